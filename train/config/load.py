"""Gathering a run's configuration, in layers, a later one over an earlier one.

defaults < preset < file < `key=value`; `none` unsets a key. Every value is checked against the
rules of `train.config.schema`, with the place where it was written. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from files.errors import UserError, did_you_mean
from train.config.layers import COMMAND_LINE, Entry, preset_file, preset_layers, read_layer
from train.config.schema import KEYS, SECTIONS, RunConfig, keys_in
from train.config.spellings import keys_of, plain, translate, unsupported
from train.config.stack import SEVERAL
from train.config.toml import shown, typed
from train.config.values import checked


def resolve_key(name: str) -> str:
    """Return the full key (`section.key`) that `name` means.

    Raises:
        UserError: an unknown or ambiguous name; the sentence gives the right or the nearest key.
    """
    if name in KEYS:
        return name
    section, _, last = name.rpartition(".")
    if not section and name in SEVERAL:
        raise UserError(f"'{name}' could mean several keys: say {' or '.join(SEVERAL[name])}")
    same_name = [path for path, key in KEYS.items() if key.name == last]
    if not section and len(same_name) == 1:
        return same_name[0]
    if not section and same_name:
        raise UserError(f"'{name}' stands in several sections: say {' or '.join(same_name)}")
    if keys := keys_of(last):
        raise UserError(f"unknown key '{name}': {last} is spelled {' or '.join(keys)} here")
    if sentence := unsupported(last):
        raise UserError(f"'{name}' is not supported: {sentence}")
    if len(same_name) == 1:
        raise UserError(f"unknown key '{name}': {last} is spelled {same_name[0]} here")
    candidates = [path for path in KEYS if path.startswith(f"{section}.")] or list(KEYS)
    hint = did_you_mean(name, candidates)
    if not hint and not section:
        hint = did_you_mean(name, [key.name for key in KEYS.values()])
    raise UserError(f"unknown key '{name}'{hint or '; --show default lists every key'}")


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Gather and check a configuration: defaults < preset < file < overrides.

    What is taken under a name of the stack's (`train.config.spellings`) is said in one line on
    standard error.

    Args:
        preset: name of a preset; see `preset_names`.
        file: a TOML file; a top-level `preset = "NAME"` in it stands for the argument.
        overrides: `key` or `section.key` → a value, or text as on the command line.

    Raises:
        UserError: an unknown preset, key or value, a file that cannot be read, or settings that
            contradict each other.
    """
    asked = {} if overrides is None else overrides
    if not isinstance(asked, Mapping) or not all(isinstance(key, str) for key in asked):
        raise UserError(
            f"load_config: overrides is a dictionary of key → value, such as "
            f'{{"lora.r": 16, "train.max_steps": 100}}, and no {type(asked).__name__}'
            f"{' of other keys' if isinstance(asked, Mapping) else ''}"
        )
    layers: list[list[Entry]] = []
    if file is not None:
        entries = read_layer(Path(file))
        named = [entry for entry in entries if entry.key == "preset"]
        for entry in named:
            preset = _agreed_preset(preset, entry)
        layers.append([entry for entry in entries if entry.key != "preset"])
    taken: list[str] = []
    layers.append([Entry(key, value, COMMAND_LINE) for key, value in asked.items()])
    layers = [list(_translated(layer, taken)) for layer in layers]
    shipped = [] if preset is None else preset_layers(preset)
    given = frozenset(_resolve_in(entry) for layer in layers for entry in layer)
    config = _assemble(preset, [*shipped, *layers], given)
    if taken:
        print(f"note: taken {', '.join(taken)}", file=sys.stderr)
    return config


def _agreed_preset(preset: str | None, entry: Entry) -> str | None:
    name = None if entry.value == "none" else entry.value
    if name is not None and not isinstance(name, str):
        raise UserError(f"{entry.where}: preset takes the name of a preset, not {shown(name)}")
    if preset is not None and name is not None and preset != name:
        raise UserError(
            f"{entry.where}: the file starts from preset '{name}' but '{preset}' was asked for; "
            "give one of them"
        )
    if name is not None:
        try:
            preset_file(name)
        except UserError as error:
            raise UserError(f"{entry.where}: {error}") from None
    return preset or name


