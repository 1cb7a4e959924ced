"""Steps of so many target tokens (`train.effective_batch_tokens`): where each of them ends.

A step takes examples in the epoch's order until their targets reach the number: one example at
least, none of them cut in two, none of the next epoch's, so that an epoch's last step has what is
left. Targets are counted, the tokens that are trained, and not all that are read: the loss is their
mean, so that their number says how much the gradient of a step varies.

The order is a function of (seed, epoch), so that a run, its plan and its resume cut alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Protocol

from train.config.schema import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from data.mixture import Mixture


class Rows(Protocol):
    """Examples to train on, as a run (`Data`) and a plan (`KnownData`) have them."""

    @property
    def num_targets(self) -> np.ndarray | Sequence[int] | None:
        """(N,) targets of each, None where they are not known."""
        ...

    @property
    def mixture(self) -> Mixture | None:
        """The sources and the share of each; None: an epoch has every example once."""
        ...


@dataclass(frozen=True)
class Cut:
    """The steps of every epoch that a run begins.

    Attributes:
        stops: Of each step, the place in its epoch's order at which it stops.
        epochs: Of each epoch, the steps that are done at its end.
        total_steps: How many of the steps the run takes.
    """

    stops: tuple[int, ...]
    epochs: tuple[int, ...]
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch, on average."""
        return round(len(self.stops) / len(self.epochs))

    @property
    def mean_examples(self) -> int:
        """Examples a step, on average."""
        return round(self.stops[-1] * len(self.epochs) / len(self.stops))

    def batch(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop) as `RunPlan.batch` does.

        A step behind the last, as where a resume made the run shorter, counts as the last.
        """
        step = min(step, len(self.stops))
        epoch = bisect_left(self.epochs, step)
        first = step - 1 == (self.epochs[epoch - 1] if epoch else 0)
        return epoch, 0 if first else self.stops[step - 2], self.stops[step - 1]

    def times_an_epoch(self, times: int) -> tuple[int, ...]:
        """Return the steps so many times an epoch, evenly; once is its end."""
        steps: list[int] = []
        for before, done in pairwise((0, *self.epochs)):
            every = max(1, (done - before) // times)
            steps += range(before + every, done + 1, every)
        return tuple(step for step in steps if step <= self.total_steps)


def stops_of(targets: Sequence[int], wanted: int) -> list[int]:
    """Return where steps of at least `wanted` targets stop.

    Args:
        targets: (N,) targets of each example, in the order of the epoch.
        wanted: Targets at which a step stops; the last has what is left.
    """
    reached, stops = [0, *accumulate(targets)], [0]
    while stops[-1] < len(targets):
        enough = bisect_left(reached, reached[stops[-1]] + wanted, lo=stops[-1] + 1)
        stops.append(min(enough, len(targets)))
    return stops[1:]


def cut_by_targets(config: RunConfig, rows: Rows | None, *, at_most: int) -> Cut | None:
    """Return the steps of a run; None where `train.effective_batch_tokens` does not cut them.

    Args:
        config: What is asked.
        rows: The training examples.
        at_most: Steps beyond which no more are looked for: the plan refuses them.

    Raises:
        ValueError: Targets are asked for, and are not known.
    """
    train = config.train
    if train.effective_batch_tokens is None:
        return None
    if rows is None or rows.num_targets is None:
        raise ValueError("train.effective_batch_tokens needs the targets of each example")
    import numpy as np

    from data.order import epoch_order  # which needs torch, and most plans do not

    targets = np.asarray(rows.num_targets)
    epochs = math.inf if train.max_steps else math.ceil(train.num_train_epochs)
    stops: list[int] = []
    done: list[int] = []
    while len(done) < epochs and len(stops) < min(train.max_steps or math.inf, at_most + 1):
        order = epoch_order(
            len(targets),
            seed=train.seed,
            epoch=len(done),
            shuffle=config.data.shuffle,
            mixture=rows.mixture,
        )
        stops += stops_of(targets[order].tolist(), train.effective_batch_tokens)
        done.append(len(stops))
    total = train.max_steps or len(stops)
    if len(done) == epochs:  # of the last epoch its share of the steps
        before = done[-2] if len(done) > 1 else 0
        share = train.num_train_epochs - (len(done) - 1)
        total = before + math.ceil(share * (done[-1] - before))
    return Cut(tuple(stops), tuple(done), total)


def with_mean_examples(config: RunConfig, mean: int | None) -> RunConfig:
    """Return the configuration whose steps of tokens count as so many examples, for estimates.

    Where the mean is not known, each example counts as `data.max_length` targets.
    """
    wanted = config.train.effective_batch_tokens
    if wanted is None:
        return config
    size = mean or max(1, wanted // config.data.max_length)
    return replace(config, train=replace(config.train, effective_batch_size=size))
