"""What a block of a test asks of the disk, in order: the calls that decide what survives."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def disk_calls(root: Path) -> Iterator[list[str]]:
    """Yield a list that fills with what is synced, renamed and deleted below a folder.

    Its entries are `fsync PATH`, `rename OLD NEW` (replacing a file is a rename too) and `delete
    PATH` (a folder that is there, with all in it). Paths are relative to `root`, and the random
    part of a temporary file's name is `*`. What concerns other places is left out.
    """
    calls: list[str] = []
    root = root.resolve()
    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

    def note(what: str, *paths: str | os.PathLike[str]) -> None:
        whole = [Path(os.path.abspath(path)) for path in paths]
        if all(path.is_relative_to(root) for path in whole):
            names = [path.relative_to(root).as_posix() for path in whole]
            calls.append(re.sub(r"\.tmp-[0-9a-f]{32}", ".tmp-*", " ".join([what, *names])))

    def noted_fsync(descriptor: int) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_rename(old: Any, new: Any) -> None:
        note("rename", old, new)
        rename(old, new)

    def noted_replace(old: Any, new: Any) -> None:
        note("rename", old, new)
        replace(old, new)

    def noted_rmtree(path: Any, *arguments: Any, **named: Any) -> None:
        if os.path.lexists(path):
            note("delete", path)
        rmtree(path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "rename", noted_rename)
        patch.setattr(os, "replace", noted_replace)
        patch.setattr(shutil, "rmtree", noted_rmtree)
        yield calls
