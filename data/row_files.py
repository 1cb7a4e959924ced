"""The rows of one file: JSON Lines, JSON, CSV, Parquet, or the text of a source file.

Readers yield (values, `FILE:LINE`). Reading is strict: what is not UTF-8, not JSON or not an object
ends with one sentence.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.messages import CONVERSATION_COLUMNS, ROLE_KEYS
from data.packed import kind_of_rows, open_file, opened
from files.errors import UserError, did_you_mean, listed
from files.strict_json import parse_json_at

MAX_ROW_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LFS_POINTER = b"version https://git-lfs"
_PARQUET_ROWS_AT_A_TIME = 1024

# A row before it has a name: column → value, and `FILE:LINE`.
Values = tuple[dict[str, Any], str]
# What is told of a row that breaks a rule; where it returns, reading goes on.
OnFault = Callable[[UserError], None]


def stop_at(fault: UserError) -> None:
    """Raise a fault: what reading does with one, unless somebody wants to hear of all."""
    raise fault


def read_file(
    path: Path,
    name: str,
    columns: list[str] | None,
    *,
    every_column: bool = False,
    on_fault: OnFault = stop_at,
) -> Iterator[Values]:
    """Yield the rows of a data file; of Parquet only `columns`, unless `every_column` is asked for.

    `on_fault` is told of lines of JSON Lines; in other files the first fault is the last.

    Raises:
        UserError: A row, or the file, breaks a rule.
    """
    _refuse_pointer(path, name)
    match kind_of_rows(path):
        case ".jsonl":
            yield from _read_jsonl(path, name, on_fault)
        case ".json":
            yield from _read_json(path, name, columns)
        case ".csv":
            yield from _read_csv(path, name)
        case _:
            yield from _read_parquet(path, name, columns, every_column)


def _refuse_pointer(path: Path, name: str) -> None:
    """Raise where a file is the stand-in that git leaves for a large file it did not fetch."""
    with open_file(path, name) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{name}: holds no rows, only git's pointer to them, because the repository "
                "was cloned without git-lfs; run 'git lfs install' and 'git lfs pull' in it"
            )


def _lines(path: Path, name: str, on_fault: OnFault = stop_at) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its end), split at line feeds only; none exceeds the cap."""
    with opened(path, name) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                raise _too_long(where)
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            try:
                text = _decode(line, where)
            except UserError as fault:
                on_fault(fault)
            else:
                yield number, text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start + 1}); "
            "save the file as UTF-8"
        ) from None


def _too_long(where: str) -> UserError:
    return UserError(
        f"{where}: row over {MAX_ROW_BYTES // 2**20} MiB, the most a row may have; split or drop it"
    )


def _json_row(value: Any, text: str, where: str) -> Values:
    """Return the parsed value as a row; `text` is what it was parsed from."""
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: is {kind_of(value)}; each row must be a JSON object such as "
            '{"text": "..."}'
        )
    # Strict UTF-8 cannot hold a surrogate; only an escape can smuggle one in.
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                "character; write the character itself"
            ) from None
    return value, where


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_jsonl(path: Path, name: str, on_fault: OnFault = stop_at) -> Iterator[Values]:
    first = True
    for number, line in _lines(path, name, on_fault):
        line = line.rstrip("\r\n")
        if _skip_space(line, 0) == len(line):
            continue
        try:
            row = _row_of_line(line, f"{name}:{number}", first)
        except UserError as fault:
            on_fault(fault)
        else:
            yield row
        first = False


def _row_of_line(line: str, where: str, first: bool) -> Values:
    """Return the row of a line; the `first` one of a file tells whether they are JSON Lines."""
    try:
        value, end = parse_json_at(line, _skip_space(line, 0), lambda _: where)
    except UserError as error:
        if first and line.rstrip()[-1] in "[{,":
            raise _one_document(where) from None
        raise error
    if first and isinstance(value, list):
        raise _one_document(where)
    after = _skip_space(line, end)
    if after < len(line):
        raise UserError(
            f"{where}: more than one value on the line (column {after + 1}); each line must be "
            "one JSON object"
        )
    return _json_row(value, line, where)


