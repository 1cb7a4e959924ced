"""Examples as files: a few .npy arrays and meta.json in a folder, written as rows arrive.

The arrays, and meta.json itself, are checked against the hashes in meta.json each time they are
opened, so that damage is noticed and the folder made anew. A folder is built under a temporary name
and renamed: processes may do this at once. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data.fim import FillInTheMiddle, Piece
from data.labels import LabelledRow, num_targets
from files.atomic import TEMPORARY_PREFIX, write_json
from files.errors import UserError, counted

# What is counted in each row.
IN_A_ROW = (
    *("merged_prompts", "assistant_turns", "untrained_turns", "left_out_turns"),
    "thoughtless_turns",
)
# Bits of an example's flags; the last two are of fill-in-the-middle.
TRUNCATED, EOS_LOST, UNPARSED, HOLELESS = 1, 2, 4, 8


class NoRowsError(UserError):
    """The data holds no row, or none of the split that was asked for."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        examples: Examples made of them.
        tokens: Tokens in the examples.
        targets: Tokens with a label, first tokens left out.
        truncated: Examples that were cut at `data.max_length`.
        dropped: Rows that left no example: too long (`drop`), without a target, or of weight 0.
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
        unparsed: Examples that Python's parser refuses, under `data.fim_unit=syntax`: holes are cut
            by lines there.
        holeless: Examples that never have a hole, since they hold special tokens themselves.
        weightless: Rows that weigh 0 (`data.weight_field`), and were dropped for it.
        near_duplicates: Rows left out because they are like one before them, word for word or
            nearly, under `data.near_duplicates=drop`.
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
    unparsed: int = 0
    holeless: int = 0
    weightless: int = 0
    near_duplicates: int = 0


@dataclass(frozen=True)
class Arrays:
    """The files of a cache folder: all tokens one after another, and a value for each example.

    Texts, their offsets and `holes_from` are there where examples have holes (`data/fim.py`),
    `weights` where rows have such (`data/weights.py`), `first_alike` under
    `data.near_duplicates=drop`.
    """

    input_ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (examples + 1,) int64: where each example begins
    targets: np.ndarray  # (examples,) int64
    rows: np.ndarray  # (examples,) int64: number of the row in the data, from 0
    prompts: np.ndarray  # (examples,) int64: tokens before the completion
    flags: np.ndarray  # (examples,) uint8
    in_a_row: np.ndarray  # (examples, 5) int32: `IN_A_ROW` of `Counts`
    texts: np.ndarray | None = None  # (bytes,) uint8: the texts in UTF-8
    text_offsets: np.ndarray | None = None  # (examples + 1,) int64: where each text begins
    holes_from: np.ndarray | None = None  # (examples,) int64: characters before the first hole
    weights: np.ndarray | None = None  # (examples,) float64: what multiplies the targets' losses
    first_alike: np.ndarray | None = None  # (rows,) int64: `data.duplicates.first_alike`

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name of each array that is there, and the array."""
        for field in fields(self):
            if (array := getattr(self, field.name)) is not None:
                yield field.name, array


@dataclass(frozen=True)
class Stored:
    """What a folder holds: the arrays, what became of the rows, and the sha256 of the arrays."""

    arrays: Arrays
    counts: Counts
    fingerprint: str
    source_rows: tuple[int, ...] = ()  # rows read of each source, where they were told apart


def in_memory(build: Callable[[Path], None]) -> Stored:
    """Return what `build` writes into a folder, read into memory."""
    with TemporaryDirectory(prefix="lathe-") as folder:
        build(Path(folder))
        stored = _open(Path(folder), in_memory=True)
    assert stored is not None, "examples just written cannot be read"
    return stored


def cached(root: Path, key: str, build: Callable[[Path], None]) -> Stored:
    """Return what lies in `root/key`, building them first where they are missing or damaged.

    They are built in a folder of their own and renamed, so that processes may do this at once: the
    first one wins, and all see whole files.
    """
    folder = root / key
    if (stored := _open(folder)) is not None:
        return stored
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
    if (stored := _open(folder)) is None:
        raise UserError(f"{folder}: tokenised data cannot be read back; check the disk")
    return stored


def _open(folder: Path, in_memory: bool = False) -> Stored | None:
    """Return what lies in a cache folder, or None where they are missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = _mapped(folder)
        if in_memory:
            arrays = Arrays(**{name: np.array(array) for name, array in arrays.named()})
        if _digest(arrays) != meta["fingerprint"] or meta["sha256"] != _hash_of(meta):
            return None
        source_rows = tuple(meta.get("source_rows", ()))
        return Stored(arrays, Counts(**meta["counts"]), meta["fingerprint"], source_rows)
    except Exception:  # whatever a damaged file brings about, the answer is to make it anew
        return None


def _mapped(folder: Path) -> Arrays:
    """Return the arrays of a folder, memory-mapped."""
    files = {field.name: folder / f"{field.name}.npy" for field in fields(Arrays)}
    held = {name: path for name, path in files.items() if path.exists()}
    return Arrays(
        **{
            name: np.asarray(np.lib.format.open_memmap(path, mode="r"))
            for name, path in held.items()
        }
    )


