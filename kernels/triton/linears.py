"""Linear layers that share one input, with their adapters: dropout drawn inside Triton kernels.

Legend: M token rows · K, N features in and out · r adapter rank, R the power of two that holds it
        J adapters

The arithmetic is that of `kernels/linears.py`. cuBLAS multiplies by the frozen weights; the small
products are those of `kernels/triton/adapters.py`. Of each sum the small product is written first
and the large one added to it in cuBLAS's own epilogue: y = c·s Bᵀ, then y += x Wᵀ, and in the
backward pass dx = (ds A) ⊙ D, then dx += dy W, so that y and dx are not read and written once more.
Kept for the backward pass are s and, once for all layers, x or what it is made of: then the kernel
that reads x makes the tile that it needs (`kernels/triton/inputs.py`). One layer alone that reads
an activation makes it forward too, and returns the gradients of what it is made of: then x is no
node of autograd's graph (`kernels/triton/activations.py`). A quantised weight is kept as it is, and
made a tensor for one product at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linears import Again, flattened, held_ones, made_again
from kernels.linears import linears as plain_linears
from kernels.operands import (
    HeldWeight,
    Made,
    Operands,
    compute_dtype,
    dense,
    gradient_product,
    value_of,
)
from kernels.segments import Segments
from kernels.triton.activations import ACTIVATIONS, activated, activation_gradients
from kernels.triton.adapters import (
    LARGEST_RANK,
    MOST_ADAPTERS,
    SMALLEST_DOT,
    Draws,
    adapter_gradient,
    input_gradient,
    low_rank_product,
    through_b,
)
from kernels.triton.inputs import tile_arguments

_NARROW = 512  # features


def linears(
    x: Tensor | Made, operands: Sequence[Operands], segments: Segments | None = None
) -> list[Tensor]:
    """Apply several linear layers, adapted or not, to one input; see `kernels.linears.linears`.

    In fp32 a card has no tensor cores that are exact: the kernels' products would be unrolled into
    thousands of scalar ones, where cuBLAS has tiles for them. That is left to the plain form.
    """
    ranks = [len(layer.lora_a) for layer in operands if layer.lora_a is not None]
    read = x.sources[0] if isinstance(x, Made) else x
    assert read is not None
    dtype = compute_dtype(read)
    scalar = dtype.itemsize > 2 and read.device.type != "cpu"  # on a CPU it is interpreted
    scalar |= any(layer.magnitude is not None for layer in operands)  # DoRA has no kernels
    if scalar or not 1 <= len(ranks) <= MOST_ADAPTERS or max(ranks) > LARGEST_RANK:
        return plain_linears(x, operands, segments)
    again = made_again(x, operands)
    if again is not None and tile_arguments(*again) is None:
        again = None
    if again is not None and again[0] in ACTIVATIONS and len(operands) == 1 and read.dtype == dtype:
        return list(_Linears.apply(None, again, *flattened(operands, segments), *again[1]))  # pyright: ignore[reportGeneralTypeIssues]
    return list(_Linears.apply(value_of(x), again, *flattened(operands, segments)))  # pyright: ignore[reportGeneralTypeIssues]


class _Linears(torch.autograd.Function):
    """Without x the one layer makes it: of `again`'s sources, which follow the layer's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        again: Again | None,
        rows: Tensor | None,
        settings: list[tuple[float, float, int]],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ctx.activates = x is None
        function, sources = again or (None, (x,))
        read = sources[0] if x is None else x
        assert read is not None
        dtype = compute_dtype(read)
        ctx.input_dtype = read.dtype
        layers = [tensors[4 * i : 4 * i + 4] for i in range(len(settings))]
        adapted = [i for i, layer in enumerate(layers) if layer[2] is not None]
        factors = [(a, b) for *_, a, b in layers if a is not None and b is not None]
        with torch.autocast(read.device.type, enabled=False):
            a, b = stacked_factors(factors, dtype)
            draws = Draws([settings[i][1:] for i in adapted], rows)
            if x is None:
                assert function is not None
                x, low_rank = activated(function, sources, a, draws)
            else:
                x = x.to(dtype).contiguous()
                low_rank = low_rank_product(x, a, draws)
            scales = [settings[i][0] / (1 - settings[i][1]) for i in adapted]
            b_parts = b.split([len(b_j) for _, b_j in factors])
            small = zip(low_rank.unbind(1), b_parts, scales, strict=True)
            outputs, weights = [], []
            for weight, bias, a_j, _ in layers:
                bias = None if bias is None else bias.to(dtype)
                weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
                weights.append(weight)
                if a_j is None:
                    outputs.append(F.linear(x, dense(weight, dtype), bias))
                    continue
                s, b_j, scale = next(small)  # the product's own factor: no pass over y for it
                if bias is None:
                    y = x.new_empty(len(x), weight.shape[0])
                    y.addmm_(s, b_j.t(), beta=0, alpha=scale)
                else:
                    y = torch.addmm(bias, s, b_j.t(), alpha=scale)
                outputs.append(y.addmm_(x, dense(weight, dtype).t()))
        if function is None:
            sources = (x,)
        ctx.again = function
        ctx.held = held_ones(tensors[: 4 * len(settings)])
        kept = [weight if isinstance(weight, Tensor) else None for weight in weights]
        ctx.save_for_backward(rows, a, b, low_rank, *kept, *sources)
        ctx.settings, ctx.adapted, ctx.scales = settings, adapted, scales
        ctx.ranks = [len(a_j) for a_j, _ in factors]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        rows, a, b, low_rank, *weights = ctx.saved_tensors
        weights, sources = weights[: len(grads)], tuple(weights[len(grads) :])
        needs_x, _, _, _, *needed = ctx.needs_input_grad
        grads = tuple(dy if dy.stride(1) == 1 else dy.contiguous() for dy in grads)
        draws = Draws([ctx.settings[i][1:] for i in ctx.adapted], rows)
        of_adapted = [grads[i] for i in ctx.adapted]
        d_low_rank, d_b = through_b(of_adapted, b, low_rank, ctx.scales)
        dx = input_gradient(d_low_rank, a, draws) if needs_x else None
        if needs_x or ctx.activates:
            pairs = zip(weights, ctx.held, strict=True)
            kept = [weight if held is None else held for weight, held in pairs]
            for dy, weight in _narrow_ones_joined(grads, kept):
                weight = dense(weight, dy.dtype)
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        found: list[Tensor | None] = [None] * len(needed)
        if ctx.activates:
            assert dx is not None
            d_a, *found[4 * len(grads) :] = activation_gradients(
                ctx.again, sources, dx, d_low_rank, a, draws, needs_bias=needed[-1]
            )
            dx = None
        else:
            d_a = adapter_gradient(ctx.again, sources, d_low_rank, draws)
        d_bs = d_b.split([dy.shape[1] for dy in of_adapted])
        for i, rank, d_a_j, d_b_j in zip(ctx.adapted, ctx.ranks, d_a, d_bs, strict=True):
            found[4 * i + 2 : 4 * i + 4] = d_a_j[:rank], d_b_j[:, :rank]
        for i, dy in enumerate(grads):
            if needed[4 * i]:
                found[4 * i] = gradient_product(dy.t(), sources[0])
            if needed[4 * i + 1]:
                found[4 * i + 1] = dy.sum(0, dtype=ctx.dtypes[4 * i + 1])
        cast = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return (None if dx is None else dx.to(ctx.input_dtype), None, None, None, *cast)


