"""Odd characters in a text: traces of a wrong encoding, of a broken tool, of a hidden intent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice


def _shown_as(byte: int) -> str:
    """Return the characters that Windows-1252 and Latin-1 show for a byte."""
    return bytes([byte]).decode("cp1252", errors="ignore") + chr(byte)


# The bytes with which a character of UTF-8 goes on, as those two show them.
_REST = f"[{re.escape(''.join(map(_shown_as, range(0x80, 0xC0))))}]"
# A character's first byte and the rest. What French has at the end of a quotation looks like one of
# two or three bytes, so that of the rarer beginnings two must follow each other.
_MOJIBAKE = re.compile(
    f"[\u00c2\u00c3]{_REST}|\u00e2(?!\u00a0){_REST}{{2}}|\u00ef\u00bb\u00bf|\u00f0{_REST}{{3}}"
    f"|(?:[\u00c4-\u00df]{_REST}){{2}}|(?:[\u00e0-\u00ef]{_REST}{{2}}){{2}}"
)
_CONTROL = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f]")
_CONTROL_C1 = re.compile("[\x80-\x9f]")
_INVISIBLE = re.compile("[\u200b\u2060\u202a-\u202e\u2066-\u2069]")
_LONE_RETURN = re.compile("\r(?!\n)")
_LONE_FEED = re.compile("(?<!\r)\n")
_MOST_TRIED = 50


def odd_characters(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, an example in ASCII) for each kind of odd character in a text.

    The kinds are `nul`, `control_character`, `replacement_character` (U+FFFD, what a decoder writes
    for bytes that it cannot read), `byte_order_mark`, `invisible_character` (zero width, or turning
    the direction of writing) and `mojibake` (UTF-8 read as Windows-1252 or Latin-1). A form feed is
    none: old sources have it between their pages.
    """
    if "\0" in text:
        yield "nul", "U+0000"
    mojibake = None if text.isascii() else _mojibake(text)
    if mojibake:
        yield "mojibake", f"{mojibake[0]!a} for {mojibake[1]!a}"
    # What mojibake is made of is no second fault.
    if found := _CONTROL.search(text) or (not mojibake and _CONTROL_C1.search(text)):
        yield "control_character", f"U+{ord(found[0]):04X}"
    if not text.isascii():
        if "\ufffd" in text:
            yield "replacement_character", "U+FFFD"
        if "\ufeff" in text:
            yield "byte_order_mark", "U+FEFF"
        if found := _INVISIBLE.search(text):
            yield "invisible_character", f"U+{ord(found[0]):04X}"


def line_endings(text: str) -> set[str]:
    """Return how the lines of a text end: `LF`, `CRLF`, `CR`, or several of them."""
    if "\r" not in text:
        return {"LF"} if "\n" in text else set()
    endings = {"CRLF"} if "\r\n" in text else set()
    endings |= {"CR"} if _LONE_RETURN.search(text) else set()
    return endings | ({"LF"} if _LONE_FEED.search(text) else set())


def _mojibake(text: str) -> tuple[str, str] | None:
    """Return characters that are the bytes of UTF-8, and what those mean."""
    for found in islice(_MOJIBAKE.finditer(text), _MOST_TRIED):
        with suppress(UnicodeDecodeError):
            return found[0], b"".join(map(_byte, found[0])).decode("utf-8")
    return None


def _byte(character: str) -> bytes:
    """Return the byte that Windows-1252, or where it has none Latin-1, shows so."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")
