"""An activation and the adapter of the linear layer that reads it, in Triton: one pass each way.

Legend: M token rows · I intermediate size · r adapter rank, R the power of two that holds it
        D the dropout mask · f GELU or SwiGLU of one source or two

    forward    z = f(sources), s = (z ⊙ D) Aᵀ                       writes z, for the product with W
    backward   dA = dsᵀ (z ⊙ D), d sources = f'(dz + (ds A) ⊙ D)    dz = dy W is the product's

What an activation is made of, its value and its gradient are I columns wide, four times the stream.
Nothing reads or writes one of them for the adapter's sake: z is multiplied as it is made, and made
again where its gradient passes. Masks and partial sums are those of `kernels/triton/adapters.py`.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.adapters import Draws, tiles_of
from kernels.triton.dropout import column_keys, kept
from kernels.triton.inputs import (
    SWIGLU,
    gelu_again,
    gelu_gradient,
    input_tile,
    swiglu_again,
    swiglu_gradients,
    tile_arguments,
)
from kernels.triton.jit import kernel

ACTIVATIONS = (gelu_again, swiglu_again)


@kernel("module_key", "limit", "rows")
def _activation_forward(
    x_ptr,
    other_ptr,
    bias_ptr,
    a_ptr,
    out_ptr,
    low_ptr,
    rows_ptr,
    module_key,
    limit,
    rows,
    width,
    RANK: tl.constexpr,
    DROPS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rank = tl.arange(0, RANK)
    there = row < rows
    at = row.to(tl.int64)[:, None] * width
    row_keys = tl.zeros((BLOCK_ROWS,), dtype=tl.uint32)
    if DROPS:
        row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
    total = tl.zeros((BLOCK_ROWS, RANK), dtype=tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = column < width
        z = input_tile(
            x_ptr, other_ptr, None, bias_ptr, None, None, row, column, there, inside, width, KIND
        )
        mask = there[:, None] & inside[None, :]  # without one, z would be made twice: see below
        tl.store(out_ptr + at + column[None, :], z, mask=mask)
        if DROPS:
            keys = column_keys(column, module_key)
            mask = kept(row_keys[:, None], keys[None, :], limit)
        z = tl.where(mask, z, 0.0).to(z.dtype)
        a_at = rank[:, None] * width + column[None, :]
        a = tl.load(a_ptr + a_at, mask=inside[None, :], other=0.0)
        total = tl.dot(z, tl.trans(a), total, input_precision="ieee")
    low = low_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(low, total.to(low_ptr.dtype.element_ty), mask=there[:, None])


@kernel("module_key", "limit", "rows", "rows_each")
def _activation_backward(
    x_ptr,
    other_ptr,
    bias_ptr,
    d_out_ptr,
    d_low_ptr,
    a_ptr,
    d_x_ptr,
    d_other_ptr,
    d_a_ptr,
    rows_ptr,
    module_key,
    limit,
    rows,
    width,
    rows_each,
    RANK: tl.constexpr,
    DROPS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Differentiate a block of columns over a range of rows, and sum dA over those rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(1)
    rank = tl.arange(0, RANK)
    inside = column < width
    keys = column_keys(column, module_key)
    a_at = rank[:, None] * width + column[None, :]
    a = tl.load(a_ptr + a_at, mask=inside[None, :], other=0.0)
    kind = d_x_ptr.dtype.element_ty
    bias = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_COLUMNS, RANK), dtype=tl.float32)
    first = part * rows_each
    stop = tl.minimum(first + rows_each, rows)
    for start in range(first, stop, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = row < stop
        # Tiles are turned, (columns, rows), and so is what comes of the first product: else the
        # compiler makes each element twice, where that product leaves it and for the second one.
        both = inside[:, None] & there[None, :]
        at = column[:, None] + row.to(tl.int64)[None, :] * width
        low_at = row.to(tl.int64)[:, None] * RANK + rank[None, :]
        d_low = tl.load(d_low_ptr + low_at, mask=there[:, None], other=0.0)
        d_out = tl.trans(tl.dot(d_low, a, input_precision="ieee"))
        mask = both
        if DROPS:
            row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
            mask = kept(row_keys[None, :], keys[:, None], limit)
        d_out = tl.where(mask, d_out, 0.0)
        d_out += tl.load(d_out_ptr + at, mask=both, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=both, other=0.0).to(tl.float32)
        if KIND == SWIGLU:
            up = tl.load(other_ptr + at, mask=both, other=0.0).to(tl.float32)
            z, d_x, d_up = swiglu_gradients(x, up, d_out)
            tl.store(d_other_ptr + at, d_up.to(kind), mask=both)
        else:
            x += bias[:, None]
            z, d_x = gelu_gradient(x, d_out)
        tl.store(d_x_ptr + at, d_x.to(kind), mask=both)
        z = tl.where(mask, z.to(kind), 0.0).to(kind)
        total = tl.dot(z, d_low, total, input_precision="ieee")
    out = d_a_ptr + column[:, None] + (part * RANK + rank).to(tl.int64)[None, :] * width
    tl.store(out, total, mask=inside[:, None])


def activated(
    again: Callable[..., Tensor], sources: Sequence[Tensor | None], a: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Return z, (M, I), and its product with the adapter's A, s: (M, 1, R).

    Args:
        again: one of `ACTIVATIONS`.
        sources: what it is made of.
        a: (1, R, I).
        draws: the mask D.
    """
    (x, other, _, bias, *_), kind, (rows, width) = _read(again, sources)
    rank = a.shape[1]
    tiles = tiles_of("activation_forward", a.device, rank)
    out, low_rank = a.new_empty(rows, width), a.new_empty(rows, 1, rank)
    _activation_forward[(triton.cdiv(rows, tiles["BLOCK_ROWS"]),)](
        *(x, other, bias, a, out, low_rank, *draws.of_first, rows, width),
        **{"DROPS": draws.drops, "KIND": kind, **tiles},
    )
    return out, low_rank


