"""One pass over all rows, as training reads, renders and encodes them, and what it finds."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data.arrays import NoRowsError, pieces
from data.duplicates import Duplicates
from data.labels import IGNORED, LabelledRow, in_batches, label_rows, num_targets
from data.lint.answers import unfinished
from data.lint.characters import line_endings, odd_characters
from data.lint.findings import Findings, Place
from data.lint.languages import programming_language, scripts
from data.lint.lengths import Lengths
from data.lint.private import private_data
from data.own_texts import own_columns, own_texts
from data.prompt import PromptFormat
from data.row_files import OnFault
from data.source import Row
from data.splits import SPLIT_NAMES
from data.tokenizer import Tokenizer
from files.errors import UserError

SETS = ("train", "valid", "test")
# Columns of which the values are counted, where they are few and short.
LABEL_COLUMNS = (
    *("split", "set", "language", "lang", "programming_language", "label", "category", "type"),
    *("source", "license", "difficulty", "task", "topic", "subset"),
)
MOST_LABELS, _LONGEST_LABEL = 50, 60
_ENDINGS = ("none or several", "LF", "CRLF", "CR")
# Reads the rows of a set, and tells of each that cannot be read.
Reader = Callable[[OnFault], Iterator[Row]]


@dataclass(frozen=True)
class Settings:
    """How rows become what is trained: the arguments of `load_examples` of the same names."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    max_length: int
    on_overflow: str
    weight_field: str | None = None  # of the training rows


