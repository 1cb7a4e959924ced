"""Where a text is cut for fill-in-the-middle: characters, lines, or nodes of Python's parser.

Every function is pure: a text and two drawn words of 64 bits decide the hole.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_LINE_END = re.compile("\n")
# What Python's parser counts as the end of a line.
_PARSED_LINE_END = re.compile("\r\n|\r|\n")
# Fields of a node that hold statements one after another.
_BLOCKS = ("body", "orelse", "finalbody")


def hole(text: str, unit: str, first: int, second: int) -> tuple[int, int] | None:
    """Return where a hole begins and ends, in characters; None where the text is too short.

    - `character`: two different places, all pairs alike (Bavarian et al. 2022, §3).
    - `line`: the same of the beginnings of lines and the end of the text; of characters where the
      text is a single line.
    - `syntax`: a character is drawn, and then one of the nodes that hold it: from its name or
      number up to its statement, the block of that, and the function or class around it. Long nodes
      are therefore drawn more often than short ones, and each depth alike. A node that is all there
      is counts for none. Lines where there is no node, or Python's parser refuses the text.

    Args:
        text: What may be cut.
        unit: `character`, `line` or `syntax`.
        first: A drawn word, 0 ≤ word < 2⁶⁴.
        second: Another one.
    """
    if unit == "syntax" and (found := _node(text, first, second)) is not None:
        return found
    places: Sequence[int] = range(len(text) + 1)
    if unit != "character":
        starts = {0, *(end.end() for end in _LINE_END.finditer(text)), len(text)}
        places = sorted(starts) if len(starts) > 2 else places
    count = len(places)
    if count < 2:
        return None
    one, other = below(first, count), below(second, count - 1)
    other += other >= one
    return places[min(one, other)], places[max(one, other)]


def below(word: int, count: int) -> int:
    """Return a drawn word as one of 0 … count - 1."""
    return word * count >> 64


def parses(text: str) -> bool:
    """Return whether Python's parser takes the text."""
    return _parsed(text) is not None


def _parsed(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():  # of escapes in strings, which are the row's own affair
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # or nested beyond its stack
        return None


def _node(text: str, first: int, second: int) -> tuple[int, int] | None:
    """Return a node that leaves some of the text around it; None where there is none."""
    tree = _parsed(text)
    if tree is None or not tree.body:
        return None
    span, place = _spans(text), below(first, len(text))
    statements = [span(statement) for statement in tree.body]
    if not any(start <= place < stop for start, stop in statements):
        # Between statements: the next one, or the last.
        place = next((start for start, _ in statements if start > place), statements[-1][0])
    inner = [
        (start, stop)
        for start, stop in dict.fromkeys(_nodes_at(tree, place, span))
        if text[:start].strip() or text[stop:].strip()
    ]
    return inner[below(second, len(inner))] if inner else None


def _nodes_at(
    tree: ast.Module, place: int, span: Callable[[ast.AST], tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield the nodes that hold a character, and the blocks of statements, from the outside in."""
    nodes = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if not hasattr(node, "lineno"):  # arguments or a comprehension: its parts have a place
            nodes += ast.iter_child_nodes(node)
            continue
        start, stop = span(node)
        if not start <= place < stop:
            continue
        yield start, stop
        for name in _BLOCKS:
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                start, stop = span(block[0])[0], span(block[-1])[1]
                # The body also for what stands before it, such as the arguments.
                if (start <= place or name == "body") and place < stop:
                    yield start, stop
        # Before Python 3.12 the parts of an f-string have no places of their own.
        nodes = [] if isinstance(node, ast.JoinedStr) else list(ast.iter_child_nodes(node))


def _spans(text: str) -> Callable[[ast.AST], tuple[int, int]]:
    """Return what says of a node where it starts and stops, in characters of the text."""
    starts = [0, *(end.end() for end in _PARSED_LINE_END.finditer(text)), len(text)]

    def place(line: int, column: int) -> int:
        """Return the character of a line, counted from 1, and a column in bytes of UTF-8."""
        start = starts[line - 1]
        characters = text[start : starts[line]]
        if characters.isascii():
            return start + column
        return start + len(characters.encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        at: Any = node  # one with a place
        return place(at.lineno, at.col_offset), place(at.end_lineno, at.end_col_offset)

    return span
