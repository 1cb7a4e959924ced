"""What a command that looks at rows, and trains nothing, is asked: a run's configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from files.errors import UserError, no_such_folder
from train.config.command_line import SETTINGS, parse
from train.config.load import load_config
from train.config.schema import RunConfig
from train.process.command import command


def add_run_arguments(parser: argparse.ArgumentParser, settings: str = SETTINGS) -> None:
    """Give a command the arguments of `train.run` that say where settings come from."""
    parser.add_argument("settings", nargs="*", metavar=settings, help="as to train.run")
    parser.add_argument("--preset", metavar="NAME", help="as to train.run")
    parser.add_argument("--config", metavar="FILE.toml", help="as to train.run")
    parser.add_argument("--resume", metavar="FOLDER", help="a run's own settings")


def run_arguments(asked: argparse.Namespace, settings: Sequence[str]) -> list[str]:
    """Return what `train.run` would be given for them."""
    options = {name: getattr(asked, name) for name in ("preset", "config", "resume")}
    given = [[f"--{name}", value] for name, value in options.items() if value is not None]
    return [*chain(*given), *settings]


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