def _one_document(where: str) -> UserError:
    return UserError(
        f"{where}: begins one JSON document, where .jsonl means an object on each line; rename the "
        "file so that it ends in .json"
    )


def _read_json(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Values]:
    """Read a list of objects, an object that holds one, JSON Lines, or one row."""
    with opened(path, name) as file:
        data = file.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    position = _skip_space(text, 0)
    if position == len(text):
        return

    def where(position: int) -> str:
        return f"{name}:{text.count(chr(10), 0, position) + 1}"

    if text[position] == "[":
        end = yield from _read_list(text, position, name)
        after = _skip_space(text, end)
        if after < len(text):
            raise UserError(f"{where(after)}: more text after the list of rows")
    elif text[position] != "{":
        raise UserError(f"{where(position)}: a .json file must hold a list of objects")
    elif _is_json_lines(text, position):
        yield from _read_jsonl(path, name)
    else:
        value, end = parse_json_at(text, position, where)
        after = _skip_space(text, end)
        if after < len(text):
            raise UserError(f"{where(after)}: more text after the object")
        key = _key_of_rows(value, columns, where(position))
        if key is None:
            if end - position > MAX_ROW_BYTES:
                raise _too_long(where(position))
            yield _json_row(value, text[position:end], where(position))
        else:
            del value
            yield from _read_list(text, _value_of(key, text, position, where), name)


def _is_json_lines(text: str, start: int) -> bool:
    """Whether the first object of a file ends on its line, and another value follows it."""
    line_end = text.find("\n", start)
    line = text[start : line_end if line_end >= 0 else None]
    try:
        end = parse_json_at(line, 0, str)[1]
    except UserError:
        return False
    return _skip_space(text, start + end) < len(text)


def _key_of_rows(value: Any, columns: Sequence[str] | None, where: str) -> str | None:
    """Return the key under which an object holds rows, or None where it is a row itself.

    It is one where it has the columns that are asked for, or the turns of a conversation.
    """
    if columns and all(column in value for column in columns):
        return None
    if any(column in value for column in CONVERSATION_COLUMNS):
        return None
    lists = {
        key: items
        for key, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    }
    if any(key in items[0] for items in lists.values() for key in ROLE_KEYS):
        return None
    if len(lists) > 1:
        raise UserError(
            f"{where}: is an object that holds several lists of objects ({listed(list(lists))}), "
            "and which of them are the rows is not certain; save that list as a file of its own"
        )
    return next(iter(lists), None)


def _value_of(key: str, text: str, start: int, where: Callable[[int], str]) -> int:
    """Return where the value of `key` begins in the object, which was parsed before, at `start`."""
    position = start
    while True:
        name, position = parse_json_at(text, _skip_space(text, position + 1), where)
        position = _skip_space(text, _skip_space(text, position) + 1)  # behind the colon
        if name == key:
            return position
        _, position = parse_json_at(text, position, where)
        position = _skip_space(text, position)  # at the comma


def _read_list(text: str, start: int, name: str) -> Generator[Values, None, int]:
    """Yield the rows of the list at `start`; return the position after it."""

    def where(position: int) -> str:
        return f"{name}:{text.count(chr(10), 0, position) + 1}"

    line, counted = 1, 0
    position = _skip_space(text, start + 1)
    while position < len(text) and text[position] != "]":
        # Counted from the last row on: counting from the start each time would be quadratic.
        line, counted = line + text.count("\n", counted, position), position
        value, end = parse_json_at(text, position, where)
        if end - position > MAX_ROW_BYTES:
            raise _too_long(f"{name}:{line}")
        yield _json_row(value, text[position:end], f"{name}:{line}")
        position = _skip_space(text, end)
        if position < len(text) and text[position] == ",":
            position = _skip_space(text, position + 1)
            if position < len(text) and text[position] == "]":
                raise UserError(f"{where(position)}: not JSON (comma before the closing bracket)")
        elif position < len(text) and text[position] != "]":
            raise UserError(f"{where(position)}: not JSON (no comma between two rows)")
    if position == len(text):
        raise UserError(f"{where(position)}: the list is not closed; the file may be cut off")
    return position + 1


