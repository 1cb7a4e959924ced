"""Resume is exact: stopped and taken up again, a run ends in the same bits."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import (
    OF_THE_PROCESS,
    Refused,
    checkpoints_of,
    resume,
    rows_of,
    signalled,
    train,
    trained_bits,
)

from files.atomic import RunLock, sha256_file
from files.errors import UserError
from files.faults import listening
from files.folders import replace_folder
from files.tensors import TensorFile
from lora import adapter_tensors
from train.evaluation import during
from train.precision import LossScaler
from train.run import main
from train.saving.resume import _is_finished

STEPS = 8


def settings(model_folder: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    every_step = {"lora.lora_dropout": 0.1, "eval.steps": 2, "checkpoint.steps": 1}
    values = {"train.max_steps": STEPS, **every_step, **changes}
    return runs.settings(model_folder, rows, output, **values)


def last_state(run: Path) -> dict[str, Any]:
    state = json.loads((checkpoints_of(run)[-1] / "state.json").read_text())["state"]
    return {key: value for key, value in state.items() if key not in OF_THE_PROCESS}


VARIANTS: dict[str, dict[str, Any]] = {
    "lora, adamw": {},
    "lora, length groups, bf16": {"data.group_by_length": True, "train.precision": "bf16"},
    "lora, adafactor, linear, padded": {
        "optimizer.name": "adafactor",
        "schedule.name": "linear",
        "data.batching": "longest",
    },
    "full, adamw": {"train.method": "full", "optimizer.weight_decay": 0.1},
    "full, adafactor, bf16": {
        "train.method": "full",
        "optimizer.name": "adafactor",
        "train.precision": "bf16",
    },
    "lora, fp16 with loss scaler": {"train.precision": "fp16"},
    "early stopping counting, eager": {
        "eval.early_stopping_patience": 4,
        "eval.early_stopping_threshold": 0.5,
        "eval.steps": 1,
        "model.attention": "eager",
    },
}


# Others are among the combinations of test_combinations.py and test_optimizer_combinations.py.
SLOW = ("lora, adafactor, linear, padded", "full, adamw")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in VARIANTS]
)
def test_stopped_and_resumed_equals_uninterrupted(
    name: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """22 rows in steps of 6 are 4 steps an epoch: stops fall mid-epoch and at an epoch's end."""
    changes = VARIANTS[name]
    whole = train(settings(model_folder, rows_file, tmp_path / "whole", **changes))
    run = tmp_path / "stopped"
    values = settings(model_folder, rows_file, run, **changes)
    outcome = train(values, signalled(2, signal.SIGTERM))
    assert outcome.reason == "sigterm"
    assert outcome.exit_code == 143
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    assert whole.reason == ("early_stopping" if "early" in name else "completed")
    if whole.reason == "completed":
        outcome = resume(run, signalled(2, signal.SIGINT))  # its own second, the run's fourth
        assert (outcome.reason, outcome.exit_code) == ("sigint", 130)
    outcome = resume(run)
    assert outcome.reason == whole.reason
    assert trained_bits(run) == trained_bits(whole.folder)
    assert rows_of(run) == rows_of(whole.folder)
    assert last_state(run) == last_state(whole.folder)