@dataclass
class Scan:
    """What one pass over the rows has found.

    Attributes:
        findings: The problems and notes.
        lengths: Of each set's rows.
        languages: Set → programming language → rows; None where there is no evidence of one.
        scripts: Set → script → rows.
        labels: Set → column → value → rows; a column of too many values is None.
        rows: Set → rows read.
        unreadable: Rows that cannot be read or rendered.
    """

    findings: Findings = field(default_factory=Findings)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    languages: dict[str, Counter[str | None]] = field(default_factory=dict)
    scripts: dict[str, Counter[str]] = field(default_factory=dict)
    labels: dict[str, dict[str, Counter[str] | None]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0


class Scanner:
    """Looks at rows one after another. In memory it keeps some 30 bytes of each, and no text."""

    def __init__(self, settings: Settings) -> None:
        self.scan = Scan()
        self._settings = settings
        self._columns = own_columns(settings.prompt_format)
        self._duplicates = Duplicates()
        self._files: dict[str, int] = {}
        self._file, self._line, self._number = array("I"), array("Q"), array("Q")
        self._set, self._trained, self._endings = array("B"), array("B"), array("B")
        self._first_fault: UserError | None = None

    def read(self, name: str, read: Reader, *, tell: bool = True) -> Iterator[int]:
        """Look at a set's rows; yield how many more were looked at, now and then.

        With `tell` off, rows that cannot be read are not counted: another set has read them too.
        """
        scan = self.scan
        scan.lengths[name], scan.rows[name], scan.labels[name] = Lengths(), 0, {}
        scan.languages[name], scan.scripts[name] = Counter(), Counter()

        def on_fault(fault: UserError) -> None:
            if tell:
                self._first_fault = self._first_fault or fault
                scan.unreadable += 1
                source, _, detail = str(fault).partition(": ")
                scan.findings.add("unreadable", Place(name, None, source, detail))

        batches = in_batches(read(on_fault))

        def next_rows() -> list[tuple[Row, LabelledRow | UserError]]:
            return self._labelled(next(batches, []), name)

        number = 0
        # The tokenizer's threads need nothing of Python's, and would wait for the checks otherwise.
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next_rows)
            while batch := coming.result():
                coming = thread.submit(next_rows)
                for row, labelled in batch:
                    if isinstance(labelled, UserError):
                        on_fault(labelled)
                    else:
                        self._look_at(name, number, row, labelled)
                    number += 1
                yield len(batch)

    def close(self, held_out: Callable[[np.ndarray], np.ndarray] | None) -> Scan:
        """Compare the rows with each other, and return what was found.

        Args:
            held_out: The numbers of the training rows that leave an example → those of them that
                become the valid set; None where none do.

        Raises:
            UserError: No row could be read.
        """
        if not self._set:
            raise self._first_fault or NoRowsError("no rows; training needs at least one")
        sets = np.frombuffer(self._set, dtype=np.uint8).copy()
        if held_out is not None:
            trained = np.flatnonzero((sets == 0) & (np.frombuffer(self._trained, np.uint8) == 1))
            numbers = np.frombuffer(self._number, dtype=np.uint64)[trained].astype(np.int64)
            sets[trained[np.isin(numbers, held_out(numbers))]] = SETS.index("valid")
        exact = self._duplicates.exact()
        near = self._duplicates.near(exact)
        self._duplicates.close()
        told = np.zeros((2, len(sets)), dtype=bool)
        self._compare(exact, sets, told, ("leaked", "duplicate"))
        self._compare(near, sets, told, ("leaked_nearly", "near_duplicate"))
        self._look_at_endings(sets)
        return self.scan

    def _labelled(self, rows: list[Row], name: str) -> list[tuple[Row, LabelledRow | UserError]]:
        """Return rows of a set with their tokens, or with why a row has none."""
        weight_field = self._settings.weight_field if name == "train" else None
        how = self._settings.tokenizer, self._settings.prompt_format, weight_field
        try:
            return list(zip(rows, label_rows(rows, *how), strict=True))
        except UserError:
            made: list[tuple[Row, LabelledRow | UserError]] = []
        for row in rows:
            try:
                made.append((row, label_rows([row], *how)[0]))
            except UserError as fault:
                made.append((row, fault))
        return made

    def _look_at(self, name: str, number: int, row: Row, labelled: LabelledRow) -> None:
        scan = self.scan

        def found(kind: str, detail: str = "") -> None:
            scan.findings.add(kind, Place(name, number, labelled.where, detail))

        scan.rows[name] += 1
        scan.lengths[name].add(labelled.labels)
        fault, trained = self._fate(labelled)
        if fault is not None:
            found(fault)
        for kind in ("untrained_turns", "merged_prompts"):
            if getattr(labelled, kind):
                found(kind)
        for kind, detail in (*odd_characters(labelled.text), *private_data(labelled.text)):
            found(kind, detail)
        own = own_texts(row.values, self._columns)
        endings = sorted(line_endings("".join(own)))
        if len(endings) > 1:
            found("mixed_line_endings", " and ".join(endings))
        content = "\n".join(own)
        language = programming_language(content)
        scan.languages[name][language] += 1
        scan.scripts[name].update(scripts(content))
        answer = own[-1] if own else ""
        if reason := unfinished(row.values, answer, language == "Python"):
            found("answer_unfinished", reason)
        split = row.values.get("split")
        if isinstance(split, str) and SPLIT_NAMES.get(split.lower(), name) != name:
            found("wrong_set", split)
        self._count_labels(scan.labels[name], row.values)
        self._endings.append(_ENDINGS.index(endings[0]) if len(endings) == 1 else 0)
        self._keep(name, number, labelled, content, trained)

    def _fate(self, row: LabelledRow) -> tuple[str | None, bool]:
        """Return what training loses of a row, and whether it leaves an example."""
        length, limit = len(row.input_ids), self._settings.max_length
        if row.weight == 0:
            return "weightless", False
        if not num_targets(row.labels):
            return "no_target", False
        if length > limit:
            if self._settings.on_overflow == "error":
                return "too_long", False
            parts = pieces(length, limit, self._settings.on_overflow)
            if not parts:
                return "dropped", False
            if not any(num_targets(row.labels[slice(*part)]) for part in parts):
                return "cut_before_answer", False
            if num_targets(row.labels[parts[-1][1] :], 0):
                return "answer_cut", True
        targets = row.labels[row.labels != IGNORED]
        if targets[-1] != self._settings.tokenizer.eos_id:
            return "eos_untrained", True
        return "empty_answer" if len(targets) == 1 else None, True

    def _keep(self, name: str, number: int, row: LabelledRow, content: str, trained: bool) -> None:
        """Keep what the row is compared by, and where it is."""
        self._duplicates.add(row.text, content)
        file, _, line = row.where.rpartition(":")
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._line.append(int(line))
        self._number.append(number)
        self._set.append(SETS.index(name))
        self._trained.append(trained)

    @staticmethod
    def _count_labels(labels: dict[str, Counter[str] | None], values: Mapping[str, Any]) -> None:
        for column in LABEL_COLUMNS:
            value = values.get(column)
            if isinstance(value, str | int):
                counts = labels.setdefault(column, Counter())
                if counts is not None:
                    counts[str(value)[:_LONGEST_LABEL]] += 1
                    if len(counts) > MOST_LABELS:
                        labels[column] = None

    def _place(self, row: int, set_: int, detail: str) -> Place:
        return Place(SETS[set_], self._number[row], self._where(row), detail)

    def _where(self, row: int) -> str:
        return f"{self._names[self._file[row]]}:{self._line[row]}"

    @cached_property
    def _names(self) -> list[str]:
        return list(self._files)

    def _compare(
        self, roots: np.ndarray, sets: np.ndarray, told: np.ndarray, kinds: tuple[str, str]
    ) -> None:
        """Tell of the rows that are with another one, but for those that were told of before."""
        leaked, repeated = kinds
        rows = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1).tolist()
        first: dict[tuple[int, int], int] = {}
        for row in rows:
            first.setdefault((int(roots[row]), int(sets[row])), row)
        for row in rows:
            root, mine = int(roots[row]), int(sets[row])
            others = [
                first[root, other]
                for other in range(len(SETS))
                if other != mine and (root, other) in first
            ]
            if mine and others and not told[0, row]:
                told[0, row] = True
                self.scan.findings.add(leaked, self._place(row, mine, self._where(others[0])))
            before = first[root, mine]
            if before != row and not told[1, row]:
                told[1, row] = True
                self.scan.findings.add(repeated, self._place(row, mine, self._where(before)))

    def _look_at_endings(self, sets: np.ndarray) -> None:
        endings = np.frombuffer(self._endings, dtype=np.uint8)
        counts = np.bincount(endings, minlength=len(_ENDINGS))
        counts[0] = 0
        usual = int(counts.argmax())
        for row in np.flatnonzero((endings != usual) & (endings != 0)).tolist():
            detail = f"{_ENDINGS[endings[row]]}, most have {_ENDINGS[usual]}"
            place = self._place(row, int(sets[row]), detail)
            self.scan.findings.add("other_line_endings", place)
