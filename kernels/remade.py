"""Trained linear layers whose input is made again in the backward pass instead of being kept.

Legend: M token rows · K, N features in and out

    forward    y = x Wᵀ + bias
    backward   dW = dyᵀ x             db = Σ over the rows of dy             dx = dy W

Products, types and the order of sums are those of autograd for layers that keep their input, so
that every gradient is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operands import Made, Operands, compute_dtype, dense, same_autocast


def linears_of_remade(x: Made, operands: Sequence[Operands]) -> list[Tensor]:
    """Apply linear layers without adapters to one input, (M, K) → (M, N) each, and forget it."""
    dtype = compute_dtype(x.value)
    # Lowered outside, so that a gradient arrives in the type of the product and is cast behind it.
    parts = [
        part
        for weight, bias, *_ in operands
        for part in (dense(weight, dtype), None if bias is None else bias.to(dtype))
    ]
    return list(_Linears.apply(x.value, x.again, x.sources, dtype, *parts))  # pyright: ignore[reportGeneralTypeIssues]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        again: Any,
        sources: tuple[Tensor | None, ...],
        dtype: torch.dtype,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.dtype, ctx.input_dtype = again, dtype, x.dtype
        ctx.autocast = same_autocast(x)
        ctx.save_for_backward(*parts[::2], *sources)
        with torch.autocast(x.device.type, enabled=False):
            lowered = x.to(dtype)
            return tuple(
                F.linear(lowered, weight, bias)  # pyright: ignore[reportArgumentType]
                for weight, bias in zip(parts[::2], parts[1::2], strict=True)
            )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        weights, sources = ctx.saved_tensors[: len(grads)], ctx.saved_tensors[len(grads) :]
        needs_x, _, _, _, *needed = ctx.needs_input_grad
        with ctx.autocast():
            x = ctx.again(*sources).to(ctx.dtype)
        found: list[Tensor | None] = [None] * len(needed)
        dx: Tensor | None = None
        # The last first, as autograd adds the gradients of what several layers read.
        for i in reversed(range(len(grads))):
            if needed[2 * i]:
                found[2 * i] = torch.mm(grads[i].t(), x)
            if needed[2 * i + 1]:
                found[2 * i + 1] = grads[i].sum(0)
            if needs_x:
                part = torch.mm(grads[i], weights[i]).to(ctx.input_dtype)
                dx = part if dx is None else dx.add_(part)
        return (dx, None, None, None, *found)
