"""The arithmetic of steps: how many, which examples each holds, and when a run does what.

`RunPlan` is computed once. The loop asks it, the report checks against it and `--plan` prints it,
so that they cannot disagree. The formulas:

- steps an epoch U = ceil(N / B) for N examples and B in a step: a step never straddles two epochs,
  the last one of an epoch is a smaller batch; where tokens say how large a step is, `plan.cuts`;
- steps in all T = `train.max_steps`, or ceil(epochs × U); warm-up `schedule.warmup_steps`, or
  ceil(T × ratio) in float64;
- a cadence of n an epoch is every max(1, U // n) steps; the last step always evaluates and saves.

Nothing here needs torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

from files.errors import UserError
from train.config.schema import RunConfig
from train.plan.cadence import steps_due
from train.plan.cuts import Cut, Rows, cut_by_targets
from train.plan.decide import decide_micro_batch_tokens
from train.plan.profiled import profiled_steps
from train.plan.schedule import learning_rate_factor, warmup_step_count

# A plan lists its steps; a billion-token epoch in steps of a thousand tokens has a million.
MAX_STEPS = 10_000_000


@dataclass(frozen=True)
class RunPlan:
    """When a run does what. Steps count from 1; a step is one optimizer update."""

    num_examples: int  # training examples in an epoch
    world_size: int  # ranks that share each step's examples
    # Examples in a step, over all ranks; where tokens say how many, their mean.
    effective_batch_size: int
    micro_batch_size: int | None  # examples in a micro-batch of one rank; None where tokens cut it
    micro_batch_tokens: int | None  # tokens in a micro-batch; None where examples cut it
    # Micro-batches that the busiest rank runs in a full step; None where tokens cut it, since that
    # differs from step to step.
    micro_batches_per_step: int | None
    steps_per_epoch: int  # steps an epoch, the last one possibly smaller
    total_steps: int  # steps planned in all
    warmup_steps: int  # steps until the peak learning rate
    log_steps: tuple[int, ...]  # steps at which to log, the last included
    # Steps at which to evaluate, the last included; empty without a valid set.
    eval_steps: tuple[int, ...]
    save_steps: tuple[int, ...]  # steps at which to save, the last included
    schedule: str  # `cosine`, `linear`, `constant` or `wsd`
    peak_learning_rate: float  # the rate at the end of the warm-up
    min_lr_ratio: float  # share of the peak at which the schedule ends
    decay_ratio: float  # share of the steps in which `wsd` falls
    profile_steps: range = range(0)  # steps that are traced
    cut: Cut | None = None  # where steps end, if tokens say how large they are

    def learning_rate(self, step: int) -> float:
        """Return the learning rate that the update of `step` uses (0 at the first of a warm-up)."""
        factor = learning_rate_factor(
            self.schedule,
            step - 1,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            min_lr_ratio=self.min_lr_ratio,
            decay_ratio=self.decay_ratio,
        )
        return self.peak_learning_rate * factor

    def logs_at(self, step: int) -> bool:
        """Return whether `step` goes to TensorBoard and the console."""
        return _contains(self.log_steps, step)

    def evaluates_at(self, step: int) -> bool:
        """Return whether the valid set is evaluated after `step`."""
        return _contains(self.eval_steps, step)

    def saves_at(self, step: int) -> bool:
        """Return whether a checkpoint is written after `step`."""
        return _contains(self.save_steps, step)

    def batch(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop): the examples of `step` are order(epoch)[start:stop].

        Epochs count from 0.
        """
        if self.cut is not None:
            return self.cut.batch(step)
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        start = index * self.effective_batch_size
        return epoch, start, min(start + self.effective_batch_size, self.num_examples)

    def epoch_of(self, step: int) -> float:
        """Return the epochs done after `step`, counted in examples: 1.5 is half of the second."""
        if step < 1:
            return 0.0
        epoch, _, stop = self.batch(step)
        return epoch + stop / self.num_examples


def _contains(steps: tuple[int, ...], step: int) -> bool:
    place = bisect_left(steps, step)
    return place < len(steps) and steps[place] == step


def effective_batch_size(config: RunConfig, world_size: int = 1) -> int:
    """Return the examples in a step over all ranks."""
    train = config.train
    if train.effective_batch_size is not None:
        return train.effective_batch_size
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def rank_shares(examples: int, ranks: int) -> tuple[int, ...]:
    """Return how many of a step's examples each rank takes: 25 over 6 are 5, 4, 4, 4, 4, 4."""
    share, rest = divmod(examples, ranks)
    return tuple(share + (rank < rest) for rank in range(ranks))


def plan_run(
    config: RunConfig,
    num_examples: int,
    world_size: int = 1,
    *,
    num_valid: int | None = None,
    rows: Rows | None = None,
) -> RunPlan:
    """Return the plan of a run over `num_examples` training examples.

    Args:
        config: What is asked.
        num_examples: Training examples of an epoch (after dropping and splitting rows).
        world_size: Ranks that share a step.
        num_valid: Examples to evaluate; 0 plans no evaluation, None leaves it open.
        rows: Those examples; needed where `train.effective_batch_tokens` is set.

    Raises:
        UserError: There is no example to train on, the steps are too many to be listed, or those to
            be traced are none of the run's.
    """
    if num_examples < 1:
        raise UserError("data.train holds no example to train on; look at the data's own counts")
    cut = cut_by_targets(config, rows, at_most=MAX_STEPS)
    batch = cut.mean_examples if cut else effective_batch_size(config, world_size)
    share = rank_shares(batch, world_size)[0]
    tokens, size = decide_micro_batch_tokens(config), config.train.per_device_train_batch_size
    micro_batch = (size if cut else min(size, share)) if tokens is None else None
    steps_per_epoch = cut.steps_per_epoch if cut else math.ceil(num_examples / batch)
    total_steps = config.train.max_steps or max(
        1, cut.total_steps if cut else math.ceil(config.train.num_train_epochs * steps_per_epoch)
    )
    if total_steps > MAX_STEPS:
        raise UserError(
            f"{total_steps:,} steps are more than a run can have ({MAX_STEPS:,}); lower "
            "train.max_steps or train.num_train_epochs, or take more examples a step"
        )
    due = partial(steps_due, steps_per_epoch=steps_per_epoch, total_steps=total_steps, cut=cut)
    return RunPlan(
        num_examples=num_examples,
        world_size=world_size,
        effective_batch_size=batch,
        micro_batch_size=micro_batch,
        micro_batch_tokens=tokens,
        micro_batches_per_step=None if cut or not micro_batch else math.ceil(share / micro_batch),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_of(config, total_steps),
        log_steps=due(config.log),
        eval_steps=() if num_valid == 0 else due(config.eval),
        save_steps=due(config.checkpoint),
        schedule=config.schedule.name,
        peak_learning_rate=config.optimizer.learning_rate,
        min_lr_ratio=config.schedule.min_lr_ratio,
        decay_ratio=config.schedule.decay_ratio,
        profile_steps=profiled_steps(config.train.profile_steps, total_steps),
        cut=cut,
    )


def warmup_of(config: RunConfig, total_steps: int) -> int:
    """Return the steps of warm-up in a run of `total_steps`."""
    schedule = config.schedule
    return warmup_step_count(
        total_steps, warmup_ratio=schedule.warmup_ratio, warmup_steps=schedule.warmup_steps
    )
