"""Lathe beside transformers Trainer + PEFT: the same model, rows, adapter, order and optimizer.

    python -m benchmarks.versus_peft [--models tiny small …] [--rounds N] [--steps N]
    python -m benchmarks.versus_peft --pilot      once a machine: the peer's best settings

Each measurement is a process of its own, so that peak memory (of the whole process) is its own too;
the sides take turns. Real functions of ragged length, at most 512 tokens, 4 × 2 examples a step,
LoRA r = 16 on all linear layers with AdamW, no dropout, or full fine-tuning with Adafactor. Before
a figure is written its tokens and losses are compared with those of Lathe in fp32 over the same
order: 1e-3 for fp32, `Fixture.bf16_bound` for bf16. Seconds are those of the step itself on both
sides; collating and logging are not counted, which favours the Trainer.

Where the peer groups by length, the timed rows are the same as everybody's in another order, and
tokens a second are of all of them together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from benchmarks.fixtures import (
    ACCUMULATION,
    BATCH,
    FP32_BOUND,
    MAX_LENGTH,
    MODELS,
    ChildError,
    Fixture,
    LatheSide,
    answer,
    child,
    disagreement,
    largest_difference,
    run_lathe,
    speed,
    write_base,
    write_rows,
)
from benchmarks.peer import PeftSide, train_with_trainer

Side = PeftSide | LatheSide
_IN_ONE = {"train.micro_batch_tokens": "auto"}
SEEDS, BEST = "peft, as the seeds ran it", "peft, best settings"
LATHE, LATHE_FP32, LATHE_PADDED = "lathe", "lathe, fp32", "lathe, padded, fp32"
GPU_ROWS = ("E1", "E2", "E3", "E4", "E5", "E6")  # of benchmarks.gpu
CANDIDATE_SECONDS = 240  # a candidate that takes longer in the pilot is not the best


def seeds_side(fixture: Fixture) -> PeftSide:
    """Return the settings that the seeds ran with, on a CPU."""
    return PeftSide("max_length", optimizer=_optimizer(fixture, "adamw_torch"))


def candidates(fixture: Fixture) -> list[PeftSide]:
    """Return the peer's settings that may be its best."""
    optimizer = _optimizer(fixture, "adamw_torch_fused")
    precisions = ["fp32", "bf16"] if fixture.method == "full" else ["fp32", "bf16", "bf16 weights"]
    sides = [PeftSide("longest", True, precision, optimizer) for precision in precisions]
    sides += [PeftSide("flattened", False, precision, optimizer) for precision in precisions]
    for precision in (precisions[0], precisions[-1]):
        sides.append(PeftSide("longest", True, precision, optimizer, compiled=True))
    return sides


def _optimizer(fixture: Fixture, adamw: str) -> str:
    return adamw if fixture.optimizer == "adamw" else "adafactor"


