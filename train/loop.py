"""The training loop: step, record, evaluate, save, stop. It reads top to bottom."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from data.batch import MicroBatch, micro_batches
from data.examples import Examples
from data.order import epoch_order
from files.faults import faultpoint
from train.config.schema import RunConfig
from train.memory import does_not_fit
from train.plan.steps import RunPlan
from train.prepare import Data
from train.saving.checkpoints import TrainState
from train.signals import Signals
from train.spikes import observe_loss
from train.step import StepResult

if TYPE_CHECKING:
    from train.session import Session

# A run whose loss is not finite this many steps in a row is stopped (exit code 3).
NON_FINITE_LIMIT = 3


@dataclass
class StepBatches:
    """The examples of each step, cut into micro-batches, in an order that (seed, epoch) decides."""

    examples: Examples
    seed: int
    shuffle: bool
    group_by_length: bool
    effective_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    batching: str
    max_length: int
    pad_id: int
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)
    _ahead: tuple[tuple[int, ...], list[MicroBatch]] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: RunConfig, plan: RunPlan, data: Data) -> StepBatches:
        """Return the batches of a configured run, whose `train.micro_batch_tokens` is decided."""
        tokens = config.train.micro_batch_tokens
        assert not isinstance(tokens, str)
        return cls(
            examples=data.train,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
            group_by_length=config.data.group_by_length,
            effective_batch_size=plan.effective_batch_size,
            micro_batch_size=config.train.per_device_train_batch_size,
            micro_batch_tokens=tokens,
            batching=config.data.batching,
            max_length=config.data.max_length,
            pad_id=data.tokenizer.pad_id,
        )

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the examples in a 0-based epoch."""
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(
                len(self.examples),
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                lengths=self.examples.lengths if self.group_by_length else None,
                group_size=self.effective_batch_size,
            )
            self._order = (epoch, order)
        return self._order[1]

    def cut(self, epoch: int, start: int, stop: int, divisor: int = 1) -> list[MicroBatch]:
        """Return the examples at positions `start` to `stop` of an epoch's order, cut.

        Args:
            epoch: The 0-based epoch.
            start: First position.
            stop: Position after the last.
            divisor: What the configured size of a micro-batch is divided by.
        """
        asked = epoch, start, stop, divisor
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == asked:
            return ahead[1]
        tokens = self.micro_batch_tokens
        return micro_batches(
            self.examples,
            self.order(epoch)[start:stop],
            micro_batch_size=max(1, self.micro_batch_size // divisor),
            micro_batch_tokens=None if tokens is None else max(1, tokens // divisor),
            batching=self.batching,
            max_length=self.max_length,
            pad_id=self.pad_id,
        )

    def cut_ahead(self, epoch: int, start: int, stop: int, divisor: int = 1) -> None:
        """Do now what the next call of `cut` will ask for; what fails then fails there."""
        with suppress(Exception):
            self._ahead = (epoch, start, stop, divisor), self.cut(epoch, start, stop, divisor)


def step_that_fits(session: Session, plan: RunPlan, batches: StepBatches, step: int) -> StepResult:
    """Do one step; where memory does not suffice, redo it in halved micro-batches, which stay.

    Raises:
        UserError: Memory does not suffice for a single example. The state before the step is saved.
    """
    state = session.state
    while True:
        divisor = state.micro_batch_divisor
        batch = batches.cut(*plan.batch(step), divisor)
        ahead = None
        if step < plan.total_steps:
            ahead = partial(batches.cut_ahead, *plan.batch(step + 1), divisor)
        result = session.step(step, batch, plan.learning_rate(step), ahead)
        if result.skipped != "out of memory":
            return result
        if all(len(micro_batch.examples) == 1 for micro_batch in batch):
            saved = ""
            if state.step > 0:
                session.save(best=False, checkpoint=True)
                session.writer.wait()
                saved = f" (the state after step {state.step} is saved)"
            longest = max(micro_batch.num_tokens for micro_batch in batch)
            raise does_not_fit(f"step {step}", longest, saved)
        state.micro_batch_divisor *= 2
        session.console.say(
            f"out of memory at step {step}: it is done again, and all goes on, with micro-batches "
            f"1/{state.micro_batch_divisor} of their configured size; the gradient is the same"
        )


def advance(state: TrainState, result: StepResult) -> float | None:
    """Move the state past one step; return how far its loss is a spike (`train.spikes`), if so."""
    state.step += 1
    state.tokens += result.tokens
    state.seconds += result.seconds
    not_finite = result.skipped == "non-finite"
    state.non_finite_in_a_row = state.non_finite_in_a_row + 1 if not_finite else 0
    if result.skipped is not None:
        state.skipped += 1
        return None
    state.targets += result.targets
    state.loss_since_eval += result.loss * result.targets
    state.targets_since_eval += result.targets
    return observe_loss(state.recent_losses, result.loss)


def train(session: Session, plan: RunPlan, batches: StepBatches, signals: Signals) -> str:
    """Train from the session's step to the plan's end and return why it ended.

    Returns:
        `completed`, `early_stopping`, `non_finite`, or the name of a signal (`sigint`, `sigterm`).
        In every case the state was saved first, or is being saved in the background.

    Raises:
        UserError: Memory does not suffice, however small the micro-batches.
    """
    state = session.state
    while state.step < plan.total_steps and not state.stopping.should_stop:
        session.writer.check()
        step = state.step + 1
        result = step_that_fits(session, plan, batches, step)
        spike = advance(state, result)
        session.record_step(result, plan.learning_rate(step), spike)
        faultpoint("step.recorded")

        new_best = plan.evaluates_at(step) and session.evaluate_valid()

        not_finite = state.non_finite_in_a_row >= NON_FINITE_LIMIT
        ends_here = signals.stop is not None or not_finite or state.stopping.should_stop
        due = ends_here or plan.saves_at(step) or signals.save or session.save_is_due()
        if due or new_best:
            session.save(best=new_best, checkpoint=due)
        if due:
            signals.save = False
        if signals.stop is not None:
            return signals.stop.name.lower()
        if not_finite:
            return "non_finite"
    return "early_stopping" if state.stopping.should_stop else "completed"
