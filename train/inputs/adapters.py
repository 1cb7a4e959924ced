"""The adapters of a run: new ones as `lora.*` says, or those of an adapter that it goes on from.

`lora.init_from` brings its rank, scale, targets and biases with it. What the user wrote must agree
with them; what is a default or a preset's is replaced, so that config.toml, plan and report hold
what is trained. `lora_dropout` is no property of the weights: the run's own is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError, did_you_mean
from train.config.load import load_config
from train.config.rules import Table
from train.config.schema import LoraSettings, RunConfig
from train.config.toml import typed
from train.inputs.known import Unknown

if TYPE_CHECKING:
    from lora import LoraConfig
    from models.config import DecoderConfig

_OF_THE_WEIGHTS = (
    *("r", "lora_alpha", "target_modules", "use_rslora", "bias"),
    *("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"),
    "trainable_token_indices",
)
_ALWAYS_TOLD = 5  # of these


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Return the adapters that a run starts with: new ones, or those of `lora.init_from`.

    Raises:
        UserError: A value out of its range, or an adapter that cannot be read.
    """
    from lora import LoraConfig, saved_config

    values = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    folder = values.pop("init_from")
    if folder is None:
        given: dict[str, Any] = {
            name: dict(value) if isinstance(value, Table) else value
            for name, value in values.items()
            if value is not None
        }
        return LoraConfig(**given)
    saved = saved_config(Path(folder).expanduser())
    return dataclasses.replace(saved, lora_dropout=settings.lora_dropout)


def refuse_unmatched(config: LoraConfig, names: Sequence[str]) -> None:
    """Refuse a pattern that matches none of the adapted modules: PEFT passes over it in silence.

    Raises:
        UserError: There is one; the nearest name is given.
    """
    for key, pattern in config.unmatched_patterns(names):
        last = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"lora.{key}: '{pattern}' matches the end of no adapted module's name"
            f"{did_you_mean(pattern, last)}"
        )


def with_starting_adapter(config: RunConfig, decoder: DecoderConfig | Unknown) -> RunConfig:
    """Return the configuration with `lora.*` as the adapter of `lora.init_from` has it.

    Doing it twice changes nothing, and without `lora.init_from` nothing changes. Where the base is
    not known, targets are not compared.

    Raises:
        UserError: The user wrote something else, or the adapter cannot be trained here.
    """
    from lora import saved_config
    from models import build

    settings = config.lora
    if settings.init_from is None or config.train.method != "lora":
        return config
    model = None if isinstance(decoder, Unknown) else build(decoder, device="meta")
    saved = saved_config(Path(settings.init_from).expanduser(), model)
    values = {key: _as_setting(getattr(saved, key)) for key in _OF_THE_WEIGHTS}
    written = _written(config)
    if model is None or _mean_the_same(model, saved, settings, "target_modules" in written):
        values["target_modules"] = settings.target_modules
    wrong = [key for key in values if key in written and values[key] != getattr(settings, key)]
    if wrong:
        has = ", ".join(f"{key}={typed(values[key])}" for key in wrong)
        asked = ", ".join(f"lora.{key}={typed(getattr(settings, key))}" for key in wrong)
        raise UserError(
            f"lora.init_from={settings.init_from}: its adapter has {has}, but {asked} is asked "
            "for; leave that out to go on with the adapter as it is, or unset lora.init_from "
            "(=none) to start a new one"
        )
    return dataclasses.replace(config, lora=dataclasses.replace(settings, **values))


def starting_adapter_note(config: RunConfig) -> list[str]:
    """Return the line that says which adapter a run goes on from; none where it is a new one."""
    settings = config.lora
    if settings.init_from is None or config.train.method != "lora":
        return []
    has = {key: getattr(settings, key) for key in _OF_THE_WEIGHTS}
    always = _OF_THE_WEIGHTS[:_ALWAYS_TOLD]
    told = {key: value for key, value in has.items() if value or key in always}
    values = ", ".join(f"{key}={typed(value)}" for key, value in told.items())
    return [
        f"lora.init_from={settings.init_from}: goes on from its adapter, with that one's {values}; "
        f"lora_dropout={settings.lora_dropout:g} is this run's own"
    ]


def _as_setting(value: Any) -> Any:
    """Return a field of `LoraConfig` as the key of the configuration has it."""
    if isinstance(value, Mapping):
        value = Table(value.items())
    return None if value == () else value


def _mean_the_same(model: Any, saved: LoraConfig, settings: LoraSettings, written: bool) -> bool:
    """Whether the targets of the settings are the very modules that the saved adapter adapts.

    A preset's may be of another family: only those that the user wrote must be there.
    """
    from lora import target_names

    asked = dataclasses.replace(saved, target_modules=settings.target_modules)
    try:
        return target_names(model, asked) == target_names(model, saved)
    except UserError:
        if written:
            raise
        return False


def _written(config: RunConfig) -> set[str]:
    """Return the names of the `lora.*` keys that the user wrote, in whatever way.

    A value that neither preset nor default has was put there in Python, by `dataclasses.replace`.
    """
    untouched = load_config(config.preset).lora
    return {
        key
        for key in _OF_THE_WEIGHTS
        if f"lora.{key}" in config.given or getattr(config.lora, key) != getattr(untouched, key)
    }
