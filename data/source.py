"""Rows from files: JSON Lines, JSON, CSV, Parquet, folders, data sets of the Hub, source trees.

A row is a dictionary and the place it came from, `FILE:LINE`, which every message about it names.
Reading is strict: what is not UTF-8, not JSON, not an object, or not the string that the run needs,
ends with one sentence. Nothing is dropped in silence.

Which files a specification stands for:

* a file: itself;
* a folder with data files at its top: these. `.json` files count only where there are no others,
  because `package.json` and `dataset_infos.json` hold no rows;
* any other folder: a tree of source files, one row for each text file below it, hidden ones left
  out: `{"text": content, "path": path below the folder}`;
* `hub:owner/name[:config][:split]`: data files of a data set on the Hub.

Where the names of a folder's or a data set's files speak of splits (`train-00000-of-00002.parquet`,
`test.jsonl`), only the files of the asked split are read, so that test rows never train.
"""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from files.errors import UserError, did_you_mean
from files.hub import resolve_dataset

MAX_ROW_BYTES = 16 * 2**20
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_PREFIX = "hub:"

Split = Literal["train", "valid", "test"]
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "test": "test",
    "testing": "test",
}
_COLUMN_VALUES = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+.*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_ROWS_AT_A_TIME = 1024
_NAMES_IN_A_MESSAGE = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data.

    Attributes:
        values: column name → value.
        where: `FILE:LINE`, 1-based; the line where the row starts, or the row's number in Parquet.
    """

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Source:
    """What a specification stands for: the files to read, in order.

    Attributes:
        spec: the specification, as the user wrote it.
        files: (path on this machine, name in messages) of each file.
        tree: None for data files; the folder for a tree of source files.
        commit: the commit of a data set of the Hub; None otherwise.
    """

    spec: str
    files: tuple[tuple[Path, str], ...]
    tree: Path | None = None
    commit: str | None = None


def open_source(spec: str | Path, split: str | None = None) -> Source:
    """Return the files that `spec` stands for, without reading a row.

    Args:
        spec: a file, a folder, or `hub:owner/name[:config][:split]`.
        split: the split to choose where file names speak of splits; a split in `spec` rules.
            None takes all files.

    Raises:
        UserError: nothing is there, the kind of file is unknown, or no file is of the split.
    """
    spec = str(spec)
    if spec.startswith(HUB_PREFIX):
        return _open_hub(spec, split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(spec, path, split)
    if not path.exists():
        raise _missing(spec, path)
    if not path.is_file():
        raise UserError(
            f"{spec}: neither a regular file nor a folder; save the rows to a file first"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{spec}: files ending in '{path.suffix}' are not read; the rows must be in one of "
            f"{', '.join(SUFFIXES)} (unpacked), or pass the folder of source files"
        )
    return Source(spec, ((path, spec),))


def read_rows(
    spec: str | Path | Source,
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
            warning says it.

    Raises:
        UserError: as `open_source`; and, while iterating, for the first row that breaks a rule,
            naming `FILE:LINE`.
    """
    source = (
        spec
        if isinstance(spec, Source)
        else open_source(spec, None if split_column is not None else split)
    )
    if source.tree is not None:
        rows = _read_tree(source, notice or _warn)
    else:
        rows = _read_files(source, fields, split_column)
    if split_column is not None and split is not None:
        rows = _of_split(rows, split_column, _canonical_split(split))
    return rows if fields is None else _checked(rows, tuple(fields))


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _missing(spec: str, path: Path) -> UserError:
    parent = path.parent
    neighbours = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    hub = f"; a data set of the Hub is written {HUB_PREFIX}{spec}" if spec.count("/") == 1 else ""
    return UserError(
        f"{spec}: no such file or folder (looked in {parent.resolve()})"
        f"{did_you_mean(path.name, neighbours) or hub}"
    )


# --- which files ---------------------------------------------------------------------------------


def _open_folder(spec: str, folder: Path, split: str | None) -> Source:
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_file() and entry.name[0] != "."
    )
    names = _data_files(names, spec)
    if names:
        names = _files_of_split(names, split, spec)
        return Source(spec, tuple((folder / name, str(Path(spec) / name)) for name in names))
    files = _tree_files(folder)
    if not files:
        raise UserError(
            f"{spec}: holds no files to read (data files end in {', '.join(SUFFIXES)}; hidden "
            "files are left out)"
        )
    return Source(
        spec, tuple((folder / name, str(Path(spec) / name)) for name in files), tree=folder
    )


