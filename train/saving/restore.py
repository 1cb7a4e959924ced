"""Going on from a checkpoint: first what can be refused is read, then the folder is put right."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from files.errors import UserError
from files.folders import damage, step_of
from files.tensors import TensorFile
from train.saving.checkpoints import Checkpoints, set_aside
from train.saving.folder import export
from train.saving.identity import check_identity
from train.saving.resume import Resume
from train.saving.saver import Saver, load_trained
from train.state import Run


def restore(
    run: Run, resume: Resume, identity: Mapping[str, Any], checkpoints: Checkpoints
) -> list[str]:
    """Take up a checkpoint: fill weights, optimizer and scaler. Nothing changes on the disk.

    The run's state is that of `resume` already; `identity` is what it is trained from now.

    Returns:
        Warnings of what may change the last bits.

    Raises:
        UserError: The checkpoint does not fit the configuration, the data or the base model.
    """
    assert resume.checkpoint is not None
    assert resume.identity is not None
    warnings = check_identity(resume.identity, identity)
    state = run.state
    best_step = state.stopping.best_step
    lost = best_is_lost(resume, identity, checkpoints, best_step)
    if run.config.checkpoint.load_best_at_end and lost:
        raise UserError(
            f"--resume: {resume.folder / 'best'} is not that of step {best_step}, which has no "
            "checkpoint to make it from again, but checkpoint.load_best_at_end=true promises "
            "it: resume from a checkpoint at or before that step"
        )
    load_trained(run, resume.checkpoint)
    with TensorFile(resume.checkpoint / "optimizer.safetensors") as file:
        run.optimizer.load_state({name: file.read(name) for name in file.names})
    state.stopping.patience = run.config.eval.early_stopping_patience
    state.resumed_from.append(state.step)
    if run.scaler is not None and state.scaler is not None:
        run.scaler.load(state.scaler)
    return warnings


def settle(saver: Saver, resume: Resume) -> list[str]:
    """Put the run's folder into the state of the checkpoint taken up; return warnings."""
    run, checkpoints = saver.run, saver.checkpoints
    state, stopping, best = run.state, run.state.stopping, run.folder / "best"
    warnings = []
    if best_is_lost(resume, saver.identity(), checkpoints, stopping.best_step):
        warnings.append(
            f"{best} is not that of step {stopping.best_step}: it is deleted, and the next "
            "evaluation is the best"
        )
        shutil.rmtree(best, ignore_errors=True)
        stopping.best_step = stopping.best_loss = None
    elif stopping.best_step is not None:
        _mend_best(saver, resume, stopping.best_step)
    checkpoints.set_newer_aside(state.step)
    # A kill may have come between a checkpoint and the deletion of those beyond the limit.
    checkpoints.rotate(stopping.best_step)
    final = run.folder / "final"
    if state.step < run.plan.total_steps and final.is_dir():
        set_aside(final, "aside")
    return warnings


def _mend_best(saver: Saver, resume: Resume, best_step: int) -> None:
    """Make `best/` from the checkpoint of `best_step` where it is not that step's already."""
    checkpoint = saver.checkpoints.path(best_step)
    if whole_best(saver.run.folder / "best", best_step) or damage(checkpoint) is not None:
        return
    assert resume.checkpoint is not None
    load_trained(saver.run, checkpoint)
    saver.replace("best", partial(export, saver.run), best_step)
    load_trained(saver.run, resume.checkpoint)


def best_is_lost(
    resume: Resume, identity: Mapping[str, Any], checkpoints: Checkpoints, best_step: int | None
) -> bool:
    """Return whether `best/` is not that of `best_step` and nothing will make it so.

    A checkpoint of that step does, and so do the same steps and evaluations where a kill came
    after a newer best was written and before its checkpoint.
    """
    best = resume.folder / "best"
    if best_step is None or whole_best(best, best_step):
        return False
    if damage(checkpoints.path(best_step)) is None:
        return False
    assert resume.identity is not None
    assert resume.state is not None
    decides = ("eval.", "train.max_steps", "train.num_train_epochs")
    same = all(
        resume.identity["config"].get(key) == value
        for key, value in identity["config"].items()
        if key.startswith(decides)
    )
    comes_again = damage(best) is None and (step_of(best) or 0) > resume.state.step
    return not (same and comes_again)


def whole_best(best: Path, step: int) -> bool:
    """Return whether `best/` is whole and holds the state of `step`."""
    return damage(best) is None and step_of(best) == step
