"""Loss spikes: found by the rule, recorded with their rows, and the same after a resume."""

import json
import statistics
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from runs import resume, rows_of, settings, train

from train import step as step_module
from train.loop import advance
from train.state import (
    DEVIATIONS,
    MIN_LOSSES,
    WINDOW,
    EarlyStopping,
    StepResult,
    TrainState,
    observe_loss,
)


def losses(count: int, seed: int = 0) -> list[float]:
    random = Random(seed)
    return [random.gauss(1.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize("count", [MIN_LOSSES, 100, WINDOW])
def test_more_than_six_deviations_above_the_mean_is_a_spike(count: int) -> None:
    before = losses(count)
    mean, deviation = statistics.mean(before), statistics.stdev(before)
    assert observe_loss(list(before), mean + (DEVIATIONS - 1e-6) * deviation) is None
    spike = observe_loss(list(before), mean + (DEVIATIONS + 1e-6) * deviation)
    assert spike == pytest.approx(DEVIATIONS + 1e-6, rel=1e-9)
    assert observe_loss(list(before), mean - 50 * deviation) is None


def test_too_few_losses_and_equal_ones_say_nothing() -> None:
    assert observe_loss(losses(MIN_LOSSES - 1), 50.0) is None
    assert observe_loss(losses(MIN_LOSSES), 50.0) is not None
    assert observe_loss([1.0] * WINDOW, 1.0 + 1e-9) is None


def test_the_window_moves_and_holds_spikes_too() -> None:
    recent: list[float] = []
    given = losses(3 * WINDOW)
    assert [observe_loss(recent, loss) for loss in given] == [None] * len(given)
    assert recent == given[-WINDOW:]
    # A rise that lasts is told at first, and is then what losses are.
    risen = [2.5 + loss for loss in losses(2 * WINDOW, seed=1)]
    told = [observe_loss(recent, loss) is not None for loss in risen]
    assert told[:3] == [True] * 3
    assert sum(told) < 10
    assert recent == risen[-WINDOW:]


def test_skipped_steps_and_losses_that_are_not_finite_stay_out_of_the_window() -> None:
    state = TrainState(EarlyStopping(None), recent_losses=losses(40))
    before = list(state.recent_losses)
    assert advance(state, StepResult(float("nan"), 1e-4, 1.0, 3, 4, 0.1, "non-finite")) is None
    assert advance(state, StepResult(9.0, 1e-4, float("inf"), 3, 4, 0.1, "non-finite")) is None
    assert advance(state, StepResult(0.0, 1e-4, 0.0, 0, 4, 0.1, "no targets")) is None
    assert state.recent_losses == before
    spike = advance(state, StepResult(9.0, 1e-4, 1.0, 3, 4, 0.1))
    assert spike is not None and spike > DEVIATIONS
    assert state.recent_losses == [*before, 9.0]


def test_the_window_survives_json_bit_for_bit() -> None:
    state = TrainState(EarlyStopping(None), recent_losses=losses(WINDOW))
    text = json.dumps(state.to_dict(), allow_nan=False)
    assert TrainState.from_dict(json.loads(text)) == state
    assert len(text) < 4096


@pytest.mark.usefixtures("cache")
def test_a_run_records_its_spikes_and_a_resumed_one_the_same(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped after step 34, so that the window of the spike at step 37 spans the stop."""
    loss_sum = step_module.loss_sum

    def spiked(model: Any, micro_batch: Any, device: Any, draw: Any, *rest: float) -> torch.Tensor:
        loss = loss_sum(model, micro_batch, device, draw, *rest)
        return loss + 10.0 * micro_batch.num_targets if draw[1] == 37 else loss

    monkeypatch.setattr(step_module, "loss_sum", spiked)
    changes = {
        "data.valid": None,
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 1,
        "train.max_steps": 38,
        "optimizer.learning_rate": 2e-4,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "checkpoint.steps": 34,
        "checkpoint.total_limit": None,
    }
    whole = train(settings(model_folder, rows_file, tmp_path / "whole", **changes)).folder
    capsys.readouterr()
    rows = rows_of(whole)
    (spike,) = [row for row in rows if "spike" in row]
    assert spike["step"] == 37
    assert spike["spike"] > DEVIATIONS
    assert spike["loss"] > 10.0
    assert len(spike["examples"]) == 4
    assert spike["rows"] == spike["examples"]  # every row of the file makes one example
    report = (whole / "report.md").read_text()
    assert "The loss of 1 of 38 steps was more than 6 standard deviations above" in report
    assert f"step 37 ({spike['loss']:.4f}, {spike['spike']:.1f} deviations; rows " in report

    stopped = tmp_path / "stopped"
    train(settings(model_folder, rows_file, stopped, **{**changes, "train.max_steps": 34}))
    resume(stopped, **{"train.max_steps": 38})
    assert rows_of(stopped) == rows
    assert "step 37: the loss, " in capsys.readouterr().out
