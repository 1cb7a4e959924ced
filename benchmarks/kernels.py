"""The kernels beside everything else that computes the same, on one GPU.

    python -m benchmarks.kernels [--parts linear loss rotary …] [--minutes 9]
    python -m benchmarks.kernels --dry-run
    python -m benchmarks.kernels --decide

Each case (`benchmarks.kernel_cases`) is one operation at one shape of the seeds' models in bf16. A
side is first compared with fp64, its outputs and all gradients; one that differs is not timed and
is recorded as wrong. Where that is one of ours, or one of ours fails, the exit code is 1. Then the
sides take turns, each captured as a CUDA graph, so that the host's part in a launch does not count,
with the L2 cache overwritten before each replay. Every line is recorded as soon as it is measured.
After `--minutes` nothing new is begun.

`--dry-run` compares every case at small shapes, on a CPU under Triton's interpreter, and times
nothing. `--decide` reads the records and writes into kernels/triton/launch.json which operations
`train.kernels=auto` takes from Triton on the class of device that was measured: those that no case
shows to be slower than the reference.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

if "--dry-run" in sys.argv:  # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import record
from benchmarks.kernel_cases import FIELDS, LATHE, PARTS, TRITON, Case, Results, Room, cases
from kernels.triton import launch as triton_launch

# ‖ours - exact‖ / ‖exact‖ of a chain of up to five roundings to a type, sums being in fp32.
TOLERANCE = {torch.bfloat16: 5 * 2**-9, torch.float16: 5 * 2**-12, torch.float32: 1e-5}
ROUNDS = 2
REPLAYS = 20
GAIN = 0.97  # of the reference's time: what differs less may be noise
FLUSHED = 256 * 2**20  # bytes: more than any L2 cache


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

    Args:
        case: The case.
        name: The side.
        room: Where it is built.
        exact: The exact results by probability of dropout, filled here.
    """
    side = case.sides[name](case.p)
    p = 0.0 if side.checked_without_dropout else case.p
    if p != case.p:
        side = case.sides[name](p)
    if p not in exact:
        exact[p] = case.exact(p)
    found = (side.full or side.forward)()
    if name == case.floor and not found.keys() & exact[p].keys():
        return None  # a floor computes less
    apart, where = difference(found, exact[p])
    bound = TOLERANCE[room.dtype]
    if case.part in ("adamw", "adafactor"):
        bound = TOLERANCE[torch.float32]
    return None if apart <= bound else f"{where} is {apart:.1e} from fp64, {bound:.1e} is allowed"


def waits(call: Callable[[], Any]) -> bool:
    """Return whether a call asks the device for a value, which a graph cannot hold."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def on_device(call: Callable[[], Any], flush: torch.Tensor, graph: bool = True) -> list[float]:
    """Return the milliseconds of each of `REPLAYS` calls, captured as a graph where it can be.

    A capture that fails leaves torch 2.11's allocator unusable, so it is not tried on a call that
    waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    kept = None
    if graph and not waits(call):
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = call()
        call = captured.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for before, after in events:
        flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    del kept
    return [before.elapsed_time(after) for before, after in events]


def ceilings(flush: torch.Tensor) -> dict[str, float]:
    """Return this card's copy rate (GB/s, read and written) and bf16 product rate (TFLOP/s)."""
    source = torch.randn(2**29, device="cuda").to(torch.bfloat16)
    copy = median(on_device(source.clone, flush))
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    product = median(on_device(lambda: a @ b, flush))
    return {"copy_gb_s": 4 * 2**29 / copy / 1e6, "gemm_tflops": 2 * 8192**3 / product / 1e9}


