"""At which steps a run logs, evaluates and saves."""

from __future__ import annotations

from train.config.schema import CheckpointSettings, EvalSettings, LogSettings
from train.plan.cuts import Cut


def steps_due(
    section: LogSettings | EvalSettings | CheckpointSettings,
    steps_per_epoch: int,
    total_steps: int,
    cut: Cut | None = None,
) -> tuple[int, ...]:
    """Return the steps at which something is due: those that are asked for, and the last.

    n an epoch is every max(1, steps_per_epoch // n) steps; where epochs differ in their steps
    (`cut`), that is counted in each from its own beginning.
    """
    times = section.per_epoch or (1 if isinstance(section.steps, str) else None)
    if cut is not None and times is not None:
        steps = cut.times_an_epoch(times)
    else:
        every = section.steps if times is None else max(1, steps_per_epoch // times)
        steps = () if not isinstance(every, int) else tuple(range(every, total_steps + 1, every))
    return steps if steps and steps[-1] == total_steps else (*steps, total_steps)
