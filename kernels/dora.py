"""A linear layer whose adapter turns its weight, and whose magnitudes are trained of their own.

Legend: M token rows · K, N features in and out · r adapter rank · D the dropout mask, 0 or 1
        n the norms of the rows of W + scale · B A, (N,) · ρ = m / n · k = 1/(1-p)

    forward    x̃ = k · x ⊙ D        y = x Wᵀ + b + (ρ-1) ⊙ x̃ Wᵀ + ρ ⊙ scale · x̃ Aᵀ Bᵀ
    backward   dm = Σ over the rows of dy ⊙ (x̃ Wᵀ + scale · x̃ Aᵀ Bᵀ) / n, and of the low-rank part
               what it is in `kernels.linears` for dy ⊙ ρ; n counts as a constant

Without dropout that is y = ρ ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + b: the direction of the adapted weight's
rows, and m for their lengths. ρ is near 1, so ρ-1 is what is rounded to the type that is computed
in. For dm the product x̃ Wᵀ is made again, not kept: it costs a third product with W (with dropout a
fourth and a fifth) and no memory.

Source: Liu et al. 2024 (DoRA), section 4.3; peft 0.21 `DoraLinearLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import keep, keep_mask
from kernels.operands import Operands, compute_dtype, gradient_product
from kernels.segments import Segments

# Rows of a weight that are held in fp32 at a time.
_ROWS = 1024


def weight_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the L2 norms of the rows of W + scale · B A, (N,), in the type of the factors."""
    norms = [
        torch.linalg.vector_norm(torch.addmm(w.to(b.dtype), b_rows, a, alpha=scale), dim=1)
        for w, b_rows in zip(weight.split(_ROWS), b.split(_ROWS), strict=True)
    ]
    return torch.cat(norms)


def dora_linear(
    x: Tensor,
    layer: Operands,
    segments: Segments | None,
    again: tuple[Callable[..., Tensor], tuple[Tensor | None, ...]] | None = None,
) -> Tensor:
    """Apply one layer that has magnitudes: (M, K) → (M, N), in the base product's type.

    `again` says what makes the input again, of what, where it is not to be kept.
    """
    rows = None if segments is None else segments.dropout_rows
    settings = layer.scale, layer.dropout if rows is not None else 0.0, layer.module
    assert isinstance(layer.weight, Tensor)
    tensors = layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.magnitude
    return _Dora.apply(x, again, rows, settings, *tensors)  # pyright: ignore[reportReturnType]


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        again: Any,
        rows: Tensor | None,
        settings: tuple[float, float, int],
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
    ) -> Tensor:
        scale, p, module = settings
        ctx.dtypes = x.dtype, compute_dtype(x)
        dtype, k = ctx.dtypes[1], 1 / (1 - p)
        with torch.autocast(x.device.type, enabled=False):
            norms = weight_norms(weight, a, b, scale)
            ratio = magnitude / norms
            x, w, low_a = x.to(dtype), weight.to(dtype), a.to(dtype)
            mask = None if p == 0 or rows is None else keep_mask(rows, module, x.shape[1], p)
            kept = x if mask is None else keep(x, mask)
            low_rank = torch.mm(kept, low_a.t())
            lifted = (b * (ratio * (scale * k)).unsqueeze(1)).to(dtype)
            excess = ((ratio - 1) * k).to(dtype)
            y = F.linear(x, w)
            y.addcmul_(y if mask is None else F.linear(kept, w), excess)
            y.addmm_(low_rank, lifted.t())
            if bias is not None:
                y.add_(bias.to(dtype))
        of_cpu = mask if x.device.type == "cpu" else None
        kept_for_later = rows, w, low_a, b, lifted, low_rank, norms, ratio, excess, of_cpu
        ctx.again, sources = again or (None, (x,))
        ctx.save_for_backward(*kept_for_later, *sources)
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, dy: Tensor
    ) -> tuple[Any, ...]:
        rows, w, low_a, b, lifted, low_rank, norms, ratio, excess, mask, *sources = (
            ctx.saved_tensors
        )
        x = sources[0] if ctx.again is None else ctx.again(*sources).to(ctx.dtypes[1])
        scale, p, module = ctx.settings
        needs_x, _, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        k = 1 / (1 - p)
        if mask is None and p and rows is not None:
            mask = keep_mask(rows, module, x.shape[1], p)
        kept = x if mask is None else keep(x, mask)
        changed, d_low_rank = dy * excess, torch.mm(dy, lifted)
        d_lifted = gradient_product(low_rank.t(), dy).t().to(b.dtype)
        d_a = gradient_product(d_low_rank.t(), kept).to(b.dtype)
        d_b = d_lifted * (ratio * (scale * k)).unsqueeze(1)
        turned = F.linear(kept, w).mul_(dy).sum(0, dtype=b.dtype)
        d_magnitude = (turned + scale * (d_lifted * b).sum(1)) * (k / norms)
        d_weight = d_x = None
        if needs_weight:
            d_weight = gradient_product(dy.t(), x) + gradient_product(changed.t(), kept)
        if needs_x:
            through = torch.mm(changed if mask is not None else dy + changed, w)
            through.addmm_(d_low_rank, low_a)
            d_x = through if mask is None else torch.mm(dy, w).add_(keep(through, mask))
        d_bias = dy.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        d_x = None if d_x is None else d_x.to(ctx.dtypes[0])
        return d_x, None, None, None, d_weight, d_bias, d_a, d_b, d_magnitude
