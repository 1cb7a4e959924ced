"""What surrounds the loop: the opening panel, a first look at the model, and the closing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from files.errors import UserError, counted
from files.faults import faultpoint
from files.folders import MANIFEST
from kernels.rounding import library
from lora import adapter_config
from train.generate import find_stop_ids, generate
from train.log.console import closing_summary, format_count, redrawn_text
from train.log.samples import MOST_NEW_TOKENS, choose_samples
from train.precision import COMPUTE_DTYPES
from train.report.page import write_report
from train.session import Session, whole_best
from train.signals import Signals


def opening_panel(session: Session) -> None:
    """Say what is about to be trained, on what, and how."""
    config, plan, data = session.config, session.plan, session.data
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in session.model.parameters())
    method = "every weight"
    if config.train.method == "lora":
        # Those of the adapter itself: lora.init_from brings its own.
        lora = adapter_config(session.model)
        targets = lora.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        method = f"LoRA r={lora.r} alpha={lora.lora_alpha} on {named}"
    counts = data.train.counts
    sets = " · ".join(
        f"{name} {len(examples):,}"
        for name, examples in (("train", data.train), ("valid", data.valid), ("test", data.test))
        if examples is not None
    )
    products = library(session.device, COMPUTE_DTYPES[config.train.precision])
    steps = f"{counted(plan.total_steps, 'step')}, {plan.steps_per_epoch} an epoch"
    evaluations = f"{counted(len(plan.eval_steps), 'evaluation')}, " if plan.eval_steps else ""
    session.console.panel(
        f"Lathe · {config.train.run_name or config.preset or 'run'}",
        [
            ("model", f"{config.model.path} ({format_count(total)} parameters)"),
            ("method", f"{method}: {trained:,} trained, {trained / total:.2%}"),
            ("examples", sets),
            (
                "tokens",
                f"{counts.tokens:,}, {counts.targets:,} of them targets; "
                f"{counted(counts.truncated, 'row')} cut, {counts.dropped:,} dropped",
            ),
            (
                "step",
                f"{counted(plan.effective_batch_size, 'example')}, in {plan.micro_batch_text}, "
                f"{config.data.batching}",
            ),
            (
                "run",
                f"{steps}; {evaluations}{counted(len(plan.save_steps), 'save')}",
            ),
            (
                "learning rate",
                f"{config.optimizer.learning_rate:g}, {config.schedule.name}, "
                f"{counted(plan.warmup_steps, 'step')} of warm-up, {config.optimizer.name}",
            ),
            (
                "computes in",
                f"{config.train.precision} on {session.device.type} "
                f"({counted(torch.get_num_threads(), 'thread')}), products {products}, attention "
                f"{session.model.attention_implementation}, kernels {session.model.operations.name}"
                f"{', gradient checkpointing' if session.model.gradient_checkpointing else ''}",
            ),
            ("folder", str(session.folder)),
        ],
    )
    plan_document = json.loads((session.folder / "plan.json").read_bytes())
    for warning in plan_document["warnings"]:
        session.console.say(f"note: {warning}")
    if session.state.step:
        session.console.say(f"resumed at step {session.state.step} of {plan.total_steps}")
    for earlier in plan_document["earlier_schedules"]:
        if earlier["until"] == session.state.step:
            session.console.say(redrawn_text(earlier, plan.total_steps))


def before_training(session: Session) -> None:
    """Do what `eval.on_start` and `eval.samples` ask for before the first step.

    A resumed run has done so before it stopped; its session holds the samples of then.
    """
    session.write_status("running", "started")
    if session.state.step > 0:
        return
    if session.config.eval.on_start:
        for split, examples in (("valid", session.data.valid), ("test", session.data.test)):
            if examples is not None:
                session.record_evaluation(split, session.evaluate(examples))
    complete_samples(session, "before")


def complete_samples(session: Session, when: str) -> None:
    """Complete the prompts of `eval.samples` held-out rows, `before` or `after` training."""
    examples = session.data.test or session.data.valid
    count = session.config.eval.samples
    if count == 0 or examples is None:
        return
    tokenizer = session.data.tokenizer
    stop_ids = find_stop_ids(session.model.config, tokenizer, session.source.folder)
    chosen = choose_samples(examples, tokenizer, count)
    if len(session.samples) != len(chosen):
        session.samples = [sample for sample, _ in chosen]
    for sample, (_, prompt_ids) in zip(session.samples, chosen, strict=True):
        with session.precision.autocast():
            ids = generate(
                session.model, prompt_ids, max_new_tokens=MOST_NEW_TOKENS, stop_ids=stop_ids
            )
        setattr(sample, when, tokenizer.decode(ids))


def finish(session: Session, reason: str, signals: Signals) -> str:
    """Write `final/`, evaluate the test set on it, and leave status, report and summary.

    A run that was stopped keeps its checkpoint and says how to go on.

    Returns:
        `reason`, or the name of a signal that came after the last step.
    """
    session.writer.wait()
    faultpoint("run.ends")
    if signals.stop is not None:
        reason = signals.stop.name.lower()
    if reason not in ("completed", "early_stopping"):
        condition = "failed" if reason == "non_finite" else "preempted"
        status = session.write_status(condition, reason)
        write_report(session.folder)
        session.console.summary(*closing_summary(status, session.folder))
        return reason
    best, best_step = session.folder / "best", session.state.stopping.best_step
    if session.config.checkpoint.load_best_at_end and best_step is not None:
        if not whole_best(best, best_step):
            raise UserError(
                f"{best}: missing, damaged or not that of step {best_step}, but "
                "checkpoint.load_best_at_end=true promises it as final/; resume the run from a "
                "checkpoint at or before its best step"
            )
        session.load_trained(best)
        session.write_final(lambda folder: _copy_files(best, folder), best_step)
    else:
        session.write_final(session.export, session.state.step)
    faultpoint("run.final")
    if session.data.test is not None:
        session.record_evaluation("test", session.evaluate(session.data.test))
    complete_samples(session, "after")
    session.metrics.sync()
    status = session.write_status("finished", reason)
    write_report(session.folder)
    session.console.summary(*closing_summary(status, session.folder))
    return reason


def _copy_files(source: Path, target: Path) -> dict[str, str]:
    """Copy a folder's files, all but its manifest; the hashes are left to be read again."""
    for path in source.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)
    return {}