@pytest.fixture(scope="module")
def finished(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(model_folder, rows_file, tmp_path_factory.mktemp("f") / "run")).folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """Return the finished run, copied elsewhere: a run's folder may be moved."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def test_a_finished_run_is_verified_and_left_alone(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(run_copy)
    assert main(["--resume", str(run_copy)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert rows_of(run_copy) == before


def test_one_checkpoint_can_be_resumed_from(run_copy: Path, finished: Path) -> None:
    assert main(["--resume", str(run_copy / "checkpoints" / "step-00000003")]) == 0
    assert trained_bits(run_copy) == trained_bits(finished)
    assert rows_of(run_copy) == rows_of(finished)


def test_newer_checkpoints_are_put_aside_when_an_older_one_is_taken(run_copy: Path) -> None:
    """Else a kill in the new third step would be answered with the old eighth."""
    checkpoints = run_copy / "checkpoints"
    seen: list[list[str]] = []

    def first_step(name: str) -> None:
        if name == "step.recorded" and not seen:
            seen.append(sorted(path.name for path in checkpoints.glob("step-*")))

    with listening(first_step):
        assert main(["--resume", str(checkpoints / "step-00000003")]) == 0
    assert all(name <= "step-00000003" for name in seen[0])
    assert (checkpoints / f"aside-step-{STEPS:08d}").is_dir()


def test_a_resume_goes_on_with_the_loss_scale(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that doubles every three good steps: after two and two it is twice the first."""
    monkeypatch.setattr(LossScaler, "initial_scale", 8.0)
    monkeypatch.setattr(LossScaler, "growth_interval", 3)
    run = tmp_path / "run"
    values = settings(model_folder, rows_file, run, **{"train.precision": "fp16"})
    train(values | {"train.max_steps": 2})
    assert last_state(run)["scaler"] == {"scale": 8.0, "good_steps": 2}
    resume(run, **{"train.max_steps": 4})
    assert last_state(run)["scaler"] == {"scale": 16.0, "good_steps": 1}


def earlier_schedules(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "plan.json").read_text())["earlier_schedules"]


def cosine(step: int, total: int) -> float:
    """The rate of a step (from 1) under a peak of 1e-2 and one step of warm-up."""
    return 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 1)))


def test_a_run_that_is_made_longer_says_what_became_of_its_learning_rate(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert earlier_schedules(run_copy) == []
    assert main(["--resume", str(run_copy), f"max_steps={STEPS + 2}"]) == 0
    line = (
        "he schedule is redrawn from step 9 on, for 10 steps instead of 8: the learning rate of "
        "that step is 0.00117 instead of 0"
    )
    assert capsys.readouterr().out.count(f"t{line}\n") == 1
    report = (run_copy / "report.md").read_text()
    assert f"- T{line}.\n" in report
    assert "The learning rate of all 10 steps is the schedule's (cosine)." in report
    (one,) = earlier_schedules(run_copy)
    assert (one["until"], one["total_steps"], one["warmup_steps"]) == (8, 8, 1)
    rows = [row for row in rows_of(run_copy) if row["kind"] == "train"]
    rates = {row["step"]: row["learning_rate"] for row in rows}
    for step in range(2, 11):
        assert rates[step] == pytest.approx(cosine(step, 8 if step <= 8 else 10), abs=1e-12)
    assert one["learning_rate_after"] == rates[9]
    assert one["learning_rate_before"] == 0.0


def test_each_change_of_length_is_kept_and_what_is_done_again_follows_the_last(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(run_copy), "num_train_epochs=3", "max_steps=none"]) == 0
    assert [(one["until"], one["total_steps"]) for one in earlier_schedules(run_copy)] == [(8, 8)]
    assert main(["--resume", str(run_copy), "max_steps=14"]) == 0  # 22 rows in 6s: 4 an epoch
    lengths = [(one["until"], one["total_steps"]) for one in earlier_schedules(run_copy)]
    assert lengths == [(8, 8), (12, 12)]
    report = (run_copy / "report.md").read_text()
    assert "from step 9 on, for 12 steps instead of 8" in report
    assert "from step 13 on, for 14 steps instead of 12" in report
    assert "The learning rate of all 14 steps is the schedule's" in report
    capsys.readouterr()
    # Steps 6 and on are done again, all of them under the last schedule.
    assert main(["--resume", str(run_copy / "checkpoints" / "step-00000005")]) == 0
    lengths = [(one["until"], one["total_steps"]) for one in earlier_schedules(run_copy)]
    assert lengths == [(5, 8)]
    assert "from step 6 on, for 14 steps instead of 8" in capsys.readouterr().out
    assert "of all 14 steps is the schedule's" in (run_copy / "report.md").read_text()


