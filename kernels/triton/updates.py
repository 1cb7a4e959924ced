"""The optimizers' updates in Triton: AdamW in one pass, Adafactor's matrices in three.

Legend: E elements of a flat buffer · n matrices of one shape · R rows · C columns · P parts of R

Everything is fp32, masters and states alike; the formulas are those of `train.optim.adamw.AdamW`
and `train.optim.adafactor.Adafactor`. The factor on the gradients, clipping's and the loss scale's,
is taken into the pass that reads them.

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

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import launch


@triton.jit
def _adamw(
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    count,
    gradient_scale,
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
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0) * gradient_scale
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    exp_avg += (gradient - exp_avg) * beta1_left
    exp_avg_sq = exp_avg_sq * beta2 + gradient * gradient * beta2_left
    weight = weight * decay - size * (exp_avg / (tl.sqrt(exp_avg_sq) + eps))
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    tl.store(weight_ptr + at, weight, mask=inside)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    steps: int,
    gradient_scale: float,
    decay: float,
) -> None:
    """Update (E,) weights and both moments in place, all fp32; the gradient is left alone.

    Args:
        weight: The masters.
        gradient: Their gradient, before `gradient_scale`.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        learning_rate: The rate of this step.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        steps: This step's number, from 1: what the bias corrections are of.
        gradient_scale: Factor on the gradient.
        decay: Factor on the weight, 1 - learning rate · weight decay.
    """
    if not weight.numel():
        return
    beta1, beta2 = betas
    # As in `AdamW._update`: with numerator and denominator times √(1-β₂ᵗ).
    correction = math.sqrt(1.0 - beta2**steps)
    settings = launch("adamw", weight.device)
    _adamw[(triton.cdiv(weight.numel(), settings["BLOCK"]),)](
        weight,
        gradient,
        exp_avg,
        exp_avg_sq,
        weight.numel(),
        gradient_scale,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps * correction,
        learning_rate * correction / (1.0 - beta1**steps),
        decay,
        **settings,
    )


@triton.jit
def _squares(
    gradient_ptr,
    gradient_stride,
    row_ptr,
    sums_ptr,
    rows,
    columns,
    gradient_scale,
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
        gradient *= gradient_scale
        squared = gradient * gradient
        total += tl.sum(squared, axis=1)
        tl.store(sums + column, tl.sum(squared, axis=0), mask=inside)
    at = row_ptr + matrix * rows + row
    before = tl.load(at, mask=there, other=0.0)
    tl.store(at, before + (total / columns + epsilon - before) * beta2_left, mask=there)


@triton.jit
def _update_of(gradient, gradient_scale, row_factor, column_factor):
    return gradient * gradient_scale * row_factor[:, None] * column_factor[None, :]


@triton.jit
def _norm(
    gradient_ptr,
    gradient_stride,
    row_factor_ptr,
    column_factor_ptr,
    out_ptr,
    rows,
    columns,
    gradient_scale,
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
        update = _update_of(gradient, gradient_scale, row_factor, column_factor)
        total += tl.sum(update * update, axis=1)
    tl.store(out_ptr + matrix * tl.num_programs(0) + part, tl.sum(total, axis=0))


@triton.jit
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
    gradient_scale,
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
    update = _update_of(gradient, gradient_scale, row_factor, column_factor)
    here = weight_ptr + matrix * weight_stride + at
    weight = tl.load(here, mask=both, other=0.0)
    rate = tl.load(rate_ptr + matrix)
    tl.store(here, weight * decay - rate * update, mask=both)


def adafactor_(
    weight: Tensor,
    gradient: Tensor,
    row: Tensor,
    column: Tensor,
    *,
    learning_rate: float,
    beta2: float,
    epsilon: float,
    gradient_scale: float,
    decay: float,
) -> None:
    """Update n matrices and their factored second moments in place, all fp32.

    Args:
        weight: (n, R, C) masters; a matrix is contiguous.
        gradient: (n, R, C), before `gradient_scale`; it is left alone.
        row: (n, R) means of the squared gradient over the columns, contiguous.
        column: (n, C) the same over the rows, contiguous.
        learning_rate: The rate of this step.
        beta2: Decay rate of the second moments at this step.
        epsilon: Added to the mean squares.
        gradient_scale: Factor on the gradient.
        decay: Factor on the weight, 1 - learning rate · weight decay.
    """
    count, rows, columns = weight.shape
    if gradient.stride()[1:] != (columns, 1):
        gradient = gradient.contiguous()
    settings = launch("adafactor", weight.device)
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
        gradient_scale,
        1.0 - beta2,
        epsilon,
        **settings,
    )
    column.lerp_(sums.sum(1).div_(rows).add_(epsilon), 1.0 - beta2)
    row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_()
    column_factor = column.rsqrt()
    factors = row_factor, column_factor
    squared = gradient.new_empty(count, parts)
    _norm[(parts, count)](
        *of_gradient, *factors, squared, rows, columns, gradient_scale, **settings
    )
    mean_square = squared.sum(1).div_(rows * columns)
    rate = learning_rate / mean_square.sqrt_().clamp_(min=1.0)
    _apply[(parts, count, slices)](
        weight,
        weight.stride(0),
        *of_gradient,
        *factors,
        rate,
        rows,
        columns,
        gradient_scale,
        decay,
        **settings,
    )
