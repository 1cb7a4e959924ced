"""How sizes and counts are said: one way everywhere."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Return bytes in binary units, as torch, nvidia-smi and `df -h` count.

    `912 B`, `2.0 KiB`, `18.2 MiB`, `21.3 GiB`, `1.5 TiB`.
    """
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def counted(count: int, one: str, several: str = "") -> str:
    """Return a number and its noun: `1 step`, `1,200 steps`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
