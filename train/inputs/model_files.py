"""Where the files of a run's base model are. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from files.errors import UserError
from files.hub import ModelSource, resolve_model
from train.config.schema import RunConfig


def find_model(config: RunConfig, *, weights: bool) -> ModelSource:
    """Return the base model's files on this machine; without `weights`, the small ones alone.

    Raises:
        UserError: No model is named, or it cannot be had.
    """
    if config.model.path is None:
        raise UserError(
            "model.path is not set: give a hub id (owner/name) or a folder with config.json, "
            "tokenizer.json and safetensors weights, or start from a --preset"
        )
    return resolve_model(
        config.model.path, config.model.revision, weights=weights and not config.model.random_init
    )


def tokenizer_folder(config: RunConfig) -> Path:
    """Return the folder of the tokenizer; a local one needs no config.json beside it.

    Raises:
        UserError: No model is named, or it cannot be had.
    """
    if config.model.path is not None:
        folder = Path(config.model.path).expanduser()
        if (folder / "tokenizer.json").is_file():
            return folder
    return find_model(config, weights=False).folder
