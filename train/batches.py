"""The examples of each step, cut into micro-batches, the next one's while this one runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from data.batch import Batching, MicroBatch, micro_batches
from data.examples import Examples
from data.mixture import Mixture
from data.order import balanced_shares, epoch_order
from train.config.schema import RunConfig
from train.inputs.dataset import Data
from train.plan.steps import RunPlan
from train.process.world import ALONE, World


def train_batching(config: RunConfig, pad_id: int) -> Batching:
    """Return how the steps of a run are cut, whose `train.micro_batch_tokens` is decided."""
    tokens = config.train.micro_batch_tokens
    assert not isinstance(tokens, str)
    return Batching(
        micro_batch_size=config.train.per_device_train_batch_size,
        micro_batch_tokens=tokens,
        layout=config.data.batching,
        max_length=config.data.max_length,
        pad_id=pad_id,
    )


def evaluation_batching(config: RunConfig, pad_id: int) -> Batching:
    """Return how a run's evaluations are cut: it changes speed and memory, never the result."""
    size = config.eval.per_device_batch_size or config.train.per_device_train_batch_size
    cut = train_batching(config, pad_id)
    return replace(cut, micro_batch_size=size, micro_batch_tokens=None)


@dataclass
class StepBatches:
    """The examples of each step, cut into micro-batches, in an order that (seed, epoch) decides."""

    examples: Examples
    seed: int
    shuffle: bool
    group_by_length: bool
    effective_batch_size: int
    batching: Batching
    world: World = ALONE
    mixture: Mixture | None = None
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)
    _ahead: tuple[tuple[int, ...], list[MicroBatch]] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: RunConfig, plan: RunPlan, data: Data, world: World = ALONE) -> StepBatches:
        """Return the batches of a configured run, whose `train.micro_batch_tokens` is decided."""
        return cls(
            examples=data.train,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
            group_by_length=config.data.group_by_length,
            effective_batch_size=plan.effective_batch_size,
            batching=train_batching(config, data.tokenizer.pad_id),
            world=world,
            mixture=data.mixture,
        )

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the examples in a 0-based epoch."""
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(
                len(self.examples),
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                mixture=self.mixture,
                lengths=self.examples.lengths if self.group_by_length else None,
                group_size=self.effective_batch_size,
            )
            self._order = (epoch, order)
        return self._order[1]

    def cut(self, epoch: int, start: int, stop: int, divisor: int = 1) -> list[MicroBatch]:
        """Return this rank's of the examples at positions `start` to `stop` of an epoch, cut.

        The configured size of a micro-batch is divided by `divisor`.
        """
        asked = epoch, start, stop, divisor
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == asked:
            return ahead[1]
        examples, indices = self.examples.at_epoch(epoch), self.order(epoch)[start:stop]
        if self.world.size > 1:
            shares = balanced_shares(examples.lengths[indices], self.world.size)
            indices = indices[shares[self.world.rank]]
        return micro_batches(examples, indices, self.batching.divided_by(divisor))

    def cut_ahead(self, epoch: int, start: int, stop: int, divisor: int = 1) -> None:
        """Do now what the next call of `cut` will ask for; what fails then fails there."""
        with suppress(Exception):
            self._ahead = (epoch, start, stop, divisor), self.cut(epoch, start, stop, divisor)
