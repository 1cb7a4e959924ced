"""Fill-in-the-middle: a row's text with a hole cut out, and what was in it as what comes next.

    prefix-suffix-middle    PREFIX prefix SUFFIX suffix MIDDLE middle END
    suffix-prefix-middle    PREFIX SUFFIX suffix MIDDLE prefix middle END

The second is Bavarian et al.'s (2022) variant 2, as Megatron-LM, StarCoder and Code Llama have it.
Each family has tokens of its own, and trains the one that ends a hole. Code Llama's text is
SentencePiece's, which begins every text with a space that is not there: prefixes keep it, suffix
and middle are encoded as if text stood before them, and after the suffix prefix and middle are one
text (Rozière et al. 2023, §2.3; `infilling_prompt_tokens` in facebookresearch/codellama).

A hole is a function of (seed, epoch, row, part of the row): Philox, a generator that is a counter,
gives four words for each. So no epoch's examples are kept. The cache holds each example's text
beside its tokens, and the hole is cut, and its parts encoded, when a step asks for the example, in
about a millisecond for a thousand tokens, while the step before computes. To keep every epoch's
examples would cost eight bytes of disk for each token that is ever trained on, and all tokenising
before the first step; a resume with more epochs would have theirs to make.

What a plan must know beforehand does not depend on the hole: which examples there are, and a bound
on the length of each. Parts that are encoded by themselves have a few tokens more than the whole:
an example may have `ROOM` more than its row, within `data.max_length`, and what goes beyond is
taken off the end of the suffix, the text farthest from the hole, as Megatron-LM does. Prefix,
middle and END are whole, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from data.holes import hole, parses
from data.labels import IGNORED, LabelledRow, common_prefix
from data.tokenizer import Tokenizer
from files.errors import UserError

# Tokens that an example may have beyond its row's: four of the format, and some where parts that
# are encoded by themselves break tokens of the whole.
ROOM = 16
# (prefix, suffix, middle, end of the middle) of StarCoder, Qwen2.5-Coder and Code Llama.
_FAMILIES = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
)
# What is put before a text that must not begin with SentencePiece's space, as Code Llama does.
_ANCHOR = "☺"
# The second word of the generator's key: no other draw has it.
_HOLES = 0x686F6C6573


@dataclass(frozen=True)
class Parts:
    """A text with a hole, as tokens."""

    before: list[int]  # all that stands before the middle
    middle: list[int]  # the middle, and the token that ends it


class FimTokens:
    """The tokens of fill-in-the-middle that a tokenizer has.

    Attributes:
        tokenizer: The tokenizer.
        end_id: Id of the token that ends a middle.
        max_id: The largest id of these tokens.

    Raises:
        UserError: It has none.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        for names in _FAMILIES:
            ids = [tokenizer.token_id(name) for name in names]
            end_id = tokenizer.eos_id if ids[3] is None else ids[3]
            if None not in ids[:3] and end_id is not None:
                break
        else:
            known = "; ".join(", ".join(names[:3]) for names in _FAMILIES)
            raise UserError(
                "fill-in-the-middle needs a tokenizer with tokens for prefix, suffix and middle, "
                f"and this one has none of those known ({known}): train a model that has them "
                "(StarCoder2, Qwen2.5-Coder, CodeLlama 7B and 13B), or leave data.fim_rate at 0"
            )
        self._prefix, self._suffix, self._middle = (i for i in ids[:3] if i is not None)
        self.end_id = end_id
        self.max_id = max(self._prefix, self._suffix, self._middle, end_id)
        self._spaced = names[0].startswith("▁")
        self._special = {*names, *tokenizer.special_tokens.values()}

    def stand_in(self, text: str) -> bool:
        """Return whether a text holds one of the tokens, or one that begins or ends a text."""
        return any(name in text for name in self._special)

    def prompt_ids(self, prefix: str, suffix: str) -> list[int]:
        """Return what a model is given to say the middle between two texts."""
        before, rest = self._encoded(self._first(prefix), suffix)
        head = self.tokenizer.prefix_ids
        return [*head, self._prefix, *before, self._suffix, *rest, self._middle]

    def parts(
        self, prefix: str, middle: str, suffix: str, *, suffix_first: bool, most: int
    ) -> Parts | None:
        """Return a text with a hole as at most so many tokens, the end of the suffix left out.

        None where prefix, middle and the format's own tokens are more than that by themselves.
        """
        first = self._first(prefix)
        if suffix_first and self._spaced:
            rest, alone, joint = self._encoded(suffix, first, self._first(prefix + middle))
            known = common_prefix(alone, joint)
            before, said = joint[:known], joint[known:]
        else:
            before, rest, said = self._encoded(first, suffix, middle)
        head = self.tokenizer.prefix_ids
        room = most - (len(head) + 3 + len(before) + len(said) + 1)
        if room < 0:
            return None
        rest = rest[:room]
        if suffix_first:
            ids = [*head, self._prefix, self._suffix, *rest, self._middle, *before]
        else:
            ids = [*head, self._prefix, *before, self._suffix, *rest, self._middle]
        return Parts(ids, [*said, self.end_id])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a middle's tokens, which stand behind others."""
        if not self._spaced:
            return self.tokenizer.decode(ids)
        anchor = self.tokenizer.decode(self._anchor)
        return self.tokenizer.decode([*self._anchor, *ids]).removeprefix(anchor)

    @cached_property
    def _anchor(self) -> list[int]:
        return self.tokenizer.encode(_ANCHOR, add_special_tokens=False)

    def _first(self, text: str) -> str:
        """Return a text as it begins a document, SentencePiece's space included."""
        return f" {text}" if self._spaced and text else text

    def _encoded(self, *texts: str) -> list[list[int]]:
        """Return the tokens of texts, none of which begins a document by itself."""
        if not self._spaced:
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)
        anchored = [_ANCHOR + text for text in texts]
        found = self.tokenizer.encode_batch(anchored, add_special_tokens=False)
        return [ids[len(self._anchor) :] for ids in found]


