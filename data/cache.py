"""Where things lie that can be made again: one folder, with a folder for each kind of thing."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder of a kind of thing: in $LATHE_CACHE, else in the user's cache folder."""
    if folder := os.environ.get("LATHE_CACHE"):
        return Path(folder) / kind
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lathe" / kind
