"""Reading, checking and writing a run's configuration, and the presets.

Values are gathered in layers, a later one over an earlier one:
defaults < preset < file < `key=value`. `none` unsets a key. Every value is checked against the
rules of `train.config.schema`, with the place where it was written. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.errors import UserError, did_you_mean
from train.config.schema import KEYS, SECTIONS, Key, RunConfig
from train.config.spellings import (
    SEVERAL,
    UNSUPPORTED_VALUES,
    keys_of,
    plain,
    translate,
    unsupported,
)

PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
PRESET_FOLDER = PACKAGE_ROOT / "train" / "presets"
_COMMAND_LINE = "on the command line"
# Texts that become tokens, in which a line break is common.
_TRAINED_TEXTS = ("data.prompt_template", "data.completion_template", "data.system_prompt")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True)
class Claim:
    """A number (or a sentence) that a seed document states, and whether the formulas confirm it.

    `quantity` names what `train.plan.claims.measure` computes for it (none: not computable from a
    plan); the claim agrees where the computed number is within `tolerance` (absolute) of `value`.
    `holds` is our verdict; where it is false, `right` is the right value.
    """

    statement: str
    where: str
    holds: bool
    quantity: str | None = None
    value: float | None = None
    right: float | None = None
    tolerance: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """One file of train/presets: its configuration, and what its seed says about it.

    `num_examples` is the number of training rows that the seed states, `num_valid` of valid rows:
    a plan made without data counts with them.
    """

    name: str
    description: str
    seed: str | None
    num_examples: int | None
    num_valid: int | None
    claims: tuple[Claim, ...]
    departures: tuple[str, ...]
    config: RunConfig


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


@dataclass(frozen=True)
class _Entry:
    """One `key = value` of a layer, and where it was written.

    `spelled` is the name of the stack's that it was written under, where it was.
    """

    key: str
    value: object
    where: str
    spelled: str = ""


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
    layers: list[list[_Entry]] = []
    if file is not None:
        entries = _read_layer(Path(file))
        named = [entry for entry in entries if entry.key == "preset"]
        for entry in named:
            preset = _agreed_preset(preset, entry)
        layers.append([entry for entry in entries if entry.key != "preset"])
    taken: list[str] = []
    layers.append([_Entry(key, value, _COMMAND_LINE) for key, value in asked.items()])
    layers = [list(_translated(layer, taken)) for layer in layers]
    shipped = [] if preset is None else _preset_layers(preset)
    given = frozenset(_resolve_in(entry) for layer in layers for entry in layer)
    config = _assemble(preset, [*shipped, *layers], given)
    if taken:
        print(f"note: taken {', '.join(taken)}", file=sys.stderr)
    return config


def _agreed_preset(preset: str | None, entry: _Entry) -> str | None:
    name = None if entry.value == "none" else entry.value
    if name is not None and not isinstance(name, str):
        raise UserError(f"{entry.where}: preset takes the name of a preset, not {_shown(name)}")
    if preset is not None and name is not None and preset != name:
        raise UserError(
            f"{entry.where}: the file starts from preset '{name}' but '{preset}' was asked for; "
            "give one of them"
        )
    if name is not None:
        try:
            _preset_file(name)
        except UserError as error:
            raise UserError(f"{entry.where}: {error}") from None
    return preset or name


def _assemble(
    preset: str | None, layers: Iterable[list[_Entry]], given: frozenset[str]
) -> RunConfig:
    """Lay the layers over the defaults; `given` are the keys of those that the user wrote."""
    values = {path: key.default for path, key in KEYS.items()}
    places: dict[str, tuple[int, str]] = {}
    for number, layer in enumerate(layers):
        written: dict[str, _Entry] = {}
        for entry in layer:
            path = _resolve_in(entry)
            value = _checked(KEYS[path], entry)
            _refuse_contradiction(path, written.get(path), entry, values[path] == value)
            values[path] = value
            written[path] = entry
            places[path] = (number, entry.where)
        _settle_cadences(values, written)
        _refuse_no_warmup(values, written)
    sections = {
        section: settings(**{key.name: values[key.path] for key in _keys_of(section)})
        for section, settings in SECTIONS.items()
    }
    config = RunConfig(preset=preset, given=given, **sections)
    for keys, fault in _contradictions(config):
        # Defaults agree with each other: what was written last made the contradiction.
        _, where = max((places[key] for key in keys if key in places), key=lambda place: place[0])
        raise UserError(f"{where}: {fault}")
    return config


def _translated(layer: Sequence[_Entry], taken: list[str]) -> Iterator[_Entry]:
    """Yield the entries of a layer under this project's keys; what that took goes to `taken`."""
    beside = {entry.key: entry.value for entry in layer}
    bare = {key.name for key in KEYS.values()}
    for entry in layer:
        name, written = entry.key, f"{entry.key}={_plainly(entry.value)}"
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
            found.append(f"{key}={_plainly(_checked(KEYS[key], one))}")
            yield one
        taken[-1] = taken[-1] or f"{written} as {' and '.join(found)}"


