"""Memory that does not suffice for a single example: layers keep less, and no bit changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import checkpoints_of, resume, rows_of, train

from data.batch import MicroBatch
from files.atomic import sha256_file
from files.errors import UserError
from models.layers import CausalLM
from models.recompute import POLICIES
from train import healing, state
from train.state import EarlyStopping, TrainState


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


def settings(model_folder: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of single examples, whose dropout depends on nothing but where it stands."""
    values = {
        "train.max_steps": 5,
        "model.attention": "eager",
        "lora.lora_dropout": 0.1,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 4,
        "checkpoint.steps": 2,
        "checkpoint.total_limit": None,
        **changes,
    }
    return runs.settings(model_folder, rows, output, **values)


def hashes(run: Path) -> dict[str, str]:
    last = checkpoints_of(run)[-1]
    return {path.name: sha256_file(path) for path in sorted(last.glob("*.safetensors"))}


class OutOfMemory:
    """A listener that runs out of memory in a step, in so many attempts at it."""

    def __init__(self, step: int, attempts: int) -> None:
        self.fails_at, self.attempts = step, attempts
        self.step = 1

    def __call__(self, name: str) -> None:
        if name == "step.micro_batch" and self.step == self.fails_at and self.attempts > 0:
            self.attempts -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if name == "step.recorded":
            self.step += 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_goes_on_keeping_less_and_so_does_its_resume(
    method: str,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"train.method": method}
    plain = train(settings(model_folder, rows_file, tmp_path / "plain", **changes)).folder
    values = settings(model_folder, rows_file, tmp_path / "run", **changes)
    run = train(values, OutOfMemory(3, attempts=2)).folder
    assert hashes(run) == hashes(plain)
    out = capsys.readouterr().out
    for policy in ("norms", "mlp"):
        assert f"all goes on, with model.gradient_checkpointing={policy}" in out
    policies = [row.get("gradient_checkpointing") for row in rows_of(run, "train")]
    assert policies == [None, None, "mlp", "mlp", "mlp"]
    assert all("micro_batch_divisor" not in row for row in rows_of(run, "train"))
    report = (run / "report.md").read_text()
    assert "Out of memory at step 3 with single examples" in report
    assert "(model.gradient_checkpointing=mlp instead of none)" in report
    # The state keeps it, and a resume where memory suffices goes on with it.
    resume(run, **{"train.max_steps": 7})
    resume(plain, **{"train.max_steps": 7})
    assert rows_of(run, "train")[-1]["gradient_checkpointing"] == "mlp"
    assert hashes(run) == hashes(plain)


