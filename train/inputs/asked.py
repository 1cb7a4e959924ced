"""What a command that looks at rows, and trains nothing, is asked: a run's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from files.errors import UserError, no_such_folder
from train.config.command_line import parse
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.base_model import find_model
from train.process.command import command


def asked_configuration(argv: Sequence[str], name: str) -> RunConfig:
    """Return the configuration that the arguments of `train.run` name, for another command.

    Raises:
        UserError: As `train.run`; or an option that only a run can answer.
    """
    arguments = parse(argv)
    for option in ("plan", "prove_resume", "list_presets", "show", "schema", "completion"):
        if getattr(arguments, option):
            raise UserError(
                f"--{option.replace('_', '-')} belongs to a run: `{command(name)}` "
                "looks at rows and does nothing else"
            )
    if arguments.resume is None:
        return load_config(arguments.preset, arguments.config_file, arguments.overrides)
    run = Path(arguments.resume)
    if not run.is_dir():
        raise UserError(f"--resume {run}: {no_such_folder(run)}")
    file = run / "config.toml"
    if not file.is_file():
        raise UserError(f"--resume {run}: no run is there (it has no config.toml)")
    return load_config(file=file, overrides=arguments.overrides)


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