def _plainly(value: object) -> str:
    """Return a value as it is typed on the command line."""
    return value if isinstance(value, str) and value.isprintable() else _shown(value)


def _refuse_contradiction(path: str, before: _Entry | None, entry: _Entry, same: bool) -> None:
    """Refuse two names of one key with two values; of one name given twice the later rules."""
    if before is None or same or not (before.spelled or entry.spelled):
        return
    one, other = before.spelled or before.key, entry.spelled or entry.key
    raise UserError(
        f"{entry.where}: {one} and {other} both set {path}, to {_plainly(before.value)} and "
        f"{_plainly(entry.value)}: give one of them"
    )


def _resolve_in(entry: _Entry) -> str:
    try:
        return resolve_key(entry.key)
    except UserError as error:
        raise UserError(f"{entry.where}: {error}") from None


def _refuse_no_warmup(values: Mapping[str, Any], given: Mapping[str, _Entry]) -> None:
    """Refuse 0 steps of warm-up beside a ratio: to the stack it says nothing, here it rules."""
    steps, ratio = "schedule.warmup_steps", "schedule.warmup_ratio"
    # What `--show` or a run wrote holds every key, whatever was asked for.
    some = steps in given and ratio in given and len(given) < len(KEYS)
    if some and values[steps] == 0 and values[ratio]:
        raise UserError(
            f"{given[steps].where}: {steps}=0 means no warm-up, and {ratio}={values[ratio]} means "
            f"one: leave out {steps} for the ratio, or the ratio for none"
        )


def _settle_cadences(values: dict[str, Any], given: Mapping[str, _Entry]) -> None:
    """`steps` and `per_epoch` are two ways to say one thing: the layer that came last rules."""
    for section in ("eval", "checkpoint", "log"):
        steps, per_epoch = f"{section}.steps", f"{section}.per_epoch"
        if values[steps] is None or values[per_epoch] is None:
            continue
        if steps in given and per_epoch in given:
            raise UserError(
                f"{given[per_epoch].where}: {steps} and {per_epoch} are both set; "
                f"give one, or {steps}=none"
            )
        values[per_epoch if steps in given else steps] = None


def _keys_of(section: str) -> list[Key]:
    return [key for key in KEYS.values() if key.section == section]


def _checked(key: Key, entry: _Entry) -> Any:
    """Return the entry's value in the key's type, within its range, or raise."""
    value = entry.value
    if isinstance(value, str):
        _refuse_escapes(key, entry)
        value = _from_text(key, value)
    fault = _fault(key, value)
    if fault:
        spelled = f"{entry.spelled}: " if entry.spelled else ""
        pattern, sentence = UNSUPPORTED_VALUES.get(key.path, ("", ""))
        if isinstance(value, str | float) and re.fullmatch(pattern, str(value)):
            fault = f"is not supported: {sentence}"
        raise UserError(
            f"{entry.where}: {spelled}{key.path} = {_shown(value)} {fault} "
            f"(it takes {key.allowed()})"
        )
    if isinstance(value, list | tuple):
        return tuple(float(item) if key.item is float else item for item in value)
    if isinstance(value, float) and float not in key.scalars:
        return int(value)
    if key.scalars & {int, float} == {float} and type(value) is int:
        return float(value)
    return value


def _refuse_escapes(key: Key, entry: _Entry) -> None:
    """Raise where a bare word for a text that is trained holds an escape, a backslash and an n.

    A shell passes both on as they are, and they would be trained so; who types them means a line.
    """
    text = str(entry.value)
    bare = entry.where == _COMMAND_LINE and text[:1] not in ("'", '"')
    if key.path in _TRAINED_TEXTS and bare and re.search(r"\\[ntr]", text):
        meant = re.sub(r"\\([ntr])", lambda match: _ESCAPES[match[1]], text)
        given, literal = (shlex.quote(_toml_value(value)) for value in (meant, text))
        raise UserError(
            f"{entry.where}: {key.path} holds \\n, \\t or \\r, which a bare word leaves as two "
            f"characters; for a line break or tab give {key.path}={given}, for the two characters "
            f"{key.path}={literal}"
        )


