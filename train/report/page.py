"""The report of a run: report.md and its plots, from the files in the run's folder alone.

`python -m train.report RUN…` writes it again, for a run in any state.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.atomic import write_text
from files.errors import UserError, counted, no_such_folder
from files.strict_json import read_json_object
from train.command import command
from train.log.console import format_duration, format_list, format_loss, redrawn_text
from train.log.metrics import METRICS_FILE, Row, read_metrics
from train.plan.schedule import learning_rate_factor
from train.report.plots import draw_plots
from train.state import DEVIATIONS, WINDOW
from train.text import size_text

REPORT_FILE, PLOTS_FOLDER = "report.md", "plots"

# Thresholds of the notes. Each note states its numbers, so that the reader may judge otherwise.
BARELY_MOVED = 0.01  # share of its first value that the valid loss has to fall by
STILL_FALLING = 0.01  # fall at the last evaluation, as a share of the loss, that promises more
BEST_EARLY, WORSE_SINCE = (
    0.8,
    0.005,
)  # best before this share of the steps, and this much worse since
FEW_ROWS, FEW_TARGETS = 100, 10_000  # a valid set below either is noisy
GAP = 1.5  # valid loss over train loss at the last evaluation
OFTEN_CLIPPED = 0.5  # share of the steps whose gradient was clipped
# Learning rates are written unrounded; anything beyond a few roundings of fp64 is another schedule.
LEARNING_RATE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Record:
    """What a run's folder says. A file that is not there yet is an empty dictionary or list."""

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    train: list[Row]
    valid: list[Row]
    test: list[Row]

    @property
    def name(self) -> str:
        """The run's name: as configured, or its folder's."""
        return self.section("train").get("run_name") or self.folder.resolve().name

    @property
    def step(self) -> int:
        """Steps done."""
        return max([row["step"] for row in self.train] + [self.status.get("step") or 0])

    @property
    def total_steps(self) -> int | None:
        """Steps planned."""
        return self.plan.get("total_steps") or self.status.get("total_steps")

    @property
    def best(self) -> Row | None:
        """The evaluation of the valid set with the lowest loss, the earliest of equals."""
        finite = [row for row in self.valid if row["loss"] is not None]
        return min(finite, key=lambda row: row["loss"], default=None)

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the configuration; what it calls `none` is None."""
        values = self.config.get(name) or {}
        return {key: None if value == "none" else value for key, value in values.items()}

    def train_loss_beside(self, row: Row) -> float | None:
        """Return the token mean of the train loss since the evaluation before `row`.

        Before training it is the loss of step 1, which was measured on the very same weights.
        """
        if row.get("train_loss") is not None:
            return row["train_loss"]
        before = max(
            (other["step"] for other in self.valid if other["step"] < row["step"]), default=0
        )
        last = max(row["step"], 1)
        span = [
            step
            for step in self.train
            if before < step["step"] <= last and step["loss"] is not None
        ]
        targets = sum(step["targets"] for step in span)
        return sum(step["loss"] * step["targets"] for step in span) / targets if targets else None


def read_record(folder: Path) -> Record:
    """Return what a run's folder says.

    Raises:
        UserError: The folder is no run's, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_such_folder(folder)}")
    written = [
        name for name in ("plan.json", "status.json", METRICS_FILE) if (folder / name).is_file()
    ]
    if not (folder / "config.toml").is_file() or not written:
        raise UserError(
            f"{folder}: not the folder of a run: that has a config.toml and a metrics.jsonl "
            "(the newest ones are in runs/)"
        )
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.toml'}: not TOML: {error}") from None
    documents = {
        name: read_json_object(path) if (path := folder / f"{name}.json").is_file() else {}
        for name in ("plan", "environment", "status")
    }
    rows = read_metrics(folder)
    evals = [row for row in rows if row["kind"] == "eval"]
    return Record(
        folder=folder,
        config=config,
        **documents,
        train=[row for row in rows if row["kind"] == "train"],
        valid=[row for row in evals if row["split"] == "valid"],
        test=[row for row in evals if row["split"] == "test"],
    )


