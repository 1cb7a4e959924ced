"""Norms, activations and rotary embeddings in plain PyTorch: the path of the CPU.

They are also what other backends are tested against, with `kernels/linears.py`,
`kernels/attention.py` and `kernels/loss.py`.

Legend: M token rows · H hidden size · heads query heads · kv key/value heads · d head size

Where SEMANTICS demands fp32 inside an operation, fp64 input stays fp64 (`_exact`). All of it works
under autocast; without it, biases that are kept in fp32 are cast to their input.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import Draw, dropout
from kernels.operands import Made


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Made:
    """Return x / √(mean(x²) + eps) · weight over the last axis: (M, H) → (M, H).

    The quotient is made in fp32 and cast back before the weight comes in (SEMANTICS §6).
    """
    return Made.by(functools.partial(_rms_norm, eps=eps), x, weight)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]  # apply is untyped


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row, r = 1/√(mean(x²) + eps).

    With n = x · r and g = dy · w: dx = r · (g - n · mean(g · n)), dw = Σ over the rows of dy · n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        normed = x.to(inverse.dtype) * inverse
        d_x = d_weight = None
        if needs_weight:
            d_weight = (grads[0] * normed).sum(0).to(weight.dtype)
        if needs_x:
            d_normed = (grads[0] * weight).to(inverse.dtype)
            mean = _mean_of_product(d_normed, normed)
            d_x = torch.addcmul(d_normed, normed, mean, value=-1).mul_(inverse).to(x.dtype)
        return d_x, d_weight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x, (M, H), and 1/√(mean(x²) + eps), (M, 1)."""
    exact = x.to(_exact(x.dtype))
    inverse = _mean_of_product(exact, exact).add_(eps).rsqrt_()
    return (exact * inverse).to(x.dtype) * weight, inverse


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return what leaves autocast where it is on: to leave it costs more than a small norm."""
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _mean_of_product(x: Tensor, y: Tensor) -> Tensor:
    """Return mean(x · y) over the last axis, (M, H) → (M, 1), in their own type under autocast."""
    with _without_autocast(x):
        return torch.linalg.vecdot(x, y).div_(x.shape[-1])[:, None]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Made:
    """Return (x - mean) / √(variance + eps) · weight + bias over the last axis: (M, H) → (M, H)."""
    return Made.by(functools.partial(_layer_norm, eps=eps), x, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # A CPU takes fp32 parameters beside bf16 input, but both in one type: a bias that is
        # trained (lora.bias) is in fp32. A layer whose weights ranks share has both in bf16 beside
        # fp32 input.
        kind = torch.promote_types(x.dtype, bias.dtype)
        weight, bias = weight.to(kind), bias.to(kind)
    else:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    # CUDA's autocast would cast the input to fp32; the sums of the kernel are in fp32 as it is.
    with _without_autocast(x):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add(x: Tensor | None, change: Tensor, draw: Draw | None = None) -> Tensor:
    """Return x + dropout(change), (M, H) each.

    Args:
        x: None stands for 0.
        change: what is added to it.
        draw: which elements of `change` are dropped first; None drops nothing.
    """
    if draw is not None:
        change = dropout(change, *draw)
    return change if x is None else x + change


def add_rms_norm(
    x: Tensor, change: Tensor, weight: Tensor, eps: float, draw: Draw | None = None
) -> tuple[Tensor, Made]:
    """Return (x + dropout(change), its RMSNorm), (M, H) each; `draw` as in `add`."""
    total = add(x, change, draw)
    return total, rms_norm(total, weight, eps)


def add_layer_norm(
    x: Tensor,
    change: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    draw: Draw | None = None,
) -> tuple[Tensor, Made]:
    """Return (x + dropout(change), its LayerNorm), (M, H) each; `draw` as in `add`."""
    total = add(x, change, draw)
    return total, layer_norm(total, weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Made:
    """Return silu(gate) · up, element by element."""
    return Made.by(_swiglu, gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]  # apply is untyped


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs and computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return d_gate, F.silu(gate).mul_(grads[0])


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, the one StarCoder2 was trained with."""
    return F.gelu(x, approximate="tanh")


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (M, heads, d) queries.
        k: (M, kv, d) keys.
        cos: (M, d); its two halves are equal, and so are those of `sin`.
        sin: (M, d).

    Returns:
        Both, rotated, in their own types: x·cos + cat(-x₂, x₁)·sin with x₁, x₂ the halves of d.
    """
    if not torch.is_grad_enabled():
        return _turned(q, cos, sin), _turned(k, cos, sin)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # pyright: ignore


class _Rotary(torch.autograd.Function):
    """Three calls and no saved activation; the backward pass turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate outside autograd, in the fewest calls: the same bits as `_rotate`'s."""
    low, high = x.chunk(2, -1)
    turned = x * cos[:, None]
    return turned.addcmul_(torch.cat((-high, low), -1), sin[:, None]).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    low, high = x.chunk(2, -1)
    sin_low, sin_high = sin.chunk(2, -1)
    signed = torch.cat((-sin_low, sin_high), -1)
    turned = x * cos[:, None]
    # Whole rows: operations on halves of a head are several times as slow on a CPU.
    turned.addcmul_(torch.cat((high, low), -1), signed[:, None], value=direction)
    return turned.to(x.dtype)
