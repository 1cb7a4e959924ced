"""What a run is trained from, as a checkpoint keeps it and a resume is held to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from files.errors import UserError
from files.hub import hashed_weights
from models.weights import weights_files
from train.config.load import resume_keys
from train.config.rules import Table
from train.config.schema import KEYS
from train.config.toml import flat
from train.saving.folder import device_name, package_versions
from train.state import Run


def identity_document(run: Run) -> dict[str, Any]:
    """Return the configuration, the hashes of data and base model, and the machine, as JSON values.

    The base's weights are hashed, which takes as long as reading them.
    """
    weights = [] if run.config.model.random_init else weights_files(run.source.folder)
    return {
        "config": {key: _as_json(value) for key, value in flat(run.config).items()},
        "data": run.data.fingerprints,
        "model": {
            "commit": run.source.commit,
            "config": run.model.config.raw,
            "files": hashed_weights(weights),
        },
        "machine": {
            "device": device_name(run.precision.device),
            "torch threads": torch.get_num_threads(),
            **package_versions(),
        },
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, Table):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare what a checkpoint was trained from with what the resumed run would train from.

    Returns:
        Warnings: differences that may change the last bits (threads, versions, device).

    Raises:
        UserError: A setting, a data set or the base model differs; the key and both values are
            named.
    """
    may_change = {*resume_keys(), "train.output_dir", "train.run_name", "model.path"}
    for key, value in now["config"].items():
        # A key that came later was not there, and what it does by default was done.
        was = saved["config"].get(key, _as_json(KEYS[key].default))
        if key == "train.effective_batch_size" and was is None:
            continue  # on another number of ranks it is the plan's (train.saving.resume)
        if key not in may_change and was != value:
            raise UserError(
                f"--resume: {key} was {was} and is {value} in config.toml; a resumed run keeps its "
                "settings: put the old value back, or start a new run"
            )
    for name, fingerprint in now["data"].items():
        was = saved["data"].get(name)
        if was != fingerprint:
            raise UserError(
                f"--resume: data.{name} is not the data that the run began with (fingerprint "
                f"{str(was)[:12]} then, {str(fingerprint)[:12]} now): put the old rows and "
                "tokenizer back, or start a new run"
            )
    differing = [key for key, value in now["model"].items() if saved["model"].get(key) != value]
    if differing:
        raise UserError(
            f"--resume: model.path holds another base model (its {' and '.join(differing)} are not "
            "those that the run began with): give back the old one, or start a new run"
        )
    return [
        f"resume will not be bit-exact: {name} {saved['machine'].get(name)} → {value}"
        for name, value in now["machine"].items()
        if saved["machine"].get(name) != value
    ]