def test_a_resume_that_changes_no_length_redraws_nothing(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run_copy / "checkpoints" / "step-00000004"
    assert main(["--resume", str(place), "eval.steps=3"]) == 0
    assert earlier_schedules(run_copy) == []
    assert "redrawn" not in capsys.readouterr().out


def damage_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_that_was_named_is_an_error(run_copy: Path, refused: Refused) -> None:
    place = run_copy / "checkpoints" / "step-00000004"
    damage_file(place / "adapter_model.safetensors")
    assert "sha256 mismatch" in refused(main, "--resume", str(place))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, refused: Refused) -> None:
    assert "no run is there" in refused(main, "--resume", str(tmp_path))


def test_what_changes_results_may_not_be_overridden(run_copy: Path, refused: Refused) -> None:
    error = refused(main, "--resume", str(run_copy), "learning_rate=1e-3")
    assert "optimizer.learning_rate" in error


def test_an_edited_configuration_is_refused_with_both_values(
    run_copy: Path, refused: Refused
) -> None:
    (run_copy / "status.json").unlink()
    config = run_copy / "config.toml"
    config.write_text(config.read_text().replace("lora_alpha = 32", "lora_alpha = 16"))
    error = refused(main, "--resume", str(run_copy))
    assert "lora.lora_alpha was 32 and is 16" in error


def test_an_edited_batch_is_refused(run_copy: Path, refused: Refused) -> None:
    """Where the run did not say its batch, its plan does; where it did, its checkpoint too."""
    from train.saving.identity import check_identity

    (run_copy / "status.json").unlink()
    config = run_copy / "config.toml"
    unsaid, edited = 'effective_batch_size = "none"', "effective_batch_size = 7"
    assert unsaid in config.read_text()
    config.write_text(config.read_text().replace(unsaid, edited))
    batch = json.loads((run_copy / "plan.json").read_text())["effective_batch_size"]
    error = refused(main, "--resume", str(run_copy))
    assert f"train.effective_batch_size was {batch} and is 7" in error
    saved = {"config": {"train.effective_batch_size": 5}, "data": {}, "model": {}, "machine": {}}
    with pytest.raises(UserError, match=r"effective_batch_size was 5 and is 7"):
        check_identity(saved, {**saved, "config": {"train.effective_batch_size": 7}})


def test_other_threads_are_warned_about() -> None:
    from train.saving.identity import check_identity

    saved = {
        "config": {},
        "data": {},
        "model": {},
        "machine": {"torch threads": 2, "torch": "2.13"},
    }
    now = {**saved, "machine": {"torch threads": 4, "torch": "2.13"}}
    assert check_identity(saved, now) == ["resume will not be bit-exact: torch threads 2 → 4"]


def test_samples_of_before_the_stop_are_kept(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = settings(model_folder, rows_file, run, **{"eval.samples": 1})
    train(values, signalled(2, signal.SIGTERM))
    before = json.loads((run / "status.json").read_text())["samples"][0]["before"]
    resume(run)
    sample = json.loads((run / "status.json").read_text())["samples"][0]
    assert before is not None
    assert sample["before"] == before
    assert sample["after"] is not None


def test_a_run_without_a_checkpoint_starts_from_the_first_step(
    run_copy: Path, finished: Path
) -> None:
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "status.json").unlink()
    assert main(["--resume", str(run_copy)]) == 0
    assert trained_bits(run_copy) == trained_bits(finished)
    assert rows_of(run_copy) == rows_of(finished)


def test_the_data_fingerprint_is_compared_not_only_the_path() -> None:
    from train.saving.identity import check_identity

    saved = {"config": {}, "data": {"train": "abc"}, "model": {}, "machine": {}}
    with pytest.raises(UserError, match=r"data\.train is not the data"):
        check_identity(saved, {**saved, "data": {"train": "abd"}})


