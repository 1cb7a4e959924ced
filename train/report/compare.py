"""Runs beside each other: their figures in one table, the settings that differ, and a verdict.

`python -m train.report RUN_A RUN_B…` prints it; with `--to FOLDER` it is a file there, with the
curves of all runs in one picture.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from files.atomic import write_text
from files.errors import UserError, counted
from train.config.schema import KEYS
from train.config.toml import shown
from train.report.notes import notes, small_valid_set
from train.report.plots import draw_comparison
from train.report.record import Record, read_record
from train.text import format_duration, format_loss, markdown_table, size_text

COMPARISON_FILE, COMPARISON_PLOT = "comparison.md", "comparison.png"
_HEADING = "# Runs compared"
# Best losses that lie nearer than this share count as equal: another seed alone moved the demo's
# by 0.4 and by 0.5 % (LOG.md, "Masters in bf16").
CLOSE = 0.005
# Settings that say where a run lies and what it is called.
_PLACES = ("train.output_dir", "train.run_name")
# What else a result depends on, of environment.json.
_SURROUNDINGS = ("device_name", "threads", "commit", "versions.torch")


def read_records(runs: Sequence[Path]) -> list[Record]:
    """Return what the folders of runs say.

    Raises:
        UserError: One is no run's, or is given twice.
    """
    given = Counter(run.resolve() for run in runs)
    if twice := [run for run in runs if given[run.resolve()] > 1]:
        raise UserError(f"{twice[0]}: is given twice, and a run is compared with others")
    return [read_record(run) for run in runs]


def write_comparison(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the comparison of runs, and the picture of their curves, into a folder.

    Returns:
        The paths written: without matplotlib, that of the text alone.

    Raises:
        UserError: Something else of those names is there.
    """
    text, plot = folder / COMPARISON_FILE, folder / COMPARISON_PLOT
    ours = text.is_file() and text.read_text("utf-8", "replace").startswith(_HEADING)
    if not ours and (there := [path for path in (text, plot) if path.exists()]):
        raise UserError(f"--to {folder}: {there[0].name} is there, and is none of ours; move it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder}: is a file; give a folder, which is made where need be")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_comparison([*zip(labels(records), records, strict=True)], plot)
    picture = f"\n![{plot.stem}]({plot.name})\n" if drawn else ""
    write_text(text, f"{render_comparison(records)}{picture}")
    return [text, plot] if drawn else [text]


def render_comparison(records: Sequence[Record]) -> str:
    """Return the comparison of runs as Markdown."""
    names = labels(records)
    align = "l" + "r" * len(records)
    different = settings_that_differ(records)
    sections = [
        _HEADING,
        markdown_table(("", *names), _figures(records), align),
        verdict(records),
        "## Settings that differ\n\n"
        + (markdown_table(("", *names), different, align) if different else "None."),
        *(
            f"## What stands out in {name}\n\n" + "\n".join(f"- {note}" for note in found)
            for name, record in zip(names, records, strict=True)
            if (found := notes(record))
        ),
    ]
    return "\n\n".join(sections) + "\n"


def labels(records: Sequence[Record]) -> list[str]:
    """Return a name for each run: its own where no other has it, else its folder."""
    names = Counter(record.name for record in records)
    return [record.name if names[record.name] == 1 else str(record.folder) for record in records]


