"""Rows that a Python program holds, kept as JSON Lines, so that all else is as with files.

The file lies in the cache folder under the sha256 of its content, and is named by it: `rows:SHA256`
is what `data.train` says of such rows, in config.toml too. A resumed run finds them there.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.cache import cache_folder
from files.atomic import TEMPORARY_PREFIX
from files.errors import UserError, shown

ROWS_PREFIX = "rows:"


def keep_rows(rows: Iterable[Mapping[str, Any]], name: str = "rows") -> str:
    """Keep rows in the cache folder, and return the specification that reads them.

    Args:
        rows: Dictionaries of what JSON holds: text, numbers, true, false, None, lists, and
            dictionaries with text as keys. A `datasets.Dataset` is an iterable of such rows.
        name: What messages call them.

    Raises:
        UserError: A row is none; the message names it, counted from 1. Or there is no room.
    """
    folder = cache_folder("rows")
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with open(written, "wb") as file:
                for number, row in enumerate(rows, start=1):
                    line = _line(row, f"{name}:{number}")
                    digest.update(line)
                    file.write(line)
            written.replace(_file(digest.hexdigest()))
        finally:
            written.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: the rows cannot be kept there ({error.strerror}); free some space, or set "
            "the environment variable LATHE_CACHE to a folder that can be written"
        ) from None
    return f"{ROWS_PREFIX}{digest.hexdigest()}"


def find_rows(spec: str) -> Path:
    """Return the file that holds the rows of `keep_rows`.

    Raises:
        UserError: It is no longer there.
    """
    path = _file(spec.removeprefix(ROWS_PREFIX))
    if not path.is_file():
        raise UserError(
            f"{spec[:17]}…: these rows were given in memory, and {path.parent} does not hold them "
            "any more; keep the same rows again, in Python, with "
            "data.rows_in_memory.keep_rows(rows)"
        )
    return path


def _file(sha256: str) -> Path:
    return cache_folder("rows") / f"{sha256}.jsonl"


def _line(row: Any, where: str) -> bytes:
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where}: is of type {type(row).__name__}; each row must be a dictionary (those of a "
            'pandas frame are frame.to_dict("records"), and a file is named by data.train)'
        )
    try:
        for column, value in row.items():
            if not isinstance(column, str):
                raise UserError(f"{where}: the column {column!r} must have a text as its name")
            _check(value, f"{where}: the column {column!r}")
        return json.dumps(dict(row)).encode() + b"\n"
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: cannot be kept as JSON ({error})") from None


def _check(value: Any, what: str) -> None:
    """Check that JSON holds the value, and gives it back as it was."""
    match value:
        case None | bool() | int() | str():
            return
        case float() if value - value == 0:
            return
        case list() | tuple():
            for item in value:
                _check(item, what)
        case dict() if all(isinstance(key, str) for key in value):
            for item in value.values():
                _check(item, what)
        case _:
            described = f"{shown(value)} ({type(value).__name__})"
            if isinstance(value, dict):
                described = "a dictionary with other keys than texts"
            raise UserError(
                f"{what} holds {described}, which JSON cannot; make it a text, a number, a list or "
                "a dictionary"
            )
