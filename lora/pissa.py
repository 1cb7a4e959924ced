"""PiSSA: adapters that begin as the principal directions of their weights, and how they are saved.

Legend: K input features · N output features · r rank · c scale · A₀, B₀ the start of A and B

    W = U S Vᵀ        A₀ = √(S_r / c) V_rᵀ        B₀ = U_r √(S_r / c)        W ← W - c · B₀ A₀

What is trained is then c · B A on what is left of W. A file holds the difference from the start,
B A - B₀ A₀ = [B, -B₀] [A; A₀], which is an adapter of rank 2r for the base as everybody has it. It
holds the start as well, so that a run goes on from it bit for bit, whatever a second SVD would
give.

Source: Meng et al. 2024 (PiSSA); peft 0.21 `pissa_init` and `subtract_mutated_init`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from files.errors import UserError
from lora.config import LoraConfig
from lora.linear import LoraLinear


def principal_factors(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A₀ (r, K) and B₀ (N, r) of a weight (N, K), made in fp32 (fp64 of fp64)."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root.unsqueeze(1) * v[:r], (u[:, :r] * root).contiguous()


@torch.no_grad()
def start_from_principal(
    layers: Mapping[str, LoraLinear],
    saved: Mapping[str, Tensor] | None,
    agree: Callable[[Tensor], Tensor],
) -> None:
    """Let adapters begin as the principal directions of their weights, which lose these.

    Args:
        layers: Name → layer; of those on the meta device the ranks are looked at alone.
        saved: `<name>.lora_A.weight` and `.lora_B.weight` of a file whose start is taken; None
            makes it anew.
        agree: Gives a factor of the first rank to all ranks; they might differ in a last bit.

    Raises:
        UserError: A weight has fewer directions than its adapter has ranks.
    """
    for name, layer in layers.items():
        r, most = len(layer.lora_A), min(layer.weight.shape)
        if r > most:
            raise UserError(
                f"lora.init_lora_weights=pissa: the rank of {name} is {r}, and its weight of "
                f"{list(layer.weight.shape)} has {most} principal directions; lower lora.r, or "
                "give it a rank of its own (lora.rank_pattern)"
            )
        if layer.weight.is_meta:
            continue
        if saved is not None:
            a = saved[f"{name}.lora_A.weight"][r:]
            b = -saved[f"{name}.lora_B.weight"][:, r:]
        else:
            a, b = map(agree, principal_factors(layer.weight, r, layer.scale))
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        wide = layer.weight.to(layer.lora_A.dtype)
        layer.weight.copy_(torch.addmm(wide, layer.lora_B, layer.lora_A, alpha=-layer.scale))
        # On the host: it is wanted where files are written.
        layer.start = layer.lora_A.to("cpu", copy=True), layer.lora_B.to("cpu", copy=True)


def from_start(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return [A; A₀] (2r, K) and [B, -B₀] (N, 2r), the adapter of the unchanged weight."""
    assert layer.start is not None
    a, b = (factor.to(layer.lora_A.device) for factor in layer.start)
    return torch.cat([layer.lora_A.detach(), a]), torch.cat([layer.lora_B.detach(), -b], dim=1)


def of_file(config: LoraConfig) -> LoraConfig:
    """Return what a file says of adapters that began so: twice the rank, at the same scale."""
    # The scale is α / r, or α / √r.
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: alpha * factor for name, alpha in config.alpha_pattern.items()},
        init_lora_weights="default",
    )
