"""`python -m train.show_data`: the rows as they will be trained, before a weight is read.

It takes the arguments of `train.run` and reads the same rows by the same functions; of the model it
needs the tokenizer alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise

import numpy as np

from data.arrays import NoRowsError, pieces
from data.fim import FillInTheMiddle
from data.labels import IGNORED, LabelledRow, label_rows, num_targets
from data.locate import open_source
from data.prompt import PromptFormat
from data.source import Row, read_rows
from data.tokenizer import Tokenizer
from files.errors import UserError, counted
from train.config.schema import DataSettings, RunConfig
from train.inputs.asked import add_run_arguments, asked_configuration, run_arguments
from train.inputs.dataset import Data, fill_in_the_middle, load_data, prompt_format, weight_field
from train.inputs.model_files import tokenizer_folder
from train.process.command import CommandParser, command, run_command

DESCRIPTION = """\
Show the rows as they will be trained: special tokens and all, the trained parts marked (in colour
on a terminal, in ⟦brackets⟧ elsewhere), with file and line, tokens and targets, and whether a row
is cut, split or dropped. Everything else is given as to train.run; no weights are needed.
"""
ROWS = 3
_SPLITS = ("train", "valid", "test")
_MOST_IN_A_PLAN, _MOST_LINES_IN_A_PLAN = 1500, 30
_COLOUR, _PLAIN = ("\x1b[32m", "\x1b[0m"), ("⟦", "⟧")


@dataclass(frozen=True)
class Shown:
    """One example, or a row that leaves none."""

    row: int  # number of the row in its split, from 0, as `rows` in metrics.jsonl
    source: str  # `FILE:LINE`
    entry: str | None  # the entry of data.train that it is drawn from, of a mixture (data.weights)
    # `whole`, `cut`, `split` or `dropped`, with the reason in words, or `with a hole`.
    fate: str
    text: str  # the row as text, before anything is cut
    input_ids: list[int]  # ids of the example; of the whole row where it is dropped
    labels: list[int]  # as `data.examples.Example.labels`; none is trained where the row is dropped
    trained: list[str]  # the trained strings: runs of tokens with a label
    tokens: int  # tokens of the example
    targets: int  # tokens that are trained: those with a label, but for the first of an example
    merged_prompts: int  # 1 where the completion begins inside a token of the prompt
    assistant_turns: int  # turns of the assistant in the row
    untrained_turns: int  # those of them that the chat template leaves nothing of
    left_out_turns: int  # those of them that the row keeps out of the loss
    thoughtless_turns: int  # those of them whose thinking the chat template leaves out
    weight: float = 1.0  # what multiplies the loss of its targets; 0 where it is dropped for it


def show_rows(
    config: RunConfig, split: str = "train", most: int | None = None, epoch: int = 0
) -> Iterator[tuple[Shown, Tokenizer]]:
    """Yield what becomes of a split's first `most` rows, or of all, and the tokenizer.

    Holes (`data.fim_rate`) are those of a 0-based epoch; valid and test rows have those of epoch 0.

    Raises:
        NoRowsError: The split has no row.
        UserError: There is no such data, or a row is not what it must be.
    """
    settings = config.data
    tokenizer = Tokenizer.load(tokenizer_folder(config), settings.chat_template)
    form, fim = prompt_format(settings), fill_in_the_middle(config, tokenizer)
    none, entries = True, _entries(settings) if split == "train" else {}
    first_alike = _FirstAlike(config, split)
    for number, row in islice(_rows_of(config, split, form), most):
        none = False
        entry = entries.get(row.where.rpartition(":")[0])
        labelled = label_rows([row], tokenizer, form, weight_field(settings, split))[0]
        if (first := first_alike.before(number, row)) is not None:
            fate = f"dropped: near-duplicate of {first}"
            examples = iter([_left_out(number, labelled, fate, tokenizer)])
        else:
            examples = _examples(number, labelled, settings, tokenizer, fim, epoch)
        for shown in examples:
            yield dataclasses.replace(shown, entry=entry), tokenizer
    if none:
        raise NoRowsError(f"data.{split}: no rows")


def segments(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer
) -> list[tuple[str, bool]]:
    """Return the text of `ids`, special tokens included, in runs that are trained or are not."""
    trained = np.array([label != IGNORED for label in labels])
    borders = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    found, before = [], ""
    for start, stop in pairwise(borders):
        # From the beginning each time: a decoder may treat the first token of a text in its own
        # way, and a character may have tokens on both sides of a border.
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        known = len(before if text.startswith(before) else before.rstrip("\ufffd"))
        found.append((text[known:], bool(trained[start])))
        before = text
    return found


def _rows_of(config: RunConfig, split: str, form: PromptFormat) -> Iterator[tuple[int, Row]]:
    """Return the numbered rows of a split, as `train.inputs.dataset.load_data` chooses them."""
    settings = config.data
    source = _training_data(settings)
    if split != "test" and (held := _held_out(config)) is not None:
        rows = enumerate(_read(settings, source, "train", form))
        return ((number, row) for number, row in rows if (number in held) == (split == "valid"))
    spec = getattr(settings, split)
    if spec is None and settings.split_column is not None:
        spec = source
    if spec is None:
        raise UserError(
            f"data.{split} is not set, and neither data.split_column nor data.valid_fraction makes "
            f"a {split} set; show another split, or name its file as data.{split}=FILE"
        )
    return zip(count(), _read(settings, spec, split, form), strict=False)


def _entries(settings: DataSettings) -> dict[str, str]:
    """Return the entry of `data.train` that each file belongs to; of no mixture nothing."""
    if settings.weights is None:
        return {}
    split = None if settings.split_column else "train"
    parts = open_source(_training_data(settings), split).parts
    return {file.name: part.spec for part in parts for file in part.files}


def _held_out(config: RunConfig) -> set[int] | None:
    """Return the numbers of the rows that `data.valid_fraction` sets apart; None without it."""
    settings = config.data
    if settings.valid is not None or settings.valid_fraction == 0:
        return None
    if settings.split_column is not None:
        rows = _read(settings, _training_data(settings), "valid", prompt_format(settings))
        if next(rows, None) is not None:
            return None  # the column names a valid set
    # Which rows these are depends on all of them.
    data = _tokenised(config)
    return set() if data.valid is None else set(data.valid.rows.tolist())


def _tokenised(config: RunConfig) -> Data:
    """Return the data without test rows, tokenised here, or before."""
    training = dataclasses.replace(config, data=dataclasses.replace(config.data, test=None))
    return load_data(training, tokenizer_folder(config), None)


class _FirstAlike:
    """The rows that `data.near_duplicates=drop` leaves out, and the place of what they are like."""

    def __init__(self, config: RunConfig, split: str) -> None:
        self._first: np.ndarray | None = None
        if split == "train" and config.data.near_duplicates == "drop":
            self._first = _tokenised(config).train.first_alike
            assert self._first is not None
            self._places = dict.fromkeys(
                self._first[self._first != np.arange(len(self._first))].tolist(), ""
            )

    def before(self, number: int, row: Row) -> str | None:
        """Return the place of the row that one is like; None where it is kept."""
        if self._first is None:
            return None
        if number in self._places:
            self._places[number] = row.where
        first = int(self._first[number])
        # A row that was held out was not seen here.
        return None if first == number else self._places[first] or f"row {first}"


def _training_data(settings: DataSettings) -> str | tuple[str, ...]:
    if settings.train is None:
        raise UserError("data.train is not set: give the rows to show, as data.train=FILE")
    return settings.train


def _read(
    settings: DataSettings, spec: str | tuple[str, ...], split: str, form: PromptFormat
) -> Iterator[Row]:
    return read_rows(
        spec,
        fields=form.columns(),
        split_column=settings.split_column,
        split=split,
        weight_field=weight_field(settings, split),
    )


def _examples(
    number: int,
    row: LabelledRow,
    settings: DataSettings,
    tokenizer: Tokenizer,
    fim: FillInTheMiddle | None,
    epoch: int,
) -> Iterator[Shown]:
    """Yield the examples of a row, or the row itself where it leaves none."""
    length, limit = len(row.input_ids), settings.max_length
    if row.weight == 0:
        yield _left_out(number, row, f"dropped: weight 0 in '{settings.weight_field}'", tokenizer)
        return
    over = f"{counted(length, 'token')}, data.max_length={limit}"
    if length > limit and settings.on_overflow == "error":
        yield _left_out(number, row, f"error: {over}", tokenizer)
        return
    parts = pieces(length, limit, settings.on_overflow)
    kept = [part for part in parts if num_targets(row.labels[slice(*part)])]
    if not kept:
        reason = over if not parts else "no token to train on"
        if parts and parts[-1][1] < length:
            reason = f"cut before its trained part begins: {over}"
        yield _left_out(number, row, f"dropped: {reason}", tokenizer)
    texts = dict(zip(parts, fim.pieces(row, parts), strict=True)) if fim else {}
    for part, (start, stop) in enumerate(kept):
        fate = "whole"
        if len(parts) > 1:
            fate = f"split: part {parts.index((start, stop)) + 1} of {len(parts)} of {over}"
        elif stop < length:
            fate = f"cut: {over}"
        ids, labels = row.input_ids[start:stop], row.labels[start:stop]
        if fim and (found := fim.example(texts[start, stop], stop - start, epoch, number, part)):
            ids, labels, _ = found
            fate = "with a hole" if fate == "whole" else f"{fate}, with a hole"
        yield _shown(number, row, fate, ids, labels, tokenizer)


def _left_out(number: int, row: LabelledRow, fate: str, tokenizer: Tokenizer) -> Shown:
    """Return a row of which nothing is trained, whole."""
    nothing = np.full(len(row.input_ids), IGNORED)
    return _shown(number, row, fate, row.input_ids, nothing, tokenizer)


def _shown(
    number: int,
    row: LabelledRow,
    fate: str,
    ids: np.ndarray,
    labels: np.ndarray,
    tokenizer: Tokenizer,
) -> Shown:
    parts = segments(ids.tolist(), labels.tolist(), tokenizer)
    return Shown(
        row=number,
        source=row.where,
        entry=None,
        fate=fate,
        text=row.text,
        input_ids=ids.tolist(),
        labels=labels.tolist(),
        trained=[text for text, trained in parts if trained],
        tokens=len(ids),
        targets=num_targets(labels),
        merged_prompts=row.merged_prompts,
        assistant_turns=row.assistant_turns,
        untrained_turns=row.untrained_turns,
        left_out_turns=row.left_out_turns,
        thoughtless_turns=row.thoughtless_turns,
        weight=1.0 if row.weight is None else row.weight,
    )


def first_example(config: RunConfig) -> str:
    """Return the first row that leaves an example, for the plan; a long text is cut short."""
    for shown, tokenizer in show_rows(config):
        if shown.targets:
            text = shown_text(shown, tokenizer).rstrip("\n")
            start = "\n".join(text[:_MOST_IN_A_PLAN].split("\n")[:_MOST_LINES_IN_A_PLAN])
            left = counted(len(text) - len(start), "more character")
            more = f"…\n({left}: {command('show-data')} shows all)"
            return text if start == text else start + more
    raise NoRowsError("data.train: no row leaves an example")


def shown_text(shown: Shown, tokenizer: Tokenizer, marks: tuple[str, str] = _PLAIN) -> str:
    """Return an example for a reader: a line about it, and its text, trained parts marked."""
    fate = "" if shown.fate == "whole" else f", {shown.fate}"
    counts = f"{counted(shown.tokens, 'token')}, {counted(shown.targets, 'target')}"
    of = f" (of {shown.entry})" if shown.entry and shown.entry not in shown.source else ""
    head = f"row {shown.row}, {shown.source}{of}: {counts}"
    head += f", weight {shown.weight:g}" if shown.weight not in (0, 1) else ""
    if shown.merged_prompts:
        fate += ", the completion begins inside a token of the prompt"
    for turns, what in (
        (shown.untrained_turns, "untrained"),
        (shown.left_out_turns, "kept out of the loss"),
        (shown.thoughtless_turns, "without their thinking"),
    ):
        fate += f", {turns} of {shown.assistant_turns} assistant turns {what}" if turns else ""
    parts = segments(shown.input_ids, shown.labels, tokenizer)
    body = "".join(
        f"{marks[0]}{printable(text)}{marks[1]}" if trained else printable(text)
        for text, trained in parts
    )
    return f"{head}{fate}\n{body}\n"


def printable(text: str) -> str:
    """Return `text` with its control characters spelled out: none may move a terminal's cursor."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1]
        for letter in text
    )


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "show-data",
        usage="%(prog)s [arguments of train.run] [--rows N] [--split SPLIT] [--epoch N] [--json]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--rows", metavar="N", help=f"rows to show (default {ROWS}; with --json all)"
    )
    parser.add_argument(
        "--split", default="train", metavar="SPLIT", help=f"one of {', '.join(_SPLITS)}"
    )
    parser.add_argument(
        "--epoch", default="0", metavar="N", help="of which the holes are shown, from 0 (training)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _asked(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    asked, rest = parser().parse_known_intermixed_args(argv)
    rest += run_arguments(asked, asked.settings)
    if asked.split not in _SPLITS:
        raise UserError(f"--split {asked.split}: is none of {', '.join(_SPLITS)}")
    if not asked.epoch.isdecimal():
        raise UserError(f"--epoch {asked.epoch}: epochs are counted from 0")
    asked.epoch = int(asked.epoch) if asked.split == "train" else 0
    if asked.rows is not None:
        if not asked.rows.isdecimal() or int(asked.rows) < 1:
            raise UserError(f"--rows {asked.rows}: a number of rows is at least 1")
        asked.rows = int(asked.rows)
    return asked, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""
    return run_command(lambda: _answer(sys.argv[1:] if argv is None else list(argv)))


def _answer(argv: Sequence[str]) -> int:
    asked, rest = _asked(argv)
    most = asked.rows or (None if asked.json else ROWS)
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    configuration = asked_configuration(rest, "show-data")
    for shown, tokenizer in show_rows(configuration, asked.split, most, asked.epoch):
        if asked.json:
            print(json.dumps(dataclasses.asdict(shown), ensure_ascii=False))
        else:
            print(shown_text(shown, tokenizer, _COLOUR if in_colour else _PLAIN))
    return 0


if __name__ == "__main__":
    sys.exit(main())
