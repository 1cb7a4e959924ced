"""How sizes and numbers are said: one way everywhere."""

from __future__ import annotations

from collections.abc import Sequence


def size_text(count: float) -> str:
    """Return bytes in binary units, as torch, nvidia-smi and `df -h` count.

    `912 B`, `2.0 KiB`, `18.2 MiB`, `21.3 GiB`, `1.5 TiB`.
    """
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def format_list(values: Sequence[int], most: int = 8) -> str:
    """Return numbers as people list them: `3, 4`, or `3, 4 and 12 more` beyond `most`."""
    shown = ", ".join(f"{value:,}" for value in values[:most])
    return shown + (f" and {len(values) - most:,} more" if len(values) > most else "")


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return things by their numbers: `step 3`, `steps 3, 4 and 12 more`."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {format_list(numbers)}"