def _tree_files(folder: Path) -> list[str]:
    """Return the files below `folder` as sorted POSIX paths, hidden files and folders left out."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        names += [
            (Path(root) / name).relative_to(folder).as_posix() for name in files if name[0] != "."
        ]
    return sorted(names)


def _data_files(names: Sequence[str], spec: str) -> list[str]:
    """Return the names that hold rows, all of one format, or nothing."""
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES and not hidden:
            by_suffix.setdefault(suffix, []).append(name)
    if len(by_suffix) > 1:
        by_suffix.pop(".json", None)
    if len(by_suffix) > 1:
        raise UserError(
            f"{spec}: holds data files of several formats ({', '.join(sorted(by_suffix))}), which "
            "may be the same rows twice; pass one file, or a folder with one format"
        )
    return sorted(next(iter(by_suffix.values()), []))


def _open_hub(spec: str, split: str | None) -> Source:
    repository, *choices = spec.removeprefix(HUB_PREFIX).split(":")
    if len(choices) > 2:
        raise UserError(f"{spec}: must be hub:owner/name, hub:owner/name:config or …:config:split")
    config, asked = (choices[0], choices[1]) if len(choices) == 2 else ("", "")

    def choose(names: Sequence[str]) -> list[str]:
        found = _data_files(names, spec)
        if not found:
            raise UserError(
                f"{spec}: has no data files ({', '.join(SUFFIXES)}); fetch its rows another way "
                "and pass the file"
            )
        chosen_config, chosen_split = config, asked or split
        if len(choices) == 1:
            # One word after the name is a configuration where there is one of that name.
            if choices[0] in _configurations(found):
                chosen_config = choices[0]
            else:
                chosen_split = choices[0]
        return _files_of_split(_files_of_config(found, chosen_config, spec), chosen_split, spec)

    dataset = resolve_dataset(repository, choose)
    files = tuple(
        (dataset.folder / name, f"{HUB_PREFIX}{repository}/{name}") for name in dataset.names
    )
    return Source(spec, files, commit=dataset.commit)


def _configurations(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the data set's configurations: folder → files. `data` and folders of a split are none.

    The files that lie in no such folder are the configuration `default`.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        folders = [
            part
            for part in PurePosixPath(name).parts[:-1]
            if part != "data" and part not in _SPLIT_NAMES
        ]
        found.setdefault("/".join(folders) or "default", []).append(name)
    return found


def _files_of_config(names: Sequence[str], config: str, spec: str) -> list[str]:
    configurations = _configurations(names)
    if not config and len(configurations) == 1:
        return next(iter(configurations.values()))
    if (config or "default") in configurations:
        return configurations[config or "default"]
    listed = _listed(sorted(configurations))
    if not config:
        raise UserError(
            f"{spec}: has several configurations ({listed}); name one, as in "
            f"{spec}:{sorted(configurations)[0]}"
        )
    raise UserError(
        f"{spec}: has no configuration '{config}' (it has: {listed})"
        f"{did_you_mean(config, configurations)}"
    )


def _split_labels(name: str) -> tuple[str, set[str]]:
    """Return what a file's name says of its split: its own words, and the splits they mean.

    `python/train_sft-00000-of-00003.parquet` → `("train_sft", {"train"})`.
    """
    path = PurePosixPath(name)
    label = _SHARD_NUMBER.sub("", path.stem)
    words = [*re.split(r"[^a-z0-9]+", label.lower()), *(part.lower() for part in path.parts[:-1])]
    return label, {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}


def _canonical_split(split: str) -> str:
    return _SPLIT_NAMES.get(split.lower(), split)


def _files_of_split(names: Sequence[str], split: str | None, spec: str) -> list[str]:
    """Return the files of `split`; where no name speaks of a split, all are training rows."""
    if split is None:
        return list(names)
    labels = {name: _split_labels(name) for name in names}
    exact = [name for name in names if labels[name][0] == split]
    if exact:
        return exact
    wanted = _canonical_split(split)
    matching = [name for name in names if wanted in labels[name][1]]
    if matching:
        return matching
    if wanted == "train" and not any(splits for _, splits in labels.values()):
        return list(names)
    found = sorted({"/".join(sorted(splits)) or label for label, splits in labels.values()})
    raise UserError(
        f"{spec}: has no files of the split '{split}' (it has: {_listed(found)}); name the file, "
        "or leave the split out and use data.valid_fraction"
    )


# --- reading -------------------------------------------------------------------------------------


def _read_files(
    source: Source, fields: Sequence[str] | None, split_column: str | None
) -> Iterator[Row]:
    columns: list[str] | None = None
    if fields is not None:
        columns = sorted({*fields, *([split_column] if split_column is not None else [])})
    for path, name in source.files:
        match path.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(path, name)
            case ".json":
                yield from _read_json(path, name)
            case ".csv":
                yield from _read_csv(path, name)
            case _:
                yield from _read_parquet(path, name, columns)


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


class _NotStrict(ValueError):
    """JSON that Python's parser takes and we do not."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise _NotStrict(f'key "{twice}" stands twice in one object')
    return values


