"""The kernels beside everything else that computes the same, on one GPU.

    python -m benchmarks.kernels [--parts linear loss rotary …] [--minutes 9]
    python -m benchmarks.kernels --check
    python -m benchmarks.kernels --dry-run
    python -m benchmarks.kernels --decide

Each case (`benchmarks.kernel_cases`) is one operation at one shape of the seeds' models in bf16. A
side is first compared with fp64, its outputs and all gradients; one that differs is recorded as
wrong, and the exit code is 1 where it is one of ours. Then the sides take turns, each captured as a
CUDA graph, so that the host's part in a launch does not count, with the L2 cache overwritten before
each replay. Every line is recorded as soon as it is measured. After `--minutes` nothing new is
begun; `--minutes 0` measures the card's ceilings alone.

`--check` is what a run does before it trusts the kernels (`train.kernel_check`), for all of them,
in bf16 and fp16. `--dry-run` compares every case at small shapes, on a CPU under Triton's
interpreter, and times nothing. `--decide` reads the records and writes into
kernels/triton/launch.json which operations `train.kernels=auto` takes from Triton on the class of
device that was measured: those that no case shows to be slower than the reference.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from benchmarks import harness
from benchmarks.case import LATHE, TRITON, Case, Results, Room
from benchmarks.harness import told
from benchmarks.kernel_cases import FIELDS, PARTS, cases
from kernels.dispatch import operations
from kernels.triton import launch as triton_launch
from train import kernel_check

# ‖ours - exact‖ / ‖exact‖ of a chain of up to five roundings to a type, sums being in fp32.
TOLERANCE = {torch.bfloat16: 5 * 2**-9, torch.float16: 5 * 2**-12, torch.float32: 1e-5}
ROUNDS = 2
GAIN = 0.97  # of the reference's time: what differs less may be noise


def difference(found: Results, exact: Results) -> tuple[float, str]:
    """Return the largest relative difference of what both have, and the name of what has it.

    Infinite where a number is not finite, or nothing can be compared.
    """
    worst, where = 0.0, ""
    shared = found.keys() & exact.keys()
    for name in sorted(shared):
        ours, theirs = found[name].double(), exact[name].double()
        apart = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
        if not apart <= worst:
            worst, where = apart if apart == apart else float("inf"), name
    return (worst, where) if shared else (float("inf"), "nothing in common")


def check(case: Case, name: str, room: Room, exact: dict[float, Results]) -> str | None:
    """Return what is wrong with one side of a case, or None.

    `exact` are the exact results by probability of dropout, filled here.
    """
    side = case.sides[name](case.p)
    p = 0.0 if side.checked_without_dropout else case.p
    if p != case.p:
        side = case.sides[name](p)
    if p not in exact:
        exact[p] = case.exact(p)
    found = side.results()
    if not side.compared:
        return None
    apart, where = difference(found, exact[p])
    bound = TOLERANCE[room.dtype]
    if case.part in ("adamw", "adafactor"):
        bound = TOLERANCE[torch.float32]
    return None if apart <= bound else f"{where} is {apart:.1e} from fp64, {bound:.1e} is allowed"


def attempt(case: Case, name: str, room: Room, exact: dict[float, Results]) -> str | None:
    """Return what `check` says, or in one line why it could not be made."""
    try:
        return check(case, name, room, exact)
    except Exception as error:  # whatever another library raises is its result here, or its absence
        return told(error)


def measure(case: Case, names: Sequence[str], flush: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Return times and peak memory of the sides, or what went wrong, by name.

    Each side is built anew in each of `ROUNDS` rounds.
    """
    times: dict[tuple[str, str], list[float]] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}

    def once(name: str, _: int) -> None:
        gc.collect()  # what the side before has left
        torch.cuda.empty_cache()
        try:
            side = case.sides[name](case.p)
            for label in case.passes:
                call = side.full if label == "full" and side.full else side.forward
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                call()
                found[name][f"{label}_peak"] = torch.cuda.max_memory_allocated() - before
                taken = harness.on_device(call, flush, case.graph)
                times.setdefault((name, label), []).extend(taken)
        except Exception as error:  # no memory, or what a library raises: that side's result
            found[name]["error"] = told(error)

    harness.in_turns(names, ROUNDS, once)
    for (name, label), all_of in times.items():
        found[name][label] = harness.fifths(all_of, "ms")
    return found


def compare(case: Case, room: Room, rates: dict[str, float], flush: torch.Tensor | None) -> bool:
    """Check, time, print and record the sides of one case; return whether ours were right.

    Without `flush` nothing is timed, and all must be right.
    """
    print(f"\n{case.part}: {case.text}", flush=True)
    exact: dict[float, Results] = {}
    right, wrong = [], {}
    for name in case.sides:
        fault = attempt(case, name, room, exact)
        if fault is None:
            right.append(name)
        else:
            wrong[name] = fault
        if flush is None or fault is not None:
            what = "agrees with fp64" if fault is None else f"not timed: {fault}"
            print(f"  {name:<32} {what}", flush=True)
        gc.collect()
    if flush is None:
        return not wrong
    exact.clear()
    torch.cuda.empty_cache()
    figures = measure(case, right, flush)
    floor = figures.get(case.floor, {})
    for name in case.sides:
        row: dict[str, Any] = {"part": case.part, "case": case.text, "side": name}
        row |= {"p": case.p, "capability": triton_launch.capability(room.device), **rates}
        if name in wrong:
            harness.append("kernels", {**row, "error": wrong[name]})
            continue
        row |= figures[name]
        for number, label in enumerate(("forward", "full")):
            taken = figures[name].get(label)
            if taken is None:
                continue
            taken["gb_s"] = 1e3 * case.gigabytes[number] / taken["ms"]
            taken["tflops"] = 1e3 * case.teraflops[number] / taken["ms"]
            if label in floor:
                taken["to_floor"] = taken["ms"] / floor[label]["ms"]
        print(f"  {name:<32} {'  '.join(filter(None, _cells(row)))}", flush=True)
        harness.append("kernels", row)
    failed = {name for name, row in figures.items() if "error" in row} | wrong.keys()
    return not failed & {TRITON, LATHE}


