"""Which steps of a run are traced: `train.profile_steps` in numbers."""

from __future__ import annotations

import re

from files.errors import UserError, counted

# The first steps make what the others find: caches, threads, compiled kernels.
STEPS_BEFORE = 2


def profiled_steps(asked: int | str | None, total_steps: int | None) -> range:
    """Return the steps that `train.profile_steps` asks for.

    Args:
        asked: `10-12` is those three; a number so many after the first two, as far as the run has
            so many; None is none.
        total_steps: Steps of the run; None where they are not known yet.

    Raises:
        UserError: It is neither, ends before it begins, or the run has no such steps.
    """
    if asked is None:
        return range(0)
    if isinstance(asked, int):
        total_steps = asked + STEPS_BEFORE if total_steps is None else total_steps
        first = max(1, min(STEPS_BEFORE + 1, total_steps - asked + 1))
        last = first + asked - 1
    else:
        found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", asked)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(
                f"train.profile_steps={asked}: must be a number of steps, such as 3, or the first "
                "and the last of them, such as 10-12"
            )
        first, last = int(found[1]), int(found[2])
    if total_steps is not None and last > total_steps:
        raise UserError(
            f"train.profile_steps={asked}: the run has {counted(total_steps, 'step')}; name steps "
            "that it has, or none"
        )
    return range(first, last + 1)
