"""The loss without logits beside the ways that torch has: milliseconds and peak memory.

    python -m benchmarks.loss [--rows small medium …] [--rounds 2]

Forward and backward of summed cross-entropy over a linear head: `kernels.loss`, logits and
`F.cross_entropy`, and `F.linear_cross_entropy` (chunked, at its own settings) where the installed
torch has it. Loss and gradients of all sides must agree before a figure is written. Peak memory is
what comes on top of hidden states and head: gradients are part of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.nn.functional as F

from benchmarks import harness, linear_cases
from benchmarks.case import LATHE as REFERENCE
from benchmarks.case import Results, Room

LATHE, LOGITS, TORCH = "lathe", "logits, F.cross_entropy", "F.linear_cross_entropy, chunked"
SIDES = {LATHE: REFERENCE, LOGITS: linear_cases.LOGITS, TORCH: linear_cases.CHUNKED}
GIB = 2**30
LARGEST_PEAK = 1.5 * GIB  # the bound on Lathe's peak in the row `must`


@dataclass(frozen=True)
class Case:
    """One row of the table; `others`: whether the sides that hold all logits run too."""

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
        sizes = f"{self.tokens:,} × {self.vocabulary:,}, hidden {self.hidden}"
        return f"{sizes}, {self.dtype}, {head} head, {self.masked:.0%} masked"

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


def be(folder: Path, row: str, side: str) -> dict[str, Any]:
    """Be one side: compute loss and gradients a few times, and return what was measured."""
    import torch.fx.experimental.symbolic_shapes  # as autograd.grad will: no peak

    case = CASES[row]
    room = Room(torch.device("cpu"), getattr(torch, case.dtype), dry=False)
    sizes = (case.tokens, case.hidden, case.vocabulary, case.masked)
    of_head = linear_cases.loss(*sizes, room, trained=case.trainable)
    both_passes = of_head.sides[SIDES[side]](0.0).results
    before = harness.new_peak()
    repeats = 2 if case.tokens * case.vocabulary > 2**28 else 5
    seconds, found = zip(*(timed_norms(both_passes) for _ in range(repeats)), strict=True)
    peak = harness.peak_bytes() - before
    milliseconds = 1000 * median(seconds[1:])
    return {"milliseconds": milliseconds, "loss_bytes": peak, "checked": found[0]}


def timed_norms(both_passes: Callable[[], Results]) -> tuple[float, dict[str, float]]:
    """Return the seconds of both passes, and the norms of what they return."""
    seconds, found = harness.timed(both_passes)
    return seconds, {name: value.float().norm().item() for name, value in found.items()}


def check_agreement(case: Case, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """End the benchmark unless all sides computed the same loss and gradients."""
    reference = measured[LATHE][0]["checked"]
    for side, rounds in measured.items():
        for name, value in ((n, v) for row in rounds for n, v in row["checked"].items()):
            bound = case.tolerance
            if side == TORCH and name == "y0" and case.dtype == "bfloat16":
                bound = 2**-5  # torch adds the chunks' losses up in bf16; not the gradients
            if not abs(value / reference[name] - 1) <= bound:
                raise harness.Fault(f"{case.text}: {side}: {name} {value}, not {reference[name]}")


def compare(name: str, rounds: int) -> None:
    """Measure the sides of one row in turns, check, print and record them."""
    case = CASES[name]
    sides = [LATHE, *([TORCH] * hasattr(F, "linear_cross_entropy")), *([LOGITS] * case.others)]
    with tempfile.TemporaryDirectory() as folder:

        def measure(side: str, _: int) -> dict[str, Any]:
            return harness.in_process("loss:be", Path(folder), 600, row=name, side=side)

        measured = harness.in_turns(sides, rounds, measure)
    check_agreement(case, measured)
    print(case.text)
    loss = measured[LATHE][0]["checked"]["y0"]
    for side, figures in measured.items():
        times = [row["milliseconds"] for row in figures]
        peak = median(row["loss_bytes"] for row in figures)
        print(f"  {side:<32} {median(times):10,.1f} ms  {peak / 2**20:8,.0f} MiB", flush=True)
        row = {"row": name, "case": case.text, "side": side, "rounds": rounds}
        row |= {"milliseconds": median(times), "spread": [min(times), max(times)]}
        row |= {"loss_bytes": peak, "process_threads": figures[0]["threads"]}
        row["loss_difference"] = abs(figures[0]["checked"]["y0"] / loss - 1)
        harness.append("loss", row)
    ours = median(row["loss_bytes"] for row in measured[LATHE])
    if name == "must" and ours > LARGEST_PEAK:
        raise harness.Fault(f"{case.text}: a peak of {ours / GIB:.2f} GiB, and 1.5 is the bound")


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each row and side as README's lines."""
    rows = [
        [
            row["case"],
            row["side"],
            harness.spread(row["milliseconds"], row["spread"], 1),
            f"{row['loss_bytes'] / 2**20:,.0f} MiB",
            f"{row['loss_difference']:.0e}",
        ]
        for row in records
    ]
    columns = "loss and gradients|side|>ms (spread)|>peak memory|>loss differs by"
    return harness.table(columns, rows)


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    for name in options.rows:
        compare(name, options.rounds)


if __name__ == "__main__":
    main()
