"""Python processes of our own: they import our code from where this process has it."""

from __future__ import annotations

import sys
from pathlib import Path

_HOUSE = str(Path(__file__).resolve().parent.parent)


def python(program: str, *arguments: str) -> list[str]:
    """Return the command line of a process that runs `program`, Python source.

    It finds our folders where they are, whatever lies where the user stands, and everything else
    where this process does; -P keeps the current folder out.

    Args:
        program: What it does; `sys` is imported.
        arguments: Its `sys.argv[1:]`.
    """
    ours = f"import sys; sys.path.insert(0, {_HOUSE!r}); import lathe; sys.path[:] = {sys.path!r}"
    return [sys.executable, "-P", "-c", f"{ours}\n{program}", *arguments]
