"""Going on from a checkpoint: first what can be refused is read, then the folder is put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
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
from train.saving.shares import own_state
from train.state import Run


def restore(
    run: Run, resume: Resume, identity: Callable[[], Mapping[str, Any]], checkpoints: Checkpoints
) -> list[str]:
    """Take up a checkpoint: fill weights, optimizer and scaler. Nothing changes on the disk.

    The run's state is that of `resume` already; `identity` returns what it is trained from now,
    which rank 0 checks.

    Returns:
        Warnings of what may change the last bits.

    Raises:
        UserError: The checkpoint does not fit the configuration, the data or the base model.
    """
    assert resume.checkpoint is not None
    assert resume.identity is not None
    state, warnings = run.state, []
    if run.world.first:
        warnings = check_identity(resume.identity, identity())
        best_step = state.stopping.best_step
        lost = best_is_lost(resume, identity(), checkpoints, best_step)
        if run.config.checkpoint.load_best_at_end and lost:
            raise UserError(
                f"--resume: {resume.folder / 'best'} is not that of step {best_step}, which has no "
                "checkpoint to make it from again, but checkpoint.load_best_at_end=true promises "
                "it: resume from a checkpoint at or before that step"
            )
    load_trained(run, resume.checkpoint)
    with TensorFile(resume.checkpoint / "optimizer.safetensors") as file:
        state_of_all = {name: file.read(name) for name in file.names}
        run.optimizer.load_state(own_state(run.optimizer, state_of_all))
    state.stopping.patience = run.config.eval.early_stopping_patience
    state.resumed_from.append(state.step)
    if run.scaler is not None and state.scaler is not None:
        run.scaler.load(state.scaler)
    return warnings


def settle(saver: Saver, resume: Resume) -> list[str]:
    """Put the run's folder into the state of the checkpoint taken up; return warnings."""
    run, stopping = saver.run, saver.run.state.stopping
    warnings: list[str] = []

    def settled() -> str:
        mend = _settle(saver, resume, warnings)
        return json.dumps([stopping.best_step, stopping.best_loss, mend])

    stopping.best_step, stopping.best_loss, mend = json.loads(run.world.told("best", settled))
    if mend:
        # Of the checkpoint of that step, which every rank reads and writes its part of.
        assert resume.checkpoint is not None
        assert stopping.best_step is not None
        load_trained(run, saver.checkpoints.path(stopping.best_step))
        saver.replace("best", partial(export, run), stopping.best_step)
        load_trained(run, resume.checkpoint)
    return warnings


def _settle(saver: Saver, resume: Resume, warnings: list[str]) -> bool:
    """Do what rank 0 does alone; return whether `best/` is to be made from a checkpoint."""
    run, checkpoints = saver.run, saver.checkpoints
    state, stopping, best = run.state, run.state.stopping, run.folder / "best"
    mend = False
    if best_is_lost(resume, saver.identity(), checkpoints, stopping.best_step):
        warnings.append(
            f"{best} is not that of step {stopping.best_step}: it is deleted, and the next "
            "evaluation is the best"
        )
        shutil.rmtree(best, ignore_errors=True)
        stopping.best_step = stopping.best_loss = None
    elif stopping.best_step is not None and not whole_best(best, stopping.best_step):
        mend = damage(checkpoints.path(stopping.best_step)) is None
    checkpoints.set_newer_aside(state.step)
    # A kill may have come between a checkpoint and the deletion of those beyond the limit.
    checkpoints.rotate(stopping.best_step)
    final = run.folder / "final"
    if state.step < run.plan.total_steps and final.is_dir():
        set_aside(final, "aside")
    return mend


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
