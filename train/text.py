"""How sizes, times, numbers, tables and panels are written: one way everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence


def size_text(count: float) -> str:
    """Return bytes in binary units, as torch, nvidia-smi and `df -h` count.

    `912 B`, `2.0 KiB`, `18.2 MiB`, `21.3 GiB`, `1.5 TiB`.
    """
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: `0.4s`, `43s`, `12m05`, `1h52`, `3d04h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if round(seconds) < 60:
        return f"{seconds:.0f}s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{second:02d}"
    hours, minute = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours}h{minute:02d}"
    days, hour = divmod(round(seconds / 3600), 24)
    return f"{days}d{hour:02d}h"


def format_seconds(seconds: float) -> str:
    """Return the time of one step: `412 ms`, `3.07 s`."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_count(count: float) -> str:
    """Return a count with a decimal unit: `912`, `5.8k`, `36.9M`, `1.54B`."""
    for limit, unit, decimals in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        # 999.95 and more would print as 1000.0 of the unit below.
        if count >= limit * 0.99995:
            return f"{count / limit:.{decimals}f}{unit}"
    return f"{count:.0f}"


def format_loss(loss: float | None) -> str:
    """Return a loss with four decimals; `non-finite` for the null of metrics.jsonl."""
    return "non-finite" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def format_list(values: Sequence[int], most: int = 8) -> str:
    """Return numbers as people list them: `3, 4`, or `3, 4 and 12 more` beyond `most`."""
    shown = ", ".join(f"{value:,}" for value in values[:most])
    return shown + (f" and {len(values) - most:,} more" if len(values) > most else "")


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return things by their numbers: `step 3`, `steps 3, 4 and 12 more`."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {format_list(numbers)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, each column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows]


# Corners (left and right above, left and right below), then the flat and the upright line.
UNICODE_BOX = ("┌", "┐", "└", "┘", "─", "│")
ASCII_BOX = ("+", "+", "+", "+", "-", "|")


def panel(title: str, rows: Sequence[tuple[str, str]], box: Sequence[str]) -> list[str]:
    """Return the lines of a box of named values; `box` is UNICODE_BOX or ASCII_BOX."""
    lines = aligned(rows)
    inside = max(len(line) for line in [*lines, title + "  "]) + 2
    left_top, right_top, left_bottom, right_bottom, flat, upright = box
    head = f"{flat} {title} "
    return [
        left_top + head + flat * (inside - len(head)) + right_top,
        *(f"{upright} {line:<{inside - 2}} {upright}" for line in lines),
        left_bottom + flat * inside + right_bottom,
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "ll") -> str:
    """Return a Markdown table; `align` has an `l` or an `r` for each column."""
    rule = ["---:" if side == "r" else "---" for side in align]
    cells = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def fenced(text: str, language: str = "") -> str:
    """Return the text as a code block that no run of backquotes in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