def run_peft(fixture: Fixture, side: PeftSide, folder: Path, steps: int) -> dict[str, Any]:
    """Train with transformers Trainer and PEFT and return loss, seconds and tokens of each step."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401  # counted as an import

    imports = record.resident_bytes()

    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    examples = load_examples(
        str(folder / f"{side.order}.jsonl"),
        split_column=None,
        split=None,
        tokenizer=Tokenizer.load(folder),
        prompt_format=PromptFormat(text_field="text"),
        max_length=MAX_LENGTH,
        on_overflow="truncate",
        cache_root=None,
    )
    dtype = torch.bfloat16 if side.precision == "bf16 weights" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if fixture.method == "lora":
        model = PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)
    figures = train_with_trainer(
        model,
        [e.input_ids.tolist() for e in examples],
        side,
        steps=steps,
        batch=BATCH,
        accumulation=ACCUMULATION,
        max_length=MAX_LENGTH,
        folder=folder,
        use_cpu=True,
    )
    return {**figures, "imports_bytes": imports}


class Comparison:
    """One model's folder, the runs that others are compared with, and its records.

    Args:
        model: Name in `MODELS`.
        steps: Steps to time; None: the fixture's.
        folder: Where base, adapter and rows are written.
    """

    def __init__(self, model: str, steps: int | None, folder: Path):
        self.model, self.fixture, self.folder = model, MODELS[model], folder
        self.steps = self.fixture.warm_up + (steps or self.fixture.steps)
        self.parameters = write_base(self.fixture, folder)
        write_rows(folder, self.fixture.warm_up, self.steps - self.fixture.warm_up)
        self.references: dict[str, dict[str, Any]] = {}

    def measure(self, name: str, side: Side, limit: float = 3600) -> dict[str, Any]:
        """Run one side in a process of its own, check it, record it and return its figures.

        Raises:
            ChildError: It failed, or computed something else.
            subprocess.TimeoutExpired: It takes more than `limit` seconds.
        """
        if side.order not in self.references:
            fp32 = LatheSide({**_IN_ONE, "train.precision": "fp32"}, side.order == "grouped")
            self.references[side.order] = self._run(fp32, limit)
        figures = self._run(side, limit)
        reference = self.references[side.order]
        wrong = disagreement(figures, reference, self._bound(side))
        if wrong is not None:
            raise ChildError(f"{self.model}: {name} ({side.text}) computed {wrong}")
        seconds, tokens = speed(figures, self.fixture.warm_up)
        row = {
            "model": self.model,
            "parameters": self.parameters,
            "side": name,
            "settings": side.text,
            "seconds_per_step": seconds,
            "tokens_per_second": tokens,
            "real_share": sum(figures["tokens"]) / (self.steps * BATCH * ACCUMULATION * MAX_LENGTH),
            "first_step_seconds": figures["seconds"][0],
            "peak_bytes": figures["peak_bytes"],
            "imports_bytes": figures["imports_bytes"],
            "process_threads": figures["threads"],
            "loss_difference": largest_difference(figures, reference),
            "steps": self.steps,
            "warm_up": self.fixture.warm_up,
        }
        print(
            f"  {name:<26} {seconds:8.3f} s  {tokens:9,.0f} tok/s"
            f"  {row['peak_bytes'] / 2**20:7,.0f} MiB  loss within {row['loss_difference']:.1e}"
            f"  {side.text}",
            flush=True,
        )
        return row

    def _bound(self, side: Side) -> float:
        fp32 = (
            side.precision if isinstance(side, PeftSide) else side.settings.get("train.precision")
        )
        return FP32_BOUND if fp32 == "fp32" else self.fixture.bf16_bound

    def _run(self, side: Side, limit: float) -> dict[str, Any]:
        arguments = ["--worker", json.dumps(description(self.model, side, self.steps))]
        return child("benchmarks.versus_peft", [*arguments, str(self.folder)], self.folder, limit)


def description(model: str, side: Side, steps: int) -> dict[str, Any]:
    """Return a side as JSON values, for the process that runs it."""
    who = "peft" if isinstance(side, PeftSide) else "lathe"
    return {"who": who, "model": model, "steps": steps, "side": vars(side)}


def work(task: dict[str, Any], folder: Path) -> None:
    """Be one side: train, and print what was measured as the last line."""
    fixture, steps = MODELS[task["model"]], task["steps"]
    if task["who"] == "peft":
        answer(run_peft(fixture, PeftSide(**task["side"]), folder, steps))
    else:
        answer(run_lathe(fixture, LatheSide(**task["side"]), folder, steps))


def pilot(model: str, steps: int | None) -> None:
    """Run each of the peer's candidates once, check and record them, and name the fastest."""
    print(f"\n{model}: the peer's settings, each once")
    found: list[tuple[float, PeftSide]] = []
    with tempfile.TemporaryDirectory() as name:
        comparison = Comparison(model, steps, Path(name))
        for side in candidates(MODELS[model]):
            about = {"model": model, "settings": side.text, "side": vars(side)}
            try:
                row = comparison.measure("candidate", side, CANDIDATE_SECONDS)
            except subprocess.TimeoutExpired:
                reason = f"more than {CANDIDATE_SECONDS} s"
            except ChildError as error:
                reason = str(error).strip().splitlines()[-1]
            else:
                found.append((row["tokens_per_second"], side))
                record.append("versus_peft_pilot", {**row, **about})
                continue
            print(f"  candidate {side.text}: {reason}", flush=True)
            record.append("versus_peft_pilot", {**about, "failed": reason})
    if not found:
        sys.exit(f"{model}: none of the peer's candidates ran")
    print(f"  the best: {fastest(found).text}")


def fastest(found: list[tuple[float, PeftSide]]) -> PeftSide:
    """Return the side with the most tokens a second; compiled only where it gives 5 % more.

    Less is noise, and the first step of a compiled run takes most of a minute.
    """
    return max(found, key=lambda pair: pair[0] / (1.05 if pair[1].compiled else 1))[1]


def best_side(model: str) -> PeftSide:
    """Return the fastest candidate of the last pilots on this kind of machine.

    Without one it is what is best nearly everywhere: padded to the longest, grouped, bf16, fused.
    """
    here = record.circumstances()
    newest = {
        row["settings"]: row
        for row in record.read("versus_peft_pilot")
        if row["model"] == model and all(row[name] == here[name] for name in ("device", "threads"))
    }
    ran = [row for row in newest.values() if "failed" not in row]
    if not ran:
        print(f"{model}: no pilot on this machine yet, see --pilot; the peer's usual best is taken")
        padded = [side for side in candidates(MODELS[model]) if side.batching == "longest"]
        return [side for side in padded if not side.compiled][-1]
    return fastest([(row["tokens_per_second"], PeftSide(**row["side"])) for row in ran])