def activation_gradients(
    again: Callable[..., Tensor],
    sources: Sequence[Tensor | None],
    d_out: Tensor,
    d_low_rank: Tensor,
    a: Tensor,
    draws: Draws,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dA, (1, R, I) fp32, and the gradients of the sources.

    Args:
        again: one of `ACTIVATIONS`.
        sources: what it is made of.
        d_out: (M, I), dy W; the gradient of the first source takes its memory.
        d_low_rank: (M, 1, R), the adapter's ds.
        a: (1, R, I).
        draws: the mask D.
        needs_bias: whether a bias among the sources, (I,), is given its gradient.
    """
    (x, other, _, bias, *_), kind, (rows, width) = _read(again, sources)
    rank = a.shape[1]
    tiles = tiles_of("activation_backward", a.device, rank)
    d_other = None if other is None else torch.empty_like(other)
    parts = max(1, min(16, rows // 512))
    d_a = a.new_empty(parts, 1, rank, width, dtype=torch.float32)
    _activation_backward[triton.cdiv(width, tiles["BLOCK_COLUMNS"]), parts](
        *(x, other, bias, d_out, d_low_rank, a, d_out, d_other, d_a, *draws.of_first),
        *(rows, width, triton.cdiv(rows, parts)),
        **{"DROPS": draws.drops, "KIND": kind, **tiles},
    )
    if bias is not None and needs_bias:
        d_other = d_out.sum(0, dtype=torch.float32)
    return d_a.sum(0), d_out, d_other


def _read(
    again: Callable[..., Tensor], sources: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], int, torch.Size]:
    """Return the pointers of `input_tile`, the kind, and the shape of the activation."""
    found, first = tile_arguments(again, tuple(sources)), sources[0]
    assert found is not None
    assert first is not None
    return *found, first.shape
