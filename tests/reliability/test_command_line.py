"""The command itself, killed by the clock: it ends in the bits of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from runs import arguments
from trials import MAX_SECONDS, outcome, settings

ROOT = Path(__file__).resolve().parents[2]
Record = Callable[[str, object], None]


def began(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Begin `python -m train.run` with the arguments."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "train.run", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until a condition holds; the process must be running until then."""
    deadline = time.monotonic() + MAX_SECONDS
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "nothing comes of it"
        time.sleep(0.005)


def goes_on(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process has done two steps of its own, which it says in its log."""
    wait_until(lambda: log.read_text().count("\nstep ") >= 2, process)


def left_alone(arguments: list[str], place: Path) -> list[int]:
    return [began(*arguments, log=place / "log").wait()]


def killed_by_the_clock(arguments: list[str], place: Path) -> list[int]:
    """Kill a run three times, each time some moments after it has begun to train."""
    draw, codes, command = Random(3), [], arguments
    for number in range(3):
        log = place / f"log-{number}"
        process = began(*command, log=log)
        goes_on(process, log)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        codes.append(process.wait())
        command = ["--resume", str(place / "run")]
    return [*codes, began(*command, log=place / "log-3").wait()]


def test_the_command_killed_by_the_clock_ends_in_the_same_bits(
    model_folder: Path, rows_file: Path, tmp_path: Path, record_property: Record
) -> None:
    """Checkpoints are far apart, so that steps are done again."""
    changes = {"train.max_steps": 50, "checkpoint.steps": 10, "eval.steps": 20, "log.steps": 1}
    values = settings(model_folder, rows_file, **changes)
    places = {act: tmp_path / act.__name__ for act in (killed_by_the_clock, left_alone)}
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for act, place in places.items():
            place.mkdir()
            given = {**values, "train.output_dir": place / "run"}
            jobs.append(pool.submit(act, arguments(given), place))
    assert jobs[0].result() == [-signal.SIGKILL] * 3 + [0]
    assert jobs[1].result() == [0]
    killed, alone = (outcome(place / "run") for place in places.values())
    record_property("kills of the command by the clock", 3)
    assert killed == alone
