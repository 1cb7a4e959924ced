"""SIGKILL anywhere: taken up again, a run ends in the bits of one that nobody touched."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from runs import signalled
from trials import (
    Point,
    Reference,
    attempt,
    killed_after,
    killed_at,
    reference,
    settings,
    side_by_side,
)

from files.faults import FAULT_POINTS

SLOW = pytest.mark.slow
FEW = 8
Record = Callable[[str, object], None]
RUNS: dict[str, dict[str, Any]] = {
    "lora, adamw, fp32, tensorboard": {"log.tensorboard": True},
    "full, adafactor, fp16": {
        "train.method": "full",
        "optimizer.name": "adafactor",
        "train.precision": "fp16",
    },
}


@pytest.fixture(scope="module", params=RUNS)
def untouched(
    request: pytest.FixtureRequest,
    one_layer: Path,
    few_rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    values = settings(one_layer, few_rows, **RUNS[request.param])
    return reference(values, tmp_path_factory.mktemp("untouched"))


def of_every_name(run: Reference, number: int) -> list[Point]:
    """Return `number` points evenly spread over a run, and the last one of each name.

    Where they are to be few, every other name is left to the other of the two runs.
    """
    points = run.points
    even = {points[index * len(points) // number] for index in range(number)}
    last = sorted(dict(points).items())
    if number == FEW:
        last = last["train.method" in run.values :: 2]
    return sorted(even.union(last))


def killed_once(case: tuple[Reference, Path, Point]) -> str:
    """Kill a run at one point, take it up again, and return what is wrong with its end."""
    untouched, place, (name, occurrence) = case
    folder = place / f"{name}-{occurrence}"
    values = untouched.at(folder)
    codes = [attempt(values, killed_at(name, occurrence)), attempt(values)]
    problem = untouched.differences(folder)
    if codes != [-signal.SIGKILL, 0] or problem:
        return f"{folder}: exit codes {codes}; {problem}"
    shutil.rmtree(folder)
    return ""


def killed_repeatedly(case: tuple[Reference, Path, int]) -> tuple[int, str]:
    """Kill a run at random points until it ends; return how often, and what is wrong with it."""
    untouched, place, seed = case
    folder, draw, kills = place / f"seed-{seed}", Random(seed), 0
    values, most = untouched.at(folder), 3 * len(untouched.points) // 2
    while (code := attempt(values, killed_after(draw.randint(1, most)))) != 0:
        if code != -signal.SIGKILL:
            return kills, f"{folder}: exit code {code}"
        kills += 1
    problem = untouched.differences(folder)
    if problem:
        return kills, f"{folder}: after {kills} kills: {problem}"
    shutil.rmtree(folder)
    return kills, ""


def test_a_run_passes_every_point(untouched: Reference) -> None:
    assert {name for name, _ in untouched.points} == FAULT_POINTS


@pytest.mark.parametrize(
    "number",
    [FEW, pytest.param(40, marks=SLOW), pytest.param(None, marks=SLOW)],
    ids=["few", "some", "every"],
)
def test_a_run_killed_at_a_point_loses_nothing(
    untouched: Reference, number: int | None, tmp_path: Path, record_property: Record
) -> None:
    points = untouched.points if number is None else of_every_name(untouched, number)
    said = side_by_side(killed_once, [(untouched, tmp_path, point) for point in points])
    record_property("kill points", len(points))
    record_property("kill points, bit-equal", said.count(""))
    assert [problem for problem in said if problem] == []


@pytest.mark.parametrize("runs", [6, pytest.param(200, marks=SLOW)])
def test_a_run_killed_again_and_again_loses_nothing(
    untouched: Reference, runs: int, tmp_path: Path, record_property: Record
) -> None:
    ends = side_by_side(killed_repeatedly, [(untouched, tmp_path, seed) for seed in range(runs)])
    record_property("runs killed at random points", runs)
    record_property("kills in them", sum(kills for kills, _ in ends))
    record_property("such runs, bit-equal", sum(not problem for _, problem in ends))
    assert [problem for _, problem in ends if problem] == []
    assert sum(kills for kills, _ in ends) >= runs


def test_a_run_sees_every_example_once_an_epoch(untouched: Reference) -> None:
    """What the ledgers are compared with: 4 steps go over the 11 rows, the fifth begins anew."""
    steps = dict(untouched.ledger)
    assert sorted(example for step in (1, 2, 3, 4) for example in steps[step]) == list(range(11))


def test_a_run_killed_while_its_rows_are_cached_loses_nothing(
    untouched: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for point in ("file.created", 1), ("file.written", 2), ("file.renamed", 3):
        monkeypatch.setenv("LATHE_CACHE", str(tmp_path / point[0]))
        assert killed_once((untouched, tmp_path, point)) == ""


@pytest.mark.parametrize(
    ("numbers", "code", "saved"),
    [
        ((signal.SIGUSR1, signal.SIGTERM), 143, True),
        ((signal.SIGINT,), 130, True),
        ((signal.SIGTERM, signal.SIGINT), 130, False),
    ],
)
def test_a_run_stopped_by_a_signal_loses_nothing(
    untouched: Reference,
    numbers: tuple[signal.Signals, ...],
    code: int,
    saved: bool,
    tmp_path: Path,
) -> None:
    """The step in progress is done and saved; a second signal ends the process at once."""
    values = untouched.at(tmp_path)
    assert attempt(values, signalled(3, *numbers)) == code
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir() == saved
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == ("preempted" if saved else "running")
    assert attempt(values) == 0
    assert untouched.differences(tmp_path) == ""


def test_a_checkpoint_asked_for_by_signal_is_where_a_killed_run_goes_on(
    untouched: Reference, tmp_path: Path
) -> None:
    """Asked for at step 3, which has no checkpoint of its own; killed at the end of step 4."""
    values = untouched.at(tmp_path)
    asked, kill = signalled(3, signal.SIGUSR1), killed_at("save.begun", 3)

    def listen(name: str) -> None:
        asked(name)
        kill(name)

    assert attempt(values, listen) == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    assert max(path.name for path in checkpoints.glob("step-*")) == "step-00000003"
    assert attempt(values) == 0
    assert untouched.differences(tmp_path) == ""
