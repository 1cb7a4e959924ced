"""What of a row is its own, and whether its answer was whole when it came here."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from data.messages import CONVERSATION_COLUMNS, ROLE_KEYS
from data.prompt import PromptFormat, parse_template

_COLUMNS = {
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "messages": CONVERSATION_COLUMNS,
}
# Columns in which those who sampled an answer keep why it ended.
_REASON_COLUMNS = ("finish_reason", "stop_reason")
_LENGTH_REASONS = ("length", "max_tokens", "model_length")
# Not what tables, C++, base64 and LaTeX end in as well.
_OPEN = tuple("([{,")
_MOST_PARSED = 100_000


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


def unfinished(values: Mapping[str, Any], answer: str, is_python: bool) -> str | None:
    """Return why an answer seems to have been cut off, or None.

    It is said by a column, by a fence of Markdown that is left open, by a last character that
    nothing ends with, or by Python's own parser, where it meets the end too early.
    """
    for column in _REASON_COLUMNS:
        if values.get(column) in _LENGTH_REASONS:
            return f"{column} is {values[column]!r}"
    answer = answer.rstrip()
    if "```" in answer:
        fences = sum(line.lstrip().startswith("```") for line in answer.splitlines())
        return "a code fence is left open" if fences % 2 else None
    if answer.endswith(_OPEN):
        return f"it ends in {answer[-1]!r}"
    return _unfinished_python(answer) if is_python else None


def _unfinished_python(source: str) -> str | None:
    balance = sum(map(source.count, "([{")) - sum(map(source.count, ")]}"))
    triple = source.count('"""') % 2 or source.count("'''") % 2
    suspicious = balance > 0 or triple or source.endswith(":")
    if not suspicious or len(source) > _MOST_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes and the like
            ast.parse(source)
    except SyntaxError as error:
        says = error.msg
        ended = ("was never closed", "unterminated triple-quoted", "expected an indented block")
        if any(words in says for words in ended):
            return f"Python's parser: {says}"
    except (ValueError, RecursionError, MemoryError):  # NUL, or nested without end
        pass
    return None


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
