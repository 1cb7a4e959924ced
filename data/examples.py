"""Rows to token ids with labels, made once and kept memory-mapped under the hash of what made them.

A cache folder's name is a sha256 over the content of the source files, the tokenizer's files and
every setting that matters, so nothing in it can be out of date. What becomes of a row's tokens is
in `data/labels.py`, and what lies in a cache folder in `data/arrays.py`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.arrays import (
    EOS_LOST,
    HOLELESS,
    IN_A_ROW,
    TRUNCATED,
    UNPARSED,
    Counts,
    Stored,
    Writer,
    cached,
    in_memory,
)
from data.cache import cache_folder
from data.duplicates import first_alike
from data.fim import FillInTheMiddle, Piece
from data.labels import labelled_rows
from data.locate import Source, open_source
from data.packed import ending_of
from data.prompt import PromptFormat
from data.source import Row, read_rows
from data.tokenizer import Tokenizer
from files.atomic import sha256_file
from files.errors import UserError, did_you_mean

OVERFLOWS = ("truncate", "drop", "error", "split")
# Raised whenever the same rows and settings come to other tokens, or the files to another layout.
_CACHE_VERSION = 4


@dataclass(frozen=True)
class Example:
    """One document of the data.

    Attributes:
        index: Its place in the whole set, the same in every subset; it keys dropout.
        input_ids: (T,) int32.
        labels: (T,) int32, not shifted: labels[i] is token i, or -100 where it is not trained.
            labels[0] never counts, since nothing predicts the first token.
        prompt_length: Tokens before the completion, trained or not, or before the first answer that
            is trained, or before the middle that fills a hole; 0 where there is no prompt.
        has_hole: Whether it is one of fill-in-the-middle.
        weight: What multiplies the loss of its targets in training; None where rows have none.
    """

    index: int
    input_ids: np.ndarray
    labels: np.ndarray
    prompt_length: int = 0
    has_hole: bool = False
    weight: float | None = None


class Examples:
    """A sequence of examples, memory-mapped.

    With fill-in-the-middle (`data/fim.py`) it is that of one epoch, 0 unless `at_epoch` was asked
    for another: which examples there are, their fingerprint and their counts are those of the rows.

    Attributes:
        lengths: (N,) int64 tokens of each example; where it may have a hole, the most that it has
            in any epoch.
        num_targets: (N,) int64 targets of each example; where it may have a hole, of its row.
        rows: (N,) int64 the row of the data that each example comes from, counted from 0; a row
            makes several examples under `data.on_overflow=split`.
        weights: (N,) float64 the weight of each example's row; None where rows have none.
        source_rows: Rows of each source, one source after the other, held out or not; empty where
            they were not loaded by source.
        counts: What became of the rows.
        fingerprint: sha256 of ids, labels, weights and their order: equal if and only if training
            sees the same data.
        first_alike: (rows read,) int64 the first row that each is like, word for word or nearly:
            for most itself; None where such rows are kept.
        max_id: The largest token id.
    """

    def __init__(
        self,
        stored: Stored,
        positions: np.ndarray | None = None,
        fim: FillInTheMiddle | None = None,
    ):
        self.fim, self._epoch = fim, 0
        self._arrays = arrays = stored.arrays
        self._positions = np.arange(len(arrays.targets)) if positions is None else positions
        self.counts = stored.counts
        self.fingerprint, self.source_rows = stored.fingerprint, stored.source_rows
        self.first_alike = arrays.first_alike
        self.lengths: np.ndarray = np.diff(arrays.offsets)[self._positions]
        self.num_targets: np.ndarray = arrays.targets[self._positions]
        self.rows: np.ndarray = arrays.rows[self._positions]
        weights = arrays.weights
        self.weights: np.ndarray | None = None if weights is None else weights[self._positions]
        self.max_id = int(arrays.input_ids.max())
        if fim is not None:
            whole = arrays.flags[self._positions] & HOLELESS
            self.lengths = np.where(whole, self.lengths, fim.bounds(self.lengths))
            self.max_id = max(self.max_id, fim.tokens.max_id)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Example:
        index = int(self._positions[position])
        weight = None if self.weights is None else float(self.weights[position])
        if self.fim is not None and (found := self._with_hole(self.fim, index)) is not None:
            return Example(index, *found, has_hole=True, weight=weight)
        start, stop = self._arrays.offsets[index : index + 2]
        return Example(
            index,
            self._arrays.input_ids[start:stop],
            self._arrays.labels[start:stop],
            int(self._arrays.prompts[index]),
            weight=weight,
        )

    def _with_hole(
        self, fim: FillInTheMiddle, index: int
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Return what `FillInTheMiddle.example` makes of an example in this epoch."""
        arrays, row = self._arrays, self.row_of(index)
        assert arrays.texts is not None and arrays.text_offsets is not None
        assert arrays.holes_from is not None
        start, stop = arrays.text_offsets[index : index + 2]
        piece = Piece(
            arrays.texts[start:stop].tobytes().decode(),
            int(arrays.holes_from[index]),
            holds_tokens=bool(arrays.flags[index] & HOLELESS),
        )
        length = int(arrays.offsets[index + 1] - arrays.offsets[index])
        part = index - int(np.searchsorted(arrays.rows, row))
        return fim.example(piece, length, self._epoch, row, part)

    def at_epoch(self, epoch: int) -> Examples:
        """Return the same examples with the holes of a 0-based epoch."""
        if self.fim is None:
            return self
        other = copy.copy(self)
        other._epoch = epoch
        return other

    def __iter__(self) -> Iterator[Example]:
        return (self[position] for position in range(len(self)))

    def row_of(self, index: int) -> int:
        """Return the row, counted as in `rows`, that the example with this `index` comes from."""
        return int(self._arrays.rows[index])

    def subset(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """Return the examples at `indices`, in this order; each keeps its `index`.

        The subset's counts know its examples alone: rows equals examples, and none is dropped.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        positions = self._positions[chosen]
        lengths = np.diff(self._arrays.offsets)[positions]
        flags = self._arrays.flags[positions]
        counted = self._arrays.in_a_row[positions].sum(axis=0).tolist()
        counts = Counts(
            rows=len(positions),
            examples=len(positions),
            tokens=int(lengths.sum()),
            targets=int(self.num_targets[chosen].sum()),
            truncated=int(np.count_nonzero(flags & TRUNCATED)),
            dropped=0,
            eos_lost=int(np.count_nonzero(flags & EOS_LOST)),
            longest=int(lengths.max(initial=0)),
            longest_row=int(lengths.max(initial=0)),
            unparsed=int(np.count_nonzero(flags & UNPARSED)),
            holeless=int(np.count_nonzero(flags & HOLELESS)),
            **dict(zip(IN_A_ROW, counted, strict=True)),
        )
        digest = hashlib.sha256(self.fingerprint.encode() + positions.astype("<i8").tobytes())
        stored = Stored(self._arrays, counts, digest.hexdigest(), self.source_rows)
        return Examples(stored, positions, self.fim)


def cache_root() -> Path:
    """Return the folder of all cached examples."""
    return cache_folder("examples")


def load_examples(
    spec: str | Sequence[str],
    *,
    split_column: str | None,
    split: str | None,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    max_length: int,
    on_overflow: str,
    cache_root: Path | None,
    fim: FillInTheMiddle | None = None,
    weight_field: str | None = None,
    by_source: bool = False,
    near_duplicates: str = "keep",
) -> Examples:
    """Return the examples of a data set; where it is cached, no row is read.

    Args:
        spec: File, folder, glob or `hub:` name, or a list of them, as `data.train` gives it.
        split_column: Column that names a row's split, or None.
        split: The split to take.
        tokenizer: Text to ids.
        prompt_format: Row to text.
        max_length: Tokens of an example at most.
        on_overflow: What becomes of a longer row: `truncate`, `drop`, `error` or `split` (pieces of
            `max_length`, each an example).
        cache_root: Folder of the cache (`cache_root()`), or None to keep the examples in memory.
        fim: Which of them have a hole, and where; None: none has.
        weight_field: Column of the rows' weights; None: they have none.
        by_source: Keep how many rows each entry of a list has (`Examples.source_rows`).
        near_duplicates: `keep`, or `drop` for rows that are like one before them, word for word or
            nearly (`data.duplicates`); the rows are read once more to find them.

    Raises:
        NoRowsError: It holds no row of the split.
        UserError: The data cannot be read, or leaves no target.
    """
    check_settings(tokenizer, prompt_format, max_length, on_overflow)
    # Where a column tells the splits apart, every file is read.
    source = open_source(spec, None if split_column else split)
    parts = source.parts if by_source else (source,)

    def build(folder: Path) -> None:
        read: list[int] = []

        def rows() -> Iterator[Row]:
            for part in parts:
                read.append(0)
                for row in read_rows(
                    part,
                    fields=prompt_format.columns(),
                    split_column=split_column,
                    split=split,
                    weight_field=weight_field,
                ):
                    read[-1] += 1
                    yield row

        writer = Writer(folder, max_length, on_overflow, fim)
        if near_duplicates == "drop":
            read_before = read_rows(
                source,
                fields=prompt_format.columns(),
                split_column=split_column,
                split=split,
                weight_field=weight_field,
                notice=lambda _: None,
            )
            writer.leave_out(first_alike(read_before, prompt_format, weight_field))
        made = labelled_rows(rows(), tokenizer, prompt_format, weight_field)
        with contextlib.closing(made) as labelled:
            for row in labelled:
                writer.add(row)
        writer.close(source.spec, read if by_source else ())

    if cache_root is None:
        return Examples(in_memory(build), fim=fim)
    content: dict[str, Any] = {"files": _content(source)}
    if split_column:
        content |= {"split_column": split_column, "split": split}
    if fim is not None:  # texts are kept too, and counted; holes are drawn from them later
        content |= {"fim_unit": fim.unit}
    if weight_field is not None:
        content |= {"weight_field": weight_field}
    if by_source:
        content |= {"sources": [len(part.files) for part in parts]}
    if near_duplicates == "drop":
        content |= {"near_duplicates": "drop"}
    key = _key(content, tokenizer, prompt_format, max_length, on_overflow)
    return Examples(cached(cache_root, key, build), fim=fim)


def check_vocabulary(
    examples: Examples, vocab_size: int, tokenizer: Tokenizer, *, padded: bool = True
) -> None:
    """Check that the model's embedding has a row for every token of the data.

    Args:
        examples: The data.
        vocab_size: Rows of the model's embedding.
        tokenizer: What made the data.
        padded: The pad token will be looked up too (`data.batching` is not `unpadded`).

    Raises:
        UserError: The data, or padding, needs an id of `vocab_size` or more.
    """
    largest = examples.max_id
    if largest >= vocab_size:
        raise UserError(
            f"token id {largest} ({tokenizer.token(largest)!r}) is beyond the model's vocab_size "
            f"of {vocab_size} (ids 0 to {vocab_size - 1}); use the tokenizer that belongs to it"
        )
    pad_id = tokenizer.pad_id
    if padded and pad_id >= vocab_size:
        raise UserError(
            f"the pad token {tokenizer.token(pad_id)!r} (id {pad_id}) is beyond the model's "
            f"vocab_size of {vocab_size}; use data.batching=unpadded, or name EOS as pad_token in "
            "tokenizer_config.json"
        )


def check_settings(
    tokenizer: Tokenizer, prompt_format: PromptFormat, max_length: int, on_overflow: str
) -> None:
    """Refuse settings that no row can be trained with.

    Raises:
        UserError: An unknown `on_overflow`, a length that holds no target, or an EOS that the
            tokenizer does not have.
    """
    if on_overflow not in OVERFLOWS:
        raise UserError(
            f"data.on_overflow: '{on_overflow}' is not one of {', '.join(OVERFLOWS)}"
            f"{did_you_mean(on_overflow, OVERFLOWS)}"
        )
    if max_length < 2:
        raise UserError(
            f"data.max_length: {max_length} is too small: an example needs at least 2 tokens, "
            "one to read and one to predict"
        )
    if prompt_format.append_eos and tokenizer.eos_id is None:
        raise UserError(
            "data.append_eos=true needs an EOS token, and the tokenizer's vocabulary has none: "
            "name one as eos_token in tokenizer_config.json, or set data.append_eos=false"
        )


def _content(source: Source) -> list[list[str]]:
    """Return (what a row may see of a file's name, sha256 of the file) for each file, in order."""
    content = []
    for file in source.files:
        seen = ending_of(file.path) if file.below is None else file.below
        try:
            content.append([seen, sha256_file(file.path)])
        except OSError as error:  # reading the rows will say so, or pass the file over
            content.append([seen, f"unreadable: {error.errno}"])
    return content


def _key(
    source: dict[str, Any],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    max_length: int,
    on_overflow: str,
) -> str:
    """Return the sha256 of everything that decides what the examples are."""
    description = {
        "version": _CACHE_VERSION,
        "tokenizers": tokenizers.__version__,
        "source": source,
        "tokenizer": tokenizer.fingerprint,
        "format": prompt_format.to_dict(),
        "max_length": max_length,
        "on_overflow": on_overflow,
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
