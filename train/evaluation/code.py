"""What a completion is worth as code, one number each: it parses, it is the reference, it is near.

Each is between 0 and 1, so that means over completions are rates.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings

_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def code_of(completion: str) -> str:
    """Return what stands in the first fenced block of a completion, else the completion itself."""
    found = _FENCE.search(completion)
    return completion if found is None else found[1]


def parses(completion: str, prompt: str = "") -> bool:
    """Return whether a completion holds code that Python's own parser takes.

    It may be whole by itself, or go on where the prompt ends; blank ones hold none.
    """
    code = code_of(completion)
    return bool(code.strip()) and (_is_python(code) or _is_python(prompt + code))


def exact_match(completion: str, reference: str) -> bool:
    """Return whether a completion is the reference, white space at both ends left out."""
    return completion.strip() == reference.strip()


def edit_similarity(completion: str, reference: str) -> float:
    """Return 2 M / T: M characters in matching blocks of T in both, white space at the ends out.

    Two empty texts are alike.

    Source: `difflib.SequenceMatcher.ratio` (Ratcliff and Metzener 1988), nothing taken for junk.
    """
    matcher = difflib.SequenceMatcher(None, completion.strip(), reference.strip(), autojunk=False)
    return matcher.ratio()


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and comparisons
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
