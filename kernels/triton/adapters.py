"""The small products of adapted linear layers, in Triton: what touches a mask, and what reads dy.

Legend: M token rows · K, N features in and out · r adapter rank, R the power of two that holds it
        J adapters of one input · D dropout mask · c = scale/(1-p)

    low rank        s_j = (x ⊙ D_j) A_jᵀ                   reads x once an adapter, through L2
    through B       ds_j = c dy_j B_j, dB_j = c dy_jᵀ s_j  reads dy once for both; partial sums
    A's gradient    dA_j = ds_jᵀ (x ⊙ D_j)                 reads x once an adapter; partial sums
    input gradient  dx = Σ_j (ds_j A_j) ⊙ D_j              writes dx once for all adapters

Neither a mask nor the masked copy of x is ever in memory: a mask bit is a function of row key,
module and column alone (kernels/README.md), so each kernel draws the tile that it needs, and all of
them, and the CPU, see the same bits. Sums that several programs share are stored in parts and added
in one order, without atomics: the same input gives the same bits.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import keep_limit, mix, signed
from kernels.operands import gradient_product
from kernels.triton.dropout import column_keys, kept
from kernels.triton.inputs import LAYER_NORM, input_tile, tile_arguments
from kernels.triton.jit import kernel
from kernels.triton.launch import launch

MOST_ADAPTERS = 3  # q, k and v; their keys are arguments of a kernel, not a tensor to be copied
SMALLEST_DOT = 16
_DRAWN = ("key_0", "key_1", "key_2", "limit_0", "limit_1", "limit_2")  # another in every layer
# A tile of fp32 factors of a larger rank does not fit the shared memory of every card.
LARGEST_RANK = 128
# `through_b` writes and reads 8 · R bytes of parts of ds for BLOCK_COLUMNS elements of dy, and has
# room for R · BLOCK_COLUMNS sums: from rank 64 on, reading dy twice is less.
_LARGEST_RANK_IN_ONE_PASS = 32
_MOST_REGISTERS = 128  # of a thread: 16 warps, the most that are tuned, then fill a multiprocessor


@triton.jit
def _kept(rows, columns, module_key, limit):
    """Draw a tile: (BM,) uint32 row keys and (BK,) column numbers to (BM, BK) bool."""
    return kept(rows[:, None], column_keys(columns, module_key)[None, :], limit)


@triton.jit
def _select(j, first, second, third):
    return tl.where(j == 0, first, tl.where(j == 1, second, third))


@kernel(*_DRAWN, "rows")
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


@kernel(*_DRAWN, "rows")
def _input_gradient(
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
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
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


@kernel(*_DRAWN, "rows", "rows_each")
def _adapter_gradient(
    x_ptr,
    other_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    inverse_ptr,
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
    KIND: tl.constexpr,
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
    stop = tl.minimum(first + rows_each, rows)
    for start in range(first, stop, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = row < stop
        x = input_tile(
            x_ptr,
            other_ptr,
            weight_ptr,
            bias_ptr,
            mean_ptr,
            inverse_ptr,
            row,
            column,
            there,
            inside,
            width,
            KIND,
        )
        x = x.to(d_low_ptr.dtype.element_ty)
        if DROPS:
            row_keys = tl.load(rows_ptr + row, mask=there, other=0).to(tl.uint32, bitcast=True)
            x = tl.where(_kept(row_keys, column, key, limit), x, 0.0).to(x.dtype)
        low_at = row.to(tl.int64)[:, None] * (COUNT * RANK) + (j * RANK + rank)[None, :]
        d_low = tl.load(d_low_ptr + low_at, mask=there[:, None], other=0.0)
        total = tl.dot(tl.trans(d_low), x, total, input_precision="ieee")
    row_out = (part * COUNT + j) * RANK + rank
    out = out_ptr + row_out.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, total, mask=inside[None, :])


@triton.jit
def _blocks_before(j, width_0, width_1, width_2, BLOCK_COLUMNS: tl.constexpr):
    """Count the blocks of columns of the layers before layer j."""
    first = tl.cdiv(width_0, BLOCK_COLUMNS)
    second = first + tl.cdiv(width_1, BLOCK_COLUMNS)
    third = second + tl.cdiv(width_2, BLOCK_COLUMNS)
    return tl.where(j == 0, 0, _select(j - 1, first, second, third))


@kernel("rows", "rows_each")
def _through_b(
    dy_0,
    dy_1,
    dy_2,
    stride_0,
    stride_1,
    stride_2,
    width_0,
    width_1,
    width_2,
    scale_0,
    scale_1,
    scale_2,
    b_ptr,
    low_ptr,
    d_low_parts,
    d_b_parts,
    rows,
    rows_each,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum dB over a range of rows for a block of columns, and ds over the columns for those rows.

    The columns of all layers' dy lie side by side; a block of them belongs to one layer.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    second = block >= _blocks_before(1, width_0, width_1, width_2, BLOCK_COLUMNS)
    third = block >= _blocks_before(2, width_0, width_1, width_2, BLOCK_COLUMNS)
    j = second.to(tl.int32) + third.to(tl.int32)
    dy_ptr = _select(j, dy_0, dy_1, dy_2)
    stride = _select(j, stride_0, stride_1, stride_2)
    width = _select(j, width_0, width_1, width_2)
    scale = _select(j, scale_0, scale_1, scale_2)
    local = block - _blocks_before(j, width_0, width_1, width_2, BLOCK_COLUMNS)
    column = local * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < width
    rank = tl.arange(0, RANK)
    feature = _select(j, 0, width_0, width_0 + width_1) + column
    b_at = feature[:, None] * RANK + rank[None, :]
    total = tl.zeros((RANK, BLOCK_COLUMNS), dtype=tl.float32)
    first = part * rows_each
    stop = tl.minimum(first + rows_each, rows)
    for start in range(first, stop, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        there = row < stop
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        dy = tl.load(dy_ptr + at, mask=there[:, None] & inside[None, :], other=0.0)
        low_at = row.to(tl.int64)[:, None] * (COUNT * RANK) + (j * RANK + rank)[None, :]
        low = tl.load(low_ptr + low_at, mask=there[:, None], other=0.0)
        # B is read again for every tile and dB comes last: other orders overflow the registers.
        b = tl.load(b_ptr + b_at, mask=inside[:, None], other=0.0)
        d_low = scale * tl.dot(dy, b, input_precision="ieee")
        out = (block.to(tl.int64) * rows + row)[:, None] * RANK + rank[None, :]
        tl.store(d_low_parts + out, d_low, mask=there[:, None])
        total = tl.dot(tl.trans(low), dy, total, input_precision="ieee")
    features = part.to(tl.int64) * (width_0 + width_1 + width_2) + feature
    out = features[:, None] * RANK + rank[None, :]
    tl.store(d_b_parts + out, scale * tl.trans(total), mask=inside[:, None])


@kernel("rows", "parts")
def _add_parts(
    d_low_parts,
    d_b_parts,
    d_low_ptr,
    d_b_ptr,
    width_0,
    width_1,
    width_2,
    rows,
    parts,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts that `_through_b` stored: those of ds_j, and for j = COUNT those of all dB."""
    j = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_b = j == COUNT
    first = _blocks_before(j, width_0, width_1, width_2, BLOCK_COLUMNS)
    stop = _blocks_before(j + 1, width_0, width_1, width_2, BLOCK_COLUMNS)
    first, stop = tl.where(of_b, 0, first), tl.where(of_b, parts, stop)
    size = RANK * tl.where(of_b, width_0 + width_1 + width_2, rows)
    parts_ptr = tl.where(of_b, d_b_parts, d_low_parts)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(first, stop):
        total += tl.load(parts_ptr + size.to(tl.int64) * part + at, mask=at < size, other=0.0)
    if of_b:
        tl.store(d_b_ptr + at, total, mask=at < size)
    else:
        out = d_low_ptr + (at // RANK * COUNT + j) * RANK + at % RANK
        tl.store(out, total.to(d_low_ptr.dtype.element_ty), mask=at < size)


class Draws:
    """What the kernels need to draw the masks of the adapters of one input.

    Args:
        settings: (p, module id) of each adapter.
        rows: (M,) int32 row keys, or None where nothing is dropped.
    """

    def __init__(self, settings: list[tuple[float, int]], rows: Tensor | None):
        self.drops = rows is not None and any(p > 0 for p, _ in settings)
        spare = MOST_ADAPTERS - len(settings)
        # As int32, so that no argument changes its type from module to module.
        keys = [signed(mix(module)) for _, module in settings] + [0] * spare
        limits = [keep_limit(p) for p, _ in settings] + [0] * spare
        self.arguments = (rows if self.drops else None, *keys, *limits)
        self.of_first = (self.arguments[0], keys[0], limits[0])

    def options(self, name: str, device: torch.device, count: int, rank: int) -> dict[str, int]:
        """Return the options of a launch."""
        return {"COUNT": count, "DROPS": self.drops, **tiles_of(name, device, rank)}


def tiles_of(name: str, device: torch.device, rank: int, full: int = 64) -> dict[str, int]:
    """Return rank, tile, warps: above rank `full` half the tile, or twice the warps."""
    tiles = launch(name, device)
    if name in ("adapter_gradient", "input_gradient") and rank > 32:  # with fewer they spill
        tiles["num_warps"] *= 2
    if rank > full:
        tiles["BLOCK_COLUMNS"] = max(SMALLEST_DOT, tiles["BLOCK_COLUMNS"] // 2)
    return {"RANK": rank, **tiles}


def low_rank_product(x: Tensor, a: Tensor, draws: Draws) -> Tensor:
    """Return (x ⊙ D_j) A_jᵀ for each adapter: (M, J, R)."""
    (rows, width), (count, rank, _) = x.shape, a.shape
    options = draws.options("low_rank", x.device, count, rank)
    out = x.new_empty(rows, count, rank)
    grid = count, triton.cdiv(rows, options["BLOCK_ROWS"])
    _low_rank[grid](x, a, out, *draws.arguments, rows, width, **options)
    return out


def input_gradient(d_low_rank: Tensor, a: Tensor, draws: Draws) -> Tensor:
    """Return Σ_j (ds_j A_j) ⊙ D_j: (M, K)."""
    rows, (count, rank, width) = len(d_low_rank), a.shape
    options = draws.options("input_gradient", a.device, count, rank)
    dx = a.new_empty(rows, width)
    grid = triton.cdiv(rows, options["BLOCK_ROWS"]), triton.cdiv(width, options["BLOCK_COLUMNS"])
    _input_gradient[grid](dx, d_low_rank, a, *draws.arguments, rows, width, **options)
    return dx


def adapter_gradient(
    again: Callable[..., Tensor] | None,
    sources: Sequence[Tensor | None],
    d_low_rank: Tensor,
    draws: Draws,
) -> Tensor:
    """Return ds_jᵀ (x ⊙ D_j) for each adapter: (J, R, K) fp32.

    Args:
        again: how x is made, a function of `kernels/triton/inputs.py`, or None where it is kept.
        sources: what it is made of, or x itself.
        d_low_rank: (M, J, R), the ds_j.
        draws: the masks D_j.
    """
    first, found = sources[0], tile_arguments(again, tuple(sources))
    assert first is not None
    assert found is not None
    pointers, kind = found
    (rows, width), (_, count, rank) = first.shape, d_low_rank.shape
    options = draws.options("adapter_gradient", first.device, count, rank)
    if rank > 64 or kind == LAYER_NORM.value:  # the assembler takes fewer by itself, and spills
        options["maxnreg"] = _MOST_REGISTERS
    parts = max(1, min(16, rows // 512))
    out = first.new_empty(parts, count, rank, width, dtype=torch.float32)
    grid = count, triton.cdiv(width, options["BLOCK_COLUMNS"]), parts
    inputs = (*pointers, d_low_rank, out, *draws.arguments)
    _adapter_gradient[grid](*inputs, rows, width, triton.cdiv(rows, parts), KIND=kind, **options)
    return out.sum(0)


def through_b(
    grads: Sequence[Tensor], b: Tensor, low_rank: Tensor, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return what the backward pass through the B's gives.

    Args:
        grads: dy_j, (M, N_j) each, with columns that lie side by side.
        b: (ΣN, R), the B_j above each other, with zeros up to R columns.
        low_rank: (M, J, R), the s_j.
        scales: the c_j.

    Returns:
        c_j dy_j B_j, (M, J, R) in the type of `low_rank`, and c_j dy_jᵀ s_j above each other,
        (ΣN, R) fp32.
    """
    rows, count, rank = low_rank.shape
    widths = [dy.shape[1] for dy in grads]
    d_low, d_b = torch.empty_like(low_rank), torch.empty_like(b, dtype=torch.float32)
    if rank > _LARGEST_RANK_IN_ONE_PASS:
        shares = zip(grads, b.split(widths), d_b.split(widths), scales, strict=True)
        for j, (dy, b_j, d_b_j, scale) in enumerate(shares):
            d_low[:, j].addmm_(dy, b_j, beta=0, alpha=scale)
            torch.mul(gradient_product(dy.t(), low_rank[:, j]), scale, out=d_b_j)
        return d_low, d_b
    tiles = tiles_of("through_b", b.device, rank, full=SMALLEST_DOT)
    spare = MOST_ADAPTERS - count
    columns = [*widths, *[0] * spare]
    pointers = [*grads, *[grads[0]] * spare]
    strides = [dy.stride(0) for dy in pointers]
    factors = [float(scale) for scale in (*scales, *[0] * spare)]
    blocks = sum(triton.cdiv(width, tiles["BLOCK_COLUMNS"]) for width in widths)
    parts = max(1, min(16, rows // 512))
    d_low_parts = b.new_empty(blocks, rows, rank, dtype=torch.float32)
    d_b_parts = b.new_empty(parts, *b.shape, dtype=torch.float32)
    inputs = (*pointers, *strides, *columns, *factors, b, low_rank)
    rows_each = triton.cdiv(rows, parts)
    _through_b[blocks, parts](
        *inputs, d_low_parts, d_b_parts, rows, rows_each, COUNT=count, **tiles
    )
    sizes = {"COUNT": count, "RANK": rank, "BLOCK_COLUMNS": tiles["BLOCK_COLUMNS"], "BLOCK": 1024}
    grid = triton.cdiv(rank * max(rows, len(b)), sizes["BLOCK"]), count + 1
    _add_parts[grid](d_low_parts, d_b_parts, d_low, d_b, *columns, rows, parts, **sizes)
    return d_low, d_b