@dataclass(frozen=True)
class Piece:
    """What an example is made of: a row's text, or the part of it that is kept."""

    text: str
    start: int  # the character where holes may begin: behind the system prompt
    holds_tokens: bool = False  # it holds tokens like those of the format: it never has a hole
    unparsed: bool = False  # it was to be cut by its syntax, and is cut by lines


@dataclass(frozen=True)
class FillInTheMiddle:
    """Which examples have a hole, and where.

    Attributes:
        tokens: The format.
        rate: Share of the examples with a hole, others in each epoch.
        spm_rate: Share of these with the suffix first.
        unit: What is cut out (`data.holes`).
        targets: `all` trains every token; `middle` the middle and its end alone.
        seed: The run's seed.
        max_length: Tokens of an example at most.
    """

    tokens: FimTokens
    rate: float
    spm_rate: float
    unit: str
    targets: str
    seed: int
    max_length: int

    def bounds(self, lengths: np.ndarray | int) -> np.ndarray:
        """Return how many tokens examples have at most, whose rows have `lengths`."""
        return np.minimum(np.asarray(lengths) + ROOM, self.max_length)

    def pieces(self, row: LabelledRow, parts: Sequence[tuple[int, int]]) -> list[Piece]:
        """Return what the examples of a row are made of, one for each part of its tokens."""
        cuts = [0, len(row.text)]
        if parts and parts[-1] != (0, len(row.input_ids)):
            tokenizer = self.tokens.tokenizer
            encoding = tokenizer.encode_chats([row.text])[0]
            head = len(tokenizer.prefix_ids)
            shift = head * (encoding.ids[:head] != tokenizer.prefix_ids)

            def character(token: int) -> int:
                place = max(0, token - shift)
                return encoding.offsets[place][0] if place < len(encoding) else len(row.text)

            cuts = [character(start) for start, _ in parts] + [character(parts[-1][1])]
            cuts[0] = 0
        return [
            self._piece(row.text[start:stop], max(0, row.prompt - start))
            for start, stop in pairwise(cuts)
        ]

    def _piece(self, text: str, start: int) -> Piece:
        unparsed = self.unit == "syntax" and not parses(text[start:])
        return Piece(text, min(start, len(text)), self.tokens.stand_in(text), unparsed)

    def example(
        self, piece: Piece, length: int, epoch: int, row: int, part: int
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Return an example with a hole: its ids, its labels, and the tokens before the middle.

        None where it has none in this epoch, or there is no place for one.

        Args:
            piece: Its text.
            length: Tokens of the text and its end without a hole.
            epoch: 0-based.
            row: Number of the row that it comes from.
            part: Which of the row's examples it is.
        """
        key = np.array([self.seed, _HOLES], dtype=np.uint64)
        counter = np.array([0, part, row, epoch], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(4).tolist()
        if piece.holds_tokens or words[0] >= self.rate * 2**64:
            return None
        text, start = piece.text, piece.start
        place = hole(text[start:], self.unit, words[2], words[3])
        if place is None:
            return None
        begin, end = start + place[0], start + place[1]
        parts = self.tokens.parts(
            text[:begin],
            text[begin:end],
            text[end:],
            suffix_first=words[1] < self.spm_rate * 2**64,
            most=int(self.bounds(length)),
        )
        if parts is None:
            return None
        ids = np.array([*parts.before, *parts.middle], dtype=np.int32)
        labels = ids.copy()
        if self.targets == "middle":
            labels[: len(parts.before)] = IGNORED
        return ids, labels, len(parts.before)
