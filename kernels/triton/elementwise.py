"""Rotary embeddings, SwiGLU and GELU in Triton: one pass over memory each way.

Legend: M token rows · I intermediate size · heads · d head size

Everything is computed in fp32 and rounded once, when it is written.

    rotary     y₁ = x₁·cos - x₂·sin, y₂ = x₂·cos + x₁·sin; backward the same with -sin
    SwiGLU     y = silu(g)·u;  dg = dy·u·σ·(1 + g·(1 - σ)),  du = dy·silu(g),  σ = sigmoid(g)
    GELU       y = x·σ with σ = sigmoid(2·√(2/π)·(x + 0.044715·x³)), which is its tanh form, and
               where a bias comes in with it x + b in the place of x;
               dx = dy·(σ + x·σ·(1 - σ)·2·√(2/π)·(1 + 3·0.044715·x²))

Bytes an element, with c bytes each: rotary 2c a way (the tables are read once a token), SwiGLU 3c
forward and 5c backward, GELU 2c and 3c. What is kept for the backward pass are the inputs alone.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operands import Made, Operands
from kernels.segments import Segments
from kernels.triton.inputs import (
    gelu,
    gelu_again,
    gelu_gradient,
    swiglu_again,
    swiglu_gradients,
)
from kernels.triton.jit import kernel
from kernels.triton.launch import launch
from kernels.triton.linears import linears


@kernel()
def _rotary(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    row_stride,
    heads,
    half,
    direction,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    table = row * 2 * half + column
    cos = tl.load(cos_ptr + table, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=column < half, other=0.0).to(tl.float32) * direction
    low = head * 2 * half + column
    first = tl.load(x_ptr + row * row_stride + low, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + row * row_stride + low + half, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + row * heads * 2 * half + low
    kind = out_ptr.dtype.element_ty
    tl.store(out, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(out + half, (second * cos + first * sin).to(kind), mask=inside)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    rows, heads, d = x.shape
    if x.stride(2) != 1 or x.stride(1) != d:
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = triton.next_power_of_2(heads), triton.next_power_of_2(d // 2)
    _rotary[(rows,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        x.stride(0),
        heads,
        d // 2,
        direction,
        HEADS=tile[0],
        HALF=tile[1],
        num_warps=min(8, max(1, tile[0] * tile[1] // 256)),
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate (M, heads, d) queries and (M, kv, d) keys by (M, d) tables of equal halves."""
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # pyright: ignore


@kernel("rows")
def _swiglu_forward(gate_ptr, up_ptr, out_ptr, rows, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows.to(tl.int64) * width
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel("rows")
def _swiglu_backward(
    gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, rows, width, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows.to(tl.int64) * width
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    _, d_gate, d_up = swiglu_gradients(gate, up, d_out)
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + at, d_up.to(d_up_ptr.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        settings = launch("elementwise", gate.device)
        grid = (triton.cdiv(gate.numel(), settings["BLOCK"]),)
        _swiglu_forward[grid](gate, up, out, *gate.shape, **settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        settings = launch("elementwise", gate.device)
        grid = (triton.cdiv(gate.numel(), settings["BLOCK"]),)
        d_out = grads[0].contiguous()
        _swiglu_backward[grid](gate, up, d_out, d_gate, d_up, *gate.shape, **settings)
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Made:
    """Return silu(gate) · up, element by element: two (M, I) → (M, I); its reader makes it."""
    return Made(_SwiGLU.apply, swiglu_again, (gate, up))  # pyright: ignore


@triton.jit
def _biased(x_ptr, bias_ptr, at, column, inside, HAS_BIAS: tl.constexpr):
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return x


@kernel()
def _gelu_forward(x_ptr, bias_ptr, out_ptr, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    x = _biased(x_ptr, bias_ptr, at, column, inside, HAS_BIAS)
    tl.store(out_ptr + at, gelu(x).to(out_ptr.dtype.element_ty), mask=inside)


@kernel()
def _gelu_backward(
    x_ptr, bias_ptr, d_out_ptr, d_x_ptr, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    x = _biased(x_ptr, bias_ptr, at, column, inside, HAS_BIAS)
    d_out = tl.load(d_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    _, d_x = gelu_gradient(x, d_out)
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, bias)
        out = torch.empty_like(x)
        grid, settings = _by_row(x)
        _gelu_forward[grid](x, bias, out, x.shape[1], HAS_BIAS=bias is not None, **settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        d_x, d_out = torch.empty_like(x), grads[0].contiguous()
        grid, settings = _by_row(x)
        arguments = x, bias, d_out, d_x, x.shape[1]
        _gelu_backward[grid](*arguments, HAS_BIAS=bias is not None, **settings)
        d_bias = None
        if ctx.needs_input_grad[1]:
            d_bias = d_x.sum(0, dtype=torch.float32).to(bias.dtype)
        return d_x, d_bias


def _by_row(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return grid and parameters of a launch whose programs stay inside a row of (M, I)."""
    settings = launch("elementwise", x.device)
    return (len(x), triton.cdiv(x.shape[1], settings["BLOCK"])), settings


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return GELU of x + bias in its tanh form: (M, I) and (I,) → (M, I)."""
    return _GELU.apply(x, bias)  # pyright: ignore[reportReturnType]  # apply is untyped


def linear_gelu(
    x: Tensor | Made,
    layer: Operands,
    segments: Segments | None = None,
    *,
    linears: Callable[..., list[Tensor]] = linears,
) -> Made:
    """Return GELU of one layer's output, as `kernels.linears.linear_gelu`: (M, K) → (M, I).

    The bias comes in with the activation, which reads the output anyway; its reader makes it.
    `linears` is the operation that the layer itself goes through.
    """
    (widened,) = linears(x, [layer._replace(bias=None)], segments)
    return Made(gelu_tanh, gelu_again, (widened, layer.bias))
