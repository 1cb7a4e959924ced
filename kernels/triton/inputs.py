"""Inputs of linear layers inside Triton kernels: read, or made again where they are read.

Legend: M token rows · K width of the input

An activation that is made from tensors that are kept anyway need not be kept itself (`Made`). Each
kind has a plain form here, which other linears make it by, and its formula in `input_tile`, so that
a kernel which reads the input tile by tile makes what it needs: reading a pre-activation is no more
than reading the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def gelu_again(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return GELU of x + bias in its tanh form, (M, K)."""
    exact = x.float() if bias is None else x.float() + bias.float()
    return F.gelu(exact, approximate="tanh").to(x.dtype)


def swiglu_again(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, (M, K)."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def layer_norm_again(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> Tensor:
    """Return (x - mean) · inverse · weight + bias, (M, K); mean and inverse are (M,)."""
    normed = (x.float() - mean[:, None]) * inverse[:, None]
    return (normed * weight.float() + bias.float()).to(x.dtype)


def rms_norm_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return x · inverse · weight, (M, K), rounded before the weight comes in."""
    normed = (x.float() * inverse[:, None]).to(x.dtype)
    return (normed.float() * weight.float()).to(x.dtype)


_READ = tl.constexpr(0)
GELU = tl.constexpr(1)
SWIGLU = tl.constexpr(2)
LAYER_NORM = tl.constexpr(3)
_RMS_NORM = tl.constexpr(4)

# Of each kind its number and where `input_tile` takes its sources: (x, other, weight, bias, mean,
# inverse).
_KINDS: dict[Callable[..., Tensor], tuple[int, tuple[int, ...]]] = {
    gelu_again: (GELU.value, (0, 3)),
    swiglu_again: (SWIGLU.value, (0, 1)),
    layer_norm_again: (LAYER_NORM.value, (0, 2, 3, 4, 5)),
    rms_norm_again: (_RMS_NORM.value, (0, 2, 5)),
}


@triton.jit
def gelu(x):
    """Return GELU in its tanh form, x · sigmoid(2·√(2/π)·(x + 0.044715·x³)), of fp32."""
    return x * tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))


@triton.jit
def gelu_gradient(x, d_out):
    """Return GELU of fp32 x and the gradient of x."""
    square = x * x
    sigmoid = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))
    slope = 1.5957691216057308 + 3.0 * 0.07135481627260025 * square
    out = x * sigmoid
    return out, d_out * (sigmoid + (out - out * sigmoid) * slope)


@triton.jit
def swiglu_gradients(gate, up, d_out):
    """Return silu(gate) · up, all in fp32, and the gradients of gate and up."""
    sigmoid = tl.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return gate * sigmoid * up, d_gate, d_out * gate * sigmoid


@triton.jit
def input_tile(
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
    KIND: tl.constexpr,
):
    """Return a tile of the input, in its own type; what lies outside it is finite."""
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    both = there[:, None] & inside[None, :]
    x = tl.load(x_ptr + at, mask=both, other=0.0)
    if KIND == _READ:
        out = x
    else:
        exact = x.to(tl.float32)
        if KIND == SWIGLU:
            exact = exact * tl.sigmoid(exact)
            exact *= tl.load(other_ptr + at, mask=both, other=0.0).to(tl.float32)
        elif KIND == GELU:
            if bias_ptr is not None:
                exact += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            exact = gelu(exact)
        else:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            inverse = tl.load(inverse_ptr + row, mask=there, other=0.0)[:, None]
            if KIND == LAYER_NORM:
                bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
                mean = tl.load(mean_ptr + row, mask=there, other=0.0)[:, None]
                exact = (exact - mean) * inverse * weight + bias
            else:
                exact = (exact * inverse).to(x.dtype).to(tl.float32) * weight
        out = exact.to(x.dtype)
    return out


def tile_arguments(
    again: Callable[..., Tensor] | None, sources: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], int] | None:
    """Return the pointers and the kind of `input_tile`, or None for what it cannot make."""
    kind, places = (_READ.value, (0,)) if again is None else _KINDS.get(again, (0, ()))
    if not places or any(s is not None and not s.is_contiguous() for s in sources):
        return None
    pointers: list[Any] = [None] * 6
    for place, source in zip(places, sources, strict=True):
        pointers[place] = source
    return pointers, kind
