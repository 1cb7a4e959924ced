"""The layers that a configuration is gathered from: entries of files and of presets.

A layer is a list of `key = value` entries, each with the place where it was written.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.errors import UserError, did_you_mean
from train.config.schema import PATH_KEYS, SECTIONS
from train.config.spellings import unsupported

PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
PRESET_FOLDER = PACKAGE_ROOT / "train" / "presets"
COMMAND_LINE = "on the command line"
# What stands in a preset's file beside its settings.
PRESET_HEAD = {
    "description": str,
    "seed": str,
    "num_examples": int,
    "num_valid": int,
    "extends": str,
    "departures": list,
    "claims": list,
}


@dataclass(frozen=True)
class Entry:
    """One `key = value` of a layer, and where it was written.

    `spelled` is the name of the stack's that it was written under, where it was.
    """

    key: str
    value: object
    where: str
    spelled: str = ""


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Return a TOML file's document and its text.

    Raises:
        UserError: It cannot be read or is not TOML; the sentence names the line.
    """
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


def read_layer(path: Path, skip: Iterable[str] = ()) -> list[Entry]:
    """Read a TOML file into entries, each with its `FILE:LINE`."""
    document, text = read_toml(path)
    entries = []
    for name, value in document.items():
        if name in skip:
            continue
        where = f"{path}:{_line_of(text, '', name)}"
        if not isinstance(value, dict):
            entries.append(Entry(name, value, where))
        elif name in SECTIONS:
            entries += [
                Entry(f"{name}.{key}", item, f"{path}:{_line_of(text, name, key)}")
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
    name, dotted = re.escape(key), rf"{re.escape(section)}\s*\.\s*"
    for number, line in enumerate(text.splitlines(), start=1):
        # Patterns are slow, and few lines hold what they look for.
        header = "[" in line and re.match(r"\s*\[+\s*([\w.\"'-]+)\s*\]+", line)
        if header:
            table = header.group(1)
            if (table.split(".")[0] if not section else table) == (
                f"{section}.{key}" if section else key
            ):
                return number
        prefix = "" if table == section else dotted
        if key in line and re.match(rf"\s*{prefix}[\"']?{name}[\"']?\s*[=.]", line):
            return number
    return 1


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def preset_file(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        UserError: No preset has this name.
    """
    if name not in preset_names():
        raise UserError(
            f"unknown preset '{name}'{did_you_mean(name, preset_names())} "
            "(--list-presets shows them all)"
        )
    return PRESET_FOLDER / f"{name}.toml"


def preset_layers(name: str, above: tuple[str, ...] = ()) -> list[list[Entry]]:
    """Return a preset's layers, that of the preset it extends first."""
    path = preset_file(name)
    if name in above:
        raise UserError(f"{path}: extends itself ({' → '.join((*above, name))})")
    entries = [_rooted(entry) for entry in read_layer(path, skip=PRESET_HEAD)]
    parent = read_toml(path)[0].get("extends")
    return [*(preset_layers(parent, (*above, name)) if parent else []), entries]


def _rooted(entry: Entry) -> Entry:
    """Point the shipped demo's relative paths at where this package lies."""
    value = entry.value
    if entry.key in PATH_KEYS and isinstance(value, str) and value.startswith("data/demo"):
        return dataclasses.replace(entry, value=str(PACKAGE_ROOT / value))
    return entry
