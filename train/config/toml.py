"""Values and configurations as TOML, and as they stand in messages."""

from __future__ import annotations

import json
from typing import Any

from train.config.rules import Table
from train.config.schema import KEYS, SECTIONS, RunConfig, keys_in


def toml_value(value: object) -> str:
    """Return a value as TOML, which has no null: None is `"none"`."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Table):
        # Quoted: a bare dot would begin a table in the table.
        return f"{{{', '.join(f'{toml_value(name)} = {toml_value(x)}' for name, x in value)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return repr(value)


def is_too_long(value: float) -> bool:
    """Whether an integer is beyond 64 bits, which TOML promises; Python's reader takes any."""
    return isinstance(value, int) and value.bit_length() > 64


def shown(value: object) -> str:
    """Return a value for a message: as TOML, cut where it is long."""
    if isinstance(value, int) and is_too_long(value):
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple) and not isinstance(value, Table):
        items = ["a list" if isinstance(item, list) else shown(item) for item in value[:10]]
        return f"[{', '.join(items)}{', …' if len(value) > 10 else ''}]"
    if isinstance(value, dict):
        return "a table"
    text = "none" if value is None else toml_value(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def typed(value: object) -> str:
    """Return a value as it is typed on the command line."""
    return value if isinstance(value, str) and value.isprintable() else shown(value)


def flat(config: RunConfig) -> dict[str, Any]:
    """Return `section.key` → value for every key of a configuration, in order."""
    return {path: getattr(getattr(config, key.section), key.name) for path, key in KEYS.items()}


def to_toml(config: RunConfig, *, comments: bool = True) -> str:
    """Write a configuration as TOML that `load_config(file=…)` reads back to the same values.

    TOML has no null: an unset key is written as `"none"`.
    """
    lines = []
    if config.preset is not None:
        lines += [f"preset = {toml_value(config.preset)}", ""]
    for section, settings in SECTIONS.items():
        if comments:
            lines.append(f"# {(settings.__doc__ or '').strip()}")
        lines.append(f"[{section}]")
        for key in keys_in(section):
            if comments:
                advice = f" (recommended: {key.rule.recommended})" if key.rule.recommended else ""
                lines += [f"# {key.rule.doc}{advice}", f"#   {key.allowed()}"]
            value = getattr(getattr(config, section), key.name)
            lines.append(f"{key.name} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)