def _hash_of(meta: dict[str, Any]) -> str:
    """Return the sha256 of what meta.json says beside it."""
    said = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(arrays: Arrays) -> str:
    """Return the sha256 of all arrays, names, types and sizes included."""
    digest = hashlib.sha256()
    for name, array in arrays.named():
        digest.update(f"{name} {array.dtype.str} {len(array)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


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


class Writer:
    """Writes examples into a folder as rows arrive, and counts; with `fim` also their texts.

    All rows have a weight, or none has.
    """

    def __init__(
        self, folder: Path, max_length: int, on_overflow: str, fim: FillInTheMiddle | None = None
    ):
        self._folder = folder
        self._fim = fim
        self._texts = None if fim is None else _ArrayFile(folder / "texts.npy", "u1")
        self._text_offsets, self._holes_from = [0], []
        self._max_length = max_length
        self._on_overflow = on_overflow
        self._input_ids = _ArrayFile(folder / "input_ids.npy", "<i4")
        self._labels = _ArrayFile(folder / "labels.npy", "<i4")
        self._offsets, self._targets, self._rows = [0], [], []
        self._prompts, self._flags, self._in_a_row = [], [], []
        self._weights: list[float] = []
        self._in_rows = np.zeros(len(IN_A_ROW), dtype=np.int64)
        self._first_alike: np.ndarray | None = None
        self.num_rows = self.longest_row = self.near_duplicates = 0
        self.dropped_too_long = self.dropped_cut = self.dropped_masked = self.weightless = 0

    def leave_out(self, first_alike: np.ndarray) -> None:
        """Make no examples of rows to come that are like one before them (`first_alike`)."""
        np.save(self._folder / "first_alike.npy", first_alike)
        self._first_alike = first_alike

    def add(self, row: LabelledRow) -> None:
        """Make the examples of one row."""
        number, length, limit = self.num_rows, len(row.input_ids), self._max_length
        self.num_rows += 1
        alike = self._first_alike
        if alike is not None and number < len(alike) and alike[number] != number:
            self.near_duplicates += 1
            return
        self.longest_row = max(self.longest_row, length)
        numbers = np.array([getattr(row, name) for name in IN_A_ROW], dtype=np.int32)
        self._in_rows += numbers
        if row.weight == 0:
            self.weightless += 1
            return
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
        flags = TRUNCATED * truncated | EOS_LOST * (row.ends and num_targets(cut_off, 0) > 0)
        before = len(self._targets)
        pieces_of_text = self._fim.pieces(row, parts) if self._fim else [None] * len(parts)
        for (start, stop), piece in zip(parts, pieces_of_text, strict=True):
            targets = num_targets(row.labels[start:stop])
            if targets:
                self._input_ids.append(row.input_ids[start:stop])
                self._labels.append(row.labels[start:stop])
                self._offsets.append(self._offsets[-1] + stop - start)
                self._targets.append(targets)
                self._rows.append(number)
                self._weights += [] if row.weight is None else [row.weight]
                self._prompts.append(min(max(row.prompt_length - start, 0), stop - start))
                self._flags.append(flags | self._add_text(piece))
                self._in_a_row.append(numbers)
                numbers = np.zeros_like(numbers)  # the first example of a row has all of it
        if len(self._targets) == before:
            self.dropped_cut += truncated
            self.dropped_masked += not truncated

    def _add_text(self, piece: Piece | None) -> int:
        """Keep the text of an example, if texts are kept, and return its flags."""
        if piece is None or self._texts is None:
            return 0
        text = np.frombuffer(piece.text.encode(), dtype=np.uint8)
        self._texts.append(text)
        self._text_offsets.append(self._text_offsets[-1] + len(text))
        self._holes_from.append(piece.start)
        return UNPARSED * piece.unparsed | HOLELESS * piece.holds_tokens

    def close(self, name: str, source_rows: Sequence[int] = ()) -> None:
        """Finish the files; `source_rows` are the rows of each source, where they count.

        Raises:
            NoRowsError: There was no row.
            UserError: None left an example, or there were others when they were compared.
        """
        compared = self.num_rows if self._first_alike is None else len(self._first_alike)
        if self.num_rows != compared:
            raise UserError(
                f"{name}: held {counted(compared, 'row')} when they were compared for "
                f"data.near_duplicates=drop, and {self.num_rows:,} when they were tokenised: the "
                "data changed meanwhile; start again when it is whole"
            )
        self._input_ids.close()
        self._labels.close()
        if self._texts is not None:
            self._texts.close()
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
        if self._fim is not None:
            offsets = np.array(self._text_offsets, dtype="<i8")
            np.save(self._folder / "text_offsets.npy", offsets)
            np.save(self._folder / "holes_from.npy", np.array(self._holes_from, dtype="<i8"))
        if self._weights:
            np.save(self._folder / "weights.npy", np.array(self._weights, dtype="<f8"))
        np.save(self._folder / "in_a_row.npy", np.array(self._in_a_row, dtype="<i4"))
        flags = np.array(self._flags)
        counts = Counts(
            rows=self.num_rows,
            examples=len(self._targets),
            tokens=self._offsets[-1],
            targets=sum(self._targets),
            truncated=int(np.count_nonzero(flags & TRUNCATED)),
            dropped=self.dropped_too_long
            + self.dropped_cut
            + self.dropped_masked
            + self.weightless,
            eos_lost=int(np.count_nonzero(flags & EOS_LOST)),
            longest=int(np.diff(self._offsets).max()),
            longest_row=self.longest_row,
            unparsed=int(np.count_nonzero(flags & UNPARSED)),
            holeless=int(np.count_nonzero(flags & HOLELESS)),
            weightless=self.weightless,
            near_duplicates=self.near_duplicates,
            **dict(zip(IN_A_ROW, self._in_rows.tolist(), strict=True)),
        )
        meta = {"fingerprint": _digest(_mapped(self._folder)), "counts": asdict(counts)}
        meta |= {"source_rows": list(source_rows)} if source_rows else {}
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
        if self.weightless:
            causes.append(f"{self.weightless} weigh 0 in the column of data.weight_field")
        return f"{name}: no target is left in any of the {self.num_rows} rows: {'; '.join(causes)}"
