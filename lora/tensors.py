"""The tensors of an adapter under PEFT's names: out of a model, and into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from files.errors import UserError
from lora.injection import adapter_config, lora_layers, trained_biases
from lora.pissa import from_start
from lora.saved_modules import is_tied, whole_weights
from lora.token_rows import ROWS, token_rows

PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
TOKEN_ROWS = f".token_adapter.{ROWS}"


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names: live, without gradient history.

    They are `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`, with DoRA
    `.lora_magnitude_vector`, and under a bias mode `<module>.base_layer.bias` for adapted and
    `<module>.bias` for other modules; `<module>.weight` of an embedding or head that is trained
    whole, `<module>.token_adapter.trainable_tokens_delta` of one with trained rows. Where the
    weights were changed at the start (PiSSA), factors of twice the rank say the same of the weights
    as they were: those are copies.

    Raises:
        UserError: The model carries no adapter.
    """
    layers = lora_layers(model)
    biases = trained_biases(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if layer.start is not None:
            a, b = from_start(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        if layer.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = layer.lora_magnitude_vector.detach()
    for name, bias in biases.items():
        module = name.removesuffix("bias").removesuffix(".")
        kept_in = f"{module}.base_layer" if module in layers else module
        tensors[f"{PREFIX}{kept_in}.bias" if kept_in else f"{PREFIX}bias"] = bias.detach()
    for name, weight in whole_weights(model, adapter_config(model).modules_to_save).items():
        tensors[f"{PREFIX}{name}.weight"] = weight.detach()
    for name, rows in token_rows(model).items():
        tensors[f"{PREFIX}{name}{TOKEN_ROWS}"] = rows.trainable_tokens_delta.detach()
    return tensors


@torch.no_grad()
def fill_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors with PEFT's names into a model's adapter, each converted to its place's dtype.

    Raises:
        UserError: Names or shapes are not the adapter's; all that differ are listed, and nothing
            has been copied.
    """
    own = fitted(model, tensors)
    for name, layer in lora_layers(model).items():
        if layer.start is None:
            continue
        a, b = (f"{PREFIX}{name}.{factor}.weight" for factor in ("lora_A", "lora_B"))
        r = len(layer.lora_A)
        if not (
            torch.equal(own[a][r:].cpu(), tensors[a][r:].to(own[a].dtype).cpu())
            and torch.equal(own[b][:, r:].cpu(), tensors[b][:, r:].to(own[b].dtype).cpu())
        ):
            raise UserError(f"{name}: the adapter began as other principal directions (PiSSA)")
        own[a], own[b] = layer.lora_A.detach(), layer.lora_B.detach()
        tensors = {**tensors, a: tensors[a][:r], b: tensors[b][:, :r]}
    for name, place in own.items():
        place.copy_(tensors[name])


def fitted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `adapter_tensors`; refuse those that `fill_adapter` would, on the meta device too."""
    own = adapter_tensors(model)
    faults = []
    if missing := own.keys() - tensors.keys():
        faults.append(f"missing are {_listed(missing)}")
        if is_tied(model, adapter_config(model).modules_to_save):
            faults[-1] += (
                " (embedding and head are one tensor, which a file holds under both names)"
            )
    if unexpected := tensors.keys() - own.keys():
        faults.append(f"unexpected are {_listed(unexpected)}")
    for name in sorted(own.keys() & tensors.keys()):
        given, place = tensors[name], own[name]
        if given.shape != place.shape:
            faults.append(f"{name} is {list(given.shape)}, not {list(place.shape)}")
        elif not given.is_floating_point():
            faults.append(f"{name} holds {given.dtype}, not floating-point numbers")
    if faults:
        raise UserError(
            f"the adapter's tensors do not fit {type(model).__name__}: {'; '.join(faults)}"
        )
    _refuse_two_of_one(model, tensors)
    return own


def _refuse_two_of_one(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an embedding and a head that differ where they are one tensor."""
    named = adapter_config(model).modules_to_save
    if not is_tied(model, named):
        return
    one, *others = (tensors[f"{PREFIX}{name}.weight"] for name in whole_weights(model, named))
    if not all(torch.equal(one, other) for other in others):
        raise UserError(
            f"the head of {type(model).__name__} is tied to its embedding, and the adapter holds "
            "two that differ: untie the base (tie_word_embeddings false and an lm_head of its "
            "own), or train the adapter with PEFT's ensure_weight_tying=True"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
