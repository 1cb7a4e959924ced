"""A model whose frozen layers stay in host memory (`model.stream_layers`)."""

from __future__ import annotations

import torch

from kernels.pinned import Boundary
from kernels.streamed import LayerStream
from lora.linear import LoraLinear
from models.layers import CausalLM, Linear


def stream_layers(
    model: CausalLM, device: torch.device, boundary: Boundary | None = None
) -> LayerStream:
    """Keep the matrices of the layers of a model on the host, and move the rest to the device.

    The matrices keep their names and numbers. Embeddings, head, norms, biases and adapters are the
    device's. Results are those of a model that is there whole, bit for bit.

    Args:
        model: On the host, with its adapters, the matrices of its layers frozen.
        device: Where it computes.
        boundary: As of `LayerStream`.
    """
    layers = [
        [module for module in layer.modules() if isinstance(module, Linear | LoraLinear)]
        for layer in model.model.layers
    ]
    stream = LayerStream([[one.weight for one in layer] for layer in layers], device, boundary)
    held = set()
    for layer, weights in zip(layers, stream.weights, strict=True):
        for module, weight in zip(layer, weights, strict=True):
            module.streamed = weight
            held.add(id(module.weight))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in held:
            tensor.data = tensor.data.to(device)
    return stream
