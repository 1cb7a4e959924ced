"""The configuration as a JSON schema, for editors that check and complete TOML or JSON files.

It is made from the rules of the keys (`train.config.schema`), so that it takes what a run takes:
types, words with their other spellings, bounds. What several keys have to agree on is for the run.
"""

from __future__ import annotations

import json
from typing import Any

from train.config.layers import preset_names
from train.config.rules import Key
from train.config.schema import SECTIONS, keys_in

Schema = dict[str, Any]


def json_schema() -> Schema:
    """Return the schema of a configuration file, by JSON Schema's draft 2020-12.

    TOML has no null: a key that may be unset takes the word `none`.
    """
    sections = {
        section: {
            "type": "object",
            "description": (settings.__doc__ or "").strip(),
            "additionalProperties": False,
            "properties": {key.name: schema_of(key) for key in keys_in(section)},
        }
        for section, settings in SECTIONS.items()
    }
    preset = {"enum": preset_names(), "description": "the documented run to start from"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Lathe: a run's configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {"preset": preset, **sections},
    }


def json_schema_text() -> str:
    """Return the schema as indented JSON."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False)


def schema_of(key: Key) -> Schema:
    """Return the schema of one key: what it takes, its meaning and its default."""
    rule = key.rule
    bounds = {
        name: bound
        for name, bound in (
            ("minimum", rule.minimum),
            ("exclusiveMinimum", rule.above),
            ("maximum", rule.maximum),
            ("exclusiveMaximum", rule.below),
        )
        if bound is not None
    }
    takes: list[Schema] = []
    if bool in key.scalars or "true" in rule.aliases:
        takes.append({"type": "boolean"})
    if float in key.scalars or int in key.scalars:
        takes.append({"type": "number" if float in key.scalars else "integer", **bounds})
    words = [*rule.words, *(alias for alias in rule.aliases if alias not in rule.words)]
    if words:
        takes.append({"enum": words})
    elif str in key.scalars:
        takes.append({"type": "string"})
    if key.item is not None:
        kinds = {str: "string", int: "integer", float: "number"}
        items = {"type": kinds[key.item], **({} if key.item is str else bounds)}
        sizes = {"minItems": key.length or 1, **({"maxItems": key.length} if key.length else {})}
        takes.append({"type": "array", "items": items, **sizes})
    if key.table:
        number = {"type": "integer" if rule.whole else "number", **bounds}
        takes.append({"type": "object", "additionalProperties": number})
    if key.optional and {"type": "string"} not in takes:
        takes.append({"const": "none"})
    advice = f" (recommended: {rule.recommended})" if rule.recommended else ""
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    return {
        **(takes[0] if len(takes) == 1 else {"anyOf": takes}),
        "description": rule.doc + advice,
        "default": "none" if default is None else default,
    }