def _assemble(
    preset: str | None, layers: Iterable[list[Entry]], given: frozenset[str]
) -> RunConfig:
    """Lay the layers over the defaults; `given` are the keys of those that the user wrote."""
    values = {path: key.default for path, key in KEYS.items()}
    places: dict[str, tuple[int, str]] = {}
    for number, layer in enumerate(layers):
        written: dict[str, Entry] = {}
        for entry in layer:
            path = _resolve_in(entry)
            value = checked(KEYS[path], entry)
            _refuse_contradiction(path, written.get(path), entry, values[path] == value)
            values[path] = value
            written[path] = entry
            places[path] = (number, entry.where)
        _settle_two_ways(values, written)
        _refuse_no_warmup(values, written)
    sections = {
        section: settings(**{key.name: values[key.path] for key in keys_in(section)})
        for section, settings in SECTIONS.items()
    }
    config = RunConfig(preset=preset, given=given, **sections)
    for keys, fault in _contradictions(config):
        # Defaults agree with each other: what was written last made the contradiction.
        _, where = max((places[key] for key in keys if key in places), key=lambda place: place[0])
        raise UserError(f"{where}: {fault}")
    return config


def _translated(layer: Sequence[Entry], taken: list[str]) -> Iterator[Entry]:
    """Yield the entries of a layer under this project's keys; what that took goes to `taken`."""
    beside = {entry.key: entry.value for entry in layer}
    bare = {key.name for key in KEYS.values()}
    for entry in layer:
        name, written = entry.key, f"{entry.key}={typed(entry.value)}"
        if name.removeprefix("train.") == "max_steps" and plain(entry.value) == -1:
            taken.append(f"{written} as train.max_steps=none")  # the stack's word for it
            yield dataclasses.replace(entry, value="none")
            continue
        if name in bare:
            yield entry
            continue
        try:
            settings = translate(name, entry.value, beside)
        except UserError as error:
            raise UserError(f"{entry.where}: {written}: {error}") from None
        if settings is None:
            yield entry
            continue
        taken.append(f"{written} as asking for nothing" if not settings else "")
        found = []
        for key, value in settings.items():
            one = dataclasses.replace(entry, key=key, value=value, spelled=name)
            found.append(f"{key}={typed(checked(KEYS[key], one))}")
            yield one
        taken[-1] = taken[-1] or f"{written} as {' and '.join(found)}"


def _refuse_contradiction(path: str, before: Entry | None, entry: Entry, same: bool) -> None:
    """Refuse two names of one key with two values; of one name given twice the later rules."""
    if before is None or same or not (before.spelled or entry.spelled):
        return
    one, other = before.spelled or before.key, entry.spelled or entry.key
    raise UserError(
        f"{entry.where}: {one} and {other} both set {path}, to {typed(before.value)} and "
        f"{typed(entry.value)}: give one of them"
    )


def _resolve_in(entry: Entry) -> str:
    try:
        return resolve_key(entry.key)
    except UserError as error:
        raise UserError(f"{entry.where}: {error}") from None


def _refuse_no_warmup(values: Mapping[str, Any], given: Mapping[str, Entry]) -> None:
    """Refuse 0 steps of warm-up beside a ratio: to the stack it says nothing, here it rules."""
    steps, ratio = "schedule.warmup_steps", "schedule.warmup_ratio"
    # What `--show` or a run wrote holds every key, whatever was asked for.
    some = steps in given and ratio in given and len(given) < len(KEYS)
    if some and values[steps] == 0 and values[ratio]:
        raise UserError(
            f"{given[steps].where}: {steps}=0 means no warm-up, and {ratio}={values[ratio]} means "
            f"one: leave out {steps} for the ratio, or the ratio for none"
        )


_TWO_WAYS = (
    *((f"{section}.steps", f"{section}.per_epoch") for section in ("eval", "checkpoint", "log")),
    ("train.effective_batch_size", "train.effective_batch_tokens"),
)


def _settle_two_ways(values: dict[str, Any], given: Mapping[str, Entry]) -> None:
    """Of two keys that are two ways to say one thing, the one in the layer that came last rules."""
    for one, other in _TWO_WAYS:
        if values[one] is None or values[other] is None:
            continue
        if one in given and other in given:
            raise UserError(
                f"{given[other].where}: {one} and {other} are both set; give one, or {one}=none"
            )
        values[other if one in given else one] = None


