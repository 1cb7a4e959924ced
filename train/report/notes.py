"""What stands out in a run: what a careful reader of its numbers would say, and what happened."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence

from files.errors import counted
from train.log.console import redrawn_text
from train.log.metrics import METRICS_FILE, Row
from train.log.step_trace import PROFILE_FOLDER
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
# Divergence: means over a tenth of the steps, of five or more each, where the noise of single steps
# has mostly gone; the last one this share above the lowest.
TENTHS, STEPS_OF_A_TENTH, RISEN = 10, 5, 0.2
# Unstable: more than this share of the norms beyond so many medians. Clipping makes one harmless.
FAR_NORM, OFTEN_FAR = 10.0, 0.01
# Of the peak: every schedule stands at the peak itself at the end of its warm-up.
REACHED = 0.99
# AdamW moves a weight by about the learning rate a step at most: by 1e-2 in 50 steps at 2e-4, less
# than the weights of most models.
FEW_STEPS = 50
OFTEN_SKIPPED = 0.05  # share of the steps without an update


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
    if traces := sorted(path.name for path in record.folder.glob(f"{PROFILE_FOLDER}/*.json.gz")):
        names = ", ".join(f"`{PROFILE_FOLDER}/{name}`" for name in traces)
        yield f"Profiled: {names}; the steps in them took longer for it."
    if damaged := sorted(path.name for path in record.folder.glob("checkpoints/corrupt-*")):
        yield f"Damaged, and set aside: {', '.join(damaged)}."
    if column := record.section("data").get("weight_field"):
        yield (
            f"Targets of the training rows were weighed by their `{column}`, and so the train loss "
            "is a weighted mean; valid and test losses count every target once."
        )
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
        moved = _fall(first, best)
        if moved <= 0:
            yield f"The valid loss never fell below its first value, {format_loss(first['loss'])}."
        elif moved < BARELY_MOVED:
            yield (
                f"The valid loss moved {moved:.1%} ({format_loss(first['loss'])} → "
                f"{format_loss(best['loss'])}): barely trained (below {BARELY_MOVED:.0%}); a "
                "higher learning rate or more steps may be needed."
            )
        worse = -_fall(best, last)
        share = best["step"] / max(1, last["step"])
        if share < BEST_EARLY and worse > WORSE_SINCE:
            yield (
                f"The best evaluation came at step {best['step']}, {share:.0%} of the "
                f"{counted(last['step'], 'step')}; at the end the valid loss was {worse:.1%} above "
                f"it: overfitting. `best/` holds step {best['step']}."
            )
        fell = _fall(finite[-2], last)
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
    if few := small_valid_set(record):
        yield (
            f"The valid set has {few}: its loss is noisy, and small differences or early stopping "
            "on it mean little."
        )


def small_valid_set(record: Record) -> str:
    """Return how small the valid set is where its loss says little; else nothing."""
    last = record.valid[-1]
    rows = (record.plan.get("data") or {}).get("valid_examples") or last.get("examples")
    if rows is not None and rows < FEW_ROWS:
        return f"{counted(rows, 'row')} (below {FEW_ROWS})"
    if last["targets"] < FEW_TARGETS:
        return f"{counted(last['targets'], 'target')} (below {FEW_TARGETS:,})"
    return ""


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
    median = statistics.median(norms) if norms else 0.0
    far = [row for row in record.train if (row["grad_norm"] or 0.0) > FAR_NORM * median > 0]
    if len(far) > max(1, OFTEN_FAR * len(norms)):
        top = max(far, key=lambda row: row["grad_norm"])
        yield (
            f"The gradient norm was unstable: in {counted(len(far), 'step')} "
            f"({len(far) / len(norms):.1%}) it was more than {FAR_NORM:g} times its median of "
            f"{median:.3g}, at step {top['step']:,} {top['grad_norm']:.3g}. A lower "
            "optimizer.learning_rate, a longer warm-up or rows of less unlike length may help."
        )
    skipped = sum(bool(row.get("skipped")) for row in record.train)
    if skipped > OFTEN_SKIPPED * max(1, len(record.train)):
        yield (
            f"{skipped / len(record.train):.0%} of the steps changed nothing (more than "
            f"{OFTEN_SKIPPED:.0%}): the run was shorter than planned."
        )
    yield from _notes_on_the_learning_rate(record)
    yield from _notes_on_divergence(record)


def _notes_on_the_learning_rate(record: Record) -> Iterable[str]:
    """Yield what a run that has ended never came to: the peak, or enough steps."""
    peak = record.section("optimizer").get("learning_rate")
    if not record.train or record.status.get("state") not in ("finished", "failed"):
        return
    top = max(record.train, key=lambda row: row["learning_rate"])
    if peak and top["learning_rate"] < REACHED * peak:
        warmup = record.plan.get("warmup_steps")
        yield (
            f"The learning rate never reached its peak: the highest used was "
            f"{top['learning_rate']:.3g} of {peak:.3g}, at step {top['step']:,}"
            + (f" (warm-up takes {counted(warmup, 'step')})." if warmup else ".")
        )
    if 0 < record.step < FEW_STEPS:
        way = sum(row["learning_rate"] for row in record.train)
        yield (
            f"The run had {counted(record.step, 'step')} (below {FEW_STEPS}): all learning rates "
            f"together are {way:.2g}, about as far as AdamW moves a weight at most; smaller steps "
            "(train.gradient_accumulation_steps) or more epochs make more of them."
        )


def _notes_on_divergence(record: Record) -> Iterable[str]:
    """Yield that the train loss, by means over a tenth of the steps, ended above its lowest."""
    rows = [row for row in record.train if row["loss"] is not None and row["targets"]]
    size = len(rows) // TENTHS
    if size < STEPS_OF_A_TENTH:
        return
    parts = [rows[len(rows) - size * (n + 1) : len(rows) - size * n] for n in range(TENTHS)]
    means = [
        sum(row["loss"] * row["targets"] for row in part) / sum(row["targets"] for row in part)
        for part in parts
    ]
    low = min(range(TENTHS), key=means.__getitem__)
    risen = means[0] / means[low] - 1
    if risen > RISEN:
        first, last = parts[low][0]["step"], parts[low][-1]["step"]
        yield (
            f"The train loss diverged: its mean over the last {counted(size, 'step')} is "
            f"{format_loss(means[0])}, {risen:.0%} above that of steps {first:,} to {last:,} "
            f"({format_loss(means[low])}; more than {RISEN:.0%} is no chance). A lower "
            "optimizer.learning_rate or a longer warm-up may hold it."
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


def _fall(before: Row, after: Row) -> float:
    """Return the fall of the loss as a share of the first; 0 where that was 0 already."""
    return (before["loss"] - after["loss"]) / before["loss"] if before["loss"] else 0.0


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
