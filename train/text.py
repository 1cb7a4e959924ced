"""How sizes are said: one way everywhere."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Return bytes in binary units, as torch, nvidia-smi and `df -h` count.

    `912 B`, `2.0 KiB`, `18.2 MiB`, `21.3 GiB`, `1.5 TiB`.
    """
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"
