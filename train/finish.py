"""What surrounds the loop: the opening panel, a first look at the model, and the closing."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch

from data.examples import Examples
from files.errors import UserError, counted
from files.faults import faultpoint
from files.folders import MANIFEST
from kernels.cpu.rounding import library
from lora import adapter_config
from train.evaluation.during import evaluate_run
from train.evaluation.programs import warning
from train.evaluation.rated import RUNS_PROGRAMS
from train.generate import generate
from train.generation.loaded import find_stop_ids
from train.log.console import closing_summary, redrawn_text
from train.log.records import Records
from train.log.samples import MOST_NEW_TOKENS, choose_samples
from train.loop import agreed
from train.plan.text import head_rows
from train.precision import COMPUTE_DTYPES
from train.process.signals import Signals
from train.report.page import write_report
from train.report.readers import note_on_readers
from train.saving.folder import export
from train.saving.restore import whole_best
from train.saving.saver import Saver, load_trained
from train.state import Run


def opening_panel(run: Run, records: Records) -> None:
    """Say what is about to be trained, on what, and how: the head of the plan, and what runs it."""
    config, model, counts = run.config, run.model, run.data.train.counts
    document = json.loads((run.folder / "plan.json").read_bytes())
    method = "every weight"
    if config.train.method == "lora":
        # Those of the adapter itself: lora.init_from brings its own.
        lora = adapter_config(model)
        targets = lora.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        method = f"LoRA r={lora.r} alpha={lora.lora_alpha} on {named}"
    masters = ", bf16 masters" if config.train.masters == "bf16" else ""
    products = library(run.precision.device, COMPUTE_DTYPES[config.train.precision])
    policy = model.gradient_checkpointing
    recomputing = "" if policy == "none" else f", recomputing {policy}"
    records.console.panel(
        f"Lathe · {config.train.run_name or config.preset or 'run'}",
        [
            *head_rows(document),
            ("trained", f"{method}, {config.optimizer.name}, {config.schedule.name}{masters}"),
            (
                "tokens",
                f"{counts.tokens:,}, {counts.targets:,} of them targets; "
                f"{counted(counts.truncated, 'row')} cut, {counts.dropped:,} dropped; "
                f"{config.data.batching}",
            ),
            (
                "computes in",
                f"{config.train.precision} on {run.precision.device.type} "
                f"({counted(torch.get_num_threads(), 'thread')}), products {products}, attention "
                f"{model.attention_implementation}, kernels {model.operations.name}{recomputing}",
            ),
            ("folder", str(run.folder)),
        ],
    )
    for objection in document["warnings"]:
        records.say(f"note: {objection}")
    if "pass@1" in (config.eval.metrics or ()):
        records.say(f"note: {warning(RUNS_PROGRAMS)}")
    if run.state.step:
        records.say(f"resumed at step {run.state.step} of {run.plan.total_steps}")
    for earlier in document["earlier_schedules"]:
        if earlier["until"] == run.state.step:
            records.say(redrawn_text(earlier, run.plan.total_steps))


def before_training(run: Run, records: Records, saver: Saver) -> None:
    """Do what `eval.on_start` and `eval.samples` ask for before the first step.

    A resumed run has done so before it stopped; it holds the samples of then.
    """
    saver.write_status("running", "started")
    if run.state.step > 0:
        return
    if run.config.eval.on_start:
        for split, examples in (("valid", run.data.valid), ("test", run.data.test)):
            if examples is not None:
                _evaluate(run, records, split, examples)
    complete_samples(run, "before")


def _evaluate(run: Run, records: Records, split: str, examples: Examples) -> None:
    records.evaluation(split, evaluate_run(run, examples))


def complete_samples(run: Run, when: str) -> None:
    """Complete the prompts of `eval.samples` held-out rows, `before` or `after` training."""
    examples = run.data.test or run.data.valid
    count = run.config.eval.samples
    if count == 0 or examples is None:
        return
    tokenizer = run.data.tokenizer
    stop_ids = find_stop_ids(run.model.config, tokenizer, run.source.folder)
    if run.data.fim is not None:
        stop_ids |= {run.data.fim.tokens.end_id}
    chosen = choose_samples(examples, tokenizer, count)
    if len(run.samples) != len(chosen):
        run.samples[:] = [sample for sample, _ in chosen]
    for sample, (_, prompt_ids) in zip(run.samples, chosen, strict=True):
        with run.precision.autocast():
            ids = generate(run.model, prompt_ids, max_new_tokens=MOST_NEW_TOKENS, stop_ids=stop_ids)
        setattr(sample, when, tokenizer.decode(ids))


def finish(run: Run, records: Records, saver: Saver, reason: str, signals: Signals) -> str:
    """Write `final/`, evaluate the test set on it, and leave status, report and summary.

    A run that was stopped keeps its checkpoint and says how to go on.

    Returns:
        `reason`, or the name of a signal that came after the last step.
    """
    saver.writer.wait()
    faultpoint("run.ends")
    reason = agreed(run.world, signals, overdue=False)[0] or reason
    ends = {"completed": "finished", "early_stopping": "finished", "non_finite": "failed"}
    condition = ends.get(reason, "preempted")
    if condition == "finished":
        _write_final(run, saver)
        faultpoint("run.final")
        if note := note_on_readers(run.folder):
            records.say(f"note: {note}")
        if run.data.test is not None:
            _evaluate(run, records, "test", run.data.test)
        complete_samples(run, "after")
        records.sync()
    status = saver.write_status(condition, reason)
    if run.world.first:
        write_report(run.folder)
        records.console.summary(*closing_summary(status, run.folder))
    return reason


def _write_final(run: Run, saver: Saver) -> None:
    """Make `final/`, of the present weights or of the best ones, which are then the model's."""
    best, best_step = run.folder / "best", run.state.stopping.best_step
    if not run.config.checkpoint.load_best_at_end or best_step is None:
        saver.replace("final", partial(export, run), run.state.step)
        return
    if run.world.first and not whole_best(best, best_step):
        raise UserError(
            f"{best}: missing, damaged or not that of step {best_step}, but "
            "checkpoint.load_best_at_end=true promises it as final/; resume the run from a "
            "checkpoint at or before its best step"
        )
    load_trained(run, best)
    copy = partial(_copy_files, best) if run.world.first else lambda _: {}
    saver.replace("final", copy, best_step)


def _copy_files(source: Path, target: Path) -> dict[str, str]:
    """Copy a folder's files, all but its manifest; the hashes are left to be read again."""
    for path in source.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)
    return {}
