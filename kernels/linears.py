"""Linear layers that share one input, with their adapters, as one autograd function.

Legend: M token rows · K, N features in and out · r adapter rank · D the dropout mask, 0 or 1.

    forward    s = (x ⊙ D) Aᵀ                     y = x Wᵀ + bias + c · s Bᵀ        c = scale/(1-p)
    backward   ds = c · dy B                      dB = c · dyᵀ s       dA = dsᵀ (x ⊙ D)
               dx = Σ over the layers of dy W + (ds A) ⊙ D

A frozen weight costs a product in either direction and no third one for its gradient: 4·M·K·N
operations, not 6. The input is kept once for all layers that read it, or made again in the backward
pass from what is kept anyway (`Made`), beside M·r numbers for each adapter. The mask is drawn again
there too. On a CPU, where making and drawing take longer than reading, both are kept, the mask at
one byte an element. Adapters are cast to the type of the base's product, never activations to
theirs. A quantised weight is kept as it is, and made a tensor for one product at a time.

Source: Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dora import dora_linear
from kernels.dropout import keep, keep_mask
from kernels.operands import (
    HeldWeight,
    Made,
    Operands,
    compute_dtype,
    dense,
    gradient_product,
    same_autocast,
    value_of,
)
from kernels.reference import gelu_tanh
from kernels.remade import linears_of_remade
from kernels.segments import Segments
from kernels.streamed import StreamedWeight

_WHOLE = (Tensor, StreamedWeight)  # weights that are not quantised
# A function and what it makes the input of; see `Made`.
Again = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


def linears(
    x: Tensor | Made, operands: Sequence[Operands], segments: Segments | None = None
) -> list[Tensor]:
    """Apply several linear layers, adapted or not, to one input.

    Args:
        x: (M, K) input. What says how to make it again is made again in the backward pass instead
            of being kept; on a CPU, where that takes longer than reading it, only on demand.
        operands: what each layer's `operands()` returns.
        segments: the documents of the rows; without them adapters drop nothing.

    Returns:
        One (M, N) tensor a layer: Wx + b + scale · B(A(dropout(x))), in the base product's type.
    """
    value, remake = value_of(x), isinstance(x, Made) and x.remake
    if all(layer.lora_a is None and isinstance(layer.weight, _WHOLE) for layer in operands):
        if isinstance(x, Made) and remake and any(layer.weight.requires_grad for layer in operands):
            return linears_of_remade(x._replace(made=value), operands)
        lowered = _lowered(value, len(operands))
        return [_plain(x, layer) for x, layer in zip(lowered, operands, strict=True)]
    again = None if keeps_inputs(value.device) and not remake else made_again(x, operands)
    if any(layer.magnitude is not None for layer in operands):
        return [
            dora_linear(one, layer, segments, again)
            if layer.magnitude is not None
            else linears(one, [layer], segments)[0]
            for one, layer in zip(_lowered(value, len(operands)), operands, strict=True)
        ]
    return list(_Linears.apply(value, again, *flattened(operands, segments)))  # pyright: ignore[reportGeneralTypeIssues]


def linear_gelu(
    x: Tensor | Made,
    layer: Operands,
    segments: Segments | None = None,
    *,
    linears: Callable[..., list[Tensor]] = linears,
) -> Made:
    """Return GELU, in its tanh form, of one layer's output: (M, K) → (M, N).

    `linears` is the operation that the layer goes through.
    """
    (widened,) = linears(x, [layer], segments)
    return Made.by(gelu_tanh, widened)


def keeps_inputs(device: torch.device) -> bool:
    """Return whether an input is kept that could be made again."""
    return device.type == "cpu"


def made_again(x: Tensor | Made, operands: Sequence[Operands]) -> Again | None:
    """Return how to make the input again, unless weights need the whole of it for gradients."""
    if not isinstance(x, Made) or any(layer.weight.requires_grad for layer in operands):
        return None
    return x.again, x.sources


def flattened(operands: Sequence[Operands], segments: Segments | None) -> tuple[Any, ...]:
    """Return what an autograd function takes: row keys, (scale, p, module) a layer, all tensors."""
    rows = None if segments is None else segments.dropout_rows
    settings = [
        (layer.scale, layer.dropout if rows is not None else 0.0, layer.module)
        for layer in operands
    ]
    return rows, settings, *(part for layer in operands for part in layer[:4])


def _plain(x: Tensor, layer: Operands) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, StreamedWeight):
        return _Streamed.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    assert isinstance(weight, Tensor)
    if not torch.is_autocast_enabled(x.device.type):
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def _lowered(x: Tensor, times: int) -> Sequence[Tensor]:
    """Return `x` that often, in the type that is computed in: autocast would copy it each time."""
    if times == 1 or x.dtype == (dtype := compute_dtype(x)):
        return [x] * times
    return _Lowered.apply(x, dtype, times)  # pyright: ignore[reportReturnType]  # apply is untyped


class _Lowered(torch.autograd.Function):
    """Makes one copy for all that read it; their gradients are added in the type of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, times: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        lowered = x.to(dtype)
        return tuple(lowered.view_as(lowered) for _ in range(times))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        # The last first, as autograd adds the gradients of copies.
        total = grads[-1].to(ctx.dtype)
        for grad in grads[-2::-1]:
            total = total.add_(grad)
        return total, None, None


