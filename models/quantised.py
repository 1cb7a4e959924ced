"""Quantised weights in a decoder: which take it, how they come in, and how they go out again.

All linear layers are quantised but the head; embedding, head, norms and biases stay as they are. A
layer's `weight` is a `QuantisedWeight` then, under its old name, and no parameter any more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from files.errors import UserError, did_you_mean
from kernels.quantised import KINDS, QuantisedWeight, quantised, quantised_shapes
from models.layers import CausalLM


def quantisable(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is a weight that is quantised."""
    if not isinstance(model, CausalLM):
        return False
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_weight = isinstance(module, nn.Linear) and leaf == "weight"
    return is_weight and module.weight is not model.head_weight()


def refuse_other_kind(where: object, stored: str | None, asked: str | None) -> None:
    """Refuse a kind that there is not, or that is not the one in which weights lie at `where`."""
    if asked is not None and asked not in KINDS:
        raise UserError(
            f"model.quantization: '{asked}' is not one of {', '.join(KINDS)}, or none"
            f"{did_you_mean(asked, KINDS)}"
        )
    if stored is not None and asked not in (None, stored):
        raise UserError(
            f"model.quantization={asked}: the weights at {where} are {stored} already; use "
            f"model.quantization={stored}, or the model's original weights"
        )


def quantise(
    model: CausalLM,
    name: str,
    value: Tensor,
    kind: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put a weight into its layer, quantised as `kind` says, `nf4` or `int8`.

    It is quantised from the numbers that it has on the host, whatever `dtype` they stand for in the
    model: (N, K), of which a piece at a time is held in another type.

    Raises:
        UserError: A number that is beyond fp16, through which int8 goes.
    """
    if kind == "int8" and not value.half().isfinite().all():
        raise UserError(
            f"{name}: holds numbers beyond 65504 or none, and int8 is made of fp16; use "
            "model.quantization=nf4 or none"
        )
    put(model, name, kind, quantised(value, kind), dtype, device)


def put(
    model: CausalLM,
    name: str,
    kind: str,
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put a weight into its layer whose parts are made: those of `QuantisedWeight`."""
    module = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(module, nn.Linear)
    shape = tuple(module.weight.shape)
    placed = {part: tensor.to(device) for part, tensor in parts.items()}
    weight = QuantisedWeight(kind, shape, dtype, placed, model.operations.dequantise)
    del module.weight
    module.weight = weight  # pyright: ignore[reportAttributeAccessIssue]  # typed as a tensor


def outline(model: CausalLM, kind: str) -> None:
    """Make the weights of a model on the meta device quantised ones, of its own type."""
    for name, parameter in list(model.named_parameters()):
        if quantisable(model, name):
            parts = {
                part: torch.empty(shape, dtype=dtype, device="meta")
                for part, (shape, dtype) in quantised_shapes(tuple(parameter.shape), kind).items()
            }
            put(model, name, kind, parts, parameter.dtype, "meta")


def dequantise(model: nn.Module) -> str | None:
    """Make every quantised weight a tensor of the type that it stands for, in place.

    Returns:
        What they were, `nf4` or `int8`; None where none was quantised.
    """
    kind = None
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantisedWeight):
            kind = weight.kind
            del module.weight
            module.weight = nn.Parameter(weight.dense(weight.dtype), requires_grad=False)
    return kind
