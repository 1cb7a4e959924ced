"""Text as its tokens come: no character is cut, and in the end it is the text of all tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from data.tokenizer import Tokenizer

# A byte of SentencePiece's: what a run of them says is known at its end, for if one byte of it is
# in the wrong place none of them is text.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# What a character that is not whole is decoded to.
_NOT_WHOLE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a completion, told piece by piece.

    Decoding costs the same for every token: of what was told before, the last piece alone is
    decoded again, since a token that begins a text may lose the space before it.

    Args:
        tokenizer: Tells which tokens are single bytes.
        decode: Ids → text; the tokenizer's, or another of which pieces are a text together.
    """

    def __init__(self, tokenizer: Tokenizer, decode: Callable[[Sequence[int]], str]):
        self._tokenizer = tokenizer
        self._decode = decode
        self._start = 0  # ids before it are not looked at again
        self._told = 0  # ids whose text is told
        self._length = 0  # characters of that text
        self._amid_bytes = False

    def new(self, ids: Sequence[int]) -> str:
        """Return what is new in a completion, as far as no later token can change it."""
        if not ids:
            return ""
        if _BYTE.fullmatch(self._tokenizer.token(ids[-1]) or ""):
            self._amid_bytes = True
        elif self._amid_bytes:  # a token without a text does not end a run
            self._amid_bytes = not self._decode(ids[-1:])
        if self._amid_bytes:
            return ""
        text = self._decode(ids[self._start :])
        if text.endswith(_NOT_WHOLE):
            return ""
        piece = text[len(self._decode(ids[self._start : self._told])) :]
        if piece.strip():  # else it may not stand before another one
            self._start = self._told
        self._told = len(ids)
        self._length += len(piece)
        return piece

    def rest(self, ids: Sequence[int]) -> str:
        """Return what was not told yet of a completion that is whole."""
        return self._decode(ids)[self._length :]
