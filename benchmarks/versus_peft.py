"""Lathe beside transformers Trainer + PEFT: the same model, rows, adapter, order and optimizer.

    python -m benchmarks.versus_peft [--models tiny small …] [--rounds N] [--steps N]
    python -m benchmarks.versus_peft --device cuda [--rows E1 E3 …] [--minutes 7]
    python -m benchmarks.versus_peft --device cuda --dry-run      on a CPU, small, nothing timed

On a CPU: real functions of ragged length, at most 512 tokens, 4 × 2 examples a step, LoRA r = 16 on
all linear layers with AdamW, no dropout, or full fine-tuning with Adafactor. Tokens and losses are
those of Lathe in fp32 over the same order: within 1e-3 for fp32, `bf16_bound` for bf16. Seconds are
those of the step itself; collating and logging are not counted, which favours the Trainer. Where
the peer groups by length, tokens a second are of the same rows in another order.

On a GPU (`benchmarks.gpu` has the rows): before a row is timed the gate of its model must be green.
Then its steps are compared with those of Lathe's first row of the same work: same tokens at every
step, at the five first ones a loss within `bf16_bound` and a gradient's norm within `NORM_BOUND`.
What differs is recorded as wrong, and the exit code is 1. Records are appended row by row; after
`--minutes` nothing new begins. TFLOP/s are of real tokens, whatever a side computes beyond them.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import gpu, harness
from benchmarks.fixtures import (
    EXAMPLES_IN_STEP,
    FP32_BOUND,
    MAX_LENGTH,
    MODELS,
    NORM_BOUND,
    bf16_bound,
    disagreement,
    largest_difference,
    speed,
    write_base,
    write_rows,
)
from benchmarks.gpu import TIMED, WARM_UP, Row
from benchmarks.harness import Fault
from benchmarks.peer import BEST, PeftSide

GPU_ROWS = ("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8")
PEFT_SEEDS, PEFT_BEST = "peft, as the seeds ran it", "peft, best settings"
LATHE, LATHE_FP32, LATHE_PADDED = "lathe", "lathe, fp32", "lathe, padded, fp32"
ROW_SECONDS = 150  # so that a command of 7 minutes ends within ten
IN_ONE = {"train.micro_batch_tokens": "auto"}
FP32 = {**IN_ONE, "train.precision": "fp32"}
Settings = Mapping[str, Any]  # of Lathe: what differs from its defaults


def compare(model: str, rounds: int | None, timed: int | None) -> None:
    """Measure all sides in turns, record every measurement, then median and spread of each side."""
    fixture = MODELS[model]
    steps = fixture.warm_up + (timed or fixture.steps)
    optimizer = "adafactor" if fixture.method == "full" else "adamw_torch"
    sides: dict[str, PeftSide | Settings] = {
        PEFT_SEEDS: PeftSide("max_length", optimizer=optimizer),  # their settings, on a CPU
        PEFT_BEST: BEST[model],
        LATHE_PADDED: {"train.precision": "fp32", "data.batching": "max_length"},
        LATHE_FP32: FP32,
        LATHE: IN_ONE,
    }
    print(f"\n{model}: seconds a step, real tokens/s, peak memory of the process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_base(fixture, folder)
        write_rows(folder, fixture.warm_up, steps - fixture.warm_up)

        def run(side: PeftSide | Settings, order: str = "rows") -> dict[str, Any]:
            task: dict[str, Any] = {"model": model, "steps": steps}
            if isinstance(side, PeftSide):
                return harness.in_process("peer:run_peft", folder, side=vars(side), **task)
            task |= {"settings": side, "order": order}
            return harness.in_process("product:run_lathe", folder, **task)

        references = {order: run(FP32, order) for order in ("rows", BEST[model].order)}

        def measure(name: str, number: int) -> dict[str, Any] | None:
            side = sides[name]
            if name == LATHE_PADDED and number > 0:
                return None  # like for like, once
            if isinstance(side, PeftSide):
                order, precision, text = side.order, side.precision, side.text
            else:
                order, precision = "rows", side.get("train.precision", "auto")
                text = " ".join(f"{key}={value}" for key, value in side.items())
            figures, reference = run(side), references[order]
            size = (fixture.config[name] for name in ("hidden_size", "num_hidden_layers"))
            bound = FP32_BOUND if precision == "fp32" else bf16_bound(*size)
            fault = disagreement(figures, reference, {"loss": (bound, 0.0)})
            if fault is not None:
                raise Fault(f"{model}: {name} ({text}) computed {fault}")
            seconds, tokens = speed(figures, fixture.warm_up)
            row = {
                **{"model": model, "parameters": parameters, "side": name, "settings": text},
                "seconds_per_step": seconds,
                "tokens_per_second": tokens,
                "real_share": sum(figures["tokens"]) / (steps * EXAMPLES_IN_STEP * MAX_LENGTH),
                "first_step_seconds": figures["seconds"][0],
                **{name: figures[name] for name in ("peak_bytes", "imports_bytes")},
                "process_threads": figures["threads"],
                "loss_difference": largest_difference(figures, reference),
                **{"steps": steps, "warm_up": fixture.warm_up},
            }
            memory, apart = row["peak_bytes"] / 2**20, f"{row['loss_difference']:.1e}"
            line = f"  {name:<26} {seconds:8.3f} s  {tokens:9,.0f} tok/s  {memory:7,.0f} MiB"
            print(f"{line}  loss within {apart}  {text}", flush=True)
            harness.append("versus_peft_rounds", {**row, "round": number})
            return row

        measured = harness.in_turns(sides, rounds or fixture.rounds, measure)
    summaries = [summary(rows) for rows in measured.values()]
    for row in summaries:
        harness.append("versus_peft", row)
    print("\n".join(ratios_table(summaries)))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a side's rounds, with the least and the most tokens a second."""
    speeds = [row["tokens_per_second"] for row in rows]
    names = ("seconds_per_step", "tokens_per_second", "first_step_seconds")
    middle = {
        name: median(row[name] for row in rows) for name in (*names, "peak_bytes", "imports_bytes")
    }
    return {**rows[0], **middle, "rounds": len(rows), "spread": [min(speeds), max(speeds)]}


