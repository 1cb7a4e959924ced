"""The command itself, killed by the clock: it ends in the bits of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from runs import arguments
from trials import MAX_SECONDS, begin_or_resume, outcome, settings

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


def killed_by_the_clock(kills: int, arguments: list[str], place: Path) -> list[int]:
    """Kill a run that often, each time some moments after it has begun to train."""
    draw, codes, command = Random(3), [], arguments
    for number in range(kills):
        log = place / f"log-{number}"
        process = began(*command, log=log)
        goes_on(process, log)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        codes.append(process.wait())
        command = ["--resume", str(place / "run")]
    return [*codes, began(*command, log=place / "log").wait()]


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_command_killed_by_the_clock_ends_in_the_same_bits(
    kills: int, model_folder: Path, rows_file: Path, tmp_path: Path, record_property: Record
) -> None:
    """Checkpoints are far apart, so that steps are done again."""
    changes = {"train.max_steps": 50, "checkpoint.steps": 10, "eval.steps": 20, "log.steps": 1}
    values = settings(model_folder, rows_file, **changes)
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    killed.mkdir()
    given = arguments({**values, "train.output_dir": killed / "run"})
    assert killed_by_the_clock(kills, given, killed) == [-signal.SIGKILL] * kills + [0]
    assert begin_or_resume({**values, "train.output_dir": str(alone / "run")}) == 0
    record_property("kills of the command by the clock", kills)
    assert outcome(killed / "run") == outcome(alone / "run")
