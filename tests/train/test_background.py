"""One save in flight, none of its errors lost, and training goes on meanwhile."""

import threading
from pathlib import Path
from typing import Any

import pytest
import runs
from recorded import disk_calls
from runs import checkpoints_of, train

from files.errors import UserError
from train.saving import saver
from train.saving.saver import BackgroundWriter


def test_a_job_runs_while_the_caller_goes_on() -> None:
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (gate.wait(10), done.append("first")))
    writer.check()
    assert done == []
    gate.set()
    writer.submit(lambda: done.append("second"))
    assert done[0] == "first"  # submit waited for it
    writer.wait()
    assert done == ["first", "second"]
    writer.close()


@pytest.mark.parametrize("asked_by", ["wait", "submit", "check"])
def test_what_a_job_ended_with_is_raised_once(asked_by: str) -> None:
    writer, ended = BackgroundWriter(), threading.Event()

    def job() -> None:
        try:
            raise UserError("the disk is full")
        finally:
            ended.set()

    writer.submit(job)
    ended.wait(10)
    if asked_by == "check":
        # The job has raised, but its thread may not have said so yet.
        while not writer._job.done():  # type: ignore[union-attr]
            pass
    with pytest.raises(UserError, match="the disk is full"):
        writer.submit(lambda: None) if asked_by == "submit" else getattr(writer, asked_by)()
    writer.wait()
    writer.close()


def settings(model_folder: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of 4 steps of 2 examples that saves every other step and evaluates nothing."""
    values = {
        "data.valid": None,
        "train.gradient_accumulation_steps": 1,
        "train.max_steps": 4,
        "checkpoint.steps": 2,
        **changes,
    }
    return runs.settings(model_folder, rows, output, **values)


def test_steps_are_done_while_a_checkpoint_is_written(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The writer of step 2 waits for the gradient of step 3, so nothing must wait for it."""
    gradients, waited = 0, []
    third = threading.Event()

    def listener(name: str) -> None:
        nonlocal gradients
        if name == "step.gradient":
            gradients += 1
            if gradients == 3:
                third.set()
        if name == "save.begun":
            waited.append(third.wait(30))

    run = train(settings(model_folder, rows_file, tmp_path / "run"), listener).folder
    assert waited == [True, True]
    assert len(checkpoints_of(run)) == 2


def test_a_save_holds_the_weights_of_its_step_though_training_goes_on(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A run whose writer is held back for a step saves the same bytes as one that waits for it."""
    third, gradients = threading.Event(), 0

    def late(name: str) -> None:
        nonlocal gradients
        gradients += name == "step.updated"
        if gradients == 3:
            third.set()
        if name == "save.begun" and not third.is_set():
            third.wait(30)

    background = train(settings(model_folder, rows_file, tmp_path / "a"), late).folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "available_memory", lambda _: 0)
        foreground = train(settings(model_folder, rows_file, tmp_path / "b")).folder
    for step in ("step-00000002", "step-00000004"):
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            one, other = (run / "checkpoints" / step / file for run in (background, foreground))
            assert one.read_bytes() == other.read_bytes(), f"{step}/{file}"


def test_without_room_for_a_copy_training_waits_for_the_writing(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "available_memory", lambda _: 0)
    threads = set()

    def listener(name: str) -> None:
        if name == "save.begun":
            threads.add(threading.current_thread())

    train(settings(model_folder, rows_file, tmp_path / "run"), listener)
    assert threads == {threading.main_thread()}


def test_minutes_between_saves_are_minutes(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by 25 s with each step: a save is due after the third and the sixth."""
    now = 0.0

    def step_done(name: str) -> None:
        nonlocal now
        now += 25.0 * (name == "step.recorded")

    monkeypatch.setattr(saver.time, "monotonic", lambda: now)
    values = settings(model_folder, rows_file, tmp_path / "run", **{"checkpoint.steps": "none"})
    values |= {"checkpoint.minutes": 1, "checkpoint.total_limit": "none", "train.max_steps": 7}
    run = train(values, step_done).folder
    assert [path.name for path in checkpoints_of(run)] == [f"step-{step:08d}" for step in (3, 6, 7)]


def test_what_a_save_speaks_of_is_on_the_disk_before_it(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The best weights and the rows of metrics before the checkpoint, the status after it."""
    run = tmp_path / "run"
    values = settings(model_folder, rows_file, run, **{"eval.steps": 2})
    values |= {"train.max_steps": 2, "data.valid": str(rows_file / "valid.jsonl")}
    with disk_calls(run) as calls:
        train(values)
    saved = calls.index("rename checkpoints/.tmp-step-00000002 checkpoints/step-00000002")
    metrics = calls.index("fsync metrics.jsonl")
    best = calls.index("rename .tmp-best best")
    status = [at for at, call in enumerate(calls) if call == "rename .tmp-* status.json"]
    assert best < metrics < saved
    assert sum(saved < at < calls.index("rename .tmp-final final") for at in status) == 1
