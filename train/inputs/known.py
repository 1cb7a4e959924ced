"""What is known of a run's data and model before it starts, and why the rest is not.

What would need them is None in the plan's document; why they are unknown is said once, here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.mixture import MixedSource, Mixture

if TYPE_CHECKING:
    from data.examples import Examples
    from train.inputs.dataset import Data


@dataclass(frozen=True)
class Unknown:
    """What is not known yet; `because` says why, or what to do about it."""

    because: str


NO_DATA = Unknown("pass a file or folder as data.train")


@dataclass(frozen=True)
class KnownData:
    """Data that was read."""

    num_examples: int  # training examples; rows, where they could not be tokenised
    num_valid: int  # valid examples; 0 plans no evaluation
    num_test: int  # test examples
    # Tokens of each training example; of a mixture, of those that an epoch is expected to draw.
    lengths: Sequence[int] | Unknown
    # What the data held (rows, truncated, dropped, …), passed on as it is.
    counts: Mapping[str, Any]
    # Targets of each training example; None where they could not be tokenised.
    num_targets: Sequence[int] | None = None
    # The hash of each set's ids and labels, where they are known.
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)
    mixture: Mixture | None = None  # data.weights
    sources: Sequence[MixedSource] = ()  # of the mixture

    @classmethod
    def of(cls, data: Data) -> KnownData:
        """Return what is known of data that was tokenised."""
        mixture, lengths = data.mixture, data.train.lengths
        return cls(
            num_examples=len(data.train),
            num_valid=data.num_valid,
            num_test=0 if data.test is None else len(data.test),
            lengths=(lengths if mixture is None else mixture.lengths(lengths)).tolist(),
            counts=dataclasses.asdict(data.train.counts) | _weights(data.train),
            num_targets=data.num_targets.tolist(),
            fingerprints=data.fingerprints,
            mixture=mixture,
            sources=() if mixture is None else mixture.sources(data.train),
        )


def _weights(train: Examples) -> dict[str, float]:
    """Return the least and the largest weight of a training example, where rows have weights."""
    if train.weights is None:
        return {}
    return {"least_weight": float(train.weights.min()), "most_weight": float(train.weights.max())}
