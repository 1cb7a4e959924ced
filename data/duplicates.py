"""Rows that are there twice, word for word or nearly, by MinHash and locality-sensitive hashing.

A row is known by 8 bytes of BLAKE2b of its text, and by a signature: the minima of 96 hash
functions over the set of its shingles, the pieces of 16 bytes of its normalised text. Two rows
agree in a place of their signatures with the probability of their sets' Jaccard similarity, so that
the share of places that agree estimates it, give or take 0.04 (one standard deviation at 0.8).
Rows that agree in four neighbouring places are compared: of pairs with a similarity of 0.8, all but
6 in a million do so somewhere (1 − (1 − 0.8⁴)²⁴).

Signatures lie in a temporary file, 192 bytes a row; in memory a row has 9 bytes, and some 80 more
while one band of four places after another is sorted.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", chapter 3.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from tempfile import TemporaryFile

import numpy as np

from data.own_texts import own_columns, own_texts
from data.prompt import PromptFormat
from data.source import Row
from data.weights import row_weight

SIMILAR = 0.8
_SHINGLE, _PLACES, _BAND = 16, 96, 4
# Shorter texts are alike too easily; word for word they are compared all the same.
_SHORTEST = 64
_AT_ONCE = 2048
_COMMENT_LINE = re.compile(r"^[ \t]*(?:#|//|--|/?\*).*$", re.MULTILINE)
_SPACE = b" \t\r\n\f\v"
_RANDOM = np.random.Generator(np.random.PCG64(1))
_BYTES = _RANDOM.integers(0, 2**64, 256, dtype=np.uint64)
_BANDS = _RANDOM.integers(0, 2**64, _BAND, dtype=np.uint64) | np.uint64(1)
_FACTORS = _RANDOM.integers(0, 2**32, (_PLACES, 1), dtype=np.uint32) | np.uint32(1)
_TERMS = _RANDOM.integers(0, 2**32, (_PLACES, 1), dtype=np.uint32)
_BASE = 0x9E3779B97F4A7C15


def normalised(text: str) -> bytes:
    """Return a text without what a copy often differs in: white space, case, lines of comment."""
    return _COMMENT_LINE.sub("", text).lower().encode("utf-8").translate(None, _SPACE)


def signature(text: bytes) -> np.ndarray:
    """Return (96,) uint16: the minima of a normalised text's shingles, their lower half."""
    hashes = _BYTES[np.frombuffer(text, dtype=np.uint8)]
    width = 1
    while width < _SHINGLE:  # of twice the width each time: h(xy) = h(x)·base^|y| + h(y)
        factor = np.uint64(pow(_BASE, width, 2**64))
        hashes = hashes[:-width] * factor + hashes[width:]
        width *= 2
    upper = (hashes >> np.uint64(32)).astype(np.uint32)
    least = np.full(_PLACES, 2**32 - 1, dtype=np.uint32)
    for start in range(0, len(upper), _AT_ONCE):
        some = upper[start : start + _AT_ONCE] * _FACTORS
        some += _TERMS
        np.minimum(least, some.min(axis=1), out=least)
    return least.astype(np.uint16)


class Duplicates:
    """The rows seen so far; rows are numbered in the order they come."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self._file = TemporaryFile(prefix="lathe-duplicates-")  # noqa: SIM115 (closed by close)
        self._long = array("b")

    def add(self, text: str, content: str) -> None:
        """Take a row: its whole text, and what of it is the row's own.

        What all rows share, such as a template's words, would make all of them alike.
        """
        digest = blake2b(text.encode("utf-8"), digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, "little"))
        kept = normalised(content)
        self._long.append(len(kept) >= _SHORTEST)
        if len(kept) >= _SHORTEST:
            self._file.write(signature(kept).tobytes())
        else:
            self._file.write(bytes(2 * _PLACES))

    def close(self) -> None:
        """Let go of the temporary file."""
        self._file.close()

    def exact(self) -> np.ndarray:
        """Return (rows,) int64: the first row with the same text, for most rows themselves."""
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        return first[inverse].astype(np.int64)

    def near(self, exact: np.ndarray) -> np.ndarray:
        """Return (rows,) int64: the first row of those that are alike, word for word or nearly.

        Being alike is passed on: what is like a row that is like a third is with both.
        """
        roots = exact.copy()
        rows = np.flatnonzero((exact == np.arange(len(exact))) & np.array(self._long, dtype=bool))
        if len(rows) < 2:
            return roots
        self._file.flush()
        signatures = np.memmap(self._file, dtype=np.uint16, mode="r", shape=(len(exact), _PLACES))
        for first, second in self._similar(signatures, rows):
            one, other = _root(roots, first), _root(roots, second)
            roots[max(one, other)] = min(one, other)
        return np.array([_root(roots, row) for row in range(len(roots))], dtype=np.int64)

    @staticmethod
    def _similar(signatures: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield pairs of rows that are alike: enough of them to connect all that are."""
        for band in range(0, _PLACES, _BAND):
            places = signatures[:, band : band + _BAND][rows].astype(np.uint64)
            keys = (places * _BANDS).sum(axis=1, dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            begins = np.r_[True, ordered[1:] != ordered[:-1]]
            # Each row with the first of its bucket, and with the one before it.
            head = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
            later = np.flatnonzero(~begins)
            for partner in (head[later], later - 1):
                for start in range(0, len(later), _AT_ONCE):
                    some = slice(start, start + _AT_ONCE)
                    first, second = rows[order[partner[some]]], rows[order[later[some]]]
                    alike = (signatures[first] == signatures[second]).mean(axis=1) >= SIMILAR
                    yield from zip(first[alike].tolist(), second[alike].tolist(), strict=True)


def first_alike(
    rows: Iterable[Row], prompt_format: PromptFormat, weight_field: str | None = None
) -> np.ndarray:
    """Return (rows,) int64: the first row that each is like, word for word or nearly.

    For most rows that is the row itself: those of which it is not are what
    `data.near_duplicates=drop` leaves out. Rows are compared by their own texts, as they are read;
    one of weight 0 in `weight_field` is like no other: it is dropped, and its copies are not.
    """
    columns = own_columns(prompt_format)
    duplicates = Duplicates()
    for number, row in enumerate(rows):
        if weight_field is not None and row_weight(row, weight_field) == 0:
            duplicates.add(str(number), "")
            continue
        whole = json.dumps([row.values.get(column) for column in columns], default=str)
        duplicates.add(whole, "\n".join(own_texts(row.values, columns)))
    roots = duplicates.near(duplicates.exact())
    duplicates.close()
    return roots


def _root(roots: np.ndarray, row: int) -> int:
    while roots[row] != row:
        roots[row] = roots[roots[row]]
        row = int(roots[row])
    return row