# What asks for something; the plain ones, such as lora.r, stand in every configuration.
_OF_ADAPTERS = (
    *("init_lora_weights", "use_dora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices"),
)


def _contradictions(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys of settings that contradict each other, with the sentence and the way out."""
    data, evaluation = config.data, config.eval
    if data.completion_only and data.format == "text":
        yield (
            ("data.completion_only", "data.format"),
            "data.completion_only=true needs a prompt and a completion, and data.format=text has "
            "neither; use data.format=template, instruction, completion or messages, or "
            "completion_only=none",
        )
    if data.train_on == "last" and (data.format != "messages" or data.completion_only is False):
        yield (
            ("data.train_on", "data.format", "data.completion_only"),
            "data.train_on=last chooses among the answers of a conversation, and there is no "
            "choice here; use data.format=messages without data.completion_only=false, or "
            "data.train_on=all",
        )
    if data.format == "template" and data.completion_template is None:
        yield (
            ("data.format", "data.completion_template"),
            "data.format=template needs data.completion_template (and usually "
            "data.prompt_template), such as 'data.completion_template={solution}'",
        )
    if data.split_column is not None and (data.valid is not None or data.test is not None):
        other = "data.valid" if data.valid is not None else "data.test"
        yield (
            ("data.split_column", other),
            f"data.split_column={data.split_column} takes the valid and test rows from data.train, "
            f"but {other} is set too; unset one of them (data.split_column=none)",
        )
    if data.group_by_length and not data.shuffle:
        yield (
            ("data.group_by_length", "data.shuffle"),
            "data.group_by_length=true shuffles in groups of like length, which data.shuffle=false "
            "forbids; give one of them",
        )
    if evaluation.early_stopping_patience is not None and (
        evaluation.steps is None and evaluation.per_epoch is None
    ):
        yield (
            ("eval.early_stopping_patience", "eval.steps", "eval.per_epoch"),
            "eval.early_stopping_patience counts evaluations, and none is asked for before the "
            "end; set eval.steps or eval.per_epoch",
        )
    if evaluation.best_metric not in ("loss", *(evaluation.metrics or ())):
        yield (
            ("eval.best_metric", "eval.metrics"),
            f"eval.best_metric={evaluation.best_metric} is not measured; add it to eval.metrics, "
            "or set eval.best_metric=loss",
        )
    for name in _OF_ADAPTERS if config.train.method == "full" else ():
        if getattr(config.lora, name) != KEYS[f"lora.{name}"].default:
            yield (
                (f"lora.{name}", "train.method"),
                f"lora.{name} is of adapters, and train.method=full trains every weight as it is; "
                f"use train.method=lora, or leave lora.{name} out",
            )
    if config.train.method == "full" and config.optimizer.loraplus_lr_ratio is not None:
        yield (
            ("optimizer.loraplus_lr_ratio", "train.method"),
            "optimizer.loraplus_lr_ratio is of the B factors of adapters, and train.method=full "
            "has none; use train.method=lora or optimizer.loraplus_lr_ratio=none",
        )
    if config.lora.init_from is not None and config.lora.init_lora_weights != "default":
        yield (
            ("lora.init_from", "lora.init_lora_weights"),
            "lora.init_from goes on from an adapter, and lora.init_lora_weights="
            f"{config.lora.init_lora_weights} begins a new one; give one of them",
        )
    if config.train.method == "full" and config.lora.init_from is not None:
        yield (
            ("lora.init_from", "train.method"),
            "lora.init_from starts from an adapter, and train.method=full trains none; "
            "use train.method=lora or lora.init_from=none",
        )


def resume_keys() -> list[str]:
    """Return the keys that may be overridden together with `--resume`."""
    return [path for path, key in KEYS.items() if key.rule.on_resume]


def check_resume_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that would change what a resumed run computes.

    Raises:
        UserError: naming the key and those that may be given.
    """
    for name in overrides:
        path = resolve_key(name)
        if not KEYS[path].rule.on_resume:
            raise UserError(
                f"{path} cannot change with --resume; only {', '.join(resume_keys())} can"
            )
