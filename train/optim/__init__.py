"""The update rules, and the buffers that they work on; the optimizer of a model.

    buffers.py      trained parameters and gradients in memory, their norm; what a rule must offer
    adamw.py        `adamw_update`, and AdamW
    adafactor.py    `adafactor_update`, and Adafactor
    eight_bit.py    `adamw_8bit_update`, and AdamW8bit: moments in 8 bits
    rounded.py      both rules over masters in bf16, which are rounded by chance
    moments.py      where AdamW's moments lie: beside the parameters
    paged.py        or in host memory, through two buffers on the device

Parameters are fp32 masters (or, by rounded.py, bf16 ones) and so is every state (fp64 parameters,
as tests use them, get fp64 states). The learning rate is an argument of `step`: the schedule is the
plan's, and no optimizer holds a copy. An optimizer's state is plain tensors by name, so a
checkpoint of it is a safetensors file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter

from files.errors import UserError, did_you_mean
from kernels.dispatch import Operations
from train.optim.adafactor import Adafactor
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer, Sharing, decays
from train.optim.eight_bit import AdamW8bit
from train.optim.moments import Moments
from train.optim.rounded import RoundedAdafactor, RoundedAdamW

OPTIMIZERS = ("adamw", "paged_adamw", "adamw_8bit", "adafactor")


def decayed_parameters(model: nn.Module) -> set[str]:
    """Return the names of a model's trainable parameters that weight decay applies to.

    To the rule of `decays` this adds that nothing inside an `nn.LayerNorm` decays, whatever it is
    called.
    """
    layer_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and decays(name) and name not in layer_norms
    }


def embeddings(model: nn.Module) -> set[str]:
    """Return the names of a model's embeddings, a tied head's among them."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in model.named_parameters() if parameter in tables}


def boosted_parameters(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the names of what LoRA+ trains at its own learning rate.

    They are the B factors and, as PEFT has it, all vectors: trained biases, DoRA's magnitudes. A
    trained embedding or head keeps the learning rate of A; PEFT's rate of its own is that of
    low-rank factors of an embedding, which there are none of here.

    Source: Hayou et al. 2024 (LoRA+); peft 0.21 `create_loraplus_optimizer`.
    """
    return [name for name, p in parameters.items() if name.endswith("lora_B") or p.ndim == 1]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    operations: Operations | None = None,
    sharing: Sharing | None = None,
    rounding_seed: int | None = None,
    moments: Moments | None = None,
) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    `paged_adamw` is `adamw`, whose `moments` the plan may have put into host memory, which changes
    no number. Adafactor takes neither betas nor eps. `loraplus_lr_ratio` multiplies the learning
    rate of what `boosted_parameters` names. The updates are those of `operations` where it has
    them; with `sharing`, on this rank's rows of every parameter. With `rounding_seed` the
    parameters are masters in bf16, rounded by draws that follow from it.

    Raises:
        UserError: `name` is no optimizer, or nothing in the model is trainable.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer.name: '{name}' is not one of {', '.join(OPTIMIZERS)}"
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if sharing is not None and sharing.sources:
        # Views of the same memory, which are no DTensors.
        trainable = {name: Parameter(sharing.local(p)) for name, p in trainable.items()}
    if not trainable:
        raise UserError(
            f"{type(model).__name__} has no trainable parameter: inject an adapter or unfreeze it"
        )
    common: dict[str, Any] = {
        "weight_decay": weight_decay,
        "decayed": decayed_parameters(model),
        "sharing": sharing,
    }
    if loraplus_lr_ratio is not None:
        common["rates"] = dict.fromkeys(boosted_parameters(trainable), loraplus_lr_ratio)
    adam = {"betas": betas, "eps": eps}
    if name == "adamw_8bit":
        if sharing is not None:
            raise ValueError("adamw_8bit: shared rows would cut its blocks (train.plan.decide)")
        del common["sharing"]
        return AdamW8bit(trainable, **adam, **common, embeddings=embeddings(model))
    if rounding_seed is not None:
        common["seed"] = rounding_seed
        if name == "adafactor":
            return RoundedAdafactor(trainable, **common)
        return RoundedAdamW(trainable, **adam, **common, moments=moments)
    if name == "adafactor":
        return Adafactor(trainable, **common, kernel=operations and operations.adafactor_)
    kernel = operations and operations.adamw_
    return AdamW(trainable, **adam, **common, kernel=kernel, moments=moments)
