"""Which evaluation was the best, and when to give up waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Best evaluation so far, and the number of evaluations in a row that did not improve enough.

    The rule is that of the stack: the best moves on any strict improvement; the count of failures
    is reset only by an improvement of more than `threshold`. A loss that is not finite is a
    failure.

    Attributes:
        patience: Failures in a row after which to stop; None never stops.
        threshold: Improvement in loss (nats per target) that a reset needs to exceed.
        best_step: Step of the best evaluation, None before the first.
        best_loss: Its loss.
        failures: Evaluations in a row without a sufficient improvement.

    Source: transformers 5.23 `EarlyStoppingCallback`.
    """

    patience: int | None
    threshold: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    failures: int = 0

    def observe(self, step: int, loss: float) -> bool:
        """Take in the evaluation at `step` and return whether it is the best so far."""
        finite = math.isfinite(loss)
        gain = math.inf if self.best_loss is None else self.best_loss - loss
        self.failures = 0 if finite and gain > self.threshold else self.failures + 1
        improved = finite and gain > 0
        if improved:
            self.best_step, self.best_loss = step, loss
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.patience is not None and self.failures >= self.patience
