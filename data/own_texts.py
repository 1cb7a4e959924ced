"""What of a row is its own: its texts without what the format puts around all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data.messages import CONVERSATION_COLUMNS, ROLE_KEYS
from data.prompt import PromptFormat, parse_template

_COLUMNS = {
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "messages": CONVERSATION_COLUMNS,
}


def own_columns(form: PromptFormat) -> tuple[str, ...]:
    """Return the columns of a row that its text is made of."""
    if form.format == "text":
        return (form.text_field,)
    if form.format != "template":
        return _COLUMNS[form.format]
    templates = [form.prompt_template or "", form.completion_template or ""]
    parts = [part for template in templates for part in parse_template(template, "data.template")]
    return tuple(dict.fromkeys(part.text for part in parts if part.is_column))


def own_texts(values: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    """Return the texts of a row in order, system turns left out; the last is its answer."""
    return [text for column in columns for text in _texts(values.get(column))]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        roles = [value[key] for key in ROLE_KEYS if key in value]
        if not any(role in ("system", "developer") for role in roles):
            for key, item in value.items():
                if key not in (*ROLE_KEYS, "type", "id", "tool_call_id", "name"):
                    yield from _texts(item)