def run(parts: Sequence[str], minutes: float, dry: bool = False) -> int:
    """Compare and time the cases of `parts`; return the exit code."""
    if not dry and not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device; --dry-run checks every case without one")
        return 2
    deadline = time.monotonic() + 60 * minutes
    room, rates, flush = Room(torch.device("cpu"), torch.float32, dry=True), {}, None
    if not dry:
        room = Room(torch.device("cuda"), torch.bfloat16, dry=False)
        flush = harness.flusher()
        rates = harness.ceilings(flush)
        products = f"bf16 {rates['gemm_tflops']:,.0f} TFLOP/s"
        name = torch.cuda.get_device_name()
        print(f"{name}: copy {rates['copy_gb_s']:,.0f} GB/s, {products}", flush=True)
        harness.append("ceilings", rates)
    faults = left = 0
    for part, make in cases():
        if part not in parts:
            continue
        if not dry and time.monotonic() > deadline:
            left += 1
            continue
        faults += not compare(make(room), room, rates, flush)
    if left:
        print(f"\n{left} cases left out after {minutes:g} minutes; --parts measures those missing")
    return 1 if faults else 0


def gains(records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return by capability the operations that Triton is faster at in every case of theirs.

    Every case of `cases` must have been measured, by both sides; the newest record counts. A wrong
    or missing side is no gain. Where several cards of one capability were measured, it gains on
    all of them.
    """
    places = ("capability", "device", "part", "case")
    newest = {(*(row[name] for name in places), row["side"]): row for row in records}
    wanted = Counter(FIELDS[part] for part, _ in cases() if part in FIELDS)
    verdicts: dict[tuple[str, str], dict[tuple[str, ...], list[bool]]] = {}
    for (capability, device, part, case, side), row in newest.items():
        if side != TRITON or part not in FIELDS:
            continue
        reference = newest.get((capability, device, part, case, LATHE), {"error": "not measured"})
        label = "full" if "full" in reference else "forward"
        faster = "error" not in row | reference and label in row
        faster = faster and row[label]["ms"] <= GAIN * reference[label]["ms"]
        verdicts.setdefault((capability, device), {}).setdefault(FIELDS[part], []).append(faster)
    found: dict[str, set[str]] = {}
    for (capability, _), of_card in verdicts.items():
        gaining = {
            name
            for fields, faster in of_card.items()
            if all(faster) and len(faster) >= wanted[fields]
            for name in fields
        }
        found[capability] = found.get(capability, gaining) & gaining
    return {capability: sorted(names) for capability, names in found.items()}


def vouch() -> int:
    """Print of each operation that Triton has whether it agrees with the reference here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, faults = operations("triton", device), 0
    # Under the interpreter bf16 products are wrong.
    for dtype in (torch.bfloat16, torch.float16)[device.type == "cpu" :]:
        for name in kernel_check.replaced(backend, device):
            fault = kernel_check.disagreement(backend, name, device, dtype)
            faults += fault is not None
            print(f"{dtype!s:<14} {name:<22} {fault or 'agrees'}", flush=True)
    return 1 if faults else 0


def decide() -> int:
    """Write what the records show into the file that `train.kernels=auto` reads."""
    records = harness.read("kernels")
    if not records:
        print("there is no record of a kernel yet: make bench-kernels on a GPU makes them")
        return 2
    for capability, fields in gains(records).items():
        triton_launch.entries().setdefault(capability, {})["gains"] = fields
        print(f"{capability}: {', '.join(fields) or 'nothing'}")
    triton_launch.write_entries()
    return 0


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each side of each case as lines of a table for each card."""
    if not records:
        return ["Nothing has been measured yet: `make bench-kernels`, on a machine with a GPU."]
    lines: list[str] = []
    card = itemgetter("capability", "device")
    for (capability, device), found in itertools.groupby(sorted(records, key=card), card):
        of_card = list(found)
        copy, product = of_card[0]["copy_gb_s"], of_card[0]["gemm_tflops"]
        lines += [
            "",
            f"{device} ({capability}): a copy {copy:,.0f} GB/s, "
            f"bf16 products {product:,.0f} TFLOP/s. Shares below are of these.",
            "",
            *harness.table(
                "operation|shape|side|>forward, ms|>both, ms|>to floor|>GB/s|>TFLOP/s",
                [[row["part"], row["case"], row["side"], *_cells(row)] for row in of_card],
            ),
        ]
    return lines[1:]


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Return forward ms, both passes' ms, ratio to the floor, GB/s and TFLOP/s of a side."""
    forward, full = row.get("forward"), row.get("full")
    last = full or forward
    if "error" in row or last is None:
        return [row.get("error", "not timed"), "", "", "", ""]
    share = last["tflops"] / row["gemm_tflops"]
    return [
        *(f"{taken['ms']:.4f}" if taken else "" for taken in (forward, full)),
        f"{last['to_floor']:.3f}" if "to_floor" in last else "",
        f"{last['gb_s']:,.0f} ({last['gb_s'] / row['copy_gb_s']:.0%})",
        f"{last['tflops']:,.1f} ({share:.0%})" if last["tflops"] else "",
    ]


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--decide", action="store_true")
    options = parser.parse_args()
    if options.check:
        sys.exit(vouch())
    sys.exit(decide() if options.decide else run(options.parts, options.minutes, options.dry_run))


if __name__ == "__main__":
    main()
