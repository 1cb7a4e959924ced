"""Segments: which token rows belong to which document, and at which position.

Legend: M token rows of a micro-batch · D documents · T rows of one document.

A micro-batch has no batch dimension: its documents lie one after another in M rows. Unpadded, each
takes as many rows as it has tokens; padded, each takes `padded_length` rows, real tokens first.
Behind the last document there may be `tail` rows that belong to none, so that M repeats: they see
nothing, have no target and so no gradient.
Attention, rotary embeddings and dropout ask this object where documents begin, and nothing else
knows. Lengths stay on the host, so that no kernel launch waits for the device to tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.dropout import fold, mix_words, signed


@dataclass(frozen=True)
class Segments:
    """The documents of one micro-batch; build it with `Segments.build`.

    `positions` count inside each document, pads included. `dropout_rows` are row keys, a function
    of (seed, step, example, position); None means that nothing is dropped, as in evaluation.
    `dropout_seed` serves fused attention alone, whose generator takes one seed a call.
    """

    lengths: tuple[int, ...]  # real tokens of each document
    padded_length: int | None  # None: end to end; else the rows that each document takes
    positions: Tensor  # (M,) int64
    # (D + 1,) int32: the row each document begins at, and where the last ends; one more for a tail
    boundaries: Tensor
    dropout_rows: Tensor | None  # (M,) int32
    dropout_seed: int
    tail: int = 0  # rows behind the last document

    @property
    def num_documents(self) -> int:
        """D, the number of documents."""
        return len(self.lengths)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that each document takes, pads included; those of the tail are no document's."""
        if self.padded_length is None:
            return self.lengths
        return (self.padded_length,) * len(self.lengths)

    @property
    def num_rows(self) -> int:
        """M, the number of token rows."""
        return sum(self.rows) + self.tail

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device | str,
        padded_length: int | None = None,
        offset: int = 0,
        multiple: int = 1,
        examples: Sequence[int] | None = None,
        draw: tuple[int, int] | None = None,
    ) -> Segments:
        """Lay out documents of the given lengths.

        Args:
            lengths: real tokens of each document, each at least 1.
            device: where the activations live.
            padded_length: rows of every document, or None where they lie end to end.
            offset: position of the first row, where a key-value cache holds what came before.
            multiple: what the number of rows is rounded up to.
            examples: index of each document in the data set; needed with `draw`.
            draw: (seed, step) to drop elements by, or None to drop nothing.

        Raises:
            ValueError: no document, an empty one, one longer than `padded_length`, or a draw
                without one example index a document.
        """
        lengths = tuple(lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents need at least one token each; lengths are {lengths}")
        if padded_length is not None and max(lengths) > padded_length:
            raise ValueError(f"a document of {max(lengths)} tokens exceeds {padded_length} rows")
        rows = lengths if padded_length is None else (padded_length,) * len(lengths)
        tail = -sum(rows) % multiple
        all_rows = (*rows[:-1], rows[-1] + tail)  # the tail counts on from the last document
        positions = _positions(all_rows)
        boundaries = [0, *accumulate((*rows, tail) if tail else rows)]
        dropout_rows, dropout_seed = None, 0
        if draw is not None:
            if examples is None or len(examples) != len(lengths):
                raise ValueError("a draw needs the example index of every document")
            dropout_rows, dropout_seed = _draw(draw, examples, all_rows, positions + offset)
        return cls(
            lengths=lengths,
            padded_length=padded_length,
            positions=uploaded(positions + offset, device),
            boundaries=uploaded(torch.tensor(boundaries, dtype=torch.int32), device),
            dropout_rows=None if dropout_rows is None else uploaded(dropout_rows, device),
            dropout_seed=dropout_seed,
            tail=tail,
        )


def uploaded(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a host's tensor on a device, without waiting for what the device is doing.

    A copy to CUDA goes on by itself only from memory that the system cannot move.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _positions(rows: tuple[int, ...]) -> Tensor:
    """Return 0 … T-1 for each document, end to end: (M,) int64 on the host."""
    if len(set(rows)) == 1:
        return torch.arange(rows[0]).repeat(len(rows))
    return torch.cat([torch.arange(count) for count in rows])


def _draw(
    draw: tuple[int, int], examples: Sequence[int], rows: tuple[int, ...], positions: Tensor
) -> tuple[Tensor, int]:
    """Return the row keys, (M,) int32, and the seed for fused attention (`kernels.dropout`)."""
    seed, step = draw
    step_key = fold(fold(0, seed), step)
    keys = [fold(step_key, example) for example in examples]
    document_keys = torch.tensor([signed(key) for key in keys], dtype=torch.int32)
    row_keys = document_keys.repeat_interleave(torch.tensor(rows))
    batch_key = step_key
    for key in keys:
        batch_key = fold(batch_key, key)
    return mix_words(row_keys ^ positions.to(torch.int32)), batch_key
