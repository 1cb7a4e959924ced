"""Where AdamW's moments lie, and the pieces in which an update walks through them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.optim.buffers import block_elements


@dataclass(frozen=True)
class Span:
    """Flat tensors of one length that are updated alike: a part of the buffer, or a parameter."""

    # Weight and gradient, and both moments, where `Moments` keeps them; (n,) each.
    flat: tuple[Tensor, ...]
    weight_decay: float
    name: str = ""  # of a parameter
    row: int = 1  # a piece is cut at a multiple of so many elements
    rate: float = 1.0  # what the learning rate is multiplied by

    def starts(self, elements: int) -> range:
        """Return where pieces begin that hold `elements`, or a row, each."""
        return range(0, len(self.flat[0]), max(self.row, elements // self.row * self.row))

    def piece(self, begin: int, step: int) -> tuple[Tensor, ...]:
        """Return weight, gradient and moments from `begin` on, `step` elements of each."""
        return tuple(tensor[begin : begin + step] for tensor in self.flat)


# A span, where in it the piece begins, and the piece: weight, gradient, both moments.
Piece = tuple[Span, int, tuple[Tensor, ...]]


class Moments:
    """Moments beside the parameters: pieces are views of them."""

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a moment of a parameter, or of the buffer, as it begins."""
        return torch.zeros_like(like, dtype=dtype)

    def pieces(self, spans: Iterable[Span], *, whole: bool) -> Iterator[Piece]:
        """Yield the spans in pieces, with moments where the update is computed.

        What is written to a piece's moments is kept once the next piece is asked for.

        Args:
            spans: The parameters, their gradients and moments.
            whole: Whether a piece may be as long as a span: an update that is one kernel.
        """
        for span in spans:
            if whole:
                yield span, 0, span.flat
                continue
            starts = span.starts(block_elements(span.flat[0].device))
            for begin in starts:
                yield span, begin, span.piece(begin, starts.step)

    def settle(self) -> None:
        """Wait until all that was written to moments can be read where they lie."""
