"""Frozen weights in host memory, brought to the device layer by layer while another computes.

Legend: N output features · K input features

A layer's matrices lie in one buffer on the host, and come with one copy into one of two places on
the device: layer i into place i mod 2, so that neighbours are never in each other's way. Whoever
multiplies by a weight asks for it then (`StreamedWeight.dense`) and keeps nothing of it: a backward
pass asks once more. The first to ask for a layer's weight waits for that layer, and sends for the
next one on the way that the pass goes, up or down, into the place of the layer behind it. The way
is a guess that costs time alone where it is wrong: what is not there is brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.pinned import COMPUTE, FETCH, Boundary, CudaBoundary

PLACES = 2
_ALIGNED = 256  # bytes: where a tensor of its own would begin


class StreamedWeight:
    """A frozen (N, K) weight of a streamed layer, in the place of a tensor in `Operands`."""

    requires_grad = False

    def __init__(self, stream: LayerStream, layer: int, begin: int, weight: Tensor):
        self._stream, self._layer, self._begin = stream, layer, begin
        self.shape, self.dtype = weight.shape, weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it is multiplied."""
        return self._stream.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight on the device, (N, K): to be read at once, and not to be kept."""
        end = self._begin + self.shape.numel()
        return self._stream.bring(self._layer)[self._begin : end].view(self.shape).to(dtype)


class LayerStream:
    """The weights of layers on the host, and two places for a layer's on the device.

    A parameter keeps its name and its numbers: its data becomes a view of the host's buffer.

    Args:
        layers: The parameters of each layer in the order of the forward pass, frozen, on the host,
            all of one type.
        device: Where they are multiplied.
        boundary: What lies between; None takes CUDA's.

    Attributes:
        weights: What stands for each parameter in `Operands`, as `layers` has them.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Tensor]],
        device: torch.device,
        boundary: Boundary | None = None,
    ):
        self.device = device
        remedy = "model.stream_layers=false with model.quantization=nf4"
        self._boundary = boundary or CudaBoundary(device, "model.stream_layers", remedy)
        self._host: list[Tensor] = []
        self.weights: list[list[StreamedWeight]] = []
        dtype = layers[0][0].dtype
        step = _ALIGNED // dtype.itemsize
        for index, parameters in enumerate(layers):
            begins, total = [], 0
            for parameter in parameters:
                assert parameter.dtype == dtype and not parameter.requires_grad
                begins.append(total)
                total += -(-parameter.numel() // step) * step
            flat = self._boundary.on_host((total,), dtype)
            for begin, parameter in zip(begins, parameters, strict=True):
                place = flat[begin : begin + parameter.numel()].view(parameter.shape)
                parameter.data = place.copy_(parameter.data)
            self._host.append(flat)
            self.weights.append(
                [
                    StreamedWeight(self, index, begin, parameter)
                    for begin, parameter in zip(begins, parameters, strict=True)
                ]
            )
        longest = max(map(len, self._host))
        self._places = [self._boundary.on_device(longest, dtype) for _ in range(PLACES)]
        self._holds: list[int | None] = [None] * PLACES
        self._arrivals: list[Any] = [None] * PLACES
        self._at: int | None = None  # the layer that computes

    def bring(self, layer: int) -> Tensor:
        """Return a layer's weights on the device, end to end; send for the next layer's."""
        place = layer % PLACES
        if layer != self._at:
            before, self._at = self._at, layer
            self._send_for(layer)
            self._boundary.wait(COMPUTE, self._arrivals[place])
            upwards = layer == 0 or (before is not None and before == layer - 1)
            following = layer + 1 if upwards else layer - 1
            if following < len(self._host):
                self._send_for(following)
        return self._places[place]

    def _send_for(self, layer: int) -> None:
        place = layer % PLACES
        if self._holds[place] != layer:
            host = self._host[layer]
            self._holds[place] = layer
            # Behind the kernels that read what the place held.
            self._boundary.wait(FETCH, self._boundary.record(COMPUTE))
            self._boundary.copy(FETCH, self._places[place][: len(host)], host)
            self._arrivals[place] = self._boundary.record(FETCH)