def _read_csv(path: Path, name: str) -> Iterator[Values]:
    """Read a comma-separated file with a header line; every value is a string."""
    # A field may be a whole source file; the module's limit is 128 KiB.
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader((line for _, line in _lines(path, name)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: not CSV ({error}); check the quotes") from None
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values
            twice = [column for column, number in Counter(header).items() if number > 1]
            if twice:
                raise UserError(f"{where}: column '{twice[0]}' stands twice in the header")
            continue
        if len(values) != len(header):
            raise UserError(
                f"{where}: has {len(values)} values where the header has {len(header)} columns; "
                "quote values that hold commas or line ends"
            )
        yield dict(zip(header, values, strict=True)), where


def _read_parquet(
    path: Path, name: str, columns: list[str] | None, every_column: bool
) -> Iterator[Values]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: Parquet files need pyarrow; run `pip install pyarrow`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            for column in columns or ():
                if column not in there and file.metadata.num_rows:
                    raise missing_field(column, there, f"{name}:1")
            number = 0
            wanted = None if every_column else columns
            for batch in file.iter_batches(_PARQUET_ROWS_AT_A_TIME, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    where = f"{name}:{number}"
                    if any(
                        isinstance(value, str | bytes) and len(value) > MAX_ROW_BYTES
                        for value in values.values()
                    ):
                        raise _too_long(where)
                    yield without_absent(values), where
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        # A page that is whole but lies brings Python's own errors: text that is not UTF-8, dates
        # beyond the calendar.
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name}: not a readable Parquet file ({reason})") from None


def without_absent(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row of columns without the keys that its structures never had.

    A column has one structure for all rows, so that each holds null under the keys that only others
    have: `tool_calls` of every message, the arguments of every tool. Null cannot be told from
    absent there, and absent is what the rows were before. A column of its own is kept.
    """
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@dataclass(frozen=True)
class PassedOver:
    """Why a file of a source tree is no row."""

    reason: str


def source_text(path: Path) -> str | PassedOver:
    """Return the text of a source file, or why it is none."""
    try:
        str(path).encode("utf-8")
        with open(path, "rb") as file:
            data = file.read(MAX_ROW_BYTES + 1)
    except UnicodeEncodeError:
        return PassedOver("with a name that is not UTF-8")
    except OSError:
        return PassedOver("unreadable")
    if len(data) > MAX_ROW_BYTES:
        return PassedOver(f"over {MAX_ROW_BYTES // 2**20} MiB")
    if not data.removeprefix(_BYTE_ORDER_MARK).strip():
        return PassedOver("empty")
    if b"\0" in data:
        return PassedOver("binary")
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return PassedOver("not UTF-8")


_FIELDS_OF_FORMATS = (
    ("completion", ("prompt", "completion")),
    ("instruction", ("instruction", "output")),
    *(("messages", (column,)) for column in CONVERSATION_COLUMNS),
    ("text", ("text",)),
)


def missing_field(field: str, there: Sequence[str], where: str) -> UserError:
    """Return the error of a row, or a file, that lacks a field and has those `there`."""
    return UserError(
        f'{where}: field "{field}" missing (fields: {listed(there) or "none"})'
        f"{did_you_mean(field, there) or _format_that_fits(field, there)}"
    )


def _format_that_fits(field: str, there: Sequence[str]) -> str:
    """Return what would read rows with these fields, or nothing."""
    if field == "split":
        return "; data.split_column=none reads all rows of a file"
    for format_, fields in _FIELDS_OF_FORMATS:
        if field not in fields and set(fields) <= set(there):
            return f"; data.format={format_} reads such rows"
    if any(field in fields for _, fields in _FIELDS_OF_FORMATS):
        return (
            "; data.format=template with data.prompt_template and data.completion_template makes "
            "text of columns of any names"
        )
    return ""


def kind_of(value: Any) -> str:
    """Return what a value is, in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"of type {type(value).__name__}"
