"""Rows to tokens with labels: what of each row is trained.

Rows are rendered and encoded many at a time, the spans that are trained become tokens, and the EOS
that a row is due is put behind its last answer. Nothing is cut here (`data/arrays.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from data.prompt import PromptFormat
from data.source import Row
from data.spans import Rendered, Span
from data.tokenizer import Tokenizer
from data.weights import row_weight
from files.errors import UserError

# A label that is no target: what torch's cross-entropy ignores.
IGNORED = -100
# Rows tokenised at once: enough for the library's threads, few enough to keep memory flat.
_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**20


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
        prompt: Characters of the text before the completion: in a text, of the system prompt.
        weight: What multiplies the loss of its targets; None where no column was named.
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
    prompt: int
    weight: float | None = None


def label_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    weight_field: str | None = None,
) -> list[LabelledRow]:
    """Return each row as the tokens that training makes of it, before anything is cut.

    `weight_field` is the column of the rows' weights, or None.

    Raises:
        UserError: A row cannot be rendered or encoded, or has no weight; the message names its file
            and line.
    """
    encoded = _encode_rows(rows, tokenizer, prompt_format, weight_field)
    return [_label(row, prompt_format.append_eos) for row in encoded]


def labelled_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    weight_field: str | None = None,
) -> Generator[LabelledRow, None, None]:
    """Yield rows as `label_rows` has them, one after another.

    One thread reads, renders and encodes while the caller labels and writes the rows before: the
    tokenizer's own threads need nothing of Python's, and would wait for it otherwise.
    """
    batches = in_batches(rows)

    def next_rows() -> list[_EncodedRow]:
        return _encode_rows(next(batches, []), tokenizer, prompt_format, weight_field)

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next_rows)
        while made := coming.result():
            coming = thread.submit(next_rows)
            made.reverse()
            while made:  # what a row's tokens are made of is let go of at once
                yield _label(made.pop(), prompt_format.append_eos)


def num_targets(labels: np.ndarray, first: int = 1) -> int:
    """Return how many tokens of an example are trained; nothing predicts the first one."""
    return int(np.count_nonzero(labels[first:] != IGNORED))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
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
        weight: As `LabelledRow.weight`.
    """

    where: str
    rendered: Rendered
    tokenizer: Tokenizer
    ids: list[int]
    prompt: int = 0
    merges: bool = False
    encoding: tokenizers.Encoding | None = None
    weight: float | None = None

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
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    weight_field: str | None,
) -> list[_EncodedRow]:
    weights = [None if weight_field is None else row_weight(row, weight_field) for row in rows]
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
    for row, item, weight in zip(rows, rendered, weights, strict=True):
        if item.chat:
            encoding = next(encodings)
            ids, prompt, merges = encoding.ids, 0, False
        else:
            ids = next(ids_of_texts)
            encoding = None
            alone = next(ids_of_prompts) if item.prompt else []
            prompt = common_prefix(alone, ids)
            merges = prompt < len(alone)
        encoded.append(
            _EncodedRow(row.where, item, tokenizer, ids, prompt, merges, encoding, weight)
        )
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
        item.prompt,
        row.weight,
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