def test_a_resume_may_ask_for_another_policy(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    folders = []
    for name, changes in (("plain", {}), ("run", {"model.gradient_checkpointing": "offload"})):
        values = settings(model_folder, rows_file, tmp_path / name, **{"train.max_steps": 3})
        folders.append(train(values).folder)
        resume(folders[-1], **{"train.max_steps": 5, **changes})
    assert 'gradient_checkpointing = "offload"' in (folders[1] / "config.toml").read_text()
    assert hashes(folders[0]) == hashes(folders[1])


def test_a_run_of_before_with_true_or_false_is_resumed(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    changes = {"train.max_steps": 3, "model.gradient_checkpointing": True}
    run = train(settings(model_folder, rows_file, tmp_path / "run", **changes)).folder
    config, last = run / "config.toml", checkpoints_of(run)[-1]
    text = config.read_text()
    assert 'gradient_checkpointing = "layers"' in text
    before = text.replace('gradient_checkpointing = "layers"', "gradient_checkpointing = true")
    config.write_text(before)
    resume(run, **{"train.max_steps": 4})
    assert len(rows_of(run, "train")) == 4
    assert checkpoints_of(run)[-1] != last


def test_what_is_kept_least_counts() -> None:
    taken = TrainState(EarlyStopping(None))
    assert healing.kept_policy("mlp", taken) == "mlp"
    taken.gradient_checkpointing = "layers"
    assert healing.kept_policy("mlp", taken) == "layers"
    assert healing.kept_policy("offload", taken) == "offload"


def test_a_state_of_before_is_read_and_a_policy_that_is_none_is_refused() -> None:
    values = TrainState(EarlyStopping(None)).to_dict()
    assert state._POLICIES == POLICIES
    for policy in (None, *POLICIES):
        read = TrainState.from_dict(values | {"gradient_checkpointing": policy})
        assert read.gradient_checkpointing == policy
    for wrong in ("auto", 3, True):
        with pytest.raises(TypeError, match="gradient_checkpointing"):
            TrainState.from_dict(values | {"gradient_checkpointing": wrong})
    del values["gradient_checkpointing"]
    assert TrainState.from_dict(values).gradient_checkpointing is None


# --- the look ahead ---


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[MicroBatch]:
    """Let a CPU be probed, and return what it was probed with."""
    tried: list[MicroBatch] = []
    monkeypatch.setattr(healing, "PROBED", ("cpu",))
    loss_sum = healing.loss_sum

    def noted(model: CausalLM, micro_batch: MicroBatch, *more: Any) -> torch.Tensor:
        tried.append(micro_batch)
        return loss_sum(model, micro_batch, *more)

    monkeypatch.setattr(healing, "loss_sum", noted)
    return tried


@pytest.mark.parametrize("changes", [{}, {"train.method": "full"}, {"train.precision": "fp16"}])
def test_the_longest_micro_batch_is_tried_and_leaves_no_trace(
    changes: dict[str, Any],
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    probed: list[MicroBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(healing, "PROBED", ())
        plain = train(settings(model_folder, rows_file, tmp_path / "plain", **changes)).folder
    assert not probed
    rows: list[int] = []
    longest_step = healing.longest_step

    def noted(run: Any, batches: Any) -> int:
        steps = range(1, run.plan.total_steps + 1)
        cuts = [part for step in steps for part in batches.cut(*run.plan.batch(step))]
        rows.extend(len(part.input_ids) for part in cuts)
        return longest_step(run, batches)

    monkeypatch.setattr(healing, "longest_step", noted)
    run = train(settings(model_folder, rows_file, tmp_path / "run", **changes)).folder
    assert [len(micro_batch.input_ids) for micro_batch in probed] == [max(rows)]
    assert len(set(rows)) > 1
    assert hashes(run) == hashes(plain)
    losses = [[row["loss"] for row in rows_of(folder, "train")] for folder in (run, plain)]
    assert losses[0] == losses[1]


def refusing(times: int) -> Callable[..., torch.Tensor]:
    """Return a loss that runs out of memory so many times."""
    left = [times]
    loss_sum = healing.loss_sum

    def refused(*given: Any) -> torch.Tensor:
        if left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_sum(*given)

    return refused


def test_what_does_not_fit_is_done_in_less_before_the_first_step(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    probed: list[MicroBatch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(healing, "PROBED", ())
        plain = train(settings(model_folder, rows_file, tmp_path / "plain")).folder
    monkeypatch.setattr(healing, "loss_sum", refusing(2))
    changes = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2}
    run = train(settings(model_folder, rows_file, tmp_path / "run", **changes)).folder
    rows = rows_of(run, "train")
    assert {row["micro_batch_divisor"] for row in rows} == {2}
    assert {row["gradient_checkpointing"] for row in rows} == {"norms"}
    assert "before step 1, with the longest micro-batch" in capsys.readouterr().out
    assert hashes(run) == hashes(plain)  # micro-batches of one there too


def test_a_run_that_cannot_do_its_longest_step_says_so_before_the_first(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    probed: list[MicroBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(healing, "loss_sum", refusing(100))
    run = tmp_path / "run"
    told = "before step 1, .*: out of memory with a single .*gradient_checkpointing=layers.*lower"
    with pytest.raises(UserError, match=told):
        train(settings(model_folder, rows_file, run))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0)
    assert not (run / "metrics.jsonl").exists() or not rows_of(run, "train")