class _Streamed(torch.autograd.Function):
    """A frozen layer alone whose weight is on the device while it is multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StreamedWeight, bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        ctx.weight, ctx.dtype = weight, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return F.linear(x.to(dtype), weight.dense(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return torch.mm(dy, ctx.weight.dense(dy.dtype)).to(ctx.dtype), None, None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        again: Again | None,
        rows: Tensor | None,
        settings: list[tuple[float, float, int]],
        *tensors: Tensor | HeldWeight | None,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x)
        ctx.input_dtype = x.dtype
        ctx.held = held_ones(tensors)
        saved: list[Tensor | None] = []
        outputs: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            for (scale, p, module), (weight, bias, a, b) in zip(
                settings, _in_groups(tensors, 4), strict=True
            ):
                kept = weight.to(dtype) if isinstance(weight, Tensor) else None
                bias = None if bias is None else bias.to(dtype)
                y = F.linear(x, dense(weight, dtype) if kept is None else kept, bias)
                low_rank = mask = None
                if a is not None and b is not None:
                    a, b = a.to(dtype), b.to(dtype)
                    mask = _mask(x, rows, module, p)
                    low_rank = torch.mm(x if mask is None else keep(x, mask), a.t())
                    y.addmm_(low_rank, b.t(), alpha=scale / (1 - p))
                outputs.append(y)
                saved += (kept, a, b, low_rank, mask if x.device.type == "cpu" else None)
        ctx.again, sources = again or (None, (x,))
        ctx.autocast = same_autocast(x) if again else nullcontext
        ctx.save_for_backward(rows, *saved, *sources)
        ctx.dtype = dtype
        ctx.settings = settings
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Any, ...]:
        rows, *saved = ctx.saved_tensors
        needs_x, _, _, _, *needed = ctx.needs_input_grad
        count = 5 * len(grads)
        saved, sources = saved[:count], saved[count:]
        with ctx.autocast():
            x = sources[0] if ctx.again is None else ctx.again(*sources).to(ctx.dtype)
        found: list[Tensor | None] = []
        dx: Tensor | None = None
        groups = _in_groups(saved, 5), _in_groups(needed, 4)
        for dy, held, (scale, p, module), (weight, a, b, low_rank, mask), needs in zip(
            grads, ctx.held, ctx.settings, *groups, strict=True
        ):
            if dy is None:
                found += [None] * 4
                continue
            needs_weight, needs_bias, needs_a, needs_b = needs
            found.append(gradient_product(dy.t(), x) if needs_weight else None)
            found.append(dy.sum(0) if needs_bias else None)
            if needs_x:
                dx = _with_product(dx, dy, weight if held is None else held.dense(dy.dtype))
            if a is None:
                found += [None] * 2
                continue
            d_low_rank = torch.mm(dy, b).mul_(scale / (1 - p))
            if mask is None:
                mask = _mask(x, rows, module, p)
            kept = x if mask is None else keep(x, mask)
            found.append(gradient_product(d_low_rank.t(), kept) if needs_a else None)
            # As (r, N) and turned: on a CPU faster than as (N, r).
            d_b = gradient_product(low_rank.t(), dy).mul_(scale / (1 - p)) if needs_b else None
            found.append(None if d_b is None else d_b.t())
            if dx is not None:
                if mask is None:
                    dx.addmm_(d_low_rank, a)
                else:
                    dx.add_(keep(torch.mm(d_low_rank, a), mask))
        cast = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return (None if dx is None else dx.to(ctx.input_dtype), None, None, None, *cast)


def held_ones(tensors: Sequence[Any]) -> list[HeldWeight | None]:
    """Return of (weight, bias, A, B) a layer each weight that is no tensor to save."""
    return [None if isinstance(weight, Tensor) else weight for weight in tensors[::4]]


def _with_product(total: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    """Return dy W, added to a sum where there is one; made for it, W is nobody's afterwards."""
    return torch.mm(dy, weight) if total is None else total.addmm_(dy, weight)


def _in_groups(values: Sequence[Any], size: int) -> zip[Any]:
    """Return what belongs to one layer after another: its weight, bias, A and B, for instance."""
    return zip(*[iter(values)] * size, strict=True)


def _mask(x: Tensor, rows: Tensor | None, module: int, p: float) -> Tensor | None:
    return None if p == 0 or rows is None else keep_mask(rows, module, x.shape[1], p)
