"""The embedding and the head, trained whole beside adapters: PEFT's `modules_to_save`.

They are trained in place, as fp32 masters, and a file holds them whole. Where the head is tied to
the embedding there is one tensor, whichever of the two is named: a file holds it under both names,
for readers that would otherwise untie them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from files.errors import UserError, did_you_mean

HEAD = "lm_head"


def whole_weights(model: nn.Module, named: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return, by module name, the weights of the embeddings and heads that are named.

    Args:
        model: Base model, adapted or not; a tied head is `lm_head`.
        named: Names, each of which stands for a module called so or one that ends in `.` and it.

    Raises:
        UserError: A name stands for neither.
    """
    there = _embeddings_and_head(model)
    found = {
        module: weight
        for module, weight in there.items()
        if any(module == name or module.endswith(f".{name}") for name in named)
    }
    for name in named:
        if not any(module == name or module.endswith(f".{name}") for module in found):
            known = [module.rpartition(".")[2] for module in there]
            raise UserError(
                f"lora.modules_to_save: '{name}' is no embedding and no head of "
                f"{type(model).__name__}, and nothing else is trained whole beside adapters"
                f"{did_you_mean(name, known)}; name {' or '.join(known)}, or use train.method=full"
            )
    chosen = {id(weight) for weight in found.values()}
    return {module: weight for module, weight in there.items() if id(weight) in chosen}


def train_whole(model: nn.Module, named: Sequence[str]) -> None:
    """Let the weights that are named be trained, as fp32 masters (fp64 of fp64)."""
    for weight in whole_weights(model, named).values():
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        weight.requires_grad_(True)


def is_tied(model: nn.Module, named: Sequence[str]) -> bool:
    """Return whether one tensor is among them under two names."""
    weights = whole_weights(model, named).values()
    return len({id(weight) for weight in weights}) < len(weights)


def _embeddings_and_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return their weights by module name, a tied head's under its own name too."""
    head_weight = getattr(model, "head_weight", None)
    head = head_weight() if callable(head_weight) else None
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_head = isinstance(module, nn.Linear) and (weight is head or _is_last(name))
        if isinstance(weight, nn.Parameter) and (is_head or isinstance(module, nn.Embedding)):
            found[name] = weight
    if isinstance(head, nn.Parameter) and HEAD not in found:
        found[HEAD] = head
    return found


def _is_last(name: str) -> bool:
    return name.rpartition(".")[2] == HEAD
