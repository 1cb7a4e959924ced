"""Starts that meet, and starts that break off: neither keeps the next one from beginning."""

import datetime
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments as as_arguments
from runs import settings

from files import folders
from files.atomic import RunLock
from files.errors import UserError
from files.folders import make_free_folder
from train.config.load import load_config
from train.log import records
from train.run import main, run


class StandingClock(datetime.datetime):
    """The same second for ever."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "StandingClock":
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)


@pytest.fixture(autouse=True)
def _own_places(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.datetime, "datetime", StandingClock)


@pytest.fixture
def arguments(model_folder: Path, rows_file: Path) -> list[str]:
    values = settings(model_folder, rows_file, Path(), **{"train.max_steps": 1})
    del values["train.output_dir"]
    return as_arguments(values)


@pytest.mark.usefixtures("one_second")
def test_runs_of_the_same_second_take_the_next_free_name(arguments: list[str]) -> None:
    assert [main(arguments) for _ in range(3)] == [0, 0, 0]
    stamp = "run-20260102-030405"
    assert sorted(os.listdir("runs")) == [stamp, f"{stamp}-2", f"{stamp}-3"]
    for name in os.listdir("runs"):
        assert (Path("runs") / name / "report.md").is_file()


@pytest.mark.usefixtures("one_second")
def test_no_two_of_many_starts_at_once_get_the_same_folder(tmp_path: Path) -> None:
    found: list[Path] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        found.extend(make_free_folder(tmp_path / "new" / "runs", "demo") for _ in range(20))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 160


@pytest.mark.usefixtures("one_second")
def test_a_file_of_that_name_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "demo-20260102-030405").touch()
    assert make_free_folder(tmp_path, "demo").name == "demo-20260102-030405-2"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"^runs/run-.*cannot be made \(.*train\.output_dir$"):
        run(load_config(overrides=dict(argument.split("=") for argument in arguments)))


@pytest.mark.parametrize(
    "left",
    [
        [],
        ["run.lock", ".tmp-0123"],
        ["run.lock", "run.lock.json", "config.toml"],
        ["run.lock", "config.toml", "plan.json", "environment.json", "metrics.jsonl"],
        ["run.lock", "config.toml", "checkpoints/", "tensorboard/"],
    ],
    ids=str,
)
def test_what_a_killed_start_leaves_keeps_nobody_out(
    left: list[str], arguments: list[str], tmp_path: Path
) -> None:
    """Killed at any moment before the run had a status, and so before its first step."""
    output = tmp_path / "run"
    output.mkdir()
    for name in left:
        (output / name).mkdir() if name.endswith("/") else (output / name).write_text("")
    assert main([*arguments, f"output_dir={output}"]) == 0
    assert (output / "report.md").is_file() and not list(output.glob(".tmp-*"))


@pytest.mark.parametrize(
    "there",
    [["config.toml"], ["run.lock", "status.json"], ["run.lock", "metrics.jsonl"], ["notes.txt"]],
)
def test_what_else_is_there_is_never_overwritten(
    there: list[str],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that did a step, or a user's own file, though it be called config.toml."""
    output = tmp_path / "run"
    output.mkdir()
    for name in there:
        (output / name).write_text("mine")
    assert main([*arguments, f"output_dir={output}"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {name: (output / name).read_text() for name in os.listdir(output)} == dict.fromkeys(
        there, "mine"
    )


def test_bad_input_ends_a_start_and_frees_its_folder(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    wrong = [*arguments, f"output_dir={output}", "lora.target_modules=q_porj"]
    assert main(wrong) == 2
    assert not output.exists()
    assert main([*arguments, f"output_dir={output}"]) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError(), OSError(28, "x")])
def test_whatever_ends_a_start_frees_its_folder(
    error: BaseException,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, no memory for the weights, a full disk: late, when all its files are there."""
    output = tmp_path / "run"

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(records, "Console", fail)
        with pytest.raises(type(error)):
            run(load_config(overrides=overrides(arguments, output)))
    assert not output.exists()
    run(load_config(overrides=overrides(arguments, output)))


def overrides(arguments: list[str], output: Path) -> dict[str, Any]:
    return {**dict(argument.split("=") for argument in arguments), "output_dir": str(output)}


def test_a_folder_taken_since_it_was_chosen_is_not_overwritten(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts into one folder: the later one sees what the earlier one made, and leaves it."""
    output = tmp_path / "run"
    enter = RunLock.__enter__

    def another_ran(lock: RunLock) -> RunLock:
        (output / "status.json").write_text("another's")
        return enter(lock)

    monkeypatch.setattr(RunLock, "__enter__", another_ran)
    with pytest.raises(UserError, match="never overwritten"):
        run(load_config(overrides=overrides(arguments, output)))
    assert (output / "status.json").read_text() == "another's"
