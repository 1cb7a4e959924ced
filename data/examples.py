"""Rows to token ids with labels, made once and kept memory-mapped under the hash of what made them.

A cache folder holds a few .npy files and meta.json. Its name is a sha256 over the content of the
source files, the tokenizer's files and every setting that matters, so nothing in it can be out of
date; its arrays, and meta.json itself, are checked against the hashes in meta.json each time they
are opened. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers

from data.cache import cache_folder
from data.locate import Source, open_source
from data.prompt import PromptFormat
from data.source import Row, read_rows
from data.spans import Rendered, Span
from data.tokenizer import Tokenizer
from files.atomic import TEMPORARY_PREFIX, sha256_file, write_json
from files.errors import UserError, did_you_mean

# A label that is no target: what torch's cross-entropy ignores.
IGNORED = -100
OVERFLOWS = ("truncate", "drop", "error", "split")
# Raised whenever the same rows and settings come to other tokens, or the files to another layout.
_CACHE_VERSION = 4
# Rows tokenised at once: enough for the library's threads, few enough to keep memory flat.
_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**20
# What is counted in each row.
_IN_A_ROW = (
    *("merged_prompts", "assistant_turns", "untrained_turns", "left_out_turns"),
    "thoughtless_turns",
)
# Bits of an example's flags.
_TRUNCATED, _EOS_LOST = 1, 2


class NoRowsError(UserError):
    """The data holds no row, or none of the split that was asked for."""


@dataclass(frozen=True)
class Example:
    """One document of the data.

    Attributes:
        index: Its place in the whole set, the same in every subset; it keys dropout.
        input_ids: (T,) int32.
        labels: (T,) int32, not shifted: labels[i] is token i, or -100 where it is not trained.
            labels[0] never counts, since nothing predicts the first token.
        prompt_length: Tokens before the completion, trained or not, or before the first answer that
            is trained; 0 where there is no prompt.
    """

    index: int
    input_ids: np.ndarray
    labels: np.ndarray
    prompt_length: int = 0


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        examples: Examples made of them.
        tokens: Tokens in the examples.
        targets: Tokens with a label, first tokens left out.
        truncated: Examples that were cut at `data.max_length`.
        dropped: Rows that left no example: too long (`drop`), or without a target.
        eos_lost: Examples whose EOS was cut off.
        longest: Tokens of the longest example.
        longest_row: Tokens of the longest row before anything was cut.
        merged_prompts: Rows whose completion begins inside a token of the prompt: its first token,
            or part of the prompt, is not what a model that is given the prompt goes on from.
        assistant_turns: Turns of the assistant in rows of messages.
        untrained_turns: Those of them that should be trained and of which the text, as the chat
            template makes it, holds nothing.
        left_out_turns: Those of them that the rows themselves keep out of the loss.
        thoughtless_turns: Those of them whose thinking the chat template leaves out.
    """

    rows: int
    examples: int
    tokens: int
    targets: int
    truncated: int
    dropped: int
    eos_lost: int
    longest: int
    longest_row: int
    merged_prompts: int = 0
    assistant_turns: int = 0
    untrained_turns: int = 0
    left_out_turns: int = 0
    thoughtless_turns: int = 0


@dataclass(frozen=True)
class LabelledRow:
    """A row as tokens, before anything is cut.

    Attributes:
        where: The row's file and line.
        text: What it was rendered as; BOS and EOS tokens that are added to its ids stand in it only
            where a chat template wrote them.
        input_ids: (T,) int32.
        labels: (T,) int32, as `Example.labels`.
        ends: The last target is the EOS that ends the row.
        prompt_length: As `Example.prompt_length`.
        merged_prompts: As in `Counts`, of this row, 0 or 1; so are the next four.
    """

    where: str
    text: str
    input_ids: np.ndarray
    labels: np.ndarray
    ends: bool
    prompt_length: int
    merged_prompts: int
    assistant_turns: int
    untrained_turns: int
    left_out_turns: int
    thoughtless_turns: int


@dataclass(frozen=True)
class _Arrays:
    """The files of a cache folder: all tokens one after another, and a value for each example."""

    input_ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (examples + 1,) int64: where each example begins
    targets: np.ndarray  # (examples,) int64
    rows: np.ndarray  # (examples,) int64: number of the row in the data, from 0
    prompts: np.ndarray  # (examples,) int64: tokens before the completion
    flags: np.ndarray  # (examples,) uint8
    in_a_row: np.ndarray  # (examples, 5) int32: the last five of `Counts`


