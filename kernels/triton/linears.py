"""Linear layers that share one input, with their adapters: dropout drawn inside Triton kernels.

Legend: M token rows · K, N features in and out · r adapter rank · J adapters · D dropout mask

The arithmetic is that of `kernels/linears.py`. cuBLAS multiplies by the frozen weights; what
touches the mask runs here, so that neither the mask nor the masked copy of x is ever in memory:

    low rank        s_j = (x ⊙ D_j) A_jᵀ            reads x once an adapter, through L2
    input gradient  dx += Σ_j (ds_j A_j) ⊙ D_j      reads and writes dx once for all adapters
    A's gradient    dA_j = ds_jᵀ (x ⊙ D_j)          reads x once an adapter; partial sums

The small product comes first and the large one is added to it in cuBLAS's own epilogue: y = c·s Bᵀ,
then y += x Wᵀ, so that y is not read and written once more. A mask bit is a function of row key,
module and column alone (kernels/README.md): each kernel draws the tile that it needs, and all of
them, and the CPU, see the same bits. Kept for the backward pass are x, once for all layers, and s.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import keep_limit, mix, signed
from kernels.linears import flattened
from kernels.linears import linears as plain_linears
from kernels.operands import Operands, compute_dtype
from kernels.segments import Segments
from kernels.triton.launch import launch

MOST_ADAPTERS = 3  # q, k and v; their keys are arguments of a kernel, not a tensor to be copied
_SMALLEST_DOT = 16
# A tile of fp32 factors of a larger rank does not fit the shared memory of every card.
_LARGEST_RANK = 128


@triton.jit
def _mixed(word):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    return word * 0x846CA68B


@triton.jit
def _kept(rows, columns, module_key, limit):
    """Draw a tile: (BM,) uint32 row keys and (BK,) column numbers to (BM, BK) bool.

    Module key and limit are int32; `mix` of a column and mix' of both keys are `_mixed` and, for
    the first, one more shift.
    """
    column_keys = _mixed(columns.to(tl.uint32) ^ module_key.to(tl.uint32, bitcast=True))
    column_keys = column_keys ^ (column_keys >> 16)
    word = _mixed(rows[:, None] ^ column_keys[None, :])
    word = word.to(tl.int32, bitcast=True)
    return (word < limit) | (limit == 0x7FFFFFFF)  # p = 0 keeps every word


@triton.jit
def _select(j, first, second, third):
    return tl.where(j == 0, first, tl.where(j == 1, second, third))


@triton.jit(do_not_specialize=["key_0", "key_1", "key_2", "limit_0", "limit_1", "limit_2"])
def _low_rank(
    x_ptr,
    a_ptr,
    out_ptr,
    rows_ptr,
    key_0,
    key_1,
    key_2,
    limit_0,
    limit_1,
    limit_2,
    rows,
    width,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    j = tl.program_id(0)  # adapters first: those of a block of rows find x in L2
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rank = tl.arange(0, RANK)
    there = row < rows
    at = row.to(tl.int64)[:, None] * width
    key = _select(j, key_0, key_1, key_2)
    limit = _select(j, limit_0, limit_1, limit_2)
    row_keys = tl.zeros((BLOCK_ROWS,), dtype=tl.uint32)
    if DROPS:
        row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
    total = tl.zeros((BLOCK_ROWS, RANK), dtype=tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = column < width
        x = tl.load(x_ptr + at + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        if DROPS:
            x = tl.where(_kept(row_keys, column, key, limit), x, 0.0).to(x.dtype)
        a_at = (j * RANK + rank)[:, None] * width + column[None, :]
        a = tl.load(a_ptr + a_at, mask=inside[None, :], other=0.0)
        total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    out = out_ptr + row.to(tl.int64)[:, None] * (COUNT * RANK) + (j * RANK + rank)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["key_0", "key_1", "key_2", "limit_0", "limit_1", "limit_2"])
def _add_input_gradient(
    d_x_ptr,
    d_low_ptr,
    a_ptr,
    rows_ptr,
    key_0,
    key_1,
    key_2,
    limit_0,
    limit_1,
    limit_2,
    rows,
    width,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rank = tl.arange(0, RANK)
    there, inside = row < rows, column < width
    both = there[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    row_keys = tl.zeros((BLOCK_ROWS,), dtype=tl.uint32)
    if DROPS:
        row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
    total = tl.load(d_x_ptr + at, mask=both, other=0.0).to(tl.float32)
    for j in range(COUNT):
        low_at = row.to(tl.int64)[:, None] * (COUNT * RANK) + (j * RANK + rank)[None, :]
        d_low = tl.load(d_low_ptr + low_at, mask=there[:, None], other=0.0)
        a_at = (j * RANK + rank)[:, None] * width + column[None, :]
        a = tl.load(a_ptr + a_at, mask=inside[None, :], other=0.0)
        product = tl.dot(d_low, a, input_precision="ieee")
        if DROPS:
            key = _select(j, key_0, key_1, key_2)
            limit = _select(j, limit_0, limit_1, limit_2)
            product = tl.where(_kept(row_keys, column, key, limit), product, 0.0)
        total += product
    tl.store(d_x_ptr + at, total.to(d_x_ptr.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["key_0", "key_1", "key_2", "limit_0", "limit_1", "limit_2"])
def _adapter_gradient(
    x_ptr,
    d_low_ptr,
    out_ptr,
    rows_ptr,
    key_0,
    key_1,
    key_2,
    limit_0,
    limit_1,
    limit_2,
    rows,
    width,
    rows_each,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    j = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(2)
    rank = tl.arange(0, RANK)
    inside = column < width
    key = _select(j, key_0, key_1, key_2)
    limit = _select(j, limit_0, limit_1, limit_2)
    total = tl.zeros((RANK, BLOCK_COLUMNS), dtype=tl.float32)
    first = part * rows_each
    for start in range(first, tl.minimum(first + rows_each, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = row < tl.minimum(first + rows_each, rows)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_ptr + at, mask=there[:, None] & inside[None, :], other=0.0)
        if DROPS:
            row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
            x = tl.where(_kept(row_keys, column, key, limit), x, 0.0).to(x.dtype)
        low_at = row.to(tl.int64)[:, None] * (COUNT * RANK) + (j * RANK + rank)[None, :]
        d_low = tl.load(d_low_ptr + low_at, mask=there[:, None], other=0.0)
        total = tl.dot(tl.trans(d_low), x, total, input_precision="ieee")
    row_out = (part * COUNT + j) * RANK + rank
    out = out_ptr + row_out.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, total, mask=inside[None, :])


def linears(
    x: Tensor, operands: Sequence[Operands], segments: Segments | None = None
) -> list[Tensor]:
    """Apply several linear layers, adapted or not, to one input; see `kernels.linears.linears`."""
    ranks = [len(layer.lora_a) for layer in operands if layer.lora_a is not None]
    if not 1 <= len(ranks) <= MOST_ADAPTERS or max(ranks) > _LARGEST_RANK:
        return plain_linears(x, operands, segments)
    return list(_Linears.apply(x, *flattened(operands, segments)))  # pyright: ignore[reportGeneralTypeIssues]


class Draws:
    """What the kernels need to draw the masks of the adapters of one input.

    Args:
        settings: (p, module id) of each adapter.
        rows: (M,) int32 row keys, or None where nothing is dropped.
    """

    def __init__(self, settings: list[tuple[float, int]], rows: Tensor | None):
        self.drops = rows is not None and any(p > 0 for p, _ in settings)
        self.rows = rows if self.drops else None
        spare = MOST_ADAPTERS - len(settings)
        # As int32, so that no argument changes its type from module to module.
        keys = [signed(mix(module)) for _, module in settings] + [0] * spare
        limits = [keep_limit(p) for p, _ in settings] + [0] * spare
        self.arguments = (*keys, *limits)


def _tiles(kernel: str, device: torch.device, rank: int) -> dict[str, int]:
    """Return the parameters of a launch: above rank 64 half the tile, to fit the registers."""
    settings = launch(kernel, device)
    if rank > 64:
        settings["BLOCK_COLUMNS"] = max(_SMALLEST_DOT, settings["BLOCK_COLUMNS"] // 2)
    return settings


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        settings: list[tuple[float, float, int]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x)
        ctx.input_dtype = x.dtype
        layers = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        adapted = [i for i, layer in enumerate(layers) if layer[2] is not None]
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype).contiguous()
            a = stacked_factors([layers[i][2] for i in adapted], dtype)
            draws = Draws([settings[i][1:] for i in adapted], rows)
            low_rank = low_rank_product(x, a, draws)
            outputs, weights, factors = [], [], []
            for i, (weight, bias, _, b) in enumerate(layers):
                assert weight is not None
                weight = weight.to(dtype)
                weights.append(weight)
                if b is None:
                    outputs.append(
                        torch.nn.functional.linear(
                            x, weight, None if bias is None else bias.to(dtype)
                        )
                    )
                    continue
                scale, p, _ = settings[i]
                b = b.to(dtype)
                factors.append(b)
                s = low_rank[:, adapted.index(i), : b.shape[1]]
                alpha = scale / (1 - p)  # the product's own factor: no pass over y for it
                if bias is None:
                    y = x.new_empty(len(x), len(weight))
                    y.addmm_(s, b.t(), beta=0, alpha=alpha)
                else:
                    y = torch.addmm(bias.to(dtype), s, b.t(), alpha=alpha)
                outputs.append(y.addmm_(x, weight.t()))
        ctx.save_for_backward(x, rows, a, low_rank, *weights, *factors)
        ctx.settings, ctx.adapted = settings, adapted
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.ranks = [layers[i][2].shape[0] for i in adapted]  # pyright: ignore
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Any, ...]:
        x, rows, a, low_rank, *rest = ctx.saved_tensors
        count = len(ctx.settings)
        weights, factors = rest[:count], rest[count:]
        needs_x, _, _, *needed = ctx.needs_input_grad
        draws = Draws([ctx.settings[i][1:] for i in ctx.adapted], rows)
        found: list[Tensor | None] = [None] * (4 * count)
        d_low_rank = torch.zeros_like(low_rank)
        dx: Tensor | None = None
        for i, dy in enumerate(grads):
            if dy is None:
                continue
            dy = dy.contiguous()
            if needed[4 * i]:
                found[4 * i] = torch.mm(dy.t(), x)
            if needed[4 * i + 1]:
                found[4 * i + 1] = dy.sum(0)
            if needs_x:
                dx = torch.mm(dy, weights[i]) if dx is None else dx.addmm_(dy, weights[i])
            if i not in ctx.adapted:
                continue
            j = ctx.adapted.index(i)
            scale, p, _ = ctx.settings[i]
            b, rank = factors[j], ctx.ranks[j]
            d_low_rank[:, j, :rank] = torch.mm(dy, b).mul_(scale / (1 - p))
            if needed[4 * i + 3]:
                d_b = torch.mm(dy.t(), low_rank[:, j, :rank]).mul_(scale / (1 - p))
                found[4 * i + 3] = d_b
        if any(needed[4 * i + 2] for i in ctx.adapted):
            d_a = adapter_gradient(x, d_low_rank, draws)
            for j, i in enumerate(ctx.adapted):
                found[4 * i + 2] = d_a[j, : ctx.ranks[j]]
        if dx is not None:
            add_input_gradient(dx, d_low_rank, a, draws)
        cast = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return (None if dx is None else dx.to(ctx.input_dtype), None, None, *cast)


def stacked_factors(factors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Return the A's above each other, (J, R, K), each with zero rows up to what a dot takes."""
    there = [a for a in factors if a is not None]
    rank = triton.next_power_of_2(max(_SMALLEST_DOT, *(len(a) for a in there)))
    stacked = there[0].new_zeros(len(there), rank, there[0].shape[1], dtype=dtype)
    for j, a in enumerate(there):
        stacked[j, : len(a)] = a
    return stacked


