"""The optimizers' updates in Triton: AdamW in one pass, Adafactor's matrices in three.

Legend: E elements of a flat buffer · n matrices of one shape · R rows · C columns · P parts of R

Everything is fp32, masters and states alike. Formulas and arguments are those of `adamw_update` and
`adafactor_update` in `train.optim`, but that gradients are left alone: the factor on them is taken
into the pass that reads them.

    AdamW       reads w, g, m, v and writes w, m, v: 28 bytes an element
    Adafactor   squares   reads g: the row means into R, sums of P parts of the columns
                norm      reads g: the sum of the squared update, in P parts
                apply     reads g, w and writes w: 20 bytes an element in all three

Sums over columns and over a matrix are made in parts, one a program, which torch adds up in order:
no atomics, the same bits every time.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Generator

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.jit import kernel
from kernels.triton.launch import launch


@kernel()
def _adamw(
    weight_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    count,
    gradient_factor,
    beta1_left,
    beta2,
    beta2_left,
    eps,
    size,
    decay,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0) * gradient_factor
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    first += (gradient - first) * beta1_left
    second = second * beta2 + gradient * gradient * beta2_left
    weight = weight * decay - size * (first / (tl.sqrt(second) + eps))
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(weight_ptr + at, weight, mask=inside)


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_factor: float,
) -> None:
    """Update (E,) parameters and both moments in place."""
    if not parameter.numel():
        return
    beta1, beta2 = betas
    # As in `adamw_update`: with numerator and denominator times √(1-β₂ᵗ).
    correction = math.sqrt(1.0 - beta2**step)
    settings = launch("adamw", parameter.device)
    _adamw[(triton.cdiv(parameter.numel(), settings["BLOCK"]),)](
        parameter,
        gradient,
        first,
        second,
        parameter.numel(),
        gradient_factor,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps * correction,
        learning_rate * correction / (1.0 - beta1**step),
        1.0 - learning_rate * weight_decay,
        **settings,
    )


@kernel()
def _squares(
    gradient_ptr,
    gradient_stride,
    row_ptr,
    sums_ptr,
    rows,
    columns,
    gradient_factor,
    beta2_left,
    epsilon,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    part = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    row = part * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = row < rows
    base = gradient_ptr + matrix * gradient_stride + row.to(tl.int64)[:, None] * columns
    sums = sums_ptr + (matrix * tl.num_programs(0) + part) * columns
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        gradient = tl.load(base + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        gradient *= gradient_factor
        squared = gradient * gradient
        total += tl.sum(squared, axis=1)
        tl.store(sums + column, tl.sum(squared, axis=0), mask=inside)
    at = row_ptr + matrix * rows + row
    before = tl.load(at, mask=there, other=0.0)
    tl.store(at, before + (total / columns + epsilon - before) * beta2_left, mask=there)


@triton.jit
def _update_of(gradient, gradient_factor, row_factor, column_factor):
    return gradient * gradient_factor * row_factor[:, None] * column_factor[None, :]


@kernel()
def _norm(
    gradient_ptr,
    gradient_stride,
    row_factor_ptr,
    column_factor_ptr,
    out_ptr,
    rows,
    columns,
    gradient_factor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    part = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    row = part * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = row < rows
    base = gradient_ptr + matrix * gradient_stride + row.to(tl.int64)[:, None] * columns
    row_factor = tl.load(row_factor_ptr + matrix * rows + row, mask=there, other=0.0)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        both = there[:, None] & inside[None, :]
        gradient = tl.load(base + column[None, :], mask=both, other=0.0)
        column_factor = tl.load(
            column_factor_ptr + matrix * columns + column, mask=inside, other=0.0
        )
        update = _update_of(gradient, gradient_factor, row_factor, column_factor)
        total += tl.sum(update * update, axis=1)
    tl.store(out_ptr + matrix * tl.num_programs(0) + part, tl.sum(total, axis=0))


@kernel()
def _apply(
    weight_ptr,
    weight_stride,
    gradient_ptr,
    gradient_stride,
    row_factor_ptr,
    column_factor_ptr,
    rate_ptr,
    rows,
    columns,
    gradient_factor,
    decay,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there, inside = row < rows, column < columns
    both = there[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    gradient = tl.load(gradient_ptr + matrix * gradient_stride + at, mask=both, other=0.0)
    row_factor = tl.load(row_factor_ptr + matrix * rows + row, mask=there, other=0.0)
    column_factor = tl.load(column_factor_ptr + matrix * columns + column, mask=inside, other=0.0)
    update = _update_of(gradient, gradient_factor, row_factor, column_factor)
    here = weight_ptr + matrix * weight_stride + at
    weight = tl.load(here, mask=both, other=0.0)
    rate = tl.load(rate_ptr + matrix)
    tl.store(here, weight * decay - rate * update, mask=both)


def adafactor_(
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor,
    column: Tensor,
    *,
    beta2: float,
    learning_rate: float,
    weight_decay: float,
    gradient_factor: float,
    epsilon: float,
    whole_rows: int | None = None,
) -> Generator[Tensor, Tensor, None]:
    """Update (n, R, C) matrices, their (n, R) row and their (n, C) column means in place.

    A matrix is contiguous, and so are the means. Yields what ranks sum, as `adafactor_update`.
    """
    count, rows, columns = parameter.shape
    whole = rows if whole_rows is None else whole_rows
    if gradient.stride()[1:] != (columns, 1):
        gradient = gradient.contiguous()
    settings = launch("adafactor", parameter.device)
    parts = triton.cdiv(rows, settings["BLOCK_ROWS"])
    slices = triton.cdiv(columns, settings["BLOCK_COLUMNS"])
    sums = gradient.new_empty(count, parts, columns)
    of_gradient = gradient, gradient.stride(0)
    _squares[(parts, count)](
        *of_gradient,
        row,
        sums,
        rows,
        columns,
        gradient_factor,
        1.0 - beta2,
        epsilon,
        **settings,
    )
    sums = yield sums.sum(1)
    column.lerp_(sums.div_(whole).add_(epsilon), 1.0 - beta2)
    row_factor = (row / ((yield row.sum(dim=-1, keepdim=True)) / whole)).rsqrt_()
    column_factor = column.rsqrt()
    factors = row_factor, column_factor
    squared = gradient.new_empty(count, parts)
    _norm[(parts, count)](
        *of_gradient, *factors, squared, rows, columns, gradient_factor, **settings
    )
    mean_square = (yield squared.sum(1)).div_(whole * columns)
    rate = learning_rate / mean_square.sqrt_().clamp_(min=1.0)
    _apply[(parts, count, slices)](
        parameter,
        parameter.stride(0),
        *of_gradient,
        *factors,
        rate,
        rows,
        columns,
        gradient_factor,
        1.0 - weight_decay * learning_rate,
        **settings,
    )
