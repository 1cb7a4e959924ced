"""The lengths of the rows as a histogram, drawn with matplotlib, which is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.lint.lengths import Lengths
from files.errors import UserError

_BINS = 60
_COLOURS = {"train": "#1f77b4", "valid": "#d62728", "test": "#2ca02c"}


def require_matplotlib() -> None:
    """Check that a picture can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("--picture needs matplotlib; run `pip install matplotlib`") from None


def draw_lengths(path: Path, lengths: Mapping[str, Lengths], marks: Mapping[str, int]) -> None:
    """Draw how many rows of each set have which length in tokens, and lengths to cut at.

    Args:
        path: The PNG file to write.
        lengths: Set → its lengths.
        marks: What a marked length is called → tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(one.longest for one in lengths.values())
    edges = np.linspace(0, longest + 1, min(_BINS, longest + 1) + 1)
    for name, one in lengths.items():
        rows = one.histogram()
        counts, _ = np.histogram(np.arange(len(rows)), bins=edges, weights=rows)
        axes.stairs(counts, edges, fill=True, alpha=0.55, color=_COLOURS[name], label=name)
    for number, (name, tokens) in enumerate(marks.items()):
        label = f"{name} = {tokens:,}"
        axes.axvline(tokens, color="#ff7f0e", lw=1.6, ls=("--", ":")[number % 2], label=label)
    axes.set_yscale("symlog", linthresh=1)  # a row alone is seen beside a million
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title("Length of the rows", loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel("tokens of a row, before anything is cut")
    axes.set_ylabel("rows")
    axes.grid(color="#888888", alpha=0.22, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
