"""One key's value: text from the command line or a TOML value, in the key's type and range."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from files.errors import UserError, did_you_mean
from train.config.layers import COMMAND_LINE, Entry
from train.config.rules import Key, Table
from train.config.schema import PATH_KEYS
from train.config.stack import UNSUPPORTED_VALUES
from train.config.toml import is_too_long, shown, toml_value

# Texts that become tokens, in which a line break is common.
_TRAINED_TEXTS = ("data.prompt_template", "data.completion_template", "data.system_prompt")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def checked(key: Key, entry: Entry) -> Any:
    """Return the entry's value in the key's type, within its range, or raise."""
    value = entry.value
    if isinstance(value, bool) and str(value) in key.rule.aliases:
        value = key.rule.aliases[str(value)]
    elif isinstance(value, str):
        _refuse_escapes(key, entry)
        value = _from_text(key, value)
    if isinstance(value, bool) and bool not in key.scalars:
        value = key.rule.aliases.get(str(value).lower(), value)
    if key.table and isinstance(value, Mapping):
        value = Table(_numbers(value))
    fault = _fault(key, value)
    if fault:
        spelled = f"{entry.spelled}: " if entry.spelled else ""
        pattern, sentence = UNSUPPORTED_VALUES.get(key.path, ("", ""))
        if isinstance(value, str | float) and re.fullmatch(pattern, str(value)):
            fault = f"is not supported: {sentence}"
        raise UserError(
            f"{entry.where}: {spelled}{key.path} = {shown(value)} {fault} "
            f"(it takes {key.allowed()})"
        )
    if isinstance(value, Table):
        return value
    if isinstance(value, list | tuple):
        return tuple(float(item) if key.item is float else item for item in value)
    if isinstance(value, float) and float not in key.scalars:
        return int(value)
    if key.scalars & {int, float} == {float} and type(value) is int:
        return float(value)
    return value


def _refuse_escapes(key: Key, entry: Entry) -> None:
    """Raise where a bare word for a text that is trained holds an escape, a backslash and an n.

    A shell passes both on as they are, and they would be trained so; who types them means a line.
    """
    text = str(entry.value)
    bare = entry.where == COMMAND_LINE and text[:1] not in ("'", '"')
    if key.path in _TRAINED_TEXTS and bare and re.search(r"\\[ntr]", text):
        meant = re.sub(r"\\([ntr])", lambda match: _ESCAPES[match[1]], text)
        given, literal = (shlex.quote(toml_value(value)) for value in (meant, text))
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
        return [text] if key.item is str else text
    if bool in key.scalars and text in ("True", "False"):
        return text == "True"
    if key.table:
        return _table_from_text(text)
    if key.item is int and re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        return [int(item) for item in text.split(",")]
    if key.item is float and re.fullmatch(r"\d[\d.]*(,\d[\d.]*)+", text):  # 0.7,0.3
        text = f"[{text}]"
    is_path = key.path in PATH_KEYS
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


def _table_from_text(text: str) -> Any:
    """Read `{q_proj = 4}`, JSON's `{"q_proj": 4}`, or `q_proj=4,v_proj=8`; else the text itself."""
    braced = text if text.strip().startswith("{") else f"{{{text}}}"
    for read in (json.loads, lambda text: tomllib.loads(f"value = {text}")["value"]):
        try:
            return read(braced)
        except (ValueError, RecursionError):
            continue
    return text


def _numbers(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names of a table, which TOML nests at the dots of bare ones, and their numbers."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _fault(key: Key, value: object) -> str:
    """Return what is wrong with a value for a key, or an empty string."""
    if value is None:
        return "" if key.optional else "is not possible, it has no unset state"
    if isinstance(value, bool):
        return "" if bool in key.scalars else "is of the wrong type"
    if isinstance(value, int | float):
        if is_too_long(value):
            return "is out of range"
        if float not in key.scalars and (int not in key.scalars or value != _int_or_none(value)):
            return "is of the wrong type"
        if float not in key.scalars and is_too_long(int(value)):
            return "is out of range"
        return _out_of_range(key, value)
    if isinstance(value, str):
        if key.rule.words and value not in key.rule.words:
            return f"is not a value of it{did_you_mean(value, key.rule.words)}"
        return "" if str in key.scalars else "is of the wrong type"
    if isinstance(value, Table):
        return _table_fault(key, value)
    if isinstance(value, list | tuple) and key.item is not None:
        return _list_fault(key, value)
    return "is of the wrong type"


def _int_or_none(value: float) -> int | None:
    """Return a whole number as an integer, and None for anything else."""
    return int(value) if math.isfinite(value) and value == int(value) else None


def _list_fault(key: Key, items: list | tuple) -> str:
    if not items or (key.length is not None and len(items) != key.length):
        return f"has {len(items)} items"
    for item in items:
        if key.item is str:
            if isinstance(item, Mapping) and key.path in PATH_KEYS:
                return "holds rows, which train.run.run(config, rows=...) takes from Python"
            if not isinstance(item, str) or not item:
                return f"holds {shown(item)}"
            if key.rule.words and item not in key.rule.words:
                return f"holds {shown(item)}{did_you_mean(item, key.rule.words)}"
        elif isinstance(item, bool) or not isinstance(
            item, int if key.item is int else int | float
        ):
            return f"holds {shown(item)}"
        elif is_too_long(item) or _out_of_range(key, item):
            return f"holds {shown(item)}, which is out of range"
    return ""


def _table_fault(key: Key, table: Table) -> str:
    for name, number in table:
        if isinstance(number, bool) or not isinstance(
            number, int if key.rule.whole else int | float
        ):
            return f"gives {name} {shown(number)}"
        if is_too_long(number) or _out_of_range(key, number):
            return f"gives {name} {shown(number)}, which is out of range"
    return ""


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
