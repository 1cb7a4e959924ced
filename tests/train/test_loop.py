"""The loop against records and a saver that write down what they are asked for."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small import RaggedExamples

from data.batch import MicroBatch
from data.order import epoch_order
from train import batches as batches_module
from train import loop
from train.batches import StepBatches
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.dataset import Data
from train.loop import advance, train
from train.plan.steps import RunPlan, plan_run
from train.process.signals import Signals
from train.process.world import ALONE
from train.state import EarlyStopping, EvalResult, StepResult, TrainState

LENGTHS = [5, 31, 12, 18, 27, 9, 40, 14, 22, 6]  # ten examples in steps of four: 4, 4, 2
EXAMPLES: Any = RaggedExamples(LENGTHS)


class Tokenizer:
    pad_id = 7


def configured(**settings: Any) -> tuple[RunConfig, RunPlan, Data]:
    keys = {
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.num_train_epochs": 2,
        "train.seed": 5,
        "schedule.warmup_steps": 2,
        "data.max_length": 40,
        **settings,
    }
    config = load_config(overrides=keys)
    data = Data(Tokenizer(), None, EXAMPLES, EXAMPLES, None)  # type: ignore[arg-type]
    return config, plan_run(config, len(EXAMPLES)), data


def batches_of(**settings: Any) -> tuple[RunPlan, StepBatches]:
    config, plan, data = configured(**settings)
    return plan, StepBatches.of(config, plan, data)


def done(loss: float = 1.0, skipped: str | None = None) -> StepResult:
    return StepResult(loss, 1e-4, 1.0, 3, 4, 0.5, skipped)


class Recorder:
    """Records and saver of a run whose steps give what `result` says, evaluations `losses`."""

    def __init__(
        self,
        losses: list[float] | None = None,
        patience: int | None = None,
        result: Callable[[int], StepResult] = lambda step: done(),
    ) -> None:
        self.state = TrainState(EarlyStopping(patience))
        self.losses = iter(losses or [])
        self.result = result
        self.events: list[tuple[str, int]] = []
        self.examples: list[list[int]] = []
        self.rates: list[float] = []
        self.spikes: list[float | None] = []
        self.writer = SimpleNamespace(check=lambda: None)
        self.trace = SimpleNamespace(around=lambda step: nullcontext())

    def train_step(
        self,
        model: Any,
        optimizer: Any,
        batch: list[MicroBatch],
        *,
        learning_rate: float,
        draw: tuple[int, int],
        meanwhile: Callable[[], object] | None,
        **_: Any,
    ) -> StepResult:
        if meanwhile is not None:
            meanwhile()
        seed, step = draw
        assert (seed, step) == (5, self.state.step + 1)
        self.events.append(("step", step))
        self.examples.append([index for part in batch for index in part.examples])
        self.rates.append(learning_rate)
        return self.result(step)

    def evaluate(self, *_: Any) -> EvalResult:
        self.events.append(("evaluate", self.state.step))
        return EvalResult(next(self.losses), 7, 0.1)

    def step(self, result: StepResult, spike: float | None) -> None:
        self.events.append(("record", self.state.step))
        self.spikes.append(spike)

    def evaluation(
        self, split: str, result: EvalResult, *, best: bool, train_loss: float | None
    ) -> None:
        assert split == "valid"
        assert best == (self.state.stopping.best_step == self.state.step)
        assert train_loss is not None
        assert self.state.targets_since_eval == 0

    def save(self, *, best: bool, checkpoint: bool) -> None:
        self.events += [("best", self.state.step)] * best + [("save", self.state.step)] * checkpoint

    def is_due(self) -> bool:
        return False

    def steps_of(self, kind: str) -> list[int]:
        return [step for event, step in self.events if event == kind]


def run(recorder: Recorder, signals: Signals | None = None, **settings: Any) -> str:
    config, plan, data = configured(**settings)
    given: Any = SimpleNamespace(
        config=config,
        plan=plan,
        data=data,
        evaluation_batching=None,
        model=SimpleNamespace(gradient_checkpointing="layers"),
        optimizer=None,
        precision=None,
        scaler=None,
        state=recorder.state,
        world=ALONE,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", recorder.train_step)
        patch.setattr(loop, "evaluate_run", recorder.evaluate)
        return train(given, recorder, recorder, signals or Signals())  # type: ignore[arg-type]


def test_it_does_what_the_plan_says_in_this_order() -> None:
    recorder = Recorder(losses=[3.0, 2.0, 1.0])
    assert run(recorder, **{"eval.steps": 2, "checkpoint.steps": "epoch"}) == "completed"
    assert recorder.events == [
        *[("step", 1), ("record", 1)],
        *[("step", 2), ("record", 2), ("evaluate", 2), ("best", 2)],
        *[("step", 3), ("record", 3), ("save", 3)],
        *[("step", 4), ("record", 4), ("evaluate", 4), ("best", 4)],
        *[("step", 5), ("record", 5)],
        *[("step", 6), ("record", 6), ("evaluate", 6), ("best", 6), ("save", 6)],
    ]
    orders = [epoch_order(10, seed=5, epoch=epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert recorder.examples == [
        part for order in orders for part in (order[:4], order[4:8], order[8:])
    ]
    # cosine, w = 2 of T = 6: 0, half of the peak, then (1 + cos(k · 45°)) / 2
    expected = [0.0, 0.5, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
    assert [rate / 2e-4 for rate in recorder.rates] == pytest.approx(expected)


def test_early_stopping_ends_it_with_a_save() -> None:
    recorder = Recorder(losses=[2.0, 3.0, 2.5, 1.0], patience=2)
    settings = {"eval.steps": 1, "checkpoint.steps": "none"}
    assert run(recorder, **settings) == "early_stopping"
    assert recorder.steps_of("step") == [1, 2, 3]
    assert recorder.steps_of("save") == [3]


def test_a_signal_ends_it_after_the_step_with_a_save() -> None:
    signals = Signals()

    def result(step: int) -> StepResult:
        signals.stop = signal.SIGTERM if step == 2 else None
        return done()

    recorder = Recorder(result=result, losses=[1.0])
    assert run(recorder, signals, **{"checkpoint.steps": "none"}) == "sigterm"
    assert (recorder.steps_of("record"), recorder.steps_of("save")) == ([1, 2], [2])


def test_a_request_to_save_is_answered_once() -> None:
    signals = Signals()
    signals.save = True
    recorder = Recorder(losses=[1.0])
    assert run(recorder, signals, **{"checkpoint.steps": "none"}) == "completed"
    assert recorder.steps_of("save") == [1, 6]


@pytest.mark.parametrize(
    ("bad", "reason", "last"),
    [
        ({2, 3, 4}, "non_finite", 4),  # three in a row
        ({1, 2, 4, 5}, "completed", 6),  # never three in a row
    ],
)
def test_three_steps_in_a_row_that_are_not_finite_end_it(
    bad: set[int], reason: str, last: int
) -> None:
    def result(step: int) -> StepResult:
        return done(float("nan"), "non-finite") if step in bad else done()

    recorder = Recorder(result=result, losses=[1.0])
    assert run(recorder, **{"checkpoint.steps": "none"}) == reason
    assert recorder.steps_of("step")[-1] == recorder.steps_of("save")[-1] == last
    assert recorder.state.skipped == len(bad)


def test_the_train_loss_since_the_last_evaluation_is_a_token_mean() -> None:
    state = TrainState(EarlyStopping(None))
    advance(state, StepResult(4.0, 1e-4, grad_norm=1.0, targets=10, tokens=12, seconds=1.0))
    advance(state, StepResult(1.0, 1e-4, grad_norm=1.0, targets=30, tokens=31, seconds=2.0))
    assert state.loss_since_eval / state.targets_since_eval == (4.0 * 10 + 1.0 * 30) / 40
    assert (state.step, state.targets, state.tokens, state.seconds) == (2, 40, 43, 3.0)
    skipped = StepResult(float("nan"), 1e-4, 1.0, 5, 6, 1.0, "non-finite")
    advance(state, skipped)
    assert (state.targets_since_eval, state.targets, state.tokens) == (40, 40, 49)
    assert (state.step, state.skipped, state.non_finite_in_a_row) == (3, 1, 1)
    advance(state, StepResult(0.0, 1e-4, 0.0, 0, 6, 1.0, "no targets"))
    assert (state.skipped, state.non_finite_in_a_row) == (2, 0)


def test_the_next_step_is_cut_ahead_and_handed_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, batches = batches_of()
    expected = [part.input_ids for part in batches.cut(*plan.batch(2), 2)]
    made = []
    cutter = batches_module.micro_batches
    monkeypatch.setattr(
        batches_module,
        "micro_batches",
        lambda *given, **named: made.append(1) or cutter(*given, **named),
    )
    batches.cut_ahead(*plan.batch(2), 2)
    batches.cut_ahead(*plan.batch(2), 2)  # as where an overflow has a step computed again
    ahead = batches.cut(*plan.batch(2), 2)
    assert len(made) == 1
    assert all(one.input_ids.equal(ids) for one, ids in zip(ahead, expected, strict=True))
    batches.cut(*plan.batch(2), 2)
    assert len(made) == 2
    with monkeypatch.context() as patch:

        def broken(*_: Any, **__: Any) -> list[MicroBatch]:
            raise OSError("disk")

        patch.setattr(batches_module, "micro_batches", broken)
        batches.cut_ahead(*plan.batch(2), 2)  # the step that is being computed goes on
        with pytest.raises(OSError, match="disk"):
            batches.cut(*plan.batch(2), 2)
    batches.cut_ahead(*plan.batch(2), 2)
    smaller = batches.cut(*plan.batch(2), 4)  # memory ran out: what lies ready does not fit
    assert len(smaller) == 4
    assert len(made) == 4


def test_a_run_cuts_each_step_once_and_nothing_behind_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    cutter = batches_module.micro_batches
    monkeypatch.setattr(
        batches_module,
        "micro_batches",
        lambda *given, **named: made.append(1) or cutter(*given, **named),
    )
    assert run(Recorder(losses=[3.0] * 6)) == "completed"
    assert len(made) == 6


def test_batches_are_cut_and_ordered_as_configured() -> None:
    plan, batches = batches_of(**{"data.group_by_length": True})
    expected = epoch_order(10, seed=5, epoch=1, lengths=EXAMPLES.lengths, group_size=4)
    assert batches.order(1).tolist() == expected.tolist()
    assert batches.order(0).tolist() != expected.tolist()
    micro = batches.cut(*plan.batch(1))
    assert [len(part.examples) for part in micro] == [2, 2]
    assert all(part.padded_length is None for part in micro)
    assert len(batches.cut(*plan.batch(1), divisor=1024)) == 4
    plan, batches = batches_of(**{"data.shuffle": False, "data.batching": "max_length"})
    (first, second) = batches.cut(*plan.batch(1))
    assert (first.examples, second.examples) == ((0, 1), (2, 3))
    assert first.padded_length == 40
    assert first.input_ids[5] == Tokenizer.pad_id
    plan, batches = batches_of(**{"train.micro_batch_tokens": 60, "data.shuffle": False})
    assert [part.examples for part in batches.cut(*plan.batch(1))] == [(0, 1, 2), (3,)]
    halved = batches.cut(*plan.batch(1), divisor=2)
    assert [part.examples for part in halved] == [(0,), (1,), (2, 3)]
    assert len(batches.cut(*plan.batch(1), divisor=1024)) == 4


def test_a_spike_is_handed_to_the_records() -> None:
    recorder = Recorder(result=lambda step: done(9.0 if step == 2 else 1.0), losses=[1.0])
    recorder.state.recent_losses = [1.0, 1.1] * 20
    run(recorder, **{"checkpoint.steps": "none"})
    assert [spike is not None for spike in recorder.spikes] == [False, True, *[False] * 4]


def test_a_finished_state_does_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.state.step = 6
    assert run(recorder) == "completed"
    assert recorder.events == []
