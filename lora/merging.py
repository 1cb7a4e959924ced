"""Folding an adapter into its base, so that the result is a plain model again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from files.errors import UserError
from kernels.quantised import QuantisedWeight
from lora.injection import adapter_config, lora_layers, trained_biases
from lora.linear import LoraLinear
from lora.saved_modules import whole_weights
from lora.token_rows import merge_rows


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold every adapter into its layer's weight, in place, and put the plain layers back.

    The sum W + scale · B A is made in fp32 and rounded once, to the weight's dtype; so are trained
    biases, and an embedding or head trained whole. One weight at a time is held in fp32.

    Args:
        model: A model with adapters.

    Returns:
        The names of the merged layers, in the model's order.

    Raises:
        UserError: The model carries no adapter; an adapted weight is quantised, or tied to another
            module, which would change with it (nothing has been merged then); or a merged weight is
            not finite in its dtype (the model is merged in part then: load it anew).
    """
    layers = lora_layers(model)
    biases = trained_biases(model)
    _refuse_quantised(layers)
    whole = whole_weights(model, adapter_config(model).modules_to_save)
    dtype = next(iter(layers.values())).weight.dtype
    _refuse_tied(model, layers)
    for name, layer in layers.items():
        merged = merged_weight(layer)
        if not merged.isfinite().all():
            raise UserError(
                f"{name}: the merged weight is not finite in {layer.weight.dtype}; the adapter has "
                "diverged, or the base needs a wider dtype"
            )
        layer.weight.copy_(merged)
        (plain,) = layer.plain
        # The layer's own parameters may have been replaced since injection.
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    for name, weight in whole.items():
        weight.data = weight.data.to(dtype)
        if not weight.isfinite().all():
            raise UserError(f"{name}: the trained weight is not finite in {dtype}")
    merge_rows(model)
    for name, bias in biases.items():
        weight = getattr(model.get_submodule(name.rpartition(".")[0]), "weight", None)
        if isinstance(weight, Tensor):
            bias.data = bias.data.to(weight.dtype)
    del model.lora_config
    return list(layers)


def merged_weight(layer: LoraLinear) -> Tensor:
    """Return W + scale · B A, (N, K), summed in the factors' dtype and rounded to the weight's.

    DoRA's rows have the lengths of its magnitudes.
    """
    weight = layer.weight.to(layer.lora_A.dtype)
    merged = torch.addmm(weight, layer.lora_B, layer.lora_A, alpha=layer.scale)
    if layer.lora_magnitude_vector is not None:
        ratio = layer.lora_magnitude_vector / torch.linalg.vector_norm(merged, dim=1)
        merged *= ratio.unsqueeze(1)
    return merged.to(layer.weight.dtype)


def _refuse_quantised(layers: dict[str, LoraLinear]) -> None:
    """Refuse weights in few bits: they have no room for what the adapter adds."""
    for name, layer in layers.items():
        if isinstance(layer.weight, QuantisedWeight):
            raise UserError(
                f"{name}: its weight is {layer.weight.kind}, and would have to be quantised again; "
                "load the base without quantization and merge into that, as python -m train.merge "
                "does"
            )


def _refuse_tied(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Refuse a weight that a second module reads: folding into it would change both."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if others:
            raise UserError(
                f"{name}: its weight is tied to {', '.join(others)}, which merging would change "
                "too; untie them first"
            )
