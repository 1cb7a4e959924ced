"""One save in flight, none of its errors lost, and training goes on meanwhile."""

import threading
from pathlib import Path
from typing import Any

import pytest
from recorded import disk_calls

from files.errors import UserError
from files.faults import listening
from train.config.load import load_config
from train.run import execute
from train.saving import saver
from train.saving.background import BackgroundWriter


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


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
    return {
        "model.path": str(model_folder),
        "data.train": str(rows / "train.jsonl"),
        "data.max_length": 48,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
        "train.max_steps": 4,
        "train.precision": "fp32",
        "train.output_dir": str(output),
        "checkpoint.steps": 2,
        "log.tensorboard": False,
        "log.progress": False,
        **changes,
    }


def train(values: dict[str, Any]) -> Path:
    return execute(load_config(overrides=values)).folder


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

    with listening(listener):
        run = train(settings(model_folder, rows_file, tmp_path / "run"))
    assert waited == [True, True]
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


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

    with listening(late):
        background = train(settings(model_folder, rows_file, tmp_path / "a"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "available_memory", lambda _: 0)
        foreground = train(settings(model_folder, rows_file, tmp_path / "b"))
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

    with listening(listener):
        train(settings(model_folder, rows_file, tmp_path / "run"))
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
    with listening(step_done):
        run = train(values)
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps == [f"step-{step:08d}" for step in (3, 6, 7)]


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
