"""Moments that lie in host memory, and pass through two buffers on the device at each update.

An update walks through the moments in buckets. Three queues work at once: one brings the next
bucket to the device, one computes, one takes the last bucket back. What must wait for what is
said by events:

    fetch bucket i     waits until the buffer's bucket i - 2 is stored
    compute bucket i   waits until it is fetched
    store bucket i     waits until it is computed

So no more than two buckets are on the device, and every number is what it would be beside the
parameters. Nothing is transferred before `pieces` is asked for, which is when norm and finiteness
of the gradient are decided. A checkpoint reads the host's memory and a resume writes it: the device
never holds a second copy.

Masters stay where they are: a step computes with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.pinned import COMPUTE, FETCH, STORE, Boundary
from train.optim.moments import Moments, Piece, Span

# Both moments of a bucket are 32 MiB at fp32: more than a millisecond on PCIe 4, beside which the
# start of a transfer is nothing, and little enough for adapters to gain by it.
BUCKET_ELEMENTS = 1 << 22
BUFFERS = 2


@dataclass
class _Buffer:
    """A place on the device for both moments of a bucket."""

    moments: tuple[Tensor, Tensor]
    free: Any  # event: what it held is stored


class PagedMoments(Moments):
    """Moments in host memory: pieces have them in one of two buffers on the device."""

    def __init__(self, boundary: Boundary, bucket_elements: int = BUCKET_ELEMENTS) -> None:
        """Begin without buffers, which the first update makes, as long as the longest bucket."""
        self._boundary = boundary
        self._elements = bucket_elements
        self._buffers: list[_Buffer] = []

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a moment in host memory."""
        return self._boundary.on_host(like.shape, dtype)

    def pieces(self, spans: Iterable[Span], *, whole: bool) -> Iterator[Piece]:
        """Yield buckets, each on the device while it is the newest; `whole` ones too."""
        boundary = self._boundary
        buckets = [
            (span, begin, span.piece(begin, starts.step))
            for span in spans
            for starts in [span.starts(self._elements)]
            for begin in starts
        ]
        self._make_buffers([tensors for _, _, tensors in buckets])

        def fetch(index: int) -> tuple[tuple[Tensor, ...], Any]:
            """Begin to fetch a bucket; return where it will lie, and the event of its arrival."""
            buffer, host = self._buffers[index % BUFFERS], buckets[index][2][2:]
            boundary.wait(FETCH, buffer.free)
            places = tuple(x[: len(y)] for x, y in zip(buffer.moments, host, strict=True))
            for target, source in zip(places, host, strict=True):
                boundary.copy(FETCH, target, source)
            return places, boundary.record(FETCH)

        coming = fetch(0) if buckets else None
        for index, (span, begin, (weight, gradient, *host)) in enumerate(buckets):
            assert coming is not None
            moments, arrived = coming
            if index + 1 < len(buckets):
                coming = fetch(index + 1)
            boundary.wait(COMPUTE, arrived)
            yield span, begin, (weight, gradient, *moments)
            boundary.wait(STORE, boundary.record(COMPUTE))
            for target, source in zip(host, moments, strict=True):
                boundary.copy(STORE, target, source)
            self._buffers[index % BUFFERS].free = boundary.record(STORE)

    def _make_buffers(self, buckets: list[tuple[Tensor, ...]]) -> None:
        if self._buffers or not buckets:
            return
        longest = max(len(tensors[0]) for tensors in buckets)
        dtype = buckets[0][2].dtype
        for _ in range(BUFFERS):
            first, second = (self._boundary.on_device(longest, dtype) for _ in range(2))
            # Memory that the computing queue may have given up and not yet left.
            self._buffers.append(_Buffer((first, second), self._boundary.record(COMPUTE)))

    def settle(self) -> None:
        """Wait until all buckets are stored."""
        self._boundary.finish()


def buffer_bytes(elements: int) -> int:
    """Return at most how many bytes of the device the moments of so many elements take."""
    return BUFFERS * 2 * 4 * min(elements, BUCKET_ELEMENTS)
