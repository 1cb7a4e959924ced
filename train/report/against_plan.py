"""What was planned beside what was done, in a run's report."""

from __future__ import annotations

import math
from typing import Any

from files.errors import counted
from train.plan.schedule import learning_rate_factor
from train.report.record import Record
from train.text import markdown_table, numbered

# Learning rates are written unrounded; anything beyond a few roundings of fp64 is another schedule.
LEARNING_RATE_TOLERANCE = 1e-12


def plan_against_actual(record: Record) -> str:
    """Return the section that compares them, with the check of every learning rate."""
    plan, status = record.plan, record.status
    if not plan:
        return ""
    rows: list[tuple[str, str, str]] = []
    tokens = plan.get("effective_batch_tokens")

    def compare(
        name: str, planned: Any, actual: Any, show: Any = lambda value: f"{value:,}"
    ) -> None:
        if planned is not None:
            rows.append((name, show(planned), "—" if actual is None else show(actual)))

    compare("steps", record.total_steps, record.step)
    epochs = record.train[-1]["epoch"] if record.train else 0.0
    if plan.get("steps_per_epoch") and record.total_steps:
        planned_epochs = record.total_steps / plan["steps_per_epoch"]
        if tokens:  # epochs differ in their steps
            planned_epochs = plan["epochs"]
        compare("epochs", planned_epochs, epochs, lambda value: f"{value:.2f}")
    planned_evals = plan.get("eval_steps")
    if planned_evals is not None:
        done = {row["step"] for row in record.valid}
        compare("evaluations", len(planned_evals), len(done & set(planned_evals)))
    compare("warm-up steps", plan.get("warmup_steps"), _warmup_done(record))
    for name in ("trainable_parameters", "total_parameters"):
        compare(name.replace("_", " "), plan.get(name), status.get(name))
    text = "## Plan against actual\n\n" + markdown_table(("", "planned", "actual"), rows, "lrr")
    examples, batch, per_epoch = (
        plan.get(name) for name in ("num_examples", "effective_batch_size", "steps_per_epoch")
    )
    sentences = []
    if examples and batch and per_epoch:
        size, steps = f"{batch:,}", counted(per_epoch, "step")
        if tokens:
            size, steps = f"at least {counted(tokens, 'target')}", f"about {steps}"
        sentences.append(
            f"{counted(examples, 'example')} in batches of {size} make {steps} an epoch."
        )
    sentences.append(_learning_rate_check(record))
    return "\n\n".join([text, " ".join(sentences).strip()]).strip()


def claims(record: Record) -> str:
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
    return "## The seed's claims\n\n" + markdown_table(header, rows, "lll") if rows else ""


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
            decay_ratio=schedule.get("decay_ratio", 0.1),
        )
        if abs(row["learning_rate"] - peak * factor) > LEARNING_RATE_TOLERANCE * peak:
            wrong.append(row["step"])
    if wrong:
        return f"**The learning rate is not the schedule's at {numbered('step', wrong)}.**"
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
