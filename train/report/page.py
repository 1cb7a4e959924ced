"""The report of a run: report.md and its plots, from the files in the run's folder alone.

`python -m train.report RUN…` writes it again, for a run in any state.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from files.atomic import write_text
from files.errors import counted
from train.log.metrics import Row
from train.process.command import command
from train.report.against_plan import claims, plan_against_actual
from train.report.card import write_card
from train.report.costs import predicted_against_measured, speed_and_memory
from train.report.evaluated import evaluated
from train.report.mixture import mixture
from train.report.notes import events, notes
from train.report.plots import draw_plots
from train.report.record import Record, read_record
from train.text import fenced, format_loss, markdown_table

REPORT_FILE, PLOTS_FOLDER = "report.md", "plots"


def write_report(run_folder: Path) -> Path:
    """Write report.md and plots/ into a run's folder, and the card of what it trained.

    Returns:
        The path of report.md, which is written last.

    Raises:
        UserError: The folder is no run's, or a file in it is damaged.
    """
    record = read_record(Path(run_folder))
    write_card(record)
    plots = draw_plots(record, record.folder / PLOTS_FOLDER)
    path = record.folder / REPORT_FILE
    write_text(path, render_report(record, plots))
    return path


def render_report(record: Record, plots: Sequence[Path] | None) -> str:
    """Return the text of report.md; `plots` is None where they could not be drawn."""
    sections = [
        _heading(record),
        _results(record),
        _bullets("Notes", notes(record)),
        _bullets("What happened on the way", list(events(record))),
        _curves(record, plots),
        mixture(record),
        _evaluations(record),
        evaluated(record),
        plan_against_actual(record),
        predicted_against_measured(record),
        _bullets("Warned before the run", record.plan.get("warnings") or []),
        claims(record),
        speed_and_memory(record),
        _samples(record),
        _environment(record),
        _configuration(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _heading(record: Record) -> str:
    model, preset = record.section("model").get("path"), record.config.get("preset")
    method = {"lora": "LoRA", "full": "full"}.get(record.section("train").get("method", ""), "")
    what = f"{method} fine-tuning of `{model}`".strip() + (f", preset `{preset}`" if preset else "")
    return f"# {record.name}\n\n{what}: **{record.outcome}**."


def _results(record: Record) -> str:
    rows: list[tuple[str, str]] = []
    if best := record.best:
        last = record.valid[-1]
        rows.append(("best valid loss", f"**{_at(best)}**"))
        rows.append(("last valid loss", _at(last)))
    if record.test:
        rows.append(("test loss", _test_result(record)))
    if record.train:
        rows.append(("train loss", f"{_at(record.train[0])}, {_at(record.train[-1])}"))
    trainable, total = (
        record.status.get(name) or record.plan.get(name)
        for name in ("trainable_parameters", "total_parameters")
    )
    if trainable and total:
        rows.append(("trained parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"))
    return _table("Result", rows)


def _test_result(record: Record) -> str:
    first, last = record.test[0], record.test[-1]
    if last["step"] == 0:
        return f"{format_loss(last['loss'])} before training ({counted(last['targets'], 'target')})"
    before = f"{format_loss(first['loss'])} before, " if first["step"] == 0 else ""
    loads_best = record.section("checkpoint").get("load_best_at_end") and record.best
    of = f", of step {record.best['step']:,}, the best" if loads_best and record.best else ""
    return (
        f"{before}**{format_loss(last['loss'])}** after{of} ({counted(last['targets'], 'target')})"
    )


def _at(row: Row) -> str:
    return f"{format_loss(row['loss'])} at step {row['step']:,}"


def _curves(record: Record, plots: Sequence[Path] | None) -> str:
    if plots is None:
        return (
            "## Curves\n\nPlots need matplotlib: `pip install matplotlib`, then "
            f"`{command('report')} {shlex.quote(str(record.folder))}`."
        )
    images = [f"![{path.stem}]({PLOTS_FOLDER}/{path.name})" for path in plots]
    return "## Curves\n\n" + "\n\n".join(images) if images else ""


def _evaluations(record: Record) -> str:
    rows, before = [], None
    for row in record.valid:
        step, loss, beside = row["step"], row["loss"], record.train_loss_beside(row)
        train = "—" if beside is None else format_loss(beside) + ("" if step else " (step 1)")
        change = "" if not before or loss is None else f"{loss / before - 1:+.1%}"
        best = "best" if row is record.best else ""
        rows.append((f"{step:,}", _epoch(record, step), train, format_loss(loss), change, best))
        before = loss if loss is not None else before
    text = "## Evaluations\n\n"
    if rows:
        header = ("step", "epoch", "train loss", "valid loss", "change", "")
        text += markdown_table(header, rows, "rrrrrl")
        text += (
            "\n\nLosses are nats per target, token means over the whole set "
            f"({record.valid[-1]['targets']:,} valid targets); the train loss is that of the steps "
            "since the evaluation before."
        )
    else:
        text += "None was done."
    if record.test:
        header = ("test at step", "test loss", "targets")
        tests = [
            (f"{row['step']:,}", format_loss(row["loss"]), f"{row['targets']:,}")
            for row in record.test
        ]
        text += "\n\n" + markdown_table(header, tests, "rrr")
    return text


def _samples(record: Record) -> str:
    parts = []
    for sample in record.status.get("samples") or []:
        for name, heading in (
            ("prompt", "Prompt"),
            ("reference", "Reference"),
            ("before", "Completion before training"),
            ("after", "Completion after training"),
        ):
            if sample.get(name) is not None:
                parts.append(f"{heading}:\n\n{fenced(sample[name])}")
    return "## Sample\n\n" + "\n\n".join(parts) if parts else ""


def _environment(record: Record) -> str:
    rows = [(name, f"`{value}`") for name, value in _flat(record.environment) if value is not None]
    return _table("Environment", rows)


def _configuration(record: Record) -> str:
    text = (record.folder / "config.toml").read_text(encoding="utf-8")
    return "## Configuration\n\n" + fenced(text, "toml")


def _epoch(record: Record, step: int) -> str:
    at = next((row["epoch"] for row in record.train if row["step"] == step), None)
    if at is None and record.plan.get("steps_per_epoch"):
        at = step / record.plan["steps_per_epoch"]
    return "" if at is None else f"{at:.2f}"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _table(heading: str, rows: Sequence[tuple[str, str]]) -> str:
    return f"## {heading}\n\n" + markdown_table(("", ""), rows) if rows else ""


def _bullets(heading: str, lines: Sequence[str]) -> str:
    return f"## {heading}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