class Examples:
    """A sequence of examples, memory-mapped.

    Attributes:
        lengths: (N,) int64 tokens of each example.
        num_targets: (N,) int64 targets of each example.
        rows: (N,) int64 the row of the data that each example comes from, counted from 0; a row
            makes several examples under `data.on_overflow=split`.
        counts: What became of the rows.
        fingerprint: sha256 of ids, labels and their order: equal if and only if training sees the
            same data.
        max_id: The largest token id.
    """

    def __init__(
        self,
        arrays: _Arrays,
        counts: Counts,
        fingerprint: str,
        positions: np.ndarray | None = None,
    ):
        self._arrays = arrays
        self._positions = np.arange(len(arrays.targets)) if positions is None else positions
        self.counts = counts
        self.fingerprint = fingerprint
        self.lengths: np.ndarray = np.diff(arrays.offsets)[self._positions]
        self.num_targets: np.ndarray = arrays.targets[self._positions]
        self.rows: np.ndarray = arrays.rows[self._positions]
        self.max_id = int(arrays.input_ids.max())

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Example:
        index = int(self._positions[position])
        start, stop = self._arrays.offsets[index : index + 2]
        return Example(
            index,
            self._arrays.input_ids[start:stop],
            self._arrays.labels[start:stop],
            int(self._arrays.prompts[index]),
        )

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
        lengths, flags = self.lengths[chosen], self._arrays.flags[positions]
        counted = self._arrays.in_a_row[positions].sum(axis=0).tolist()
        counts = Counts(
            rows=len(positions),
            examples=len(positions),
            tokens=int(lengths.sum()),
            targets=int(self.num_targets[chosen].sum()),
            truncated=int(np.count_nonzero(flags & _TRUNCATED)),
            dropped=0,
            eos_lost=int(np.count_nonzero(flags & _EOS_LOST)),
            longest=int(lengths.max(initial=0)),
            longest_row=int(lengths.max(initial=0)),
            **dict(zip(_IN_A_ROW, counted, strict=True)),
        )
        digest = hashlib.sha256(self.fingerprint.encode() + positions.astype("<i8").tobytes())
        return Examples(self._arrays, counts, digest.hexdigest(), positions)


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

    Raises:
        NoRowsError: It holds no row of the split.
        UserError: The data cannot be read, or leaves no target.
    """
    _check_settings(tokenizer, prompt_format, max_length, on_overflow)
    # Where a column tells the splits apart, every file is read.
    source = open_source(spec, None if split_column else split)

    def build(folder: Path) -> None:
        rows = read_rows(
            source, fields=prompt_format.columns(), split_column=split_column, split=split
        )
        _build(rows, source.spec, tokenizer, prompt_format, max_length, on_overflow, folder)

    if cache_root is None:
        return _in_memory(build)
    content = {"files": _content(source)}
    if split_column:
        content |= {"split_column": split_column, "split": split}
    key = _key(content, tokenizer, prompt_format, max_length, on_overflow)
    return _cached(cache_root, key, build)


def tokenise(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    on_overflow: str,
    cache_folder: Path | None = None,
) -> Examples:
    """Return the examples of `rows`; arguments and errors as `load_examples`.

    `cache_folder` is a root such as `cache_root()`; None keeps the examples in memory.
    """
    _check_settings(tokenizer, prompt_format, max_length, on_overflow)
    rows = list(rows)

    def build(folder: Path) -> None:
        _build(rows, "the data", tokenizer, prompt_format, max_length, on_overflow, folder)

    if cache_folder is None:
        return _in_memory(build)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True).encode() + b"\n")
    source = {"rows": digest.hexdigest()}
    key = _key(source, tokenizer, prompt_format, max_length, on_overflow)
    return _cached(cache_folder, key, build)


def label_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> list[LabelledRow]:
    """Return each row as the tokens that training makes of it, before anything is cut.

    Raises:
        UserError: A row cannot be rendered or encoded; the message names its file and line.
    """
    encoded = _encode_rows(rows, tokenizer, prompt_format)
    return [_label(row, prompt_format.append_eos) for row in encoded]


def pieces(length: int, max_length: int, on_overflow: str) -> list[tuple[int, int]]:
    """Return where the examples of a row of `length` tokens start and stop.

    Nothing where the row is dropped; as one piece that is shorter than the row where it is cut.
    """
    if length > max_length and on_overflow == "drop":
        return []
    starts = list(range(0, length, max_length)) if on_overflow == "split" else [0]
    if len(starts) > 1 and starts[-1] == length - 1:
        starts[-1] -= 1  # a token alone has nothing to be predicted from
    return list(zip(starts, [*starts[1:], min(length, starts[-1] + max_length)], strict=True))


def num_targets(labels: np.ndarray, first: int = 1) -> int:
    """Return how many tokens of an example are trained; nothing predicts the first one."""
    return int(np.count_nonzero(labels[first:] != IGNORED))


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


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def _check_settings(
    tokenizer: Tokenizer, prompt_format: PromptFormat, max_length: int, on_overflow: str
) -> None:
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


# --- the cache -----------------------------------------------------------------------------------


def _content(source: Source) -> list[list[str]]:
    """Return (what a row may see of a file's name, sha256 of the file) for each file, in order."""
    content = []
    for file in source.files:
        seen = file.path.suffix.lower() if file.below is None else file.below
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


def _in_memory(build: Callable[[Path], None]) -> Examples:
    with TemporaryDirectory(prefix="lathe-") as folder:
        build(Path(folder))
        examples = _open(Path(folder), in_memory=True)
    assert examples is not None, "examples just written cannot be read"
    return examples


def _cached(root: Path, key: str, build: Callable[[Path], None]) -> Examples:
    """Return the examples in `root/key`, building them first where they are missing or damaged.

    They are built in a folder of their own and renamed, so that processes may do this at once: the
    first one wins, and all see whole files.
    """
    folder = root / key
    if (examples := _open(folder)) is not None:
        return examples
    temporary = root / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        build(temporary)
        if folder.exists() and _open(folder) is None:  # damaged
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise UserError(
            f"{root}: tokenised data cannot be kept there ({error.strerror}); free some space, or "
            "set the environment variable LATHE_CACHE to a folder that can be written"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if (examples := _open(folder)) is None:
        raise UserError(f"{folder}: tokenised data cannot be read back; check the disk")
    return examples


def _open(folder: Path, in_memory: bool = False) -> Examples | None:
    """Return the examples in a cache folder, or None where they are missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {}
        for name in (field.name for field in fields(_Arrays)):
            mapped = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
            arrays[name] = np.array(mapped) if in_memory else np.asarray(mapped)
        arrays = _Arrays(**arrays)
        if _digest(arrays) != meta["fingerprint"] or meta["sha256"] != _hash_of(meta):
            return None
        return Examples(arrays, Counts(**meta["counts"]), meta["fingerprint"])
    except Exception:  # whatever a damaged file brings about, the answer is to make it anew
        return None


def _hash_of(meta: dict[str, Any]) -> str:
    """Return the sha256 of what meta.json says beside it."""
    said = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(arrays: _Arrays) -> str:
    """Return the sha256 of all arrays, names, types and sizes included."""
    digest = hashlib.sha256()
    for name in (field.name for field in fields(_Arrays)):
        array = getattr(arrays, name)
        digest.update(f"{name} {array.dtype.str} {len(array)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


# --- rows to arrays ------------------------------------------------------------------------------


class _ArrayFile:
    """A one-dimensional .npy file that grows: numpy's header has room for the final length."""

    def __init__(self, path: Path, dtype: str):
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._dtype = np.dtype(dtype)
        self._size = 0
        self._write_header()

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        self._size += len(values)
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _Writer:
    """Writes examples into a folder as rows arrive, and counts."""

    def __init__(self, folder: Path, max_length: int, on_overflow: str):
        self._folder = folder
        self._max_length = max_length
        self._on_overflow = on_overflow
        self._input_ids = _ArrayFile(folder / "input_ids.npy", "<i4")
        self._labels = _ArrayFile(folder / "labels.npy", "<i4")
        self._offsets, self._targets, self._rows = [0], [], []
        self._prompts, self._flags, self._in_a_row = [], [], []
        self._in_rows = np.zeros(len(_IN_A_ROW), dtype=np.int64)
        self.num_rows = self.longest_row = 0
        self.dropped_too_long = self.dropped_cut = self.dropped_masked = 0

    def add(self, row: LabelledRow) -> None:
        """Make the examples of one row."""
        number, length, limit = self.num_rows, len(row.input_ids), self._max_length
        self.num_rows += 1
        self.longest_row = max(self.longest_row, length)
        counted = np.array([getattr(row, name) for name in _IN_A_ROW], dtype=np.int32)
        self._in_rows += counted
        if length > limit and self._on_overflow == "error":
            raise UserError(
                f"{row.where}: {length} tokens, more than data.max_length={limit}; raise it, or "
                "set data.on_overflow to truncate, drop or split"
            )
        parts = pieces(length, limit, self._on_overflow)
        if not parts:
            self.dropped_too_long += 1
            return
        truncated = parts[-1][1] < length
        cut_off = row.labels[parts[-1][1] :]
        flags = _TRUNCATED * truncated | _EOS_LOST * (row.ends and num_targets(cut_off, 0) > 0)
        before = len(self._targets)
        for start, stop in parts:
            targets = num_targets(row.labels[start:stop])
            if targets:
                self._input_ids.append(row.input_ids[start:stop])
                self._labels.append(row.labels[start:stop])
                self._offsets.append(self._offsets[-1] + stop - start)
                self._targets.append(targets)
                self._rows.append(number)
                self._prompts.append(min(max(row.prompt_length - start, 0), stop - start))
                self._flags.append(flags)
                self._in_a_row.append(counted)
                counted = np.zeros_like(counted)  # the first example of a row has all of it
        if len(self._targets) == before:
            self.dropped_cut += truncated
            self.dropped_masked += not truncated

    def close(self, name: str) -> None:
        """Finish the files.

        Raises:
            NoRowsError: There was no row.
            UserError: None left an example.
        """
        self._input_ids.close()
        self._labels.close()
        if not self.num_rows:
            raise NoRowsError(f"{name}: no rows; training needs at least one")
        if not self._targets:
            raise UserError(self._nothing_left(name))
        for array, values, dtype in (
            ("offsets", self._offsets, "<i8"),
            ("targets", self._targets, "<i8"),
            ("rows", self._rows, "<i8"),
            ("prompts", self._prompts, "<i8"),
            ("flags", self._flags, "u1"),
        ):
            np.save(self._folder / f"{array}.npy", np.array(values, dtype=dtype))
        np.save(self._folder / "in_a_row.npy", np.array(self._in_a_row, dtype="<i4"))
        flags = np.array(self._flags)
        counts = Counts(
            rows=self.num_rows,
            examples=len(self._targets),
            tokens=self._offsets[-1],
            targets=sum(self._targets),
            truncated=int(np.count_nonzero(flags & _TRUNCATED)),
            dropped=self.dropped_too_long + self.dropped_cut + self.dropped_masked,
            eos_lost=int(np.count_nonzero(flags & _EOS_LOST)),
            longest=int(np.diff(self._offsets).max()),
            longest_row=self.longest_row,
            **dict(zip(_IN_A_ROW, self._in_rows.tolist(), strict=True)),
        )
        arrays = {
            field.name: np.lib.format.open_memmap(self._folder / f"{field.name}.npy", mode="r")
            for field in fields(_Arrays)
        }
        meta = {"fingerprint": _digest(_Arrays(**arrays)), "counts": asdict(counts)}
        write_json(self._folder / "meta.json", {**meta, "sha256": _hash_of(meta)})

    def _nothing_left(self, name: str) -> str:
        causes = []
        if self.dropped_too_long:
            causes.append(
                f"{self.dropped_too_long} are longer than data.max_length={self._max_length} "
                "(raise it, or set data.on_overflow=truncate)"
            )
        if self.dropped_cut:
            causes.append(
                f"{self.dropped_cut} are cut at data.max_length={self._max_length} before their "
                "trained part begins (raise it)"
            )
        if self.dropped_masked:
            causes.append(
                f"{self.dropped_masked} have nothing to train (an empty text or completion, or "
                "messages without an assistant turn: check data.format and the columns it names)"
            )
        return f"{name}: no target is left in any of the {self.num_rows} rows: {'; '.join(causes)}"


def _build(
    rows: Iterable[Row],
    name: str,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    max_length: int,
    on_overflow: str,
    folder: Path,
) -> None:
    """Tokenise `rows` into the files of `folder`.

    One thread reads, renders and encodes while this one labels and writes the rows before: the
    tokenizer's own threads need nothing of Python's, and would wait for it otherwise.
    """
    writer = _Writer(folder, max_length, on_overflow)
    batches = _batches(rows)

    def next_rows() -> list[_EncodedRow]:
        return _encode_rows(next(batches, []), tokenizer, prompt_format)

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next_rows)
        while made := coming.result():
            coming = thread.submit(next_rows)
            made.reverse()
            while made:  # what a row's tokens are made of is let go of at once
                writer.add(_label(made.pop(), prompt_format.append_eos))
    writer.close(name)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in lists that are bounded in number and in characters."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row.values)
        if len(batch) == _ROWS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    """Return how much text a value holds, at whatever depth."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


@dataclass(frozen=True)
class _EncodedRow:
    """A row before its labels.

    Attributes:
        where: Its file and line.
        rendered: Its text.
        tokenizer: What made the tokens.
        ids: The text's tokens.
        prompt: In a row of texts, how many of them the prompt alone has too: a model that is given
            the prompt is given these, and has to say the others.
        merges: The prompt alone has other tokens than at the beginning of the row.
        encoding: In a row of messages, where each token lies in the text.
    """

    where: str
    rendered: Rendered
    tokenizer: Tokenizer
    ids: list[int]
    prompt: int = 0
    merges: bool = False
    encoding: tokenizers.Encoding | None = None

    def before(self, place: int) -> int:
        """Return how many tokens end at or before a character of the text.

        A token with characters on both sides does not, unless those behind are space that a special
        token has taken in. The tokens of one character all have its place.
        """
        if self.encoding is None:
            return self.prompt if place else 0
        text, count = self.rendered.text, len(self.ids)
        before = bisect_right(range(count), place, key=lambda index: self._place(index)[1])
        if before < count:
            start, stop = self._place(before)
            if start < place and text[place:stop].isspace():
                before += self.tokenizer.token(self.ids[before]) == text[start:place]
        return before

    def _place(self, index: int) -> tuple[int, int]:
        assert self.encoding is not None
        place = self.encoding.token_to_chars(index)
        assert place is not None, "every token that was encoded has a place"
        return place


def _encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, prompt_format: PromptFormat
) -> list[_EncodedRow]:
    rendered = prompt_format.render_rows(rows, tokenizer)
    plain = [item for item in rendered if not item.chat]
    try:
        encodings = iter(tokenizer.encode_chats([item.text for item in rendered if item.chat]))
        ids_of_texts = iter(tokenizer.encode_batch([item.text for item in plain]))
        ids_of_prompts = iter(
            tokenizer.encode_batch([item.text[: item.prompt] for item in plain if item.prompt])
        )
    except UserError:
        _name_the_row(rows, rendered, tokenizer)
        raise
    encoded = []
    for row, item in zip(rows, rendered, strict=True):
        if item.chat:
            encoding = next(encodings)
            ids, prompt, merges = encoding.ids, 0, False
        else:
            ids = next(ids_of_texts)
            encoding = None
            alone = next(ids_of_prompts) if item.prompt else []
            prompt = common_prefix(alone, ids)
            merges = prompt < len(alone)
        encoded.append(_EncodedRow(row.where, item, tokenizer, ids, prompt, merges, encoding))
    return encoded


def _name_the_row(rows: Sequence[Row], rendered: list[Rendered], tokenizer: Tokenizer) -> None:
    """Raise again the error of the first row that the tokenizer cannot encode, with its place."""
    for row, item in zip(rows, rendered, strict=True):
        try:
            tokenizer.encode(item.text)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None


def _label(row: _EncodedRow, append_eos: bool) -> LabelledRow:
    """Return a row with its labels, and with the EOS that it is due."""
    item, eos_id = row.rendered, row.tokenizer.eos_id
    ids = np.array(row.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    stop, ended = len(ids), False
    for span in item.trained:
        start, stop, ended = _tokens_of(span, row, eos_id)
        labels[start:stop] = ids[start:stop]
    due = append_eos and eos_id is not None and item.ends and bool(item.trained)
    if due and not ended:
        # Nothing may stand between an answer and its EOS, such as the header of a turn to come.
        eos = np.array([eos_id], dtype=np.int32)
        ids, labels = (np.concatenate((array[:stop], eos)) for array in (ids, labels))
    return LabelledRow(
        row.where,
        item.text,
        ids,
        labels,
        due,
        row.before(item.prompt),
        int(row.merges and any(span.start for span in item.trained)),
        item.assistant_turns,
        item.untrained_turns,
        item.left_out_turns,
        item.thoughtless_turns,
    )


def _tokens_of(span: Span, row: _EncodedRow, eos_id: int | None) -> tuple[int, int, bool]:
    """Return the first token of a span, the one after its last, and whether it holds its EOS."""
    ids = row.ids
    if row.encoding is None:
        return row.before(span.start), len(ids), ids[-1:] == [eos_id]
    start = row.before(span.start) if span.start else 0
    settled, stop = row.before(span.settled), row.before(span.stop)
    if span.marked and eos_id in ids[start:settled]:
        return start, settled, True
    for index in range(stop - 1, settled - 1, -1):
        if ids[index] == eos_id:
            return start, index + 1, True
    return start, settled if span.marked else stop, False
