"""What a run took, in its report: time, memory, disk, and what the plan had predicted of them."""

from __future__ import annotations

import re
import statistics
from typing import Any

from files.errors import counted
from train.plan.cards import CARDS, Card
from train.plan.ledger import SHARE_OF_PEAK
from train.report.record import Record
from train.text import format_duration, format_seconds, markdown_table, size_text

# The plan's memory is tested within 10 % of what is measured under every policy; beyond twice that
# something was not foreseen.
MEMORY_OFF = 0.2
# A prediction by operations alone knows nothing of what waits for memory or for rows.
TIME_OFF = 2.0


def predicted_against_measured(record: Record) -> str:
    """Return the section that sets memory, work, time and disk beside the plan's figures."""
    plan, status = record.plan, record.status
    if not plan or not record.train:
        return ""
    rows: list[tuple[str, str, str, str]] = []
    sentences: list[str] = []

    def compare(name: str, predicted: float | None, measured: float | None, show: Any) -> float:
        """Add a row of what is known, and return measured over predicted; 0 where it is not."""
        ratio = measured / predicted if measured and predicted else 0.0
        if predicted is not None or measured is not None:
            left, right = ("—" if value is None else show(value) for value in (predicted, measured))
            rows.append((name, left, right, f"{ratio:.2f} ×" if ratio else ""))
        return ratio

    on_cpu = plan.get("device") == "cpu"
    memory = plan.get("memory") or {}
    held = memory.get("total")
    if held is not None and not on_cpu:
        # On a card much of the overhead is the driver's and the allocator's.
        held -= memory.get("overhead", 0)
    trained = status.get("training_memory_bytes")
    off = compare("memory of model and training", held, trained, size_text)
    if off > 1 + MEMORY_OFF:  # a short run may take less: it need not meet the largest micro-batch
        sentences.append(
            f"**Model and training took {off - 1:.0%} more memory than predicted** "
            f"(beyond {MEMORY_OFF:.0%})."
        )
    done = record.step / record.total_steps if record.total_steps else 0.0
    compute = plan.get("compute") or {}
    tokens, flops = (done * (compute.get(name) or 0) or None for name in ("tokens", "flops"))
    compare("tokens", tokens, sum(row["tokens"] for row in record.train), lambda x: f"{x:,.0f}")
    seconds = sum(row["seconds"] for row in record.train)
    ranks, card = plan.get("world_size") or 1, card_of(record)
    predicted = None
    if card and flops:
        predicted = flops / ranks / (SHARE_OF_PEAK * card.peak_flops)
    each = predicted / record.step if predicted and record.step else None
    off = compare("a step", each, seconds / len(record.train), format_seconds)
    compare("all steps", predicted, seconds, format_duration)
    if off > TIME_OFF or 0 < off < 1 / TIME_OFF:
        than = "longer" if off > 1 else "shorter"
        sentences.append(f"**Steps took {max(off, 1 / off):.1f} times {than} than predicted.**")
    disk = (plan.get("disk") or {}).get("total")
    if done == 1 and disk:
        compare("disk", disk, _disk(record), size_text)
    if flops and seconds:
        rate = flops / seconds / ranks
        share = f", {rate / card.peak_flops:.0%} of its peak" if card else ""
        sentences.append(f"Operations, as the plan counts them: {rate / 1e9:,.1f} GFLOP/s{share}.")
    if card:
        sentences.append(
            f"Time is predicted from operations alone, at {SHARE_OF_PEAK:.0%} of the bf16 peak of "
            f"the {card.name}."
        )
    elif flops:
        sentences.append("The plan predicts no time for this device: it knows cards alone.")
    table = markdown_table(("", "predicted", "measured", "ratio"), rows, "lrrr")
    return "\n\n".join(["## Predicted against measured", table, " ".join(sentences)]).strip()


def speed_and_memory(record: Record) -> str:
    """Return the section of what was measured."""
    seconds = [row["seconds"] for row in record.train]
    if not sum(seconds):
        return ""
    tokens, targets = (sum(row[name] for row in record.train) for name in ("tokens", "targets"))
    evaluating = sum(row.get("seconds") or 0.0 for row in record.valid + record.test)
    median = format_seconds(statistics.median(seconds))
    throughput, trained = tokens / sum(seconds), targets / sum(seconds)
    rows = [
        ("tokens trained on", f"{tokens:,} ({counted(targets, 'target')})"),
        ("throughput", f"{throughput:,.0f} tokens/s, {trained:,.0f} targets/s"),
        ("step", f"median {median}, slowest {format_seconds(max(seconds))}"),
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
    return "## Speed and memory\n\n" + markdown_table(("", ""), rows)


def card_of(record: Record) -> Card | None:
    """Return the card that a run computed on, by its device's name; None where none is known."""
    if record.environment.get("device") != "cuda":
        return None
    words = re.findall(r"[a-z0-9]+", str(record.environment.get("device_name", "")).lower())
    named = [name for name in CARDS if set(name.split("-")) <= set(words)]
    return CARDS[max(named, key=len)] if named else None


def _disk(record: Record) -> int:
    """Return the bytes of a run's checkpoints, `best/` and `final/`."""
    folders = [*record.folder.glob("checkpoints/step-*"), record.folder / "best"]
    files = (path for folder in [*folders, record.folder / "final"] for path in folder.glob("*"))
    return sum(path.stat().st_size for path in files)