def measure(case: Case, names: Sequence[str], flush: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Return times and peak memory of the sides, or what went wrong, by name.

    Each side is built anew in each of `ROUNDS` rounds, every other one in reverse order: what the
    card's clock does meets all of them.
    """
    times: dict[tuple[str, str], list[float]] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number in range(ROUNDS):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            try:
                side = case.sides[name](case.p)
                for label in case.passes:
                    call = side.full if label == "full" and side.full else side.forward
                    torch.cuda.synchronize()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    call()
                    found[name][f"{label}_peak"] = torch.cuda.max_memory_allocated() - before
                    times.setdefault((name, label), []).extend(on_device(call, flush, case.graph))
            except Exception as error:  # no memory, or what a library raises: that side's result
                found[name]["error"] = told(error)
            gc.collect()
            torch.cuda.empty_cache()
    for (name, label), all_of in times.items():
        fifths = quantiles(all_of, n=5)
        found[name][label] = {"ms": median(all_of), "p20": fifths[0], "p80": fifths[-1]}
    return found


def compare(case: Case, room: Room, rates: dict[str, float], flush: torch.Tensor) -> bool:
    """Check, time, print and record the sides of one case; return whether all were right."""
    print(f"\n{case.part}: {case.text}", flush=True)
    exact: dict[float, Results] = {}
    right, wrong = [], {}
    for name in case.sides:
        fault = attempt(case, name, room, exact)
        if fault is None:
            right.append(name)
        else:
            wrong[name] = fault
            print(f"  {name:<32} not timed: {fault}", flush=True)
        gc.collect()
    exact.clear()
    torch.cuda.empty_cache()
    figures = measure(case, right, flush)
    floor = figures.get(case.floor, {})
    for name in case.sides:
        row: dict[str, Any] = {"part": case.part, "case": case.text, "side": name}
        row |= {"p": case.p, "capability": _capability(room), **rates}
        if name in wrong:
            record.append("kernels", {**row, "error": wrong[name]})
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
            print(line(name, label, taken, rates), flush=True)
        if "error" in row:
            print(f"  {name:<32} failed: {row['error']}", flush=True)
        record.append("kernels", row)
    failed = {name for name, row in figures.items() if "error" in row} | wrong.keys()
    return not failed & {TRITON, LATHE}


def attempt(case: Case, name: str, room: Room, exact: dict[float, Results]) -> str | None:
    """Return what `check` says, or in one line why it could not be made."""
    try:
        return check(case, name, room, exact)
    except ImportError as error:
        return f"not importable: {error}"
    except Exception as error:  # whatever another library raises is its result here
        return told(error)


def told(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def line(name: str, label: str, taken: dict[str, float], rates: dict[str, float]) -> str:
    """Return one line of the printed table."""
    text = (
        f"  {name:<32} {label:<8} {taken['ms']:9.4f} ms ({taken['p20']:.4f} … {taken['p80']:.4f})"
    )
    if "to_floor" in taken:
        text += f"  × {taken['to_floor']:.3f}"
    text += f"  {taken['gb_s']:7,.0f} GB/s ({taken['gb_s'] / rates['copy_gb_s']:4.0%} of a copy)"
    if taken["tflops"]:
        share = taken["tflops"] / rates["gemm_tflops"]
        text += f"  {taken['tflops']:6,.1f} TFLOP/s ({share:4.0%})"
    return text


def _capability(room: Room) -> str:
    return triton_launch.capability(room.device)


def dry_run(parts: Sequence[str]) -> int:
    """Compare every side of every case at small shapes; return the exit code."""
    room = Room(torch.device("cpu"), torch.float32, dry=True)
    faults = 0
    for part, make in cases():
        if part not in parts:
            continue
        case = make(room)
        print(f"{case.part}: {case.text}")
        exact: dict[float, Results] = {}
        for name in case.sides:
            fault = attempt(case, name, room, exact)
            faults += fault is not None
            print(f"  {name:<32} {fault or 'agrees with fp64'}", flush=True)
    return 1 if faults else 0


def run(parts: Sequence[str], minutes: float) -> int:
    """Compare and time the cases of `parts`; return the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device; --dry-run checks every case without one")
        return 2
    deadline = time.monotonic() + 60 * minutes
    room = Room(torch.device("cuda"), torch.bfloat16, dry=False)
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    rates = ceilings(flush)
    device = torch.cuda.get_device_name()
    print(
        f"{device}: copy {rates['copy_gb_s']:,.0f} GB/s, bf16 {rates['gemm_tflops']:,.0f} TFLOP/s"
    )
    faults = left = 0
    for part, make in cases():
        if part not in parts:
            continue
        if time.monotonic() > deadline:
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
    places = ("capability", "device", "part", "case", "side")
    newest = {tuple(row[name] for name in places): row for row in records}
    wanted = Counter(FIELDS[part] for part, _ in cases() if part in FIELDS)
    verdicts: dict[tuple[str, str], dict[tuple[str, ...], list[bool]]] = {}
    for (capability, device, part, case, side), row in newest.items():
        if side != TRITON or part not in FIELDS:
            continue
        reference = newest.get((capability, device, part, case, LATHE), {"error": "not measured"})
        faster = "error" not in row and "error" not in reference
        if faster:
            label = "full" if "full" in reference else "forward"
            faster = label in row and row[label]["ms"] <= GAIN * reference[label]["ms"]
        of_card = verdicts.setdefault((capability, device), {})
        of_card.setdefault(FIELDS[part], []).append(faster)
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


def decide() -> int:
    """Write what the records show into the file that `train.kernels=auto` reads."""
    records = record.read("kernels")
    if not records:
        print("there is no record of a kernel yet: make bench-kernels on a GPU makes them")
        return 2
    for capability, fields in gains(records).items():
        triton_launch.entries().setdefault(capability, {})["gains"] = fields
        print(f"{capability}: {', '.join(fields) or 'nothing'}")
    triton_launch.write_entries()
    return 0


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest record of each side of each case as lines of a table."""
    if not records:
        return ["Nothing has been measured yet: `make bench-kernels`, on a machine with a GPU."]
    lines: list[str] = []
    card = None
    for row in sorted(records, key=lambda row: (row["capability"], row["device"])):
        if (row["capability"], row["device"]) != card:
            card = row["capability"], row["device"]
            lines += [
                "",
                f"{row['device']} ({row['capability']}): a copy {row['copy_gb_s']:,.0f} GB/s, "
                f"bf16 products {row['gemm_tflops']:,.0f} TFLOP/s. Shares below are of these.",
                "",
                "| operation | shape | side | forward, ms | both, ms | to floor | GB/s | TFLOP/s |",
                "|---|---|---|---:|---:|---:|---:|---:|",
            ]
        cells = [row["part"], row["case"], row["side"]]
        if "error" in row:
            lines.append(f"| {' | '.join(cells)} | {row['error']} | | | | |")
            continue
        forward, full = row.get("forward"), row.get("full")
        last = full or forward or {}
        cells += [f"{taken['ms']:.4f}" if taken else "" for taken in (forward, full)]
        cells.append(f"{last['to_floor']:.3f}" if "to_floor" in last else "")
        cells.append(f"{last['gb_s']:,.0f} ({last['gb_s'] / row['copy_gb_s']:.0%})")
        share = last["tflops"] / row["gemm_tflops"]
        cells.append(f"{last['tflops']:,.1f} ({share:.0%})" if last["tflops"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--decide", action="store_true")
    options = parser.parse_args()
    if options.decide:
        sys.exit(decide())
    sys.exit(dry_run(options.parts) if options.dry_run else run(options.parts, options.minutes))


if __name__ == "__main__":
    main()
