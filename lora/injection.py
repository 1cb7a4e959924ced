"""Which linear layers get an adapter, the adapter's starting value, and what is trained."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from files.errors import UserError, did_you_mean
from kernels.quantised import QuantisedWeight
from lora.config import ALL_LINEAR, LoraConfig
from lora.linear import LoraLinear
from lora.pissa import start_from_principal
from lora.saved_modules import train_whole, whole_weights
from lora.token_rows import token_rows, train_rows

LEAVE_IT_OUT = f"leave it out, use '{ALL_LINEAR}', or train every weight"


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model has.

    Attributes:
        trainable: Those that are trained.
        total: All of them, adapters included.
        base: All of them without the adapters.
    """

    trainable: int
    total: int
    base: int

    @property
    def percent_of_total(self) -> float:
        """The trainable share of all parameters, in percent: what PEFT prints."""
        return 100.0 * self.trainable / self.total

    @property
    def percent_of_base(self) -> float:
        """The trainable parameters over the base model's, in percent."""
        return 100.0 * self.trainable / self.base


def inject(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int = 42,
    freeze: bool = True,
    start: Mapping[str, Tensor] | None = None,
    agree: Callable[[Tensor], Tensor] = lambda factor: factor,
) -> list[str]:
    """Put an adapter beside every targeted linear layer of `model`, in place.

    A is drawn from U(±1/√K) and B is zero, so the model computes what it did. Each A is a pure
    function of (seed, its name). On the meta device nothing is drawn and no memory is used. PiSSA's
    start changes the weights too, and the model computes what it did but for their rounding.

    Args:
        model: Any module; what replaces its linear layers keeps the parameters' names.
        config: Ranks, scale, targets, biases.
        seed: Of the draws.
        freeze: Whether all but the adapters, and the biases that `config.bias` names, stop being
            trained. Biases, embeddings and heads that are trained become fp32.
        start: Of PiSSA, the tensors of a file whose start is taken; None makes it anew.
        agree: Of PiSSA, gives a tensor of the first rank to all ranks.

    Returns:
        The names of the adapted modules, in the model's order.

    Raises:
        UserError: The model has adapters already, or as `target_names`.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} carries an adapter already; merge it first, or load the model "
            "anew"
        )
    names = target_names(model, config)
    _refuse_quantised(model, config, names)
    whole = whole_weights(model, config.modules_to_save)
    train_rows(model, config.trainable_token_indices, list(whole))
    if freeze:
        model.requires_grad_(False)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LoraLinear(
            linear,
            name=name,
            r=config.rank(name),
            scale=config.scale(name),
            dropout=config.lora_dropout,
            use_dora=config.use_dora,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    draw_adapters(model, seed)
    if config.init_lora_weights == "pissa":
        start_from_principal(lora_layers(model), start, agree)
    for rows in token_rows(model).values():
        rows.trainable_tokens_delta.requires_grad_(True)
    if freeze:
        _unfreeze_biases(model, names, config.bias)
        train_whole(model, config.modules_to_save)
    model.lora_config = config  # pyright: ignore[reportArgumentType]  # typed for tensors alone
    return names


def adapter_factors(model: nn.Module) -> list[str]:
    """Return the names of the parameters that adapters add to a model."""
    return [
        f"{name}.{one}" for name, layer in lora_layers(model).items() for one in layer.factors()
    ]


def draw_adapters(model: nn.Module, seed: int) -> None:
    """Give the adapters of a model their starting values: A is drawn, B is zero.

    DoRA's magnitudes are the lengths that the rows of the weights have.
    """
    for name, layer in lora_layers(model).items():
        _draw(layer.lora_A, seed, name)
        with torch.no_grad():
            layer.lora_B.zero_()
            if layer.lora_magnitude_vector is not None and not layer.lora_B.is_meta:
                layer.lora_magnitude_vector.copy_(layer.row_norms())


def target_names(model: nn.Module, config: LoraConfig, *, remedy: str = LEAVE_IT_OUT) -> list[str]:
    """Return the names of the linear layers that `inject` would adapt, in the model's order.

    Args:
        model: The model.
        config: Says which layers are meant.
        remedy: What to do where the head or an embedding is meant, for the message.

    Raises:
        UserError: A target matches no linear layer, or the head or an embedding, which take none.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    _refuse_head_and_embedding(model, config.target_modules, remedy)
    return _targeted(model, linears, config.target_modules)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers of a model by name, in the model's order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def adapter_config(model: nn.Module) -> LoraConfig:
    """Return the configuration that the model's adapters were injected with.

    Raises:
        UserError: The model has none.
    """
    config = getattr(model, "lora_config", None)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{type(model).__name__} carries no adapter; inject or load one first")
    return config


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, tied ones once; it may be on the meta device.

    A quantised weight counts as the numbers that it stands for.
    """
    parameters = list(model.parameters())
    adapters = [p for layer in lora_layers(model).values() for p in layer.factors().values()]
    adapters += [rows.trainable_tokens_delta for rows in token_rows(model).values()]
    quantised = [m.shape for m in model.modules() if isinstance(m, QuantisedWeight)]
    total = _elements(parameters) + sum(map(math.prod, quantised))
    return ParameterCount(
        trainable=_elements(parameter for parameter in parameters if parameter.requires_grad),
        total=total,
        base=total - _elements(adapters),
    )


def trained_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return, by parameter name, the biases that belong to the adapter under its bias mode."""
    mode = adapter_config(model).bias
    if mode == "all":
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2] == "bias"
        }
    if mode == "none":
        return {}
    return {
        f"{name}.bias": layer.bias
        for name, layer in lora_layers(model).items()
        if layer.bias is not None
    }


