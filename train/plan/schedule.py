"""Learning-rate schedules as pure functions of the step: no state, no torch, nothing to resume.

The convention is the stack's (transformers `optimization.py`): step s of a run, counted from 0, has
the factor f(s), so with warm-up the first update uses a learning rate of exactly 0, the peak stands
at s = warm-up, and the last of T updates uses f(T - 1): the 0 at s = T is never reached.
"""

from __future__ import annotations

import math

from files.errors import UserError, did_you_mean

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def warmup_step_count(
    total_steps: int, *, warmup_ratio: float = 0.0, warmup_steps: int | None = None
) -> int:
    """Return the warm-up's length: `warmup_steps` where set, else the ratio's share of the run.

    The share is rounded up. The product is rounded in float64 exactly as the stack does it: 100
    steps at 0.07 give 8, because 100 * 0.07 = 7.000000000000001.

    Source: transformers 5.23 `TrainingArguments.get_warmup_steps`.
    """
    if warmup_steps is not None:
        return warmup_steps
    return math.ceil(total_steps * warmup_ratio)


def learning_rate_factor(
    name: str,
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> float:
    """Return the share of the peak learning rate that a step uses, in [0, 1].

    It rises linearly from 0 over the warm-up, then follows a half cosine or a line down to
    `min_lr_ratio` at `total_steps`, or stays at 1; `wsd` (warm-up, stable, decay) stays at 1 until
    the last `total_steps` · `decay_ratio` steps, to the nearest, and falls in them by a half
    cosine. Past `total_steps` it stays where it ended; the stack's cosine would rise again. A
    warm-up longer than the run is cut short by the end of the run, below the peak.

    Args:
        name: `cosine`, `linear`, `constant` or `wsd`.
        step: Updates made before this one (0 at the first).
        warmup_steps: Length of the warm-up in steps; 0 starts at the peak.
        total_steps: Planned length of the run in steps. Stopping early does not compress the curve.
        min_lr_ratio: The factor at the end of a schedule that falls.
        decay_ratio: Share of the run in which `wsd` falls.

    Raises:
        UserError: `name` is no schedule.

    Source: transformers 5.23 `get_cosine_schedule_with_warmup`, `get_linear_schedule_with_warmup`,
        `get_constant_schedule_with_warmup`, `get_cosine_with_min_lr_schedule_with_warmup`,
        `get_wsd_schedule`.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"schedule.name: '{name}' is not one of {', '.join(SCHEDULES)}"
            f"{did_you_mean(name, SCHEDULES)}"
        )
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if name == "constant":
        return 1.0
    decay_steps = max(1, total_steps - warmup_steps)
    if name == "wsd":
        decay_steps = min(decay_steps, max(1, round(total_steps * decay_ratio)))
    if name == "linear":
        falling = max(0.0, (total_steps - step) / decay_steps)
    else:
        begin = total_steps - decay_steps if name == "wsd" else warmup_steps
        progress = min(1.0, max(0, step - begin) / decay_steps)
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
    return falling * (1.0 - min_lr_ratio) + min_lr_ratio