def test_a_run_in_use_is_not_touched(run_copy: Path, refused: Refused) -> None:
    """Another process is in the middle of a save: sweeping its folder would lose it."""
    half_written = run_copy / "checkpoints" / ".tmp-step-00000009"
    half_written.mkdir()
    with RunLock(run_copy):
        for place in (run_copy, run_copy / "checkpoints" / "step-00000003"):
            assert "in use" in refused(main, "--resume", str(place))
    assert half_written.is_dir()
    assert len(list((run_copy / "checkpoints").glob("step-*"))) == STEPS


def test_a_refused_resume_changes_nothing(
    run_copy: Path, rows_file: Path, tmp_path: Path, refused: Refused
) -> None:
    other = tmp_path / "train.jsonl"
    other.write_text("".join((rows_file / "train.jsonl").read_text().splitlines(True)[:-2]))
    config = run_copy / "config.toml"
    config.write_text(config.read_text().replace(str(rows_file / "train.jsonl"), str(other)))

    def state() -> dict[str, str]:
        return {
            str(path): sha256_file(path)
            for path in run_copy.rglob("*")
            if path.is_file() and path.name != "run.lock"
        }

    before = state()
    error = refused(main, "--resume", str(run_copy / "checkpoints" / "step-00000003"))
    assert "data.train was " in error
    assert state() == before


def test_one_checkpoint_may_be_named_from_beside_it(
    run_copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_copy / "checkpoints")
    assert main(["--resume", f"step-{STEPS - 1:08d}"]) == 0
    assert trained_bits(run_copy) == trained_bits(finished)


def test_best_is_not_lost_between_two_renames(
    run_copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_copy / "status.json").unlink()
    (run_copy / "best").rename(run_copy / ".trash-best")
    assert main(["--resume", str(run_copy)]) == 0
    assert trained_bits(run_copy) == trained_bits(finished)


