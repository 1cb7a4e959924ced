"""How long rows are, and what a `data.max_length` would cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.labels import IGNORED, num_targets

LIMITS = (512, 1024, 2048, 4096)
# A recommended length is a multiple of this, cuts at most this share of the rows and loses at most
# this share of the targets.
_STEP, _TOLERATED = 64, 0.01
# The longest row is taken whole where it is at most so much longer than that.
_WORTH = 1.25


@dataclass(frozen=True)
class Lost:
    """What cutting rows at a length costs."""

    max_length: int
    rows_cut: int
    targets_lost: int
    rows_without_target: int


class Lengths:
    """Exact counts of lengths and of targets by their place; memory grows with the longest row."""

    def __init__(self) -> None:
        self._rows = np.zeros(_STEP, dtype=np.int64)  # [n]: rows of n tokens
        self._targets = np.zeros(_STEP, dtype=np.int64)  # [p]: targets that are the p-th token
        self._firsts = np.zeros(_STEP, dtype=np.int64)  # [p]: rows whose first target is there

    def add(self, labels: np.ndarray) -> None:
        """Count a row by its labels (T,), as it is before anything is cut."""
        length = len(labels)
        while length >= len(self._rows):
            for name in ("_rows", "_targets", "_firsts"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        self._rows[length] += 1
        if num_targets(labels):
            trained = labels != IGNORED
            trained[0] = False  # nothing predicts it
            self._targets[:length] += trained
            self._firsts[int(trained.argmax())] += 1

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self._rows.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self._rows @ np.arange(len(self._rows)))

    @property
    def targets(self) -> int:
        """Targets of all rows."""
        return int(self._targets.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row, 0 without rows."""
        return int(np.flatnonzero(self._rows).max(initial=0))

    def percentile(self, share: float) -> int:
        """Return the least length that this share of the rows does not exceed."""
        least = np.ceil(share * self.rows)
        return int(np.searchsorted(np.cumsum(self._rows), least)) if self.rows else 0

    def lost_at(self, max_length: int) -> Lost:
        """Return what is lost where every row ends at its `max_length`-th token."""
        return Lost(
            max_length,
            rows_cut=int(self._rows[max_length + 1 :].sum()),
            targets_lost=int(self._targets[max_length:].sum()),
            rows_without_target=int(self._firsts[max_length:].sum()),
        )

    def recommended(self) -> int | None:
        """Return the least length in steps of 64 that cuts and loses 1 % at most; None for no rows.

        Where the longest row is hardly longer, it is that row's.
        """
        if not self.rows:
            return None
        whole = _rounded(self.longest)
        tried = range(_STEP, whole, _STEP)
        least = next((length for length in tried if self._tolerates(length)), whole)
        return whole if whole <= _WORTH * least else least

    def histogram(self) -> np.ndarray:
        """Return (longest + 1,) int64: how many rows have each length."""
        return self._rows[: self.longest + 1]

    def _tolerates(self, length: int) -> bool:
        lost = self.lost_at(length)
        return (
            lost.rows_cut <= _TOLERATED * self.rows
            and lost.targets_lost <= _TOLERATED * self.targets
        )


def _rounded(length: int) -> int:
    return max(_STEP, -(-length // _STEP) * _STEP)
