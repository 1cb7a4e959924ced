"""RMSNorm and LayerNorm in Triton, with the residual addition before them where there is one.

Legend: M token rows · H hidden size · P programs of the backward pass

    forward    t = x + drop(change)                n = (t - mean) · r          y = n · w + b
    backward   g = dy · w                          dt = r · (g - mean(g) - n · mean(g · n)) + dt'
               dw = Σ over the rows of dy · n      db = Σ over the rows of dy

with r = 1/√(variance + ε); RMSNorm has neither mean nor b, and its variance is the mean of t². dt'
is the gradient that arrives by way of the residual stream: every addition of the stream, and of its
gradients, happens in here. Where elements of the change are dropped, their mask is drawn again
in the backward pass, dchange = drop(dt); else dchange is dt itself.

A program holds whole rows in registers, so that each tensor is read once: forward x, change → t, y;
backward t, dy, dt' → dt, dchange. Mean and r, two fp32 numbers a row, are kept. The gradients of w
and b are sums over rows: each program of the backward pass adds up a contiguous range of rows in
order and writes one (H,) partial sum; torch adds the P of them. No atomics: the same bits always.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import Draw
from kernels.operands import Made
from kernels.triton.dropout import add_dropped, column_keys, draw_arguments, dropped
from kernels.triton.inputs import layer_norm_again, rms_norm_again
from kernels.triton.jit import kernel
from kernels.triton.launch import block_of, norm_programs, norm_warps

_WIDEST_DROPPED = 4096  # elements of a row


@kernel("module_key", "limit")
def _forward(
    x_ptr,
    change_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    out_ptr,
    mean_ptr,
    inverse_ptr,
    rows_ptr,
    module_key,
    limit,
    factor,
    width,
    eps,
    HAS_CHANGE: tl.constexpr,
    DROPS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    total = tl.load(x_ptr + at, mask=inside, other=0.0)
    if HAS_CHANGE:
        change = tl.load(change_ptr + at, mask=inside, other=0.0)
        if DROPS:
            keys = column_keys(columns, module_key)
            change = dropped(change, tl.load(rows_ptr + row), keys, limit, factor)
        total = (total.to(tl.float32) + change.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
    exact = total.to(tl.float32)
    if CENTRED:
        mean = tl.sum(exact, axis=0) / width
        tl.store(mean_ptr + row, mean)
        exact = tl.where(inside, exact - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(exact * exact, axis=0) / width + eps)
    tl.store(inverse_ptr + row, inverse)
    normed = exact * inverse
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        out = normed * weight + bias
    else:
        # SEMANTICS §6: the quotient is rounded to the input's type before the weight comes in.
        out = normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel("module_key", "limit", "rows", "rows_each")
def _backward(
    total_ptr,
    weight_ptr,
    mean_ptr,
    inverse_ptr,
    d_out_ptr,
    d_total_ptr,
    d_x_ptr,
    d_change_ptr,
    d_weight_ptr,
    d_bias_ptr,
    rows_ptr,
    module_key,
    limit,
    factor,
    rows,
    width,
    rows_each,
    HAS_D_TOTAL: tl.constexpr,
    DROPS: tl.constexpr,
    CENTRED: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    keys = column_keys(columns, module_key)  # once for all rows; not at all where nothing drops
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, rows)):
        at = row * width + columns
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        if CENTRED:
            total = tl.where(inside, total - tl.load(mean_ptr + row), 0.0)
        normed = total * inverse
        if NEEDS_WEIGHT:
            d_weight += d_out * normed
            d_bias += d_out
        gradient = d_out * weight
        d_x = gradient - normed * (tl.sum(gradient * normed, axis=0) / width)
        if CENTRED:
            d_x -= tl.sum(gradient, axis=0) / width
        d_x *= inverse
        if HAS_D_TOTAL:
            d_x += tl.load(d_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_x = d_x.to(d_x_ptr.dtype.element_ty)
        tl.store(d_x_ptr + at, d_x, mask=inside)
        if DROPS:
            d_change = d_x.to(d_change_ptr.dtype.element_ty)
            d_change = dropped(d_change, tl.load(rows_ptr + row), keys, limit, factor)
            tl.store(d_change_ptr + at, d_change, mask=inside)
    if NEEDS_WEIGHT:
        tl.store(d_weight_ptr + program * width + columns, d_weight, mask=inside)
        if CENTRED:
            tl.store(d_bias_ptr + program * width + columns, d_bias, mask=inside)


class _Norm(torch.autograd.Function):
    """Both norms: x → (y, mean, r), or (x, change) → (y, mean, r, t); no mean of RMSNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        change: Tensor | None,
        draw: Draw | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        rows, width = x.shape
        x = x.contiguous()
        total = x if change is None else torch.empty_like(x)
        out = torch.empty_like(x)
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(inverse) if bias is not None else None
        block = block_of(width)
        _forward[(rows,)](
            x,
            None if change is None else change.contiguous(),
            weight,
            bias,
            total,
            out,
            mean,
            inverse,
            *draw_arguments(draw),
            width,
            eps,
            HAS_CHANGE=change is not None,
            DROPS=draw is not None,
            CENTRED=bias is not None,
            BLOCK=block,
            num_warps=norm_warps(block, x.device),
        )
        ctx.save_for_backward(total, weight, mean, inverse)
        ctx.draw = draw
        ctx.change_dtype = None if change is None else change.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(inverse,) if mean is None else (mean, inverse))
        return (out, mean, inverse) if change is None else (out, mean, inverse, total)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight, mean, inverse = ctx.saved_tensors
        has_change, draw = ctx.change_dtype is not None, ctx.draw
        d_out, d_total = grads[0], grads[3] if has_change else None
        if d_out is None:  # only the residual stream was used
            d_change = d_total if has_change else None
            if d_change is not None and draw is not None:
                d_change = add_dropped(None, d_change.to(ctx.change_dtype), draw)
            return d_total, d_change, None, None, None, None
        rows, width = total.shape
        centred = mean is not None
        needs_weight = ctx.needs_input_grad[3] or (centred and ctx.needs_input_grad[4])
        programs = norm_programs(rows, total.device)
        d_x = torch.empty_like(total)
        d_change = d_x if has_change else None
        block = block_of(width)
        # Beside two sums of columns the registers of a program do not hold the keys of a wide row.
        apart = draw if needs_weight and centred and block > _WIDEST_DROPPED else None
        drawn = None if apart is not None else draw
        if drawn is not None:
            d_change = torch.empty_like(total, dtype=ctx.change_dtype)
        partial = (programs, width)
        d_weight = total.new_empty(partial, dtype=torch.float32) if needs_weight else None
        d_bias = torch.empty_like(d_weight) if needs_weight and centred else None
        _backward[(programs,)](
            total,
            weight,
            mean,
            inverse,
            d_out.contiguous(),
            None if d_total is None else d_total.contiguous(),
            d_x,
            d_change,
            d_weight,
            d_bias,
            *draw_arguments(drawn),
            rows,
            width,
            triton.cdiv(rows, programs),
            HAS_D_TOTAL=d_total is not None,
            DROPS=drawn is not None,
            CENTRED=centred,
            NEEDS_WEIGHT=needs_weight,
            BLOCK=block,
            num_warps=norm_warps(block, total.device),
        )
        if apart is not None:
            d_change = add_dropped(None, d_x.to(ctx.change_dtype), apart)
        return (
            d_x,
            d_change,
            None,
            None if d_weight is None else d_weight.sum(0).to(weight.dtype),
            None if d_bias is None else d_bias.sum(0).to(ctx.bias_dtype),
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Made:
    """Return x / √(mean(x²) + eps) · weight over the last axis: (M, H) → (M, H)."""
    out, _, inverse = _Norm.apply(x, None, None, weight, None, eps)  # pyright: ignore
    return Made(out, rms_norm_again, (x, weight, inverse))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Made:
    """Return (x - mean) / √(variance + eps) · weight + bias over the last axis: (M, H) → (M, H)."""
    out, mean, inverse = _Norm.apply(x, None, None, weight, bias, eps)  # pyright: ignore
    return Made(out, layer_norm_again, (x, weight, bias, mean, inverse))


def add_rms_norm(
    x: Tensor, change: Tensor, weight: Tensor, eps: float, draw: Draw | None = None
) -> tuple[Tensor, Made]:
    """Return (x + dropout(change), its RMSNorm), (M, H) each; see `kernels.reference.add`."""
    out, _, inverse, total = _Norm.apply(x, change, draw, weight, None, eps)  # pyright: ignore
    return total, Made(out, rms_norm_again, (total, weight, inverse))


def add_layer_norm(
    x: Tensor,
    change: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    draw: Draw | None = None,
) -> tuple[Tensor, Made]:
    """Return (x + dropout(change), its LayerNorm), (M, H) each; see `kernels.reference.add`."""
    out, mean, inverse, total = _Norm.apply(x, change, draw, weight, bias, eps)  # pyright: ignore
    return total, Made(out, layer_norm_again, (total, weight, bias, mean, inverse))
