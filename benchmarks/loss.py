"""The loss without logits beside the ways that torch has: milliseconds and peak memory.

    python -m benchmarks.loss [--rows small medium …] [--rounds 2]

Forward and backward of summed cross-entropy over a linear head: `kernels.loss`, logits and
`F.cross_entropy`, and `F.linear_cross_entropy` (chunked, at its own settings) where the installed
torch has it. Loss and gradients
of all sides must agree before a figure is written. Each measurement is a process of its own, since
peaks do not come down; the sides take turns. Peak memory is what comes on top of hidden states and
head: gradients are part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from benchmarks.fixtures import ChildError, answer, child

LATHE, LOGITS, TORCH = "lathe", "logits, F.cross_entropy", "F.linear_cross_entropy, chunked"
GIB = 2**30
LARGEST_PEAK = 1.5 * GIB  # the bound on Lathe's peak in the row `must`


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, precision, whether the head is trained, share of masked rows.

    `others` says whether the sides that hold all logits run too.
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str = "float32"
    trainable: bool = False
    masked: float = 0.0
    others: bool = True

    @property
    def text(self) -> str:
        """The row's name."""
        head = "trainable" if self.trainable else "frozen"
        return (
            f"{self.tokens:,} × {self.vocabulary:,}, hidden {self.hidden}, {self.dtype}, "
            f"{head} head, {self.masked:.0%} masked"
        )

    @property
    def tolerance(self) -> float:
        """How far sums may be apart, relative to their size.

        fp32: another order of a sum. bf16: logits and gradients are rounded to 8 significant bits,
        each once a side; norms and losses are of many of them.
        """
        return 1e-5 if self.dtype == "float32" else 2**-6


CASES = {
    "small": Case(1024, 256, 4096),
    "small-masked": Case(1024, 256, 4096, masked=0.5),
    "small-trainable": Case(1024, 256, 4096, trainable=True),
    "small-bf16": Case(1024, 256, 4096, "bfloat16"),
    "medium": Case(1024, 512, 49_152),
    "medium-masked": Case(1024, 512, 49_152, masked=0.5),
    "medium-trainable": Case(1024, 512, 49_152, trainable=True),
    "medium-bf16": Case(1024, 512, 49_152, "bfloat16"),
    "medium-bf16-trainable": Case(1024, 512, 49_152, "bfloat16", trainable=True),
    "large": Case(1024, 256, 151_936),
    "large-bf16": Case(1024, 256, 151_936, "bfloat16"),
    # Logits alone would be 5 GB here, and their gradient and softmax as much again.
    "must": Case(8192, 256, 151_936, others=False),
}


def sides_of(case: Case) -> list[str]:
    """Return the sides that a row compares."""
    import torch.nn.functional as F

    sides = [LATHE]
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        sides.append(TORCH)
    if case.others:
        sides.append(LOGITS)
    return sides


def work(case: Case, side: str, repeats: int) -> None:
    """Be one side: compute loss and gradients `repeats` times and print what was measured."""
    import torch
    import torch.nn.functional as F

    from kernels.loss import linear_cross_entropy

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.hidden, dtype=dtype, requires_grad=True)
    weight = torch.empty(case.vocabulary, case.hidden, dtype=dtype).normal_(0, 0.02)
    weight.requires_grad_(case.trainable)
    targets = torch.randint(case.vocabulary, (case.tokens,))
    targets[torch.rand(case.tokens) < case.masked] = -100

    def logits_first() -> torch.Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, reduction="sum")

    def torch_fused() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)

    compute = {
        LATHE: lambda: linear_cross_entropy(hidden, weight, targets),
        LOGITS: logits_first,
        TORCH: torch_fused,
    }[side]
    before = record.resident_bytes()
    seconds = []
    loss = torch.zeros(())
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        loss = compute()
        loss.backward()
        seconds.append(time.perf_counter() - started)
    peak = record.peak_bytes() - before
    assert hidden.grad is not None
    checked = {"loss": loss.item(), "hidden's gradient": hidden.grad.float().norm().item()}
    if weight.grad is not None:
        checked["weight's gradient"] = weight.grad.float().norm().item()
    timed = seconds[1:] or seconds
    answer({"milliseconds": 1000 * median(timed), "loss_bytes": peak, "checked": checked})


def measure(case: Case, side: str) -> dict[str, Any]:
    """Run one side in a process of its own and return its figures."""
    repeats = 2 if case.tokens * case.vocabulary > 2**28 else 5
    arguments = ["--worker", json.dumps(asdict(case)), side, str(repeats)]
    try:
        return child("benchmarks.loss", arguments, Path("unused"), 600)
    except ChildError as error:
        sys.exit(str(error))


def check_agreement(case: Case, measured: dict[str, list[dict[str, Any]]]) -> None:
    """End the benchmark unless all sides computed the same loss and gradients."""
    reference = measured[LATHE][0]["checked"]
    for side, rounds in measured.items():
        for figures in rounds:
            for name, value in figures["checked"].items():
                bound = case.tolerance
                if side == TORCH and name == "loss" and case.dtype == "bfloat16":
                    bound = 2**-5  # torch adds the chunks' losses up in bf16; not the gradients
                if not abs(value / reference[name] - 1) <= bound:
                    sys.exit(f"{case.text}: {side}: {name} {value}, not {reference[name]}")


def compare(name: str, rounds: int) -> None:
    """Measure the sides of one row in turns, check, print and record them."""
    case = CASES[name]
    sides = sides_of(case)
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides[:: 1 if number % 2 == 0 else -1]:
            measured[side].append(measure(case, side))
    check_agreement(case, measured)
    print(case.text)
    loss = measured[LATHE][0]["checked"]["loss"]
    for side, figures in measured.items():
        times = [row["milliseconds"] for row in figures]
        peak = median(row["loss_bytes"] for row in figures)
        print(f"  {side:<32} {median(times):10,.1f} ms  {peak / 2**20:8,.0f} MiB", flush=True)
        record.append(
            "loss",
            {
                "row": name,
                "case": case.text,
                "side": side,
                "rounds": rounds,
                "milliseconds": median(times),
                "spread": [min(times), max(times)],
                "loss_bytes": peak,
                "loss_difference": abs(figures[0]["checked"]["loss"] / loss - 1),
                "process_threads": figures[0]["threads"],
            },
        )
    ours = median(row["loss_bytes"] for row in measured[LATHE])
    if name == "must" and ours > LARGEST_PEAK:
        sys.exit(f"{case.text}: a peak of {ours / GIB:.2f} GiB, and 1.5 GiB is the bound")


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest record of each row and side as README's lines."""
    newest = {(row["row"], row["side"]): row for row in records}
    lines = [
        "| loss and gradients | side | ms (spread) | peak memory | loss differs by |",
        "|---|---|---:|---:|---:|",
    ]
    for row in newest.values():
        low, high = row["spread"]
        lines.append(
            f"| {row['case']} | {row['side']} | {row['milliseconds']:,.1f} "
            f"({low:,.1f} to {high:,.1f}) | {row['loss_bytes'] / 2**20:,.0f} MiB "
            f"| {row['loss_difference']:.0e} |"
        )
    return lines


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case, side, repeats = options.worker
        work(Case(**json.loads(case)), side, int(repeats))
    else:
        for name in options.rows:
            compare(name, options.rounds)


if __name__ == "__main__":
    main()