def settings_that_differ(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the rows of what is not the same in all runs: its name, and its value in each.

    A key that an older run does not know has its default.
    """
    defaults = {path: _plain(key.default) for path, key in KEYS.items() if path not in _PLACES}
    columns = []
    for record in records:
        settings = {"preset": record.config.get("preset"), **defaults}
        for section in record.config:
            if isinstance(record.config[section], dict):
                values = record.section(section)
                settings |= {f"{section}.{name}": _plain(x) for name, x in values.items()}
        flat = record.environment | {
            f"versions.{name}": x for name, x in record.environment.get("versions", {}).items()
        }
        settings |= {f"({name})": flat.get(name) for name in _SURROUNDINGS}
        columns.append(settings)
    names = dict.fromkeys(name for column in columns for name in column if name not in _PLACES)
    rows = []
    for name in names:
        values = [column.get(name) for column in columns]
        if any(value != values[0] for value in values):
            cells = (shown(value).strip('"') if value is not None else "none" for value in values)
            rows.append((name, *cells))
    return rows


def verdict(records: Sequence[Record]) -> str:
    """Return which run has the lowest loss, by how much, and whether that says anything."""
    named = [*zip(labels(records), records, strict=True)]
    sentences = []
    if running := [name for name, one in named if one.status.get("state") != "finished"]:
        sentences.append(f"Not finished, and judged as they stand: {', '.join(running)}.")
    evaluated = [(name, one.best, one) for name, one in named if one.best]
    if without := [name for name, one in named if not one.best]:
        sentences.append(f"Without an evaluation, and left out: {', '.join(without)}.")
    targets = {best["targets"] for _, best, _ in evaluated}
    rows = {one.plan.get("fingerprints", {}).get("valid") for _, _, one in evaluated}
    models = {one.section("model").get("path") for _, _, one in evaluated}
    if len(evaluated) < 2:
        sentences.append("There is nothing to compare by: it takes two runs with a valid loss.")
    elif len(targets) > 1:
        told = " and ".join(f"{count:,}" for count in sorted(targets))
        sentences.append(
            f"**The valid losses cannot be compared**: they are means over {told} targets, so they "
            "are not of the same rows, or not cut or tokenised alike."
        )
    elif len(rows) > 1:
        sentences.append(
            "**The valid losses cannot be compared**: they are of other rows, or of the same ones "
            "cut or tokenised in another way."
        )
    else:
        if len(models) > 1:
            sentences.append(
                "The base models differ; losses compare only where both have one tokenizer."
            )
        small = small_valid_set(evaluated[0][2])
        ranked = sorted(evaluated, key=lambda one: one[1]["loss"])
        (first, best, _), (second, next_best, _) = ranked[:2]
        by = 1 - best["loss"] / next_best["loss"] if next_best["loss"] else 0.0
        if by < CLOSE:
            sentences.append(
                f"**{first} and {second} are equal** by their best valid loss "
                f"({format_loss(best['loss'])} and {format_loss(next_best['loss'])}, {by:.2%} "
                f"apart; below {CLOSE:.1%}, which another seed alone can make)."
            )
        else:
            sentences.append(
                f"**{first} is best**: its lowest valid loss, {format_loss(best['loss'])} at step "
                f"{best['step']:,}, is {by:.1%} below that of {second} "
                f"({format_loss(next_best['loss'])}) on the same "
                f"{counted(best['targets'], 'target')}"
                + (f"; the valid set has {small}, and that may be chance." if small else ".")
            )
    return "## Verdict\n\n" + " ".join(sentences)


def _figures(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the rows of the table of figures; what no run has is left out."""

    def at_best(record: Record) -> str | None:
        best = record.best
        return f"{format_loss(best['loss'])} at step {best['step']:,}" if best else None

    def last(rows: str) -> Callable[[Record], str | None]:
        return lambda record: (
            format_loss(found[-1]["loss"]) if (found := getattr(record, rows)) else None
        )

    def total(name: str, show: Callable[[float], str]) -> Callable[[Record], str | None]:
        return lambda record: show(sum(row[name] for row in record.train)) if record.train else None

    def throughput(record: Record) -> str | None:
        seconds = sum(row["seconds"] for row in record.train)
        return f"{sum(row['tokens'] for row in record.train) / seconds:,.0f}" if seconds else None

    def norm(record: Record) -> str | None:
        norms = [row["grad_norm"] for row in record.train if row["grad_norm"] is not None]
        return f"{statistics.median(norms):.3g}" if norms else None

    def of_status(name: str, show: Callable[[Any], str]) -> Callable[[Record], str | None]:
        return lambda record: show(value) if (value := record.status.get(name)) else None

    figures: dict[str, Callable[[Record], str | None]] = {
        "outcome": lambda record: record.outcome,
        "best valid loss": at_best,
        "last valid loss": last("valid"),
        "test loss": last("test"),
        "train loss, last step": last("train"),
        "median gradient norm": norm,
        "trained parameters": of_status("trainable_parameters", lambda x: f"{x:,}"),
        "tokens trained on": total("tokens", lambda x: f"{x:,}"),
        "targets trained on": total("targets", lambda x: f"{x:,}"),
        "tokens/s": throughput,
        "time in steps": total("seconds", format_duration),
        "peak memory": of_status("peak_memory_bytes", size_text),
    }
    rows = [(name, [tell(record) for record in records]) for name, tell in figures.items()]
    return [(name, *(cell or "—" for cell in cells)) for name, cells in rows if any(cells)]


def _plain(value: object) -> object:
    """Return a value as TOML gives it back: a list in the place of a tuple, none for no value."""
    if value == "none":
        return None
    return list(value) if isinstance(value, tuple) else value