@pytest.mark.parametrize("fault", ["damaged", "of another step", "missing"])
def test_a_best_that_is_not_that_of_its_step_is_not_handed_out(
    fault: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def spoil(name: str) -> None:
        if name == "run.ends":
            if fault == "damaged":
                damage_file(run / "best" / "adapter_model.safetensors")
            elif fault == "of another step":
                (run / "best" / "manifest.json").unlink()
                files = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
                replace_folder(run / "best", lambda folder: write_all(folder, files), step=1)
            else:
                (run / "best").rename(tmp_path / "elsewhere")

    values = settings(model_folder, rows_file, run, **{"checkpoint.load_best_at_end": True})
    with pytest.raises(UserError, match=r"best: missing, damaged or not that of"):
        train(values, spoil)
    assert not (run / "final").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_the_test_set_is_evaluated_with_the_weights_of_final(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation is made the best of all, so that the last step's weights are others."""
    evaluate = during.evaluate
    judged: list[dict[str, torch.Tensor]] = []

    def first_is_best(model: Any, *given: Any, **named: Any) -> Any:
        judged.append({name: t.clone() for name, t in adapter_tensors(model).items()})
        result = evaluate(model, *given, **named)
        return dataclasses.replace(result, loss=0.5) if len(judged) == 1 else result

    monkeypatch.setattr(during, "evaluate", first_is_best)
    values = {"data.test": str(rows_file / "test.jsonl"), "checkpoint.load_best_at_end": True}
    run = train(settings(model_folder, rows_file, tmp_path / "run", **values)).folder
    with TensorFile(run / "final" / "adapter_model.safetensors") as file:
        assert all(file.read(name).equal(tensor) for name, tensor in judged[-1].items())
        assert not all(file.read(name).equal(tensor) for name, tensor in judged[-2].items())


def write_all(folder: Path, files: dict[str, bytes]) -> dict[str, str]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {}


def test_another_base_model_of_the_same_size_is_refused(
    run_copy: Path,
    model_folder: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    (run_copy / "status.json").unlink()
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    damage_file(other / "model.safetensors")
    config = run_copy / "config.toml"
    config.write_text(config.read_text().replace(str(model_folder), str(other)))
    error = refused(main, "--resume", str(run_copy))
    assert "another base model (its files are not those that the run began with)" in error
    shutil.copy(model_folder / "model.safetensors", other)
    assert main(["--resume", str(run_copy)]) == 0


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"state": ["finished"]}', "3"])
def test_a_status_that_is_none_does_not_say_finished(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    assert not _is_finished(tmp_path, 3)


def test_a_resume_refused_for_damaged_metrics_moves_nothing(
    run_copy: Path, refused: Refused
) -> None:
    """Nor is the run taken for finished at an earlier step afterwards."""
    with open(run_copy / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    before = sorted(path.name for path in (run_copy / "checkpoints").iterdir())
    place = run_copy / "checkpoints" / "step-00000003"
    assert "not a row of metrics" in refused(main, "--resume", str(place))
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == before


def test_a_run_killed_before_its_resume_said_so_is_not_finished(
    run_copy: Path, finished: Path
) -> None:
    """status.json is that of the last step, the newest checkpoint an earlier one."""
    for path in (run_copy / "checkpoints").glob("step-*"):
        if path.name > "step-00000003":
            path.rename(path.with_name(f"aside-{path.name}"))
    assert main(["--resume", str(run_copy)]) == 0
    assert trained_bits(run_copy) == trained_bits(finished)


@pytest.mark.parametrize("promised", [True, False])
def test_a_best_of_later_steps_is_not_carried_into_other_evaluations(
    promised: bool,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """best/ is that of step 8; the checkpoint of step 4 speaks of step 3, which has none."""
    run = tmp_path / "run"
    changes = {"eval.steps": 1, "checkpoint.steps": 4, "checkpoint.load_best_at_end": promised}
    train(settings(model_folder, rows_file, run, **changes))
    place = run / "checkpoints" / "step-00000004"
    document = json.loads((place / "state.json").read_text())
    document["state"]["stopping"].update(best_step=3, best_loss=1.0)
    files = {path.name: path.read_bytes() for path in place.iterdir() if path.suffix != ".json"}
    files["adapter_config.json"] = (place / "adapter_config.json").read_bytes()
    files["state.json"] = json.dumps(document).encode()
    replace_folder(place, lambda folder: write_all(folder, files), step=4)
    if promised:
        rows = (run / "metrics.jsonl").read_bytes()
        capsys.readouterr()
        error = refused(main, "--resume", str(place), "eval.steps=4")
        assert (run / "metrics.jsonl").read_bytes() == rows
        assert "best is not that of step 3" in error
        assert (run / "checkpoints" / "step-00000008").is_dir()
        return
    assert main(["--resume", str(place), "eval.steps=4"]) == 0
    assert "it is deleted, and the next evaluation is the best" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text())["best"]["step"] == 8


def test_the_result_of_fewer_steps_is_put_aside(run_copy: Path) -> None:
    reached = []

    def look(name: str) -> None:
        if name == "step.recorded":
            reached.append((run_copy / "final").exists())

    with listening(look):
        assert main(["--resume", str(run_copy), f"max_steps={STEPS + 2}"]) == 0
    assert reached == [False, False]
    assert (run_copy / "final").is_dir()
    assert (run_copy / "aside-final").is_dir()


def test_a_signal_after_the_last_step_is_answered(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    def stop(name: str) -> None:
        if name == "run.ends":
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(settings(model_folder, rows_file, tmp_path / "run"), stop)
    assert (outcome.reason, outcome.exit_code) == ("sigterm", 143)
    assert not (tmp_path / "run" / "final").exists()
    assert resume(tmp_path / "run").reason == "completed"
    assert (tmp_path / "run" / "final").is_dir()
