"""Fuzzing: broken and hostile files through the functions that read them, each case in a child.

A case is (target, seed). The child says which case it begins, so that a hang, a signal or an exit
is known by its case; another child goes on with the next one. A case fails where anything comes out
but success and `UserError`, where the error's message is not one line that names the file, or where
what was accepted is not what the target says it must be.

A failure is repeated by `PYTHONPATH=.:tests python tests/reliability/fuzzing.py TARGET SEED`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from targets import TARGETS

from files.errors import UserError

MAX_SECONDS = 5.0
MAX_MESSAGE = 2000
# What a case may take beyond what the process holds already.
MAX_BYTES = 4 * 2**30
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Failure:
    """A case that went wrong.

    Attributes:
        target: Name of the target.
        seed: The case's seed.
        what: The exception's type, `hang`, `signal 11`, `exit 1` or what the message breaks.
        place: File, line and function of ours where it came out; empty where no one can tell.
        text: The error itself.
    """

    target: str
    seed: int
    what: str
    place: str
    text: str

    def __str__(self) -> str:
        repeat = f"PYTHONPATH=.:tests python tests/reliability/fuzzing.py {self.target} {self.seed}"
        return f"{self.target}: {self.what} at {self.place}: {self.text[:300]}\n    {repeat}"


Case = tuple[str, int]


def cases(number: int, first_seed: int = 0) -> list[Case]:
    """Return `number` cases, spread over the targets by their shares."""
    whole = sum(target.share for target in TARGETS.values())
    counts = {name: round(number * TARGETS[name].share / whole) for name in sorted(TARGETS)}
    # What rounding left over, or took too much, is one target's.
    counts[min(counts)] += number - sum(counts.values())
    return [(name, first_seed + i) for name, count in counts.items() for i in range(count)]


def run_cases(chosen: Sequence[Case], max_seconds: float = MAX_SECONDS) -> list[Failure]:
    """Run cases one after another in child processes, and return those that failed."""
    failures: list[Failure] = []
    with tempfile.TemporaryDirectory(prefix="lathe-fuzz-") as folder:
        prepared = _prepare(Path(folder), {name for name, _ in chosen})
        good = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        done, retried = 0, -1
        while done < len(chosen):
            # A child that died in a case has left that case's file.
            for path, content in good.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            known = len(failures)
            done = _run_child(chosen, done, prepared, max_seconds, failures)
            hung = len(failures) > known and failures[-1].what.startswith("hang")
            if hung and done - 1 != retried:
                # A busy machine may stall a case: one that stalls twice hangs.
                failures.pop()
                retried = done = done - 1
    return failures


def distinct(failures: Sequence[Failure]) -> list[Failure]:
    """Return one failure for each target, kind and place."""
    return list({(f.target, f.what, f.place): f for f in reversed(failures)}.values())


def _prepare(folder: Path, names: set[str]) -> dict[str, Path]:
    """Write each target's good files, from which its cases start."""
    folders = {}
    for name in sorted(names):
        folders[name] = folder / name
        folders[name].mkdir()
        TARGETS[name].prepare(folders[name])
    return folders


def _run_child(
    chosen: Sequence[Case],
    start: int,
    prepared: dict[str, Path],
    max_seconds: float,
    failures: list[Failure],
) -> int:
    """Run cases from `start` on until all are done or one ends the child; return where to go on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as channel:
            _child(chosen[start:], prepared, channel)
        os._exit(0)
    os.close(writing)
    current, what = start, ""
    for line in _lines(reading, max_seconds):
        if line is None:
            what = f"hang of {max_seconds:g} s"
            os.kill(child, signal.SIGKILL)
            break
        if line:
            failures.append(Failure(*chosen[current], *json.loads(line)))
        current += 1
    _, status = os.waitpid(child, 0)
    os.close(reading)
    if current == len(chosen) and not what:
        return current
    code = os.waitstatus_to_exitcode(status)
    what = what or (f"signal {-code}" if code < 0 else f"exit {code}")
    failures.append(Failure(*chosen[current], what, "", ""))
    return current + 1


def _lines(descriptor: int, max_seconds: float) -> Iterator[str | None]:
    """Yield the lines of a pipe; None where the next one takes too long."""
    held = b""
    deadline = time.monotonic() + max_seconds
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            yield None
            return
        data = os.read(descriptor, 65536)
        if not data:
            return
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            yield line.decode()
            deadline = time.monotonic() + max_seconds


def _child(chosen: Sequence[Case], prepared: dict[str, Path], channel) -> None:
    """Do cases; one line each says that it is over: empty, or the failure as JSON."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    for name, seed in chosen:
        fault = run_case(name, seed, prepared[name])
        channel.write((json.dumps(fault) if fault else "") + "\n")


def run_case(name: str, seed: int, folder: Path) -> tuple[str, str, str] | None:
    """Do one case in this process; return (what, place, text) of its failure, None without one.

    Args:
        name: The target.
        seed: Of the mutation.
        folder: The target's good files.
    """
    target = TARGETS[name]
    random = Random(f"{name}/{seed}")
    relative = random.choice(target.files)
    path = folder / relative
    good = path.read_bytes()
    try:
        path.write_bytes(target.mutate(random, good))
        target.use(folder, path)
    except UserError as error:
        return _message_fault(str(error), target.named or path.name, error)
    except BaseException as error:
        return type(error).__name__, _place(error), f"{error}"[:1000]
    finally:
        path.write_bytes(good)
    return None


def _message_fault(message: str, named: str, error: BaseException) -> tuple[str, str, str] | None:
    faults = {
        "an empty message": not message.strip(),
        "a message of several lines": len(message.splitlines()) > 1,
        "a message with control characters": not message.isprintable(),
        f"a message over {MAX_MESSAGE} characters": len(message) > MAX_MESSAGE,
        f"a message without '{named}'": named not in message,
    }
    for fault, present in faults.items():
        if present:
            return fault, _place(error), message[:1000]
    return None


def _place(error: BaseException) -> str:
    """Return the last place in this repository's own code that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY) and ".venv" not in path.parts:
            return f"{path.relative_to(REPOSITORY)}:{frame.lineno} ({frame.name})"
    return ""


def _repeat(name: str, seed: int) -> None:
    """Do one case in the open, with its traceback."""
    with tempfile.TemporaryDirectory(prefix="lathe-fuzz-") as folder:
        os.environ["LATHE_CACHE"] = f"{folder}/lathe-cache"
        TARGETS[name].prepare(Path(folder))
        target, random = TARGETS[name], Random(f"{name}/{seed}")
        path = Path(folder) / random.choice(target.files)
        path.write_bytes(target.mutate(random, path.read_bytes()))
        print(f"{path.name}: {path.read_bytes()[:2000]!r}")
        try:
            target.use(Path(folder), path)
        except UserError as error:
            print(f"UserError: {str(error)!r}")


def main(argv: Sequence[str]) -> None:
    """Repeat one case, or with `--cases N [FIRST_SEED [TARGET]]` run many."""
    if argv[0] != "--cases":
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))
        _repeat(argv[0], int(argv[1]))
        return
    number, first_seed = int(argv[1]), int(argv[2]) if len(argv) > 2 else 0
    chosen = cases(number, first_seed)
    if len(argv) > 3:
        chosen = [(argv[3], first_seed + i) for i in range(number)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lathe-cache-") as cache:
        os.environ["LATHE_CACHE"] = cache
        failures = run_cases(chosen)
    for failure in distinct(failures):
        print(str(failure).encode("ascii", "backslashreplace").decode())
    print(f"{len(chosen)} cases, {len(failures)} failures, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