def _refuse_quantised(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> None:
    """Refuse what is made of the weights' own numbers where they are quantised."""
    if not config.use_dora and config.init_lora_weights == "default":
        return
    for name in names:
        if isinstance(model.get_submodule(name).weight, QuantisedWeight):
            raise UserError(
                f"{name}: its weight is quantised, and lora.use_dora and lora.init_lora_weights "
                "are made of weights that are not; load the base without, or use plain adapters"
            )


def _refuse_head_and_embedding(model: nn.Module, targets: str | Sequence[str], remedy: str) -> None:
    """Refuse targets that PEFT would adapt with other factors, or tie, and that take none here."""
    owner = type(model).__name__
    untargeted = {
        name: f"an embedding of {owner}, and only linear layers take an adapter"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    if hasattr(model, "head_weight"):
        why = f"the output head of {owner}, whose weight the loss reads directly: it takes none"
        # A tied head is no module here, and yet it is meant.
        untargeted["lm_head"] = why
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and _is_head(model, name, module):
                untargeted[name] = why
    for name, why in untargeted.items():
        if isinstance(targets, str):
            meant = targets != ALL_LINEAR and re.fullmatch(targets, name) is not None
        else:
            meant = any(_is_called(name, target) for target in targets)
        if meant:
            raise UserError(f"lora.target_modules: '{name}' is {why}; {remedy}")


def _targeted(
    model: nn.Module, linears: Mapping[str, nn.Linear], targets: str | Sequence[str]
) -> list[str]:
    """Return the names of the linear layers that `targets` mean; each target must mean one."""
    owner = type(model).__name__
    if targets == ALL_LINEAR:
        names = [name for name in linears if not _is_head(model, name, linears[name])]
        if not names:
            raise UserError(f"lora.target_modules: '{ALL_LINEAR}' matched no Linear in {owner}")
        return names
    if isinstance(targets, str):
        names = [name for name in linears if re.fullmatch(targets, name)]
        if not names:
            raise UserError(
                f"lora.target_modules: the regular expression '{targets}' matched no Linear in "
                f"{owner}; it must match a full module name such as '{next(iter(linears), '')}' (a "
                f"list of names matches by their last parts){_near(targets, linears)}"
            )
    else:
        names = [name for name in linears if any(_is_called(name, target) for target in targets)]
        unmatched = [
            target for target in targets if not any(_is_called(name, target) for name in names)
        ]
        if unmatched:
            listed = ", ".join(f"'{target}'" for target in unmatched)
            raise UserError(
                f"lora.target_modules: {listed} matched no Linear in {owner}"
                f"{_near(unmatched[0], linears)}"
            )
    return names


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _near(target: str, linears: Iterable[str]) -> str:
    return did_you_mean(target, sorted({name.rpartition(".")[2] for name in linears}))


def _is_head(model: nn.Module, name: str, linear: nn.Linear) -> bool:
    """Return whether a linear layer is the output embedding, by what the model says or its name."""
    head_weight = getattr(model, "head_weight", None)
    if callable(head_weight):
        return head_weight() is linear.weight
    return _is_called(name, "lm_head")


@torch.no_grad()
def _draw(factor: Tensor, seed: int, name: str) -> None:
    """Fill an A factor (r, K) with U(±1/√K), drawn in fp32 on the host whatever its device.

    Source: PEFT's `kaiming_uniform_(a=√5)`, whose bound √(6 / ((1 + 5)·K)) is 1/√K.
    """
    if factor.is_meta:
        return
    key = hashlib.sha256(f"{seed}/{name}.lora_A".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    bound = 1.0 / math.sqrt(factor.shape[1])
    factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


def _unfreeze_biases(model: nn.Module, names: Sequence[str], mode: str) -> None:
    """Let the biases of `mode` be trained, as fp32 masters."""
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and (mode == "all" or (mode == "lora_only" and module in names)):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
