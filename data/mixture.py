"""Several sources in given shares: a pure function of (seed, epoch, position), so never saved.

An epoch has as many examples as the sources hold together, N. Of them source j gets n_j places, by
the method of largest remainders from its weight, the same in every epoch. The source counts its
draws over the whole run: epoch e takes draws e·n_j to (e + 1)·n_j - 1, and draw d is at d mod M of
the source's permutation number ⌊d / M⌋, for M examples. So all of them are drawn once before any is
drawn twice, whatever the weight and wherever epochs end.

What is drawn is reordered by `data.order.epoch_order`. Without shuffling sources keep their own
order and are spread evenly over the epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from files.errors import UserError, counted

if TYPE_CHECKING:
    from data.examples import Examples

_SOURCES = 0x6D69787475726573  # "mixtures": draws of no other use have this key


@dataclass(frozen=True)
class MixedSource:
    """What is known of one source of a mixture."""

    name: str  # as in data.train
    weight: float  # the share asked of it, in the unit of the others'
    places: int  # its examples in an epoch
    rows: int  # its rows that are trained on
    examples: int  # examples made of them
    targets: int  # in those examples


@dataclass(frozen=True)
class Mixture:
    """The sources of a run's training examples, and how many of each an epoch holds.

    Attributes:
        names: What each source is called in `data.train`.
        weights: The share asked of each, in any unit.
        members: For each source the positions (M,) of its examples in the training set.
        places: Examples of each source in an epoch; their sum is that of all members.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    members: tuple[np.ndarray, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, examples: Examples, names: Sequence[str], weights: Sequence[float]) -> Mixture:
        """Return the mixture of examples that were loaded by source.

        Raises:
            UserError: A source has no example, or too small a weight to be given a place.
        """
        first_beyond = np.cumsum(examples.source_rows)
        source_of = np.searchsorted(first_beyond, examples.rows, side="right")
        members = tuple(np.flatnonzero(source_of == source) for source in range(len(names)))
        places = largest_remainders(len(examples), weights)
        for name, own, count, weight in zip(names, members, places, weights, strict=True):
            if not len(own):
                raise UserError(
                    f"data.weights: {name} has no example to draw (no row of it is of the training "
                    "split, or all are dropped, held out or, with data.near_duplicates=drop, like "
                    "others before them); leave it out of data.train"
                )
            if not count:
                raise UserError(
                    f"data.weights: the weight {weight:g} gives {name} no place among the "
                    f"{counted(len(examples), 'example')} of an epoch; raise it, or leave the "
                    "source out of data.train"
                )
        return cls(tuple(names), tuple(weights), members, places)

    def drawn(self, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Return the positions (N,) that a 0-based epoch draws, source after source."""
        return np.concatenate(
            [
                self._draws(source, epoch * count, count, seed if shuffle else None)
                for source, count in enumerate(self.places)
            ]
        )

    def _draws(self, source: int, start: int, count: int, seed: int | None) -> np.ndarray:
        own = self.members[source]
        first, last = start // len(own), (start + count - 1) // len(own)
        rounds = [
            own if seed is None else own[_permutation(len(own), seed, source, number)]
            for number in range(first, last + 1)
        ]
        begin = start - first * len(own)
        return np.concatenate(rounds)[begin : begin + count]

    def spread(self) -> np.ndarray:
        """Return the order (N,) of `drawn` in which every source is spread evenly.

        Draw k of n stands at (k + 1/2) / n of the epoch; of equal places the earlier source's is
        first.
        """
        places = [(2 * np.arange(count) + 1) / (2 * count) for count in self.places]
        return np.argsort(np.concatenate(places), kind="stable")

    def sources(self, examples: Examples) -> tuple[MixedSource, ...]:
        """Return what is known of each source, of the examples that the mixture was made of."""
        return tuple(
            MixedSource(
                name,
                weight,
                places,
                rows=len(np.unique(examples.rows[own])),
                examples=len(own),
                targets=int(examples.num_targets[own].sum()),
            )
            for name, weight, own, places in zip(
                self.names, self.weights, self.members, self.places, strict=True
            )
        )

    def lengths(self, of_examples: np.ndarray) -> np.ndarray:
        """Return the lengths (N,) of an epoch as it is to be expected, given those of all examples.

        Of each source they are spread over its own from the shortest to the longest, which counts.
        """
        found = []
        for own, count in zip(self.members, self.places, strict=True):
            ordered = np.sort(of_examples[own])
            ordered = ordered[(2 * np.arange(count) + 1) * len(own) // (2 * count)]
            ordered[-1] = of_examples[own].max()
            found.append(ordered)
        return np.concatenate(found)

    def fingerprint(self, of_examples: str) -> str:
        """Return the hash of a set of examples, given its own, of their sources and shares."""
        digest = hashlib.sha256(of_examples.encode() + repr(self.places).encode())
        for own in self.members:
            digest.update(b"source" + own.astype("<i8").tobytes())
        return digest.hexdigest()


def largest_remainders(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Return `total` places shared out by `weights`, as numbers that add up to it.

    Each gets its quota rounded down, and those with the largest remainders one more (Hamilton's
    method); of equal remainders the first. It is exact: weights count as they are written.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    places = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda j: places[j] - quotas[j])
    for source in by_remainder[: total - sum(places)]:
        places[source] += 1
    return tuple(places)


def _permutation(size: int, seed: int, source: int, number: int) -> np.ndarray:
    """Return a permutation of 0 … size - 1: the order of as many words of a counter's bits."""
    key = np.array([seed, _SOURCES], dtype=np.uint64)
    counter = np.array([0, 0, source, number], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(size)
    return np.argsort(words, kind="stable")
