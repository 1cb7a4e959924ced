"""Loss spikes: losses far above those of the steps before. They are recorded, never skipped."""

from __future__ import annotations

import math

WINDOW = 128
MIN_LOSSES = 32
DEVIATIONS = 6.0


def observe_loss(recent: list[float], loss: float) -> float | None:
    """Return how many standard deviations a spike lies above the losses before; enter the loss.

    A spike is a loss more than `DEVIATIONS` standard deviations above the mean of the last `WINDOW`
    losses, those before it. It enters the window like any other loss: the next few of a series are
    still found (after one at 20 deviations, one at 13 is), and a rise that lasts becomes what the
    steps to come are measured against.

    Nothing is said before `MIN_LOSSES` losses are there: a deviation of n values is uncertain by
    the share 1/√(2n), which is an eighth at 32, and normal losses exceed six of them once in a
    million steps; of two values it would say nothing. OLMo-core waits for 64, which is more steps
    than many a fine-tuning has.

    Args:
        recent: The losses so far, at most `WINDOW`, oldest first; changed in place. All are finite.
        loss: The finite loss of the step just done (nats per target).

    Returns:
        The number of standard deviations, or None where the loss is no spike.

    Source: OLMo-core, `SkipStepOptimizer`, which skips the update, and also by gradient norm.
    """
    spike = None
    if len(recent) >= MIN_LOSSES:
        mean = math.fsum(recent) / len(recent)
        squares = math.fsum((other - mean) ** 2 for other in recent)
        deviation = math.sqrt(squares / (len(recent) - 1))
        if deviation > 0 and loss - mean > DEVIATIONS * deviation:
            spike = (loss - mean) / deviation
    recent.append(loss)
    del recent[:-WINDOW]
    return spike
