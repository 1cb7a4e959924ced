"""What every benchmark is made of: fresh processes, turns, the clock of a card, records, tables.

A measurement is a process of its own, so that its peak of memory is its own too; the sides take
turns, and what they compute is compared before a figure is written. Records are appended to
benchmarks/results, one object a line, with device, versions, commit, time and command.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from train.saving.folder import device_name, package_versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "triton", "numpy")
REPLAYS = 20  # of a call whose time on a card is taken
FLUSHED = 256 * 2**20  # bytes: more than any L2 cache

Key = TypeVar("Key")
Result = TypeVar("Result")


class Fault(SystemExit):
    """What a side did wrong, in words: its result where it is caught, else the benchmark's end."""


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser whose description is the first line of a module's docstring."""
    first = (documentation or "").splitlines()[0]
    return argparse.ArgumentParser(description=first, allow_abbrev=False)


# --- processes -----------------------------------------------------------------------------------


def in_process(work: str, folder: Path, limit: float = 3600, **task: Any) -> dict[str, Any]:
    """Call `MODULE:FUNCTION` of this package in a fresh process and return what it returns.

    The function gets `folder` and the task's values; its dictionary comes back with `peak_bytes`
    and `threads` of the process.

    Raises:
        Fault: It failed; its output is the message.
        subprocess.TimeoutExpired: It takes more than `limit` seconds.
    """
    serve = "from benchmarks.harness import serve; serve()"
    done = subprocess.run(
        [sys.executable, "-c", serve, work, str(folder), json.dumps(task)],
        cwd=ROOT,
        env=os.environ | {"LATHE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )
    if done.returncode != 0:
        raise Fault(f"{work} {task}: {done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def serve() -> None:
    """Be the process that `in_process` starts: print what its function measured as last line."""
    work, folder, task = sys.argv[1:]
    module, _, function = work.partition(":")
    found = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    figures = found(Path(folder), **json.loads(task))
    print(json.dumps({**figures, "peak_bytes": peak_bytes(), "threads": torch.get_num_threads()}))


def peak_bytes() -> int:
    """Return the most memory that this process has had resident (Linux).

    Not `ru_maxrss`, which begins at the size of the process that started this one.
    """
    return _status("VmHWM")


def new_peak() -> int:
    """Let `peak_bytes` begin anew, and return the memory that is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes()


def resident_bytes() -> int:
    """Return the memory that this process has resident now (Linux)."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


# --- time ----------------------------------------------------------------------------------------


def in_turns(
    sides: Iterable[Key], rounds: int, measure: Callable[[Key, int], Result | None]
) -> dict[Key, list[Result]]:
    """Return what `measure(side, round)` found of each side; None is left out.

    Every other round goes backwards, so that a drift of the machine favours nobody.
    """
    found: dict[Key, list[Result]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(found)[:: 1 if number % 2 == 0 else -1]:
            if (one := measure(side, number)) is not None:
                found[side].append(one)
    return found


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def fifths(values: Sequence[float], name: str) -> dict[str, float]:
    """Return the median under a name, with the limits of the lowest and the highest fifth."""
    limits = quantiles(values, n=5)
    return {name: median(values), "p20": limits[0], "p80": limits[-1]}


def flusher() -> torch.Tensor:
    """Return what `on_device` overwrites the L2 cache with."""
    return torch.empty(FLUSHED, dtype=torch.int8, device="cuda")


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
    if graph and not _waits(call):
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


def _waits(call: Callable[[], Any]) -> bool:
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


def ceilings(flush: torch.Tensor) -> dict[str, float]:
    """Return this card's copy rate (GB/s, read and written) and bf16 product rate (TFLOP/s)."""
    source = torch.randn(2**29, device="cuda").to(torch.bfloat16)
    copy = median(on_device(source.clone, flush))
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    product = median(on_device(lambda: a @ b, flush))
    return {"copy_gb_s": 4 * 2**29 / copy / 1e6, "gemm_tflops": 2 * 8192**3 / product / 1e9}


# --- records -------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def read(name: str) -> list[dict[str, Any]]:
    """Return the records of `benchmarks/results/<name>.jsonl`, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(name: str, row: Mapping[str, Any]) -> None:
    """Append `row` with its circumstances to `benchmarks/results/<name>.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **circumstances()}) + "\n")


def circumstances() -> dict[str, Any]:
    """Return device, threads, versions, commit, time and command: no figure is read without."""
    changes = ("--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": _git("status", *changes) != "",  # where nobody can say, too
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def spread(middle: float, least_and_most: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Return a median with the least and the most that was measured."""
    low, high = least_and_most
    return f"{middle:,.{digits}f}{unit} ({low:,.{digits}f} to {high:,.{digits}f})"


def table(columns: str, rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table; a column whose name begins with `>` holds numbers."""
    names = columns.split("|")
    head = [f" {name.removeprefix('>')} " if name != ">" else " " for name in names]
    rules = ["---:" if name.startswith(">") else "---" for name in names]
    lines = [f"|{'|'.join(cells)}|" for cells in (head, rules)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]