def _narrow_ones_joined(
    grads: Sequence[Tensor], weights: Sequence[Tensor | HeldWeight]
) -> list[tuple[Tensor, Tensor | HeldWeight]]:
    """Return each layer's dy and W, those of a few hundred features as one.

    A product with as few features as grouped keys and values have takes less time than reading and
    writing dx for it; copying their dy and W takes a sixth of that.
    """
    pairs = list(zip(grads, weights, strict=True))
    narrow = [pair for pair in pairs if pair[1].shape[0] <= _NARROW]
    if len(narrow) < 2:
        return pairs
    dys = torch.cat([dy for dy, _ in narrow], 1)
    ws = torch.cat([dense(weight, dys.dtype) for _, weight in narrow])
    return [pair for pair in pairs if pair[1].shape[0] > _NARROW] + [(dys, ws)]


def stacked_factors(
    factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the A's, (J, R, K), and the B's, (ΣN, R), each with zeros up to what a dot takes."""
    size = triton.next_power_of_2(max(SMALLEST_DOT, *(len(a) for a, _ in factors)))
    a = [a if len(a) == size else F.pad(a, (0, 0, 0, size - len(a))) for a, _ in factors]
    b = [b if b.shape[1] == size else F.pad(b, (0, size - b.shape[1])) for _, b in factors]
    return _joined(a, dtype).view(len(a), size, -1), _joined(b, dtype)


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors one above the other; one alone is not copied."""
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole.to(dtype).contiguous()
