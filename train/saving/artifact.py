"""What a folder has trained, and over which base: what `generate` and `merge` are given."""

from __future__ import annotations

import shlex
from pathlib import Path

from files.errors import UserError, no_such_folder
from files.folders import damage
from files.hub import ModelSource, resolve_model
from train.process.command import command
from train.saving.checkpoints import STEP_FOLDER


def run_and_trained(place: Path) -> tuple[Path, Path]:
    """Return a run's folder and what is taken of it; `place` is the run's, or the one to take."""
    if not place.is_dir():
        raise UserError(f"--run {place}: {no_such_folder(place)}")
    if (place / "config.toml").is_file():
        return place, _trained_folder(place)
    whole = place.resolve()
    run = whole.parent.parent if whole.parent.name == "checkpoints" else whole.parent
    is_checkpoint = STEP_FOLDER.fullmatch(whole.name) is not None
    of_a_run = is_checkpoint or whole.name in ("final", "best")
    if not of_a_run or not (run / "config.toml").is_file():
        raise UserError(
            f"{place}: not the folder of a run, which has a config.toml, and none of a run's: "
            "for an adapter use --adapter, for a model --model"
        )
    if is_checkpoint and (problem := damage(place)) is not None:
        raise UserError(f"--run {problem}; take another one, or the run's folder")
    return run, place


def _trained_folder(run: Path) -> Path:
    for folder in (run / "final", run / "best"):
        if folder.is_dir():
            return folder
    for checkpoint in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if damage(checkpoint) is None:
            return checkpoint
    raise UserError(
        f"{run}: nothing is trained yet (there is no final/, best/ or whole checkpoint): "
        f"go on with `{command()} --resume {shlex.quote(str(run))}`"
    )


def adapter_folder(run_or_adapter: Path) -> Path:
    """Return the adapter's folder: the one given, or the `final/` or `best/` of a run."""
    if not run_or_adapter.is_dir():
        raise UserError(f"{run_or_adapter}: {no_such_folder(run_or_adapter)}")
    if not (run_or_adapter / "config.toml").is_file():
        return run_or_adapter
    for folder in (run_or_adapter / "final", run_or_adapter / "best"):
        if (folder / "adapter_config.json").is_file():
            return folder
        if (folder / "config.json").is_file():
            raise UserError(
                f"{run_or_adapter}: was trained in full, so {folder} is a whole model already and "
                "there is nothing to merge"
            )
    raise UserError(
        f"{run_or_adapter}: this run has no final/ or best/ yet; finish it with "
        f"`{command()} --resume {shlex.quote(str(run_or_adapter))}`, or give one of its checkpoints"
    )


def base_of(adapter: Path, base: str | None) -> ModelSource:
    """Return the base model's files, from `base` (folder or hub id) or as the adapter names it.

    Raises:
        UserError: None is named, or it cannot be had.
    """
    from lora import read_adapter_config  # not above: what is not there is refused without torch

    document = read_adapter_config(adapter)
    if base is not None:
        return resolve_model(base)
    named, revision = document.get("base_model_name_or_path"), document.get("revision")
    if not isinstance(named, str) or not named:
        raise UserError(f"{adapter}: names no base model; give it with --base FOLDER")
    try:
        return resolve_model(named, revision if isinstance(revision, str) else None)
    except UserError as error:
        raise UserError(
            f"the base model that {adapter} names: {error}, or give it with --base FOLDER"
        ) from None
