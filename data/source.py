"""Rows from files: JSON Lines, JSON, CSV, Parquet, source files.

A row is a dictionary and the place it came from, `FILE:LINE`, which every message about it names.
Reading is strict: what is not UTF-8, not JSON, not an object, or not the string that the run needs,
ends with one sentence. Nothing is dropped in silence.

Which files a specification stands for is the business of `data.locate`. A file of rows is

* `.jsonl`: an object on each line;
* `.json`: a list of objects; an object that holds one such list, under any key, as in
  `{"data": [...]}`; JSON Lines; or one row;
* `.csv`: a header line, and a row on each further one;
* `.parquet`;
* any other text file of a source tree: `{"text": content, "path": path below the folder}`.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.locate import SPLIT_NAMES, Source, SourceFile, canonical_split, open_source
from data.messages import CONVERSATION_COLUMNS, ROLE_KEYS
from files.errors import UserError, did_you_mean, listed, note
from files.strict_json import parse_json_at

MAX_ROW_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LFS_POINTER = b"version https://git-lfs"
_PARQUET_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data.

    Attributes:
        values: column name → value.
        where: `FILE:LINE`, 1-based; the line where the row starts, or the row's number in Parquet.
    """

    values: dict[str, Any]
    where: str


def read_rows(
    spec: str | Path | Sequence[str | Path] | Source,
    *,
    fields: Sequence[str] | None = None,
    split_column: str | None = None,
    split: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """Return the rows of `spec`, one after another; the files are looked for at once.

    Args:
        spec: as in `open_source`, or what that returned.
        fields: columns that every row must have, as strings; None checks nothing. Of a Parquet file
            only these (and the split column) are read.
        split_column: column whose value chooses the rows of `split`; file names do not choose then.
        split: `train`, `valid` or `test`; None takes all rows.
        notice: is told how many files of a source tree were passed over, and why; by default a
            note on standard error says it.

    Raises:
        UserError: as `open_source`; and, while iterating, for the first row that breaks a rule,
            naming `FILE:LINE`.
    """
    source = (
        spec
        if isinstance(spec, Source)
        else open_source(spec, None if split_column is not None else split)
    )
    rows = _read_files(source, fields, split_column, notice or note)
    if split_column is not None and split is not None:
        rows = _of_split(rows, split_column, canonical_split(split))
    return rows if fields is None else _checked(rows, tuple(fields))


# --- reading -------------------------------------------------------------------------------------


def _read_files(
    source: Source,
    fields: Sequence[str] | None,
    split_column: str | None,
    notice: Callable[[str], None],
) -> Iterator[Row]:
    columns: list[str] | None = None
    if fields is not None:
        columns = sorted({*fields, *([split_column] if split_column is not None else [])})
    passed_over: list[tuple[str, str]] = []
    for file in source.files:
        if file.below is not None:
            text = _source_text(file.path)
            if isinstance(text, _PassedOver):
                passed_over.append((text.reason, file.name))
            else:
                yield Row({"text": text, "path": file.below}, f"{file.name}:1")
            continue
        _refuse_pointer(file)
        match file.path.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(file.path, file.name)
            case ".json":
                yield from _read_json(file.path, file.name, columns)
            case ".csv":
                yield from _read_csv(file.path, file.name)
            case _:
                yield from _read_parquet(file.path, file.name, columns)
    if passed_over:
        example = dict(reversed(passed_over))
        reasons = ", ".join(
            f"{number} {reason} (such as {example[reason]})"
            for reason, number in Counter(reason for reason, _ in passed_over).items()
        )
        notice(
            f"{source.spec}: {len(passed_over)} of {len(source.files)} files passed over: {reasons}"
        )


def _refuse_pointer(file: SourceFile) -> None:
    """Raise where a file is the stand-in that git leaves for a large file it did not fetch."""
    with _opened(file.path, file.name) as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{file.name}: holds no rows, only git's pointer to them, because the repository "
                "was cloned without git-lfs; run 'git lfs install' and 'git lfs pull' in it"
            )


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its end), split at line feeds only; none exceeds the cap."""
    with _opened(path, name) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                raise _too_long(where)
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield number, _decode(line, where)


def _opened(path: Path, name: str):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


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


def _json_row(value: Any, text: str, where: str) -> Row:
    """Return the parsed value as a row; `text` is what it was parsed from."""
    if not isinstance(value, dict):
        raise UserError(
            f'{where}: is {_kind(value)}; each row must be a JSON object such as {{"text": "..."}}'
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
    return Row(value, where)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    first = True
    for number, line in _lines(path, name):
        where = f"{name}:{number}"
        line = line.rstrip("\r\n")
        start = _skip_space(line, 0)
        if start == len(line):
            continue
        try:
            value, end = parse_json_at(line, start, lambda _, where=where: where)
        except UserError as error:
            if first and line.rstrip()[-1] in "[{,":
                raise _one_document(where) from None
            raise error
        if first and isinstance(value, list):
            raise _one_document(where)
        first = False
        after = _skip_space(line, end)
        if after < len(line):
            raise UserError(
                f"{where}: more than one value on the line (column {after + 1}); each line must be "
                "one JSON object"
            )
        yield _json_row(value, line, where)


def _one_document(where: str) -> UserError:
    return UserError(
        f"{where}: begins one JSON document, where .jsonl means an object on each line; rename the "
        "file so that it ends in .json"
    )


def _read_json(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """Read a list of objects, an object that holds one, JSON Lines, or one row."""
    with _opened(path, name) as file:
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


def _read_list(text: str, start: int, name: str) -> Generator[Row, None, int]:
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


def _read_csv(path: Path, name: str) -> Iterator[Row]:
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
        yield Row(dict(zip(header, values, strict=True)), where)


def _read_parquet(path: Path, name: str, columns: list[str] | None) -> Iterator[Row]:
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
                    raise _missing_field(column, there, f"{name}:1")
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS_AT_A_TIME, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    where = f"{name}:{number}"
                    if any(
                        isinstance(value, str | bytes) and len(value) > MAX_ROW_BYTES
                        for value in values.values()
                    ):
                        raise _too_long(where)
                    yield Row(without_absent(values), where)
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
class _PassedOver:
    """Why a file of a source tree is no row."""

    reason: str


def _source_text(path: Path) -> str | _PassedOver:
    try:
        str(path).encode("utf-8")
        with open(path, "rb") as file:
            data = file.read(MAX_ROW_BYTES + 1)
    except UnicodeEncodeError:
        return _PassedOver("with a name that is not UTF-8")
    except OSError:
        return _PassedOver("unreadable")
    if len(data) > MAX_ROW_BYTES:
        return _PassedOver(f"over {MAX_ROW_BYTES // 2**20} MiB")
    if not data.removeprefix(_BYTE_ORDER_MARK).strip():
        return _PassedOver("empty")
    if b"\0" in data:
        return _PassedOver("binary")
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return _PassedOver("not UTF-8")


# --- choosing and checking rows ------------------------------------------------------------------


def _of_split(rows: Iterator[Row], column: str, split: str) -> Iterator[Row]:
    for row in rows:
        value = _string(row, column)
        if canonical_split(value) not in SPLIT_NAMES.values():
            raise UserError(
                f"{row.where}: split column '{column}' is {value!r}; must be train, valid "
                "(or validation) or test"
            )
        if canonical_split(value) == split:
            yield row


def _checked(rows: Iterator[Row], fields: tuple[str, ...]) -> Iterator[Row]:
    for row in rows:
        for field in fields:
            _string(row, field)
        yield row


def _string(row: Row, field: str) -> str:
    """Return the row's value of `field`, which must be there and be a string."""
    if field not in row.values:
        raise _missing_field(field, list(row.values), row.where)
    value = row.values[field]
    if not isinstance(value, str):
        raise UserError(
            f'{row.where}: field "{field}" is {_kind(value)}; it must be a string: fill it in or '
            "drop the row"
        )
    return value


_FIELDS_OF_FORMATS = (
    ("completion", ("prompt", "completion")),
    ("instruction", ("instruction", "output")),
    *(("messages", (column,)) for column in CONVERSATION_COLUMNS),
    ("text", ("text",)),
)


def _missing_field(field: str, there: Sequence[str], where: str) -> UserError:
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
    return ""


def _kind(value: Any) -> str:
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
