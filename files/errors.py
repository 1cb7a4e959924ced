"""The one error class that a user ever sees, and the nearest-name hint that its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a file, a row, a key, a value, a checkpoint.

    The message is one sentence that names what is wrong, where, the rule, and the remedy. The
    command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the candidate nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
