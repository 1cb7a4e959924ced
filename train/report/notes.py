"""What stands out in a run: what a careful reader of its numbers would say, and what happened."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence

from files.errors import counted
from train.log.console import redrawn_text
from train.log.metrics import METRICS_FILE, Row
from train.process.command import command
from train.report.readers import note_on_readers
from train.report.record import Record
from train.state import DEVIATIONS, WINDOW
from train.text import format_loss, numbered

# Thresholds. Each note states its numbers, so that the reader may judge otherwise.
BARELY_MOVED = 0.01  # share of its first value that the valid loss has to fall by
STILL_FALLING = 0.01  # fall at the last evaluation, as a share of the loss, that promises more
BEST_EARLY = 0.8  # overfitting: best before this share of the steps …
WORSE_SINCE = 0.005  # … and this much worse since
FEW_ROWS, FEW_TARGETS = 100, 10_000  # a valid set below either is noisy
GAP = 1.5  # valid loss over train loss at the last evaluation
OFTEN_CLIPPED = 0.5  # share of the steps whose gradient was clipped


def notes(record: Record) -> list[str]:
    """Return what a careful reader of the numbers would say, each with the numbers it rests on."""
    candidates = [
        *_notes_on_the_end(record),
        note_on_readers(record.folder),
        *_notes_on_evaluation(record),
        *_notes_on_steps(record),
    ]
    return [note for note in candidates if note]


def events(record: Record) -> Iterable[str]:
    """Yield what does not happen in every run: resumes, updates left out, holes, memory, spikes."""
    if resumed := record.status.get("resumed_from"):
        yield f"Resumed from {numbered('step', resumed)}."
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
    for row in record.valid + record.test:
        if row.get("holes"):
            share = f"{row['exact_match']:.1%} of {counted(row['holes'], 'hole')}"
            yield f"Step {row['step']:,}: {share} of the {row['split']} set filled exactly."
    yield from _memory_events(record)
    spikes = [row for row in record.train if row.get("spike")]
    if spikes:
        yield (
            f"The loss of {len(spikes)} of {counted(record.step, 'step')} was more than "
            f"{DEVIATIONS:g} standard deviations above the mean of the up to {WINDOW} losses "
            f"before: {_places(spikes, _spike)}."
        )
    if any(row.get("rows") for row in skipped + spikes):
        yield (
            "Rows are counted from 0 over the files of `data.train` in their order, rows of other "
            "splits left out; in one JSONL file without blank lines, row 0 is line 1. "
            f"`{METRICS_FILE}` has all of them, and in `examples` the numbers of what was made of "
            "them."
        )


def _notes_on_the_end(record: Record) -> Iterable[str]:
    state, reason = record.status.get("state"), record.status.get("reason")
    if state != "finished":
        remedy = (
            "Mend the rows named below, or start anew with a lower optimizer.learning_rate."
            if reason == "non_finite"
            else f"`{command()} --resume {shlex.quote(str(record.folder))}` goes on."
        )
        yield f"The run is not finished: {record.outcome}. {remedy}"
    if reason == "early_stopping" and record.best:
        threshold = record.section("eval").get("early_stopping_threshold", 0.0)
        yield (
            f"Stopped early at step {record.step}: no evaluation after step {record.best['step']} "
            f"was better by more than {threshold:g}."
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
                f"{format_loss(best['loss'])}): barely trained (below {BARELY_MOVED:.0%}); a "
                "higher learning rate or more steps may be needed."
            )
        worse = last["loss"] / best["loss"] - 1
        share = best["step"] / max(1, last["step"])
        if share < BEST_EARLY and worse > WORSE_SINCE:
            yield (
                f"The best evaluation came at step {best['step']}, {share:.0%} of the "
                f"{counted(last['step'], 'step')}; at the end the valid loss was {worse:.1%} above "
                f"it: overfitting. `best/` holds step {best['step']}."
            )
        fell = (finite[-2]["loss"] - last["loss"]) / finite[-2]["loss"]
        if last is best and fell > STILL_FALLING and record.status.get("state") == "finished":
            yield (
                f"The valid loss still fell by {fell:.1%} between steps {finite[-2]['step']} and "
                f"{last['step']}: more epochs may gain more."
            )
    beside = record.train_loss_beside(last)
    if beside and last["step"] and last["loss"] > GAP * beside:
        yield (
            f"At the last evaluation the valid loss ({format_loss(last['loss'])}) is "
            f"{last['loss'] / beside:.1f} times the train loss ({format_loss(beside)}): the model "
            "learns its rows by heart."
        )
    rows = (record.plan.get("data") or {}).get("valid_examples") or last.get("examples")
    few = ""
    if rows is not None and rows < FEW_ROWS:
        few = f"{counted(rows, 'row')} (below {FEW_ROWS})"
    elif last["targets"] < FEW_TARGETS:
        few = f"{counted(last['targets'], 'target')} (below {FEW_TARGETS:,})"
    if few:
        yield (
            f"The valid set has {few}: its loss is noisy, and small differences or early stopping "
            "on it mean little."
        )


def _notes_on_steps(record: Record) -> Iterable[str]:
    done = {row["step"] for row in record.train}
    if missing := sorted(set(range(1, record.step + 1)) - done):
        steps = counted(record.step, "step")
        yield f"{len(missing)} of {steps} without a row: {numbered('step', missing)}."
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
    policy = record.section("model").get("gradient_checkpointing") or "none"
    for row in record.train:
        before, policy = policy, row.get("gradient_checkpointing", policy)
        if policy != before:
            yield (
                f"Out of memory at step {row['step']:,} with single examples: from there on, the "
                f"step itself included, layers kept less of what their backward pass needs "
                f"(model.gradient_checkpointing={policy} instead of {before}). Loss and gradient "
                "are the same."
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
        source = numbered("row", numbers) if numbers else ""
        inside = "; ".join(text for text in (what(row), source) if text)
        places.append(f"step {row['step']:,}" + (f" ({inside})" if inside else ""))
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(places) + more