def table(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the summary of each model and side as lines of a table, and the ratios."""
    rows = [
        [
            model,
            name,
            f"{row['seconds_per_step']:.3f}",
            harness.spread(row["tokens_per_second"], row["spread"]),
            f"{row['first_step_seconds']:.2f} s",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['imports_bytes'] / 2**20:,.0f} MiB",
            f"{row['loss_difference']:.0e}",
            row["settings"],
        ]
        for model, sides in _by_model(records).items()
        for name, row in sides.items()
    ]
    columns = "model|side|>s a step|>real tokens/s (spread)|>first step|>peak memory"
    columns += "|>of it imports|>loss within|settings"
    return [*harness.table(columns, rows), "", *ratios_table(records)]


def ratios_table(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return Lathe's speed, then its memory, over that of either peer, by model."""
    columns = "Lathe over PEFT|>speed: as the seeds ran it|>its best settings"
    columns += "|>memory: as the seeds ran it|>its best settings"
    rows = [
        [model]
        + [
            f"{sides[LATHE][figure] / sides[name][figure]:.2f} ×"
            for figure in ("tokens_per_second", "peak_bytes")
            for name in (PEFT_SEEDS, PEFT_BEST)
        ]
        for model, sides in _by_model(records).items()
        if {PEFT_SEEDS, PEFT_BEST, LATHE} <= sides.keys()
    ]
    return harness.table(columns, rows)


def _by_model(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    by_model: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in records:
        if "settings" in row and row["model"] in MODELS:
            by_model.setdefault(row["model"], {})[row["side"]] = row
    return by_model


# --- on a GPU ------------------------------------------------------------------------------------


def wrong(
    row: Row, figures: Mapping[str, Any], reference: Mapping[str, Any], dry: bool
) -> str | None:
    """Return in words how a row computed something else than the reference row of its work."""
    other_masks = isinstance(row.side, PeftSide) and row.work.dropout > 0
    config = gpu.decoder_of(row.work, dry)
    loss = FP32_BOUND if dry else bf16_bound(config.hidden_size, config.num_hidden_layers)
    bounds = {"loss": (4 * loss if other_masks else loss, 0.0)}
    if not other_masks:  # the norm scatters with them; the gate has compared gradients without
        bounds["norm"] = (0.0, FP32_BOUND if dry else NORM_BOUND)
    # Later the two drift apart as two runs of one side do: rounding decides what Adam divides by.
    first = 1 if dry and row.side.grouped else WARM_UP
    return disagreement(figures, reference, bounds, first, reordered=row.side.grouped)


def figures_of(
    row: Row, figures: Mapping[str, Any], reference: Mapping[str, Any], operations: float
) -> dict[str, Any]:
    """Return what a timed row of so many operations a step is recorded with."""
    seconds, tokens = (figures[name][WARM_UP:] for name in ("seconds", "tokens"))
    compared = slice(WARM_UP if row.side.grouped else None)  # the others are in another order
    losses = ({"loss": side["loss"][compared]} for side in (figures, reference))
    return {
        **harness.fifths(seconds, "seconds_per_step"),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tflops": operations * len(seconds) / sum(seconds) / 1e12,
        "peak_bytes": figures["peak_allocated"],
        "first_step_seconds": figures["seconds"][0],
        "start_up_seconds": figures["start_up"],
        "loss_difference": largest_difference(*losses),
        **{name: figures.get(name) for name in ("micro_batch_tokens", "attention")},
        "steps": len(seconds),
        "warm_up": WARM_UP,
    }


class OutOfTime(Exception):
    """A row was not measured for want of time: nothing is recorded of it."""


def run_on_gpu(names: Sequence[str], minutes: float, dry: bool = False) -> int:
    """Measure the rows whose names begin with one of `names`; return the exit code.

    `dry`: compare them and their gates at small shapes in this process, and record nothing.
    """
    if not dry and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device; --dry-run checks every row without one")
        return 2
    if not dry:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # else Trainer spreads over all cards
    deadline = time.monotonic() + 60 * minutes

    @functools.cache
    def ask(task: str, number: int) -> dict[str, Any]:
        """Ask a process; what went wrong is its answer's `error`."""
        if not dry and time.monotonic() > deadline:
            raise OutOfTime
        try:
            if dry:
                return gpu.be(None, task, number, dry=True)
            with tempfile.TemporaryDirectory() as folder:
                of_task = {"task": task, "number": number}
                return harness.in_process("gpu:be", Path(folder), ROW_SECONDS, **of_task)
        except subprocess.TimeoutExpired:
            return {"error": f"{task}: more than {ROW_SECONDS} s"}
        except (Exception, Fault) as error:  # whatever a library raises is the row's result
            text = (str(error).strip().splitlines() or ["no answer"])[-1]
            return {"error": text[:300].replace("|", "/")}

    rates = {} if dry else ask("rates", 0)
    if "error" in rates:
        print(f"the card's rates could not be measured: {rates['error']}")
        return 1
    every, faults, left = gpu.rows(), 0, 0
    for number, row in enumerate(every):
        if row.name.split()[0] not in names:
            continue
        try:
            found = measured(row, every, number, ask, dry)
        except OutOfTime:
            left += 1
            continue
        faults += "error" in found
        about = {"row": row.name, "work": row.work.text, "who": row.who, "side": row.side.text}
        if dry:
            cells = found.get("error", "agrees")
        else:
            about |= {name: rates[name] for name in ("copy_gb_s", "gemm_tflops", "device")}
            harness.append("gpu", {**about, **found})
            cells = "  ".join(filter(None, _cells({**about, **found})))
        print(f"{row.name:<24} {cells}  ({row.who}: {row.side.text})", flush=True)
    if left:
        print(f"{left} rows left out after {minutes:g} minutes; --rows measures those missing")
    return 1 if faults else 0


def measured(
    row: Row,
    every: Sequence[Row],
    number: int,
    ask: Callable[[str, int], dict[str, Any]],
    dry: bool = False,
) -> dict[str, Any]:
    """Return what a row is recorded with: its figures, or under `error` what is wrong."""
    model = (row.work.model, row.work.rank)
    models = [(other.work.model, other.work.rank) for other in every]
    answer = ask("gate", models.index(model))
    fault = answer.get("error") or gpu.gate_fault(answer)
    if fault is not None:
        return {"error": f"gate: {fault}"}
    figures = ask("row", number)
    if "error" in figures:
        return figures
    if row.most:
        most = figures["most_tokens"]
        return {"most_tokens": most} if most else {"error": "not one document fits"}
    first = next(
        i
        for i, other in enumerate(every)
        if other.work == row.work and isinstance(other.side, gpu.OurSide) and not other.most
    )
    reference = ask("row", first)
    if "error" in reference:
        return {"error": f"nothing to compare with: {every[first].name}: {reference['error']}"}
    fault = wrong(row, figures, reference, dry)
    if fault is not None:
        return {"error": fault}
    if dry:
        return {}
    timed = gpu.token_rows(row.work, WARM_UP + TIMED, False)[WARM_UP * gpu.EXAMPLES :]
    return figures_of(row, figures, reference, gpu.arithmetic(row.work, timed, False) / TIMED)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Return the last four cells of a row of the GPU's table."""
    if "error" in row:
        return [row["error"], "", "", ""]
    if "most_tokens" in row:
        return [f"{row['most_tokens']:,} tokens fit", "", "", ""]
    share = row["tflops"] / row["gemm_tflops"]
    cells = [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:,.0f} ({share:.0%})"]
    return [*cells, f"{row['peak_bytes'] / 2**30:.1f} GiB", f"{row['first_step_seconds']:.1f} s"]


def gpu_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the records of each card as lines of README."""
    if not records:
        return ["Nothing has been measured yet: `make bench-gpu`, on a machine with a GPU."]
    lines: list[str] = []
    card = itemgetter("device")
    for device, found in itertools.groupby(sorted(records, key=card), card):
        of_card = list(found)
        rate = of_card[0]["gemm_tflops"]
        lines += ["", f"{device}: bf16 products {rate:,.0f} TFLOP/s; shares are of it.", ""]
        lines += harness.table(
            "row|work|side|>real tokens/s|>TFLOP/s|>peak memory|>first step",
            [[r["row"], r["work"], f"{r['who']}: {r['side']}", *_cells(r)] for r in of_card],
        )
    return lines[1:]


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="default: 3 for tiny, else 2")
    parser.add_argument("--steps", type=int, help="steps that are timed; default: by model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", nargs="+", choices=GPU_ROWS, help="with --device cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="with --device cuda")
    parser.add_argument("--dry-run", action="store_true", help="with --device cuda: small, no GPU")
    options = parser.parse_args()
    if options.device == "cuda":
        sys.exit(run_on_gpu(options.rows or GPU_ROWS, options.minutes, options.dry_run))
    if options.rows or options.dry_run:
        parser.error("--rows and --dry-run go with --device cuda")
    for model in options.models:
        compare(model, options.rounds, options.steps)


if __name__ == "__main__":
    main()
