"""What a decoder remembers of a document while it writes on.

Legend: M new token rows · N rows seen by a cache, the new M included · kv key/value heads
        d head size
"""

from __future__ import annotations

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
        self.length = 0  # tokens held; advanced once a forward pass, after the last layer
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

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
