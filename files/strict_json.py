"""JSON that others wrote, read strictly: what the standard parser lets through is refused.

Python's parser takes NaN, keeps the last of two equal keys, and answers deep nesting or a number
of thousands of digits with exceptions of its own. Here each of these is one sentence about the
file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files.errors import UserError

_MAX_BYTES = 64 * 2**20


class _Refused(ValueError):
    """Valid for Python's parser, not for us."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"key '{twice}' stands twice")
    return value


def _refuse_constant(text: str) -> Any:
    raise _Refused(f"{text} is no JSON number; write null")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Refused(f"{text[:40]} is beyond any number")
    return number


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _object_without_duplicates,
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
}
_DECODER = json.JSONDecoder(**_STRICT)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply to be read"
    # Else it is Python's limit on the digits of an integer.
    return str(error) if isinstance(error, _Refused) else "holds a number with too many digits"


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that `data` holds.

    Args:
        data: the bytes of the document, UTF-8.
        where: the file (or the part of it) that messages name.

    Raises:
        UserError: not UTF-8, not an object, or as `parse_json`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; the file is damaged") from None
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def parse_json(text: str, where: str) -> Any:
    """Return the JSON value that `text` holds.

    Raises:
        UserError: not JSON, a key that stands twice, NaN or infinity (1e999 is one), a number
            beyond Python's digit limit, or nesting beyond its recursion limit.
    """
    try:
        return json.loads(text, **_STRICT)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_reason(error)}") from None


def parse_json_at(text: str, start: int, where: Callable[[int], str]) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and the position after it.

    Args:
        text: What holds one value or several, rows among them.
        start: A position in it that is no white space.
        where: Position → what messages name.

    Raises:
        UserError: As `parse_json`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where(error.pos)}: not JSON ({error.msg} at column {error.colno}); "
            "each row must be one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where(start)}: {_reason(error)}") from None


def read_json_object(path: Path, *, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in the file at `path`, which may hold at most `max_bytes` bytes.

    Raises:
        UserError: the file is missing or unreadable, too large, or refused by `parse_json_object`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes} bytes, which no such file needs")
    return parse_json_object(data, str(path))
