"""Masks drawn inside Triton kernels, and the residual addition of what is dropped.

Legend: M token rows · H hidden size

The rule is that of `kernels/dropout.py` (kernels/README.md): 32-bit words, wrapping products.
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

from kernels.dropout import Draw, keep_limit, mix, signed
from kernels.triton.jit import kernel
from kernels.triton.launch import launch


@triton.jit
def _mixed(word):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    return word * 0x846CA68B


@triton.jit
def column_keys(columns, module_key):
    """Return uint32 column keys of a module, whose own key is int32: `mix` of either."""
    keys = _mixed(columns.to(tl.uint32) ^ module_key.to(tl.uint32, bitcast=True))
    return keys ^ (keys >> 16)


@triton.jit
def kept(row_keys, keys, limit):
    """Draw the mask of uint32 row keys and column keys that broadcast to a tile: bool."""
    word = _mixed(row_keys ^ keys).to(tl.int32, bitcast=True)
    return (word < limit) | (limit == 0x7FFFFFFF)  # p = 0 keeps every word


@triton.jit
def dropped(values, row_key, keys, limit, factor):
    """Return the elements of a row that are kept, times factor = 1/(1-p), in their own type."""
    scaled = (values.to(tl.float32) * factor).to(values.dtype)
    return tl.where(kept(row_key.to(tl.uint32, bitcast=True), keys, limit), scaled, 0.0)


def draw_arguments(draw: Draw | None) -> tuple[Tensor | None, int, int, float]:
    """Return row keys, module key, limit and factor; nothing is read of them without a draw."""
    if draw is None:
        return None, 0, 0, 1.0
    return draw.rows, signed(mix(draw.module)), keep_limit(draw.p), 1 / (1 - draw.p)


@kernel("module_key", "limit")
def _add_dropped(
    x_ptr,
    change_ptr,
    out_ptr,
    rows_ptr,
    module_key,
    limit,
    factor,
    width,
    HAS_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    change = tl.load(change_ptr + at, mask=inside, other=0.0)
    keys = column_keys(columns, module_key)
    out = dropped(change, tl.load(rows_ptr + row), keys, limit, factor).to(tl.float32)
    if HAS_X:
        out += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_dropped(x: Tensor | None, change: Tensor, draw: Draw) -> Tensor:
    """Return x + dropout(change), (M, H), outside autograd; without `x` the second alone."""
    change = change.contiguous()
    out = torch.empty_like(change if x is None else x, memory_format=torch.contiguous_format)
    settings = launch("elementwise", change.device)
    width = change.shape[1]
    _add_dropped[(len(change), triton.cdiv(width, settings["BLOCK"]))](
        None if x is None else x.contiguous(),
        change,
        out,
        *draw_arguments(draw),
        width,
        HAS_X=x is not None,
        **settings,
    )
    return out


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, change: Tensor, draw: Draw) -> Tensor:
        ctx.draw, ctx.dtype = draw, change.dtype
        return add_dropped(x, change, draw)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_change, _ = ctx.needs_input_grad
        d_change = add_dropped(None, grads[0].to(ctx.dtype), ctx.draw) if needs_change else None
        return grads[0] if needs_x else None, d_change, None


def add(x: Tensor | None, change: Tensor, draw: Draw | None = None) -> Tensor:
    """Return x + dropout(change), (M, H) each; see `kernels.reference.add`."""
    if draw is None:
        return change if x is None else x + change
    return _Add.apply(x, change, draw)  # pyright: ignore[reportReturnType]  # apply is untyped
