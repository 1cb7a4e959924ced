"""What ends a run before its first step, found before anything large is read.

The run and `--plan` ask here alike, so that what is planned can be started.
"""

from __future__ import annotations

from pathlib import Path

from files.hub import resolve_model
from models import build
from models.config import DecoderConfig
from models.weights import check_weights
from train.config.schema import RunConfig
from train.log.metrics import require_tensorboard
from train.plan.decide import Machine, decide
from train.saving.folder import run_folder
from train.world import World


def refuse_early(config: RunConfig, machine: Machine, *, new: bool) -> None:
    """Refuse what the settings, the machine and the disk say by themselves.

    Args:
        config: What is asked.
        machine: The machine that the run would compute on, from `train.plan.decide.this_machine`.
        new: Whether the run would begin; a resumed one has its folder.

    Raises:
        UserError: More than one rank, settings that contradict each other there, kernels that
            cannot run, no TensorBoard, or a folder that is in use.
    """
    World.from_environment()
    decide(config, machine)
    if config.log.tensorboard:
        require_tensorboard()
    if new:
        run_folder(config)


def refuse_model(config: RunConfig, decoder: DecoderConfig | None) -> None:
    """Refuse weights of this machine that cannot be loaded; of the Hub's nothing is known yet.

    Args:
        config: What is asked.
        decoder: The architecture; None checks that the weights are there alone.

    Raises:
        UserError: They are not there or are pickles, or their names, shapes or types are not those
            of the architecture.
    """
    path = config.model.path
    if path is None or config.model.random_init or not Path(path).expanduser().is_dir():
        return
    folder = resolve_model(path, config.model.revision, weights=True).folder
    if decoder is not None:
        check_weights(folder, build(decoder, device="meta"))