def _refuse_constant(text: str) -> Any:
    raise _NotStrict(f"{text} is not JSON; write null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _parse(text: str, start: int, where: Callable[[int], str]) -> tuple[Any, int]:
    """Return the JSON value at `start` and the position after it.

    `where` gives `FILE:LINE` for a position in `text`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where(error.pos)}: not JSON ({error.msg} at column {error.colno}); "
            "each row must be one JSON object"
        ) from None
    except RecursionError:
        raise UserError(f"{where(start)}: JSON nested too deeply") from None
    except _NotStrict as error:
        raise UserError(f"{where(start)}: {error}") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise UserError(f"{where(start)}: holds a number with too many digits") from None


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
    for number, line in _lines(path, name):
        where = f"{name}:{number}"
        line = line.rstrip("\r\n")
        start = _skip_space(line, 0)
        if start == len(line):
            continue
        value, end = _parse(line, start, lambda _, where=where: where)
        after = _skip_space(line, end)
        if after < len(line):
            raise UserError(
                f"{where}: more than one value on the line (column {after + 1}); each line must be "
                "one JSON object"
            )
        yield _json_row(value, line, where)


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """Read a list of objects; a file that begins with an object is read as JSON Lines."""
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
    if text[position] == "{":
        yield from _read_jsonl(path, name)
        return

    def where(position: int) -> str:
        return f"{name}:{text.count(chr(10), 0, position) + 1}"

    if text[position] != "[":
        raise UserError(f"{where(position)}: a .json file must hold a list of objects")
    line, counted = 1, 0
    position = _skip_space(text, position + 1)
    while position < len(text) and text[position] != "]":
        # Counted from the last row on: counting from the start each time would be quadratic.
        line, counted = line + text.count("\n", counted, position), position
        value, end = _parse(text, position, where)
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
    after = _skip_space(text, position + 1)
    if after < len(text):
        raise UserError(f"{where(after)}: more text after the list of rows")


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
        raise UserError(
            f"{name}: Parquet files need pyarrow; run pip install 'lathe[parquet]'"
        ) from None
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


def _read_tree(source: Source, notice: Callable[[str], None]) -> Iterator[Row]:
    """Yield a row for each text file; say at the end how many files were passed over, and why."""
    assert source.tree is not None
    passed_over: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for path, name in source.files:
        text = _source_text(path)
        if isinstance(text, _PassedOver):
            passed_over[text.reason] += 1
            examples.setdefault(text.reason, name)
            continue
        yield Row({"text": text, "path": path.relative_to(source.tree).as_posix()}, f"{name}:1")
    if passed_over:
        reasons = ", ".join(
            f"{number} {reason} (such as {examples[reason]})"
            for reason, number in passed_over.items()
        )
        notice(
            f"{source.spec}: {passed_over.total()} of {len(source.files)} files passed over: "
            f"{reasons}"
        )


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
        if value not in _COLUMN_VALUES:
            raise UserError(
                f"{row.where}: split column '{column}' is {value!r}; must be train, valid "
                "(or validation) or test"
            )
        if _COLUMN_VALUES[value] == split:
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
    ("messages", ("messages",)),
    ("messages", ("conversations",)),
    ("text", ("text",)),
)


def _missing_field(field: str, there: Sequence[str], where: str) -> UserError:
    return UserError(
        f'{where}: field "{field}" missing (fields: {_listed(there) or "none"})'
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


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
