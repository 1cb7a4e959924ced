"""Whether an answer was whole when it came here."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

# Columns in which those who sampled an answer keep why it ended.
_REASON_COLUMNS = ("finish_reason", "stop_reason")
_LENGTH_REASONS = ("length", "max_tokens", "model_length")
# Not what tables, C++, base64 and LaTeX end in as well.
_OPEN = tuple("([{,")
_MOST_PARSED = 100_000


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