def _from_text(key: Key, text: str) -> Any:
    """Read a TOML scalar or list, a bare word, an alias, or `none` for a key."""
    if text in ("none", "None", "null") and "none" not in key.rule.words:
        return None
    if text in key.rule.aliases:
        return key.rule.aliases[text]
    if text in key.rule.words:
        return text
    if bool in key.scalars and text in ("True", "False"):
        return text == "True"
    is_path = key.path in _PATH_KEYS
    only_text = key.scalars == {str} and (key.item is None or (is_path and text[:1] != "["))
    if only_text and text[:1] not in ("'", '"'):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, too many digits, or nested too deeply
        value = text
        if key.item is str and re.fullmatch(r"\[[^'\"\[\]]+\]", text):  # [q_proj,v_proj]
            return [item.strip() for item in text[1:-1].split(",")]
    if only_text and not isinstance(value, str):
        return text
    if not is_path and key.item is str and isinstance(value, str) and value != key.default:
        names = value.split(",")
        # q_proj or q_proj,v_proj are names; anything else is a regular expression.
        if all(re.fullmatch(r"[\w.]+", name) for name in names):
            return names
    return value


def _fault(key: Key, value: object) -> str:
    """Return what is wrong with a value for a key, or an empty string."""
    if value is None:
        return "" if key.optional else "is not possible, it has no unset state"
    if isinstance(value, bool):
        return "" if bool in key.scalars else "is of the wrong type"
    if isinstance(value, int | float):
        if _is_too_long(value):
            return "is out of range"
        if float not in key.scalars and (int not in key.scalars or value != int_or_none(value)):
            return "is of the wrong type"
        if float not in key.scalars and _is_too_long(int(value)):
            return "is out of range"
        return _out_of_range(key, value)
    if isinstance(value, str):
        if key.rule.words and value not in key.rule.words:
            return f"is not a value of it{did_you_mean(value, key.rule.words)}"
        return "" if str in key.scalars else "is of the wrong type"
    if isinstance(value, list | tuple) and key.item is not None:
        return _list_fault(key, value)
    return "is of the wrong type"


def int_or_none(value: float) -> int | None:
    """Return a whole number as an integer, and None for anything else."""
    return int(value) if math.isfinite(value) and value == int(value) else None


def _list_fault(key: Key, items: list | tuple) -> str:
    if not items or (key.length is not None and len(items) != key.length):
        return f"has {len(items)} items"
    for item in items:
        if key.item is str:
            if isinstance(item, Mapping) and key.path in _PATH_KEYS:
                return "holds rows, which train.run.run(config, rows=...) takes from Python"
            if not isinstance(item, str) or not item:
                return f"holds {_shown(item)}"
        elif isinstance(item, bool) or not isinstance(item, int | float):
            return f"holds {_shown(item)}"
        elif _is_too_long(item) or _out_of_range(key, item):
            return f"holds {_shown(item)}, which is out of range"
    return ""


def _is_too_long(value: float) -> bool:
    """Whether an integer is beyond 64 bits, which TOML promises; Python's reader takes any."""
    return isinstance(value, int) and value.bit_length() > 64


