"""What a linear layer offers to `linears`: its tensors and, where it is adapted, its LoRA factors.

Legend: K input features · N output features · r adapter rank.

A plain linear and an adapted one return the same tuple from `operands()`, so that a model can hand
all the linears that read one input to one kernel without knowing which of them are adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quantised import QuantisedWeight
from kernels.streamed import StreamedWeight

HeldWeight = QuantisedWeight | StreamedWeight  # no tensor: made one where it is multiplied by


class Operands(NamedTuple):
    """y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ, the last term only where A and B are given."""

    weight: Tensor | HeldWeight  # (N, K)
    bias: Tensor | None = None  # (N,)
    lora_a: Tensor | None = None  # (r, K)
    lora_b: Tensor | None = None  # (N, r)
    scale: float = 1.0  # alpha / r, or alpha / √r
    dropout: float = 0.0  # probability of dropping an element of the adapter's input
    module: int = 0  # `dropout.module_id` of the layer's name: which masks it draws
    magnitude: Tensor | None = None  # (N,) lengths of the adapted weight's rows (`kernels.dora`)


class Made(NamedTuple):
    """An activation that is made from tensors which are kept for its own backward pass anyway.

    Linears that read it may keep the sources in its place and make it again in their backward pass.
    Where a backend's linears can make it forward too, and return the gradients of its sources, it
    is not made before one of them reads it, and they need not ask for its value.
    """

    made: Tensor | Callable[..., Tensor]  # (M, K), or what makes it of the sources, for autograd
    again: Callable[..., Tensor]  # of the sources: what `value` is, outside autograd
    sources: tuple[Tensor | None, ...]
    # Made again on every device, for the gradients of weights too, not only where that is faster.
    remake: bool = False

    @property
    def value(self) -> Tensor:
        """The activation, (M, K); what is not made yet is made for whoever asks."""
        return self.made if isinstance(self.made, Tensor) else self.made(*self.sources)

    @classmethod
    def by(cls, function: Callable[..., Tensor], *sources: Tensor) -> Made:
        """Return what `function` makes of the sources."""
        return cls(function(*sources), function, sources)

    def like(self, x: Tensor | Made) -> Made:
        """Return it, to be made again where `x`, which it comes from, is."""
        return self._replace(remake=isinstance(x, Made) and x.remake)


def value_of(x: Tensor | Made) -> Tensor:
    """Return the activation itself."""
    return x.value if isinstance(x, Made) else x


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return what products of `x` are computed in: autocast's type where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def same_autocast(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """Return what enters, in a backward pass, the autocast that is on for `x` now."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def dense(weight: Tensor | HeldWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight in the type that is computed in; nobody keeps that of a held one."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)


def gradient_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product that a parameter's gradient is.

    On CUDA the fp32 sums of a product in half precision are returned as they are, since parameters
    that are trained are fp32; other devices have no such product and round them.
    """
    if left.device.type in ("cuda", "meta") and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)
