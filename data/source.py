"""Rows from files: JSON Lines, JSON, CSV, Parquet, source files.

A row is a dictionary and the place it came from, `FILE:LINE`, which every message about it names.
Reading is strict: what is not UTF-8, not JSON, not an object, or not the string that the run needs,
ends with one sentence. Nothing is dropped in silence.

Which files a specification stands for is the business of `data.locate`. A file of rows is

* `.jsonl`: an object on each line;
* `.json`: a list of objects; an object that holds one such list, under any key, as in
  `{"data": [...]}`; JSON Lines; or one row;
* `.csv`: a header line, and a row on each further one;
* any of these packed, as `.jsonl.gz` or `.csv.zst`;
* `.parquet`;
* any other text file of a source tree: `{"text": content, "path": path below the folder}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from data.locate import Source, open_source
from data.row_files import (
    OnFault,
    PassedOver,
    kind_of,
    missing_field,
    read_file,
    source_text,
    stop_at,
)
from data.splits import SPLIT_NAMES, canonical_split
from files.errors import UserError, note


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
    every_column: bool = False,
    weight_field: str | None = None,
    notice: Callable[[str], None] | None = None,
    on_fault: OnFault = stop_at,
) -> Iterator[Row]:
    """Return the rows of `spec`, one after another; the files are looked for at once.

    Args:
        spec: as in `open_source`, or what that returned.
        fields: columns that every row must have, as strings; None checks nothing. Of a Parquet file
            only these, the split column and `weight_field` are read.
        split_column: column whose value chooses the rows of `split`; file names do not choose then.
        split: `train`, `valid` or `test`; None takes all rows.
        every_column: of a Parquet file, read the columns too that nobody asked for.
        weight_field: column of the rows' weights, which is read too.
        notice: is told how many files of a source tree were passed over, and why; by default a
            note on standard error says it.
        on_fault: is told of a row that breaks a rule; where it does not raise, as it does by
            default, reading goes on behind it, or in the next file where this one has no lines.

    Raises:
        UserError: as `open_source`; and, while iterating, for the first row that breaks a rule,
            naming `FILE:LINE`.
    """
    source = (
        spec
        if isinstance(spec, Source)
        else open_source(spec, None if split_column is not None else split)
    )
    columns: list[str] | None = None
    if fields is not None:
        others = (split_column, weight_field)
        columns = sorted({*fields, *(name for name in others if name is not None)})
    rows = _read_files(source, columns, every_column, notice or note, on_fault)
    if split_column is not None and split is not None:
        rows = _of_split(rows, split_column, canonical_split(split), on_fault)
    return rows if fields is None else _checked(rows, tuple(fields), on_fault)


def _read_files(
    source: Source,
    columns: list[str] | None,
    every_column: bool,
    notice: Callable[[str], None],
    on_fault: OnFault,
) -> Iterator[Row]:
    passed_over: list[tuple[str, str]] = []
    for file in source.files:
        if file.below is not None:
            text = source_text(file.path)
            if isinstance(text, PassedOver):
                passed_over.append((text.reason, file.name))
            else:
                yield Row({"text": text, "path": file.below}, f"{file.name}:1")
            continue
        rows = read_file(
            file.path, file.name, columns, every_column=every_column, on_fault=on_fault
        )
        try:
            yield from starmap(Row, rows)
        except UserError as fault:
            on_fault(fault)
    if passed_over:
        example = dict(reversed(passed_over))
        reasons = ", ".join(
            f"{number} {reason} (such as {example[reason]})"
            for reason, number in Counter(reason for reason, _ in passed_over).items()
        )
        notice(
            f"{source.spec}: {len(passed_over)} of {len(source.files)} files passed over: {reasons}"
        )


# --- choosing and checking rows ------------------------------------------------------------------


def _of_split(rows: Iterator[Row], column: str, split: str, on_fault: OnFault) -> Iterator[Row]:
    for row in rows:
        try:
            named = _named_split(row, column)
        except UserError as fault:
            on_fault(fault)
        else:
            if named == split:
                yield row


def _named_split(row: Row, column: str) -> str:
    value = _string(row, column)
    if canonical_split(value) not in SPLIT_NAMES.values():
        raise UserError(
            f"{row.where}: split column '{column}' is {value!r}; must be train, valid "
            "(or validation) or test"
        )
    return canonical_split(value)


def _checked(rows: Iterator[Row], fields: tuple[str, ...], on_fault: OnFault) -> Iterator[Row]:
    for row in rows:
        try:
            for field in fields:
                _string(row, field)
        except UserError as fault:
            on_fault(fault)
        else:
            yield row


def _string(row: Row, field: str) -> str:
    """Return the row's value of `field`, which must be there and be a string."""
    if field not in row.values:
        raise missing_field(field, list(row.values), row.where)
    value = row.values[field]
    if not isinstance(value, str):
        raise UserError(
            f'{row.where}: field "{field}" is {kind_of(value)}; it must be a string: fill it in or '
            "drop the row"
        )
    return value
