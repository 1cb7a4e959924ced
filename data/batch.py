"""A step's examples cut into micro-batches of flat tokens, targets already shifted.

However they are cut and padded, all cuts of the same indices hold the same examples in the same
order and the same targets: only speed and memory differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.examples import Example, Examples
from data.labels import IGNORED

LAYOUTS = ("unpadded", "longest", "max_length")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How examples become micro-batches.

    Attributes:
        micro_batch_size: Examples in a micro-batch, where `micro_batch_tokens` is None.
        micro_batch_tokens: Rows in a micro-batch, padding included: each takes as many consecutive
            examples as fit. One example alone may exceed it.
        layout: `unpadded` (documents end to end), `longest` (each padded to the longest of its
            micro-batch) or `max_length` (each padded to `max_length`).
        max_length: Rows of a document under `max_length`.
        pad_id: Token that fills padded rows.
    """

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    layout: str
    max_length: int
    pad_id: int

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is not one of {LAYOUTS}")
        tokens = self.micro_batch_tokens
        if self.micro_batch_size < 1 or (tokens is not None and tokens < 1):
            raise ValueError("a micro-batch holds at least one example and one token")

    def divided_by(self, divisor: int) -> Batching:
        """Return the same with micro-batches of that share of their size."""
        tokens = self.micro_batch_tokens
        return replace(
            self,
            micro_batch_size=max(1, self.micro_batch_size // divisor),
            micro_batch_tokens=None if tokens is None else max(1, tokens // divisor),
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass sees: M rows, documents one after another.

    Attributes:
        input_ids: (M,) int64.
        targets: (M,) int64: the label of the next token of the same document; -100 where there is
            none (masked, the last token of a document, padding).
        lengths: Real tokens of each document.
        padded_length: Rows that each document occupies, or None where they lie end to end.
        examples: Index of each document's example; it keys dropout.
        target_rows: (S,) int64: the rows that have a target.
        num_tokens: Real tokens, padding left out.
        weights: (S,) float64, for each of `target_rows` the weight of its document; None where all
            are 1.
    """

    input_ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    padded_length: int | None
    examples: tuple[int, ...]
    target_rows: Tensor
    num_tokens: int
    weights: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """S, the number of rows with a target."""
        return len(self.target_rows)

    @property
    def total_weight(self) -> float:
        """What the targets weigh together: S where there are no weights."""
        return float(self.num_targets if self.weights is None else self.weights.sum())

    def weights_over(self, mean: float | None, dtype: torch.dtype) -> Tensor | None:
        """Return `weights` divided by a mean, (S,), for states of `dtype`; None: all count 1.

        Over the mean of their step they are of a size that half precision can hold, and equal ones
        are 1 exactly. They are of fp32, and of fp64 where the states are.
        """
        if mean is None or self.weights is None:
            return None
        return (self.weights / mean).to(torch.promote_types(dtype, torch.float32))


def micro_batches(
    examples: Examples, indices: Sequence[int] | np.ndarray, batching: Batching
) -> list[MicroBatch]:
    """Return the examples at `indices`, positions in the set, in this order, cut."""
    indices = np.asarray(indices, dtype=np.int64)
    lengths = examples.lengths[indices]
    batches = []
    for cut in _cuts(lengths, batching):
        padded_length = {
            "unpadded": None,
            "longest": int(lengths[cut].max()),
            "max_length": batching.max_length,
        }[batching.layout]
        documents = [examples[int(i)] for i in indices[cut]]
        batches.append(_assemble(documents, padded_length, batching.pad_id))
    return batches


def _cuts(lengths: np.ndarray, batching: Batching) -> Iterator[slice]:
    """Yield consecutive cuts; with a budget of tokens, each as long as its rows stay within it."""
    budget, size = batching.micro_batch_tokens, batching.micro_batch_size
    if budget is None:
        yield from (slice(start, start + size) for start in range(0, len(lengths), size))
        return
    start, tokens, longest = 0, 0, 0
    for stop, length in enumerate(lengths.tolist()):
        tokens += length
        longest = max(longest, length)
        count = stop - start + 1
        rows = {
            "unpadded": tokens,
            "longest": count * longest,
            "max_length": count * batching.max_length,
        }
        if rows[batching.layout] > budget and stop > start:
            yield slice(start, stop)
            start, tokens, longest = stop, length, length
    if len(lengths):
        yield slice(start, len(lengths))


def _assemble(documents: list[Example], padded_length: int | None, pad_id: int) -> MicroBatch:
    """Lay the documents one after another and shift their labels."""
    lengths = tuple(len(document.input_ids) for document in documents)
    if padded_length is not None and max(lengths) > padded_length:
        raise ValueError(f"a document of {max(lengths)} tokens in rows of {padded_length}")
    starts = np.concatenate([[0], np.cumsum([padded_length or length for length in lengths])])
    input_ids = np.full(starts[-1], pad_id, dtype=np.int64)
    targets = np.full(starts[-1], IGNORED, dtype=np.int64)
    weights = np.ones(starts[-1])
    for document, start, length in zip(documents, starts, lengths, strict=False):
        input_ids[start : start + length] = document.input_ids
        targets[start : start + length - 1] = document.labels[1:]
        weights[start : start + length] = 1.0 if document.weight is None else document.weight
    target_rows = np.flatnonzero(targets != IGNORED)
    weighted = any(document.weight is not None for document in documents)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        lengths=lengths,
        padded_length=padded_length,
        examples=tuple(document.index for document in documents),
        target_rows=torch.from_numpy(target_rows),
        num_tokens=sum(lengths),
        weights=torch.from_numpy(weights[target_rows]) if weighted else None,
    )