def compare(model: str, rounds: int | None, steps: int | None) -> None:
    """Measure all sides in turns, record every measurement, then median and spread of each side."""
    fixture = MODELS[model]
    sides: dict[str, Side] = {
        SEEDS: seeds_side(fixture),
        BEST: best_side(model),
        LATHE_PADDED: LatheSide({"train.precision": "fp32", "data.batching": "max_length"}),
        LATHE_FP32: LatheSide({**_IN_ONE, "train.precision": "fp32"}),
        LATHE: LatheSide(_IN_ONE),
    }
    print(f"\n{model}: seconds a step, real tokens/s, peak memory of the process")
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(model, steps, Path(folder))
        for number in range(rounds or fixture.rounds):
            # Every other round goes backwards, so that a drift of the machine favours nobody.
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                if name == LATHE_PADDED and number > 0:
                    continue  # like for like, once
                try:
                    row = comparison.measure(name, sides[name])
                except ChildError as error:
                    sys.exit(str(error))
                measured[name].append(row)
                record.append("versus_peft_rounds", {**row, "round": number})
    summaries = {name: summary(rows) for name, rows in measured.items()}
    for row in summaries.values():
        record.append("versus_peft", row)
    print(ratios(model, summaries))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a side's rounds, with the least and the most tokens a second."""
    speeds = [row["tokens_per_second"] for row in rows]
    names = ("seconds_per_step", "tokens_per_second", "first_step_seconds")
    middle = {name: median(row[name] for row in rows) for name in names}
    memory = {name: median(row[name] for row in rows) for name in ("peak_bytes", "imports_bytes")}
    spread = [min(speeds), max(speeds)]
    return {**rows[0], **middle, **memory, "rounds": len(rows), "spread": spread}


def ratios(model: str, sides: dict[str, dict[str, Any]]) -> str:
    """Return Lathe's speed, then its memory, over that of either peer, as a line of a table."""
    ours = sides[LATHE]
    cells = [model]
    for figure in ("tokens_per_second", "peak_bytes"):
        cells += [f"{ours[figure] / sides[name][figure]:.2f} ×" for name in (SEEDS, BEST)]
    return f"| {' | '.join(cells)} |"


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest summary of each model and side as lines of a table, and the ratios."""
    lines = [
        "| model | side | s a step | real tokens/s (spread) | first step | peak memory "
        "| of it imports | loss within | settings |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for model, sides in _newest(records).items():
        for name, row in sides.items():
            low, high = row["spread"]
            lines.append(
                f"| {model} | {name} | {row['seconds_per_step']:.3f} "
                f"| {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) "
                f"| {row['first_step_seconds']:.2f} s | {row['peak_bytes'] / 2**20:,.0f} MiB "
                f"| {row['imports_bytes'] / 2**20:,.0f} MiB | {row['loss_difference']:.0e} "
                f"| {row['settings']} |"
            )
    return [*lines, "", *ratios_table(records)]


def ratios_table(records: list[dict[str, Any]]) -> list[str]:
    """Return how Lathe compares with either peer, by model."""
    lines = [
        "| Lathe over PEFT | speed: as the seeds ran it | its best settings "
        "| memory: as the seeds ran it | its best settings |",
        "|---|---:|---:|---:|---:|",
    ]
    for model, sides in _newest(records).items():
        if {SEEDS, BEST, LATHE} <= sides.keys():
            lines.append(ratios(model, sides))
    return lines


def _newest(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the newest summary by model and side."""
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for row in records:
        if "settings" in row and row["model"] in MODELS:
            newest.setdefault(row["model"], {})[row["side"]] = row
    return newest


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="default: 3 for tiny, else 2")
    parser.add_argument("--steps", type=int, help="steps that are timed; default: by model")
    parser.add_argument("--pilot", action="store_true", help="find the peer's best settings")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", nargs="+", choices=GPU_ROWS, help="with --device cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="with --device cuda")
    parser.add_argument("--dry-run", action="store_true", help="with --device cuda: small, no GPU")
    parser.add_argument("--worker", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda":
        from benchmarks import gpu  # not above: a peer's process imports nothing of ours

        gpu.main(GPU_ROWS, options, "benchmarks.versus_peft")
        return
    if options.rows or options.dry_run:
        parser.error("--rows and --dry-run go with --device cuda")
    if options.worker:
        work(json.loads(options.worker[0]), Path(options.worker[1]))
        return
    for model in options.models:
        if options.pilot:
            pilot(model, options.steps)
        else:
            compare(model, options.rounds, options.steps)


if __name__ == "__main__":
    main()
