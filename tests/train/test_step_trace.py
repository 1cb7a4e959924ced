"""`train.profile_steps`: which steps, what the trace holds, and that nothing else changes."""

import gzip
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import resume, rows_of, settings, signalled, train, trained_bits

from files.errors import UserError
from train.config.load import load_config
from train.log.records import Records
from train.plan.decide import UNKNOWN, decide
from train.plan.profiled import profiled_steps
from train.plan.steps import plan_run


def traced(run: Path) -> dict[str, list[int]]:
    """Return, for each trace, the steps that stand in it."""
    found = {}
    for path in sorted((run / "profile").glob("*")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("ph") == "X"]
        assert any("aten::" in name for name in names)
        steps = (re.fullmatch(r"step (\d+)", name) for name in names)
        found[path.name] = sorted(int(step[1]) for step in steps if step)
    return found


@pytest.mark.parametrize(
    ("asked", "total", "steps"),
    [
        (None, 9, []),
        ("3-5", 9, [3, 4, 5]),
        ("9-9", 9, [9]),
        (2, 9, [3, 4]),  # two come before
        (2, 3, [2, 3]),  # the last that there are
        (3, 3, [1, 2, 3]),
        (2, None, [3, 4]),
    ],
)
def test_the_steps_that_are_asked_for(asked: Any, total: int | None, steps: list[int]) -> None:
    assert list(profiled_steps(asked, total)) == steps


@pytest.mark.parametrize("asked", ["5-3", "0-2", "3-", "a", "3-5-7", "3,5", ""])
def test_what_names_no_steps_is_refused_before_rows_are_read(asked: str) -> None:
    config = load_config(overrides={"train.profile_steps": asked})
    with pytest.raises(UserError, match="must be a number of steps, such as 3, or the first"):
        decide(config, UNKNOWN)


def test_steps_that_the_run_has_not_are_refused() -> None:
    config = load_config(overrides={"train.max_steps": 4, "train.profile_steps": "3-5"})
    for refuse in (lambda: decide(config, UNKNOWN), lambda: plan_run(config, 100)):
        with pytest.raises(UserError, match=r"profile_steps=3-5: the run has 4 steps; name steps"):
            refuse()
    config = load_config(overrides={"train.max_steps": 4, "train.profile_steps": 5})
    with pytest.raises(UserError, match="profile_steps=5: the run has 4 steps"):
        plan_run(config, 100)


def test_the_trace_holds_those_steps_and_the_run_is_the_same(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(name: str, **changes: Any) -> Path:
        common = {"train.max_steps": 4, "lora.lora_dropout": 0.1, "data.valid": None}
        train(settings(model_folder, rows_file, tmp_path / name, **common, **changes))
        return tmp_path / name

    plain, profiled = run("plain"), run("profiled", **{"train.profile_steps": "2-3"})
    assert not (plain / "profile").exists()
    assert traced(profiled) == {"steps-2-3.json.gz": [2, 3]}
    assert f"profiled: {profiled / 'profile' / 'steps-2-3.json.gz'}" in capsys.readouterr().out
    assert "Profiled: `profile/steps-2-3.json.gz`" in (profiled / "report.md").read_text()
    assert rows_of(plain) == rows_of(profiled)
    for folder in (plain, profiled):
        (folder / "best").mkdir()  # without a valid set there is none
    assert trained_bits(plain) == trained_bits(profiled)
    assert not list(profiled.glob(".tmp-*"))


def test_a_run_that_is_stopped_between_them_leaves_what_was_done_and_goes_on(
    model_folder: Path, rows_file: Path, tmp_path: Path, cache: Path
) -> None:
    run = tmp_path / "run"
    config = settings(model_folder, rows_file, run, **{"train.max_steps": 4, "data.valid": None})
    train(config | {"train.profile_steps": "2-4"}, signalled(3, signal.SIGTERM))
    assert traced(run) == {"steps-2-3.json.gz": [2, 3]}
    resume(run)
    assert traced(run) == {"steps-2-3.json.gz": [2, 3], "steps-4-4.json.gz": [4]}


def test_a_resume_may_ask_for_other_steps(
    model_folder: Path, rows_file: Path, tmp_path: Path, cache: Path
) -> None:
    run = tmp_path / "run"
    config = settings(model_folder, rows_file, run, **{"train.max_steps": 3, "data.valid": None})
    train(config, signalled(1, signal.SIGTERM))
    resume(run, **{"train.profile_steps": "3-3"})
    assert traced(run) == {"steps-3-3.json.gz": [3]}


@pytest.mark.parametrize("first", [True, False])
def test_of_many_ranks_the_first_alone_is_traced(first: bool, tmp_path: Path) -> None:
    run: Any = SimpleNamespace(
        config=load_config(overrides={"log.progress": False, "log.tensorboard": False}),
        state=SimpleNamespace(step=0),
        precision=SimpleNamespace(device=torch.device("cpu")),
        world=SimpleNamespace(first=first),
        plan=SimpleNamespace(total_steps=1, profile_steps=range(1, 2)),
        folder=tmp_path,
    )
    records = Records(run, busy=lambda: False)
    with records.trace.around(1):
        torch.ones(2).sum()
    records.close()
    assert (traced(tmp_path) == {"steps-1-1.json.gz": [1]}) == first
    assert (tmp_path / "profile").exists() == first
