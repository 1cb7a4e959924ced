"""What a decoder remembers of a document, or of several at once, while it writes on.

Legend: M new token rows · N rows seen by a cache, the new M included · kv key/value heads
        d head size · D documents
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """The keys and values of one document's past, for generation.

    Keys are stored rotated. Under `dynamic` rotary scaling they keep the frequencies of the length
    that the document had when they came in, as in every implementation with a cache.

    Args:
        capacity: tokens that the document may reach, prompt included; room for all of them is
            taken when the first ones come in.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        # Tokens held; advanced once a forward pass, after the last layer. What is set lower forgets
        # the tokens behind.
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def advance(self, rows: int) -> None:
        """Count the rows of a pass, when all layers have stored them."""
        self.length += rows

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens, those that are held included."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for layer, held in self._layers.items():
            keys, values = (x.new_empty((capacity, *x.shape[1:])) for x in held)
            keys[: self.length], values[: self.length] = (x[: self.length] for x in held)
            self._layers[layer] = keys, values

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new rows of a layer, (M, kv, d) each, and return all N of them.

        Raises:
            ValueError: the document would exceed `capacity`.
        """
        stop = self.length + len(k)
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens exceed the cache's capacity of {self.capacity}")
        if layer not in self._layers:
            room = (self.capacity, *k.shape[1:])
            self._layers[layer] = k.new_empty(room), v.new_empty(room)
        keys, values = self._layers[layer]
        keys[self.length : stop] = k
        values[self.length : stop] = v
        return keys[:stop], values[:stop]


class BatchCache:
    """The keys and values of D documents that are written on together, a token each in a pass.

    The first pass holds the beginnings of all, end to end; every later one a row for each document,
    in their order. As with `KeyValueCache`, keys are stored rotated;
    models with `dynamic` rotary scaling, whose frequencies differ between documents, cannot.

    Args:
        lengths: real tokens of each beginning.
        capacity: tokens that any document may reach.
        device: where the model computes.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, device: torch.device):
        self.capacity = capacity
        self.length = 0  # tokens of the longest document
        self.lengths = torch.tensor(lengths, device=device)  # (D,) tokens of each
        self._rows: Tensor | None = None  # which of all documents' rows this pass's stand in
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new rows of a layer, (M, kv, d) each.

        Returns:
            In the first pass these rows; afterwards all of them, (D, N, kv, d) each, of which a
            document's are the first, as many as it has tokens, and the new one.
        """
        if layer not in self._layers:
            room = (len(self.lengths), self.capacity, *k.shape[1:])
            # Zeros: what a mask hides must be finite all the same.
            self._layers[layer] = k.new_zeros(room), v.new_zeros(room)
        if self._rows is None:
            starts = torch.arange(len(self.lengths), device=k.device) * self.capacity
            self._rows = starts + self.lengths if self.length else self._beginnings(starts)
        stored = self._layers[layer]
        for old, new in zip(stored, (k, v), strict=True):
            old.flatten(0, 1).index_copy_(0, self._rows, new)
        if self.length == 0:
            return k, v
        keys, values = (x[:, : self.length + 1] for x in stored)
        return keys, values

    def _beginnings(self, starts: Tensor) -> Tensor:
        """Return the rows of all tokens of the beginnings, end to end."""
        place = torch.arange(self.capacity, device=starts.device)
        return (starts[:, None] + place)[place < self.lengths[:, None]]

    def advance(self, rows: int) -> None:
        """Count the tokens of a pass, when all layers have stored them."""
        if self.length == 0:
            self.length = int(self.lengths.max())
        else:
            self.length += 1
            self.lengths += 1
        self._rows = None

    def keep(self, documents: Sequence[int]) -> None:
        """Go on with these documents alone, in this order."""
        chosen = torch.tensor(documents, device=self.lengths.device)
        self.lengths = self.lengths[chosen]
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = keys[chosen], values[chosen]