def _shown(value: object) -> str:
    """Return a value for a message: as TOML, cut where it is long."""
    if isinstance(value, int) and _is_too_long(value):
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        items = ["a list" if isinstance(item, list) else _shown(item) for item in value[:10]]
        return f"[{', '.join(items)}{', …' if len(value) > 10 else ''}]"
    if isinstance(value, dict):
        return "a table"
    text = "none" if value is None else _toml_value(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _out_of_range(key: Key, value: float) -> str:
    rule = key.rule
    inside = (
        math.isfinite(value)
        and (rule.minimum is None or value >= rule.minimum)
        and (rule.maximum is None or value <= rule.maximum)
        and (rule.above is None or value > rule.above)
        and (rule.below is None or value < rule.below)
    )
    return "" if inside else "is out of range"


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
    if config.train.method == "full" and config.lora.init_from is not None:
        yield (
            ("lora.init_from", "train.method"),
            "lora.init_from starts from an adapter, and train.method=full trains none; "
            "use train.method=lora or lora.init_from=none",
        )


def _read_toml(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; a configuration is TOML") from None
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column \d+\)", str(error))
        line = int(place.group(1)) if place else text.count("\n") + 1
        reason = re.sub(r" \(at .*\)$", "", str(error))
        raise UserError(f"{path}:{line}: not valid TOML: {reason}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer, and its calendar
        raise UserError(f"{path}: holds a number with too many digits, or no date") from None


def _read_layer(path: Path, skip: Iterable[str] = ()) -> list[_Entry]:
    """Read a TOML file into entries, each with its `FILE:LINE`."""
    document, text = _read_toml(path)
    entries = []
    for name, value in document.items():
        if name in skip:
            continue
        where = f"{path}:{_line_of(text, '', name)}"
        if not isinstance(value, dict):
            entries.append(_Entry(name, value, where))
        elif name in SECTIONS:
            entries += [
                _Entry(f"{name}.{key}", item, f"{path}:{_line_of(text, name, key)}")
                for key, item in value.items()
            ]
        elif sentence := unsupported(name):
            raise UserError(f"{where}: '{name}' is not supported: {sentence}")
        else:
            raise UserError(
                f"{where}: unknown section [{name}]; the sections are {', '.join(SECTIONS)}"
                f"{did_you_mean(name, SECTIONS)}"
            )
    return entries


def _line_of(text: str, section: str, key: str) -> int:
    """Return the 1-based line where a key (or, without one, a section) stands; 1 if not found."""
    table = ""
    name = re.escape(key)
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+\s*([\w.\"'-]+)\s*\]+", line)
        if header:
            table = header.group(1)
            if not section and table.split(".")[0] == key:
                return number
        prefix = "" if table == section else rf"{re.escape(section)}\s*\.\s*"
        if re.match(rf"\s*{prefix}[\"']?{name}[\"']?\s*[=.]", line):
            return number
    return 1


_PRESET_HEAD = {
    "description": str,
    "seed": str,
    "num_examples": int,
    "num_valid": int,
    "extends": str,
    "departures": list,
    "claims": list,
}
_PATH_KEYS = ("model.path", "data.train", "data.valid", "data.test", "lora.init_from")


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def _preset_file(name: str) -> Path:
    if name not in preset_names():
        raise UserError(
            f"unknown preset '{name}'{did_you_mean(name, preset_names())} "
            "(--list-presets shows them all)"
        )
    return PRESET_FOLDER / f"{name}.toml"


def _preset_layers(name: str, above: tuple[str, ...] = ()) -> list[list[_Entry]]:
    """Return a preset's layers, that of the preset it extends first."""
    path = _preset_file(name)
    if name in above:
        raise UserError(f"{path}: extends itself ({' → '.join((*above, name))})")
    entries = [_rooted(entry) for entry in _read_layer(path, skip=_PRESET_HEAD)]
    parent = _read_toml(path)[0].get("extends")
    return [*(_preset_layers(parent, (*above, name)) if parent else []), entries]


def _rooted(entry: _Entry) -> _Entry:
    """Point the shipped demo's relative paths at where this package lies."""
    value = entry.value
    if entry.key in _PATH_KEYS and isinstance(value, str) and value.startswith("data/demo"):
        return dataclasses.replace(entry, value=str(PACKAGE_ROOT / value))
    return entry


def read_preset(name: str) -> Preset:
    """Read a preset: its resolved configuration, its seed's claims and its departures.

    A preset that `extends` another takes over its values, seed, row counts and departures; claims
    belong to one preset alone, since they speak of its own settings.

    Raises:
        UserError: no preset of that name.
    """
    path = _preset_file(name)
    head = _read_toml(path)[0]
    for key, kind in _PRESET_HEAD.items():
        if key in head and not isinstance(head[key], kind):
            raise UserError(f"{path}: {key} must be of type {kind.__name__}")
    config = load_config(preset=name)
    parent = read_preset(head["extends"]) if "extends" in head else None
    return Preset(
        name=name,
        description=head.get("description", parent.description if parent else ""),
        seed=head.get("seed", parent.seed if parent else None),
        num_examples=head.get("num_examples", parent.num_examples if parent else None),
        num_valid=head.get("num_valid", parent.num_valid if parent else None),
        claims=tuple(_claim(path, claim) for claim in head.get("claims", [])),
        departures=(*(parent.departures if parent else ()), *head.get("departures", [])),
        config=config,
    )


def _claim(path: Path, values: Any) -> Claim:
    try:
        return Claim(**values)
    except TypeError:
        given = list(values) if isinstance(values, dict) else values
        names = ", ".join(field.name for field in dataclasses.fields(Claim))
        raise UserError(f"{path}: not a claim: {_shown(given)}; its keys are {names}") from None


def flat(config: RunConfig) -> dict[str, Any]:
    """Return `section.key` → value for every key of a configuration, in order."""
    return {path: getattr(getattr(config, key.section), key.name) for path, key in KEYS.items()}


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


def _toml_value(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)


def to_toml(config: RunConfig, *, comments: bool = True) -> str:
    """Write a configuration as TOML that `load_config(file=…)` reads back to the same values.

    TOML has no null: an unset key is written as `"none"`.
    """
    lines = []
    if config.preset is not None:
        lines += [f"preset = {_toml_value(config.preset)}", ""]
    for section, settings in SECTIONS.items():
        if comments:
            lines.append(f"# {(settings.__doc__ or '').strip()}")
        lines.append(f"[{section}]")
        for key in _keys_of(section):
            if comments:
                advice = f" (recommended: {key.rule.recommended})" if key.rule.recommended else ""
                lines += [f"# {key.rule.doc}{advice}", f"#   {key.allowed()}"]
            value = getattr(getattr(config, section), key.name)
            lines.append(f"{key.name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)