def low_rank_product(x: Tensor, a: Tensor, draws: Draws) -> Tensor:
    """Return (x ⊙ D_j) A_jᵀ for each adapter: (M, J, R)."""
    (rows, width), (count, rank, _) = x.shape, a.shape
    tiles = _tiles("low_rank", x.device, rank)
    out = x.new_empty(rows, count, rank)
    _low_rank[(count, triton.cdiv(rows, tiles["BLOCK_ROWS"]))](
        x,
        a,
        out,
        draws.rows,
        *draws.arguments,
        rows,
        width,
        COUNT=count,
        RANK=rank,
        DROPS=draws.drops,
        **tiles,
    )
    return out


def add_input_gradient(dx: Tensor, d_low_rank: Tensor, a: Tensor, draws: Draws) -> None:
    """Add Σ_j (ds_j A_j) ⊙ D_j to (M, K) `dx`, in place."""
    (rows, width), (count, rank, _) = dx.shape, a.shape
    tiles = _tiles("input_gradient", dx.device, rank)
    grid = triton.cdiv(rows, tiles["BLOCK_ROWS"]), triton.cdiv(width, tiles["BLOCK_COLUMNS"])
    _add_input_gradient[grid](
        dx,
        d_low_rank,
        a,
        draws.rows,
        *draws.arguments,
        rows,
        width,
        COUNT=count,
        RANK=rank,
        DROPS=draws.drops,
        **tiles,
    )


def adapter_gradient(x: Tensor, d_low_rank: Tensor, draws: Draws) -> Tensor:
    """Return ds_jᵀ (x ⊙ D_j) for each adapter: (J, R, K) fp32."""
    (rows, width), (_, count, rank) = x.shape, d_low_rank.shape
    tiles = _tiles("adapter_gradient", x.device, rank)
    parts = max(1, min(16, rows // 512))
    out = x.new_empty(parts, count, rank, width, dtype=torch.float32)
    _adapter_gradient[(count, triton.cdiv(width, tiles["BLOCK_COLUMNS"]), parts)](
        x,
        d_low_rank,
        out,
        draws.rows,
        *draws.arguments,
        rows,
        width,
        triton.cdiv(rows, parts),
        COUNT=count,
        RANK=rank,
        DROPS=draws.drops,
        **tiles,
    )
    return out.sum(0)
