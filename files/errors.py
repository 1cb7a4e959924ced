"""The one error class that a user ever sees, notes, and what their sentences are made of."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """Bad input: a file, a row, a key, a value, a checkpoint.

    The message is one sentence that names what is wrong, where, the rule, and the remedy. The
    command line prints it without a traceback and exits with code 2.

    It quotes files that others wrote. So that no name in them breaks the line, commands the
    terminal or fills the screen, characters that do not print are shown by their escapes, and the
    middle of a long message is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


# Characters kept of a long message: what is wrong stands first, the remedy last.
_HEAD, _TAIL = 1300, 500


def _one_line(message: str) -> str:
    if len(message) > _HEAD + _TAIL:
        message = f"{message[:_HEAD]} […] {message[-_TAIL:]}"
    if message.isprintable():
        return message
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in message
    )


def shown(value: object, most: int = 60) -> str:
    """Return a value as a message quotes it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names for a message, the first twenty of them."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the candidate nearest to `name`, or an empty string.

    The nearest is the only one that begins so, else one of which most is the same.
    """
    known = list(candidates)
    longer = [one for one in known if len(name) > 1 and one.startswith(name)]
    one_only = longer if len(longer) == 1 else None
    cutoff = 0.65 if len(name) > 4 else 0.5  # one letter of a short word is much of it
    nearest = one_only or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def no_such_folder(place: Path) -> str:
    """Return the predicate for a folder that is not there: where it was looked for, what is near.

    `no such folder (looked in /home/me/runs); did you mean 'demo-2'?`, or `is a file`.
    """
    if place.exists():
        return "is a file, and a folder is needed"
    parent = place.parent
    neighbours = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return f"no such folder (looked in {parent.resolve()}){did_you_mean(place.name, neighbours)}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 row`, `2,048 rows`; a plural other than in -s is given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def note(sentence: str) -> None:
    """Tell the user, on standard error, what is no error but should be known."""
    print(f"note: {_one_line(sentence)}", file=sys.stderr, flush=True)