def write_report(run_folder: Path) -> Path:
    """Write report.md and plots/ into a run's folder and return the path of report.md.

    Args:
        run_folder: The folder of a run in any state.

    Raises:
        UserError: The folder is no run's, or a file in it is damaged.
    """
    record = read_record(Path(run_folder))
    plots = draw_plots(
        record.folder / PLOTS_FOLDER,
        record.train,
        record.valid + record.test,
        title=record.name,
        best_step=record.best["step"] if record.best else None,
        steps_per_epoch=record.plan.get("steps_per_epoch"),
        max_grad_norm=record.section("optimizer").get("max_grad_norm"),
        warmup_steps=record.plan.get("warmup_steps"),
    )
    path = record.folder / REPORT_FILE
    write_text(path, render_report(record, plots))
    return path


def render_report(record: Record, plots: Sequence[Path] | None) -> str:
    """Return the text of report.md.

    Args:
        record: What the run's folder says.
        plots: The files of the plots, to be shown; None where they could not be drawn.
    """
    sections = [
        _heading(record),
        _results(record),
        _bullets("Notes", notes(record)),
        _bullets("What happened on the way", list(events(record))),
        _curves(record, plots),
        _evaluations(record),
        _plan_against_actual(record),
        _bullets("Warned before the run", record.plan.get("warnings") or []),
        _claims(record),
        _speed(record),
        _samples(record),
        _environment(record),
        _configuration(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def notes(record: Record) -> list[str]:
    """Return what a careful reader of the numbers would say, each with the numbers it rests on."""
    candidates = [
        *_notes_on_the_end(record),
        *_notes_on_evaluation(record),
        *_notes_on_steps(record),
    ]
    return [note for note in candidates if note]


def events(record: Record) -> Iterable[str]:
    """Yield what does not happen in every run: resumes, updates left out, memory, spikes."""
    if resumed := record.status.get("resumed_from"):
        yield f"Resumed from {_steps(resumed)}."
    earlier = record.plan.get("earlier_schedules") or []
    for one, after in zip(earlier, [*earlier[1:], record.plan], strict=False):
        text = redrawn_text(one, after["total_steps"])
        yield f"{text[0].upper()}{text[1:]}."
    if damaged := sorted(path.name for path in record.folder.glob("checkpoints/corrupt-*")):
        yield f"Damaged, and set aside: {', '.join(damaged)}."
    skipped = [row for row in record.train if row.get("skipped")]
    for reason in sorted({row["skipped"] for row in skipped}):
        rows = [row for row in skipped if row["skipped"] == reason]
        yield (
            f"{len(rows)} of {counted(record.step, 'step')} changed nothing ({reason}): "
            f"{_places(rows, lambda row: '')}."
        )
    yield from _memory_events(record)
    spikes = [row for row in record.train if row.get("spike")]
    if spikes:
        yield (
            f"The loss of {len(spikes)} of {counted(record.step, 'step')} was more than "
            f"{DEVIATIONS:g} "
            f"standard deviations above the mean of the up to {WINDOW} losses before: "
            f"{_places(spikes, _spike)}."
        )
    if any(row.get("rows") for row in skipped + spikes):
        yield (
            "Rows are counted from 0 over the files of `data.train` in their order, rows of other "
            "splits left out; in one JSONL file without blank lines, row 0 is line 1. "
            f"`{METRICS_FILE}` has all of them, and in `examples` the numbers of what was made of "
            "them."
        )


def _memory_events(record: Record) -> Iterable[str]:
    train, divisor = record.section("train"), 1
    unit = "tokens" if train.get("micro_batch_tokens") else "examples"
    whole = train.get("micro_batch_tokens") or train.get("per_device_train_batch_size") or 1
    for row in record.train:
        before, divisor = divisor, row.get("micro_batch_divisor", 1)
        if divisor > before:
            yield (
                f"Out of memory at step {row['step']:,}: from there on, the step itself included, "
                f"a micro-batch was {max(1, whole // divisor):,} instead of "
                f"{max(1, whole // before):,} {unit}. Loss and gradient are the same."
            )
    for row in record.valid + record.test:
        if row.get("reduced_batch_size"):
            yield (
                f"Out of memory in the {row['split']} evaluation at step {row['step']:,}: it was "
                f"done in batches of {row['reduced_batch_size']:,}."
            )


def _spike(row: Row) -> str:
    return f"{format_loss(row['loss'])}, {row['spike']:.1f} deviations"


def _places(rows: Sequence[Row], what: Callable[[Row], str], most: int = 8) -> str:
    """Return steps, in brackets what there is to say of each and the rows of its examples."""
    places = []
    for row in rows[:most]:
        numbers = sorted(set(row.get("rows") or []))
        source = f"row{'s' if len(numbers) > 1 else ''} {format_list(numbers)}" if numbers else ""
        inside = "; ".join(text for text in (what(row), source) if text)
        places.append(f"step {row['step']:,}" + (f" ({inside})" if inside else ""))
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(places) + more


def _notes_on_the_end(record: Record) -> Iterable[str]:
    state, reason = record.status.get("state"), record.status.get("reason")
    if state != "finished":
        remedy = (
            "Mend the rows named below, or start anew with a lower optimizer.learning_rate."
            if reason == "non_finite"
            else f"`{command()} --resume {shlex.quote(str(record.folder))}` goes on."
        )
        yield f"The run is not finished: {_outcome(record)}. {remedy}"
    if reason == "early_stopping" and record.best:
        yield (
            f"Stopped early at step {record.step}: no evaluation after step {record.best['step']} "
            "was better "
            f"by more than {record.section('eval').get('early_stopping_threshold', 0.0):g}."
        )


def _notes_on_evaluation(record: Record) -> Iterable[str]:
    finite = [row for row in record.valid if row["loss"] is not None]
    if len(finite) < len(record.valid):
        yield (
            f"{len(record.valid) - len(finite)} of {counted(len(record.valid), 'evaluation')} gave "
            "a loss that is not finite."
        )
    best, last = record.best, finite[-1] if finite else None
    if best is None or last is None:
        if record.train:
            yield (
                "No evaluation was done: whether the model learned more than its rows cannot be "
                "told."
            )
        return
    first = finite[0]
    if len(finite) > 1:
        moved = (first["loss"] - best["loss"]) / first["loss"]
        if moved <= 0:
            yield f"The valid loss never fell below its first value, {format_loss(first['loss'])}."
        elif moved < BARELY_MOVED:
            yield (
                f"The valid loss moved {moved:.1%} ({format_loss(first['loss'])} → "
                f"{format_loss(best['loss'])}): "
                f"barely trained (below {BARELY_MOVED:.0%}); a higher learning rate or more steps "
                "may be needed."
            )
        worse = last["loss"] / best["loss"] - 1
        share = best["step"] / max(1, last["step"])
        if share < BEST_EARLY and worse > WORSE_SINCE:
            yield (
                f"The best evaluation came at step {best['step']}, {share:.0%} of the "
                f"{counted(last['step'], 'step')}; at the end "
                f"the valid loss was {worse:.1%} above it: overfitting. `best/` holds step "
                f"{best['step']}."
            )
        fell = (finite[-2]["loss"] - last["loss"]) / finite[-2]["loss"]
        if last is best and fell > STILL_FALLING and record.status.get("state") == "finished":
            yield (
                f"The valid loss still fell by {fell:.1%} between steps {finite[-2]['step']} and "
                f"{last['step']}: "
                "more epochs may gain more."
            )
    beside = record.train_loss_beside(last)
    if beside and last["step"] and last["loss"] > GAP * beside:
        yield (
            f"At the last evaluation the valid loss ({format_loss(last['loss'])}) is "
            f"{last['loss'] / beside:.1f} times "
            f"the train loss ({format_loss(beside)}): the model learns its rows by heart."
        )
    rows = (record.plan.get("data") or {}).get("valid_examples") or last.get("examples")
    if rows is not None and rows < FEW_ROWS:
        yield (
            f"The valid set has {counted(rows, 'row')} (below {FEW_ROWS}): its loss is noisy, "
            "and small differences or early stopping on it mean little."
        )
    elif last["targets"] < FEW_TARGETS:
        yield (
            f"The valid set has {counted(last['targets'], 'target')} (below {FEW_TARGETS:,}): its "
            "loss is "
            "noisy, "
            "and small differences or early stopping on it mean little."
        )


def _notes_on_steps(record: Record) -> Iterable[str]:
    done = {row["step"] for row in record.train}
    if missing := sorted(set(range(1, record.step + 1)) - done):
        yield f"{len(missing)} of {counted(record.step, 'step')} without a row: {_steps(missing)}."
    bound = record.section("optimizer").get("max_grad_norm")
    norms = [row["grad_norm"] for row in record.train if row["grad_norm"] is not None]
    clipped = sum(norm > bound for norm in norms) / len(norms) if bound and norms else 0.0
    if clipped > OFTEN_CLIPPED:
        yield (
            f"The gradient was clipped to {bound:g} in {clipped:.0%} of the steps (median norm "
            f"{statistics.median(norms):.3g}): the bound, more than the learning rate, set the "
            "size of the steps."
        )
    if norms and not any(norms):
        yield "Every gradient was zero: nothing was trained."


def _outcome(record: Record) -> str:
    state, reason = record.status.get("state", "no status"), record.status.get("reason")
    steps = counted(record.step, "step")
    if record.total_steps:
        steps = f"{record.step:,} of {counted(record.total_steps, 'step')}"
    return f"{state}{f' ({reason})' if reason else ''} after {steps}"


def _heading(record: Record) -> str:
    model, preset = record.section("model").get("path"), record.config.get("preset")
    method = {"lora": "LoRA", "full": "full"}.get(record.section("train").get("method", ""), "")
    what = f"{method} fine-tuning of `{model}`".strip() + (f", preset `{preset}`" if preset else "")
    return f"# {record.name}\n\n{what}: **{_outcome(record)}**."


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
    return "## Result\n\n" + _table(("", ""), rows) if rows else ""


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
        loss, beside = row["loss"], record.train_loss_beside(row)
        change = "" if before is None or loss is None else f"{loss / before - 1:+.1%}"
        rows.append(
            (
                f"{row['step']:,}",
                _epoch(record, row["step"]),
                "—"
                if beside is None
                else format_loss(beside) + ("" if row["step"] else " (step 1)"),
                format_loss(loss),
                change,
                "best" if row is record.best else "",
            )
        )
        before = loss if loss is not None else before
    text = "## Evaluations\n\n"
    if rows:
        header = ("step", "epoch", "train loss", "valid loss", "change", "")
        text += _table(header, rows, "rrrrrl")
        text += (
            "\n\nLosses are nats per target, token means over the whole set "
            f"({record.valid[-1]['targets']:,} valid "
            "targets); the train loss is that of the steps since the evaluation before."
        )
    else:
        text += "None was done."
    if record.test:
        header = ("test at step", "test loss", "targets")
        tests = [
            (f"{row['step']:,}", format_loss(row["loss"]), f"{row['targets']:,}")
            for row in record.test
        ]
        text += "\n\n" + _table(header, tests, "rrr")
    return text


def _plan_against_actual(record: Record) -> str:
    plan, status = record.plan, record.status
    if not plan:
        return ""
    rows: list[tuple[str, str, str]] = []

    def compare(
        name: str, planned: Any, actual: Any, show: Any = lambda value: f"{value:,}"
    ) -> None:
        if planned is not None:
            rows.append((name, show(planned), "—" if actual is None else show(actual)))

    compare("steps", record.total_steps, record.step)
    epochs = record.train[-1]["epoch"] if record.train else 0.0
    if plan.get("steps_per_epoch") and record.total_steps:
        compare(
            "epochs",
            record.total_steps / plan["steps_per_epoch"],
            epochs,
            lambda value: f"{value:.2f}",
        )
    planned_evals = plan.get("eval_steps")
    if planned_evals is not None:
        done = {row["step"] for row in record.valid}
        compare("evaluations", len(planned_evals), len(done & set(planned_evals)))
    compare("warm-up steps", plan.get("warmup_steps"), _warmup_done(record))
    for name in ("trainable_parameters", "total_parameters"):
        compare(name.replace("_", " "), plan.get(name), status.get(name))
    # Of model and training alone: what surrounds them stands under "Speed and memory".
    memory = plan.get("memory") or {}
    if memory.get("total") is not None:
        held = memory["total"] - memory.get("overhead", 0)
        name = "memory of model and training"
        compare(name, held, status.get("training_memory_bytes"), size_text)
    text = "## Plan against actual\n\n" + _table(("", "planned", "actual"), rows, "lrr")
    examples, batch, per_epoch = (
        plan.get(name) for name in ("num_examples", "effective_batch_size", "steps_per_epoch")
    )
    sentences = []
    if examples and batch and per_epoch:
        sentences.append(
            f"{counted(examples, 'example')} in batches of {batch:,} make "
            f"{counted(per_epoch, 'step')} an epoch."
        )
    sentences.append(_learning_rate_check(record))
    return "\n\n".join([text, " ".join(sentences).strip()]).strip()


def _claims(record: Record) -> str:
    """Return what the preset's seed claims, beside what the formulas give for it."""
    rows = [
        (
            claim["statement"],
            {True: "holds", False: "**does not hold**", None: "cannot be checked"}[claim["holds"]],
            claim.get("note") or "",
        )
        for claim in record.plan.get("claims") or []
    ]
    header = ("claim", "", "")
    return "## The seed's claims\n\n" + _table(header, rows, "lll") if rows else ""


def _learning_rate_check(record: Record) -> str:
    """Compare each step's learning rate with the schedule of configuration and plan."""
    schedule, peak = record.section("schedule"), record.section("optimizer").get("learning_rate")
    warmup, total = record.plan.get("warmup_steps"), record.total_steps
    if not record.train or peak is None or warmup is None or total is None:
        return ""
    drawn = [*(record.plan.get("earlier_schedules") or [])]
    drawn.append({"until": math.inf, "warmup_steps": warmup, "total_steps": total})
    wrong = []
    for row in record.train:
        followed = next(one for one in drawn if row["step"] <= one["until"])
        factor = learning_rate_factor(
            schedule["name"],
            row["step"] - 1,
            warmup_steps=followed["warmup_steps"],
            total_steps=followed["total_steps"],
            min_lr_ratio=schedule.get("min_lr_ratio", 0.0),
        )
        if abs(row["learning_rate"] - peak * factor) > LEARNING_RATE_TOLERANCE * peak:
            wrong.append(row["step"])
    if wrong:
        return f"**The learning rate is not the schedule's at {_steps(wrong)}.**"
    return (
        f"The learning rate of all {len(record.train):,} steps is the schedule's "
        f"({schedule['name']})."
    )


def _warmup_done(record: Record) -> int | None:
    """Return the steps before the highest learning rate, None while it may still rise.

    None too where the schedule was redrawn: the peak may lie in either.
    """
    if record.plan.get("earlier_schedules") or len(record.train) <= (
        record.plan.get("warmup_steps") or 0
    ):
        return None
    top = max(record.train, key=lambda row: row["learning_rate"])
    return top["step"] - 1


def _speed(record: Record) -> str:
    seconds = [row["seconds"] for row in record.train]
    if not sum(seconds):
        return ""
    tokens, targets = (sum(row[name] for row in record.train) for name in ("tokens", "targets"))
    evaluating = sum(row.get("seconds") or 0.0 for row in record.valid + record.test)
    rows = [
        ("tokens trained on", f"{tokens:,} ({counted(targets, 'target')})"),
        (
            "throughput",
            f"{tokens / sum(seconds):,.0f} tokens/s, {targets / sum(seconds):,.0f} targets/s",
        ),
        ("step", f"median {_short(statistics.median(seconds))}, slowest {_short(max(seconds))}"),
        ("time in steps", format_duration(sum(seconds))),
    ]
    if evaluating:
        rows.append(("time in evaluation", format_duration(evaluating)))
    if peak := record.status.get("peak_memory_bytes"):
        rows.append(("peak memory", size_text(peak)))
        before = record.status.get("memory_before_bytes")
        if before and record.environment.get("device") == "cpu":
            whole = f"{size_text(peak)}: {size_text(before)} before the model was loaded (Python, "
            whole += "torch, libraries, rows), then model and training, and freed memory that is "
            rows[-1] = ("peak memory of the process", f"{whole}kept for the next step")
    return "## Speed and memory\n\n" + _table(("", ""), rows)


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
                parts.append(f"{heading}:\n\n{_fenced(sample[name])}")
    return "## Sample\n\n" + "\n\n".join(parts) if parts else ""


def _environment(record: Record) -> str:
    rows = [(name, f"`{value}`") for name, value in _flat(record.environment) if value is not None]
    return "## Environment\n\n" + _table(("", ""), rows) if rows else ""


def _configuration(record: Record) -> str:
    text = (record.folder / "config.toml").read_text(encoding="utf-8")
    return "## Configuration\n\n" + _fenced(text, "toml")


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


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _steps(steps: Sequence[int]) -> str:
    """Return the numbers of steps as people list them: `step 3`, `steps 3, 4 and 12 more`."""
    return f"step{'s' if len(steps) > 1 else ''} {format_list(steps)}"


def _bullets(heading: str, lines: Sequence[str]) -> str:
    return f"## {heading}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "ll") -> str:
    """Return a Markdown table; `align` has an `l` or an `r` for each column."""
    rule = ["---:" if side == "r" else "---" for side in align]
    cells = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _fenced(text: str, language: str = "") -> str:
    """Return the text as a code block that no run of backquotes in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
