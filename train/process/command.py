"""A command's name, its options, and its end: an answer or one sentence, never a traceback."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from files.errors import UserError
from train.process.world import counted_by

# Where each command's `parser` and `main` are. None of these modules imports torch, which takes
# seconds: `main` imports what needs it when the arguments are read and found right.
MODULES = {
    "run": "train.run",
    "show-data": "train.show_data",
    "lint": "train.inputs.lint",
    "generate": "train.generate",
    "merge": "train.merge.__main__",
    "report": "train.report.__main__",
    "push": "train.publish.push",
    "export-metrics": "train.publish.export_metrics",
    "evaluate": "train.evaluation.__main__",
}
# What is typed behind `python -m`, where it is not that module or its package.
_TYPED = {"lint": "data.lint", "evaluate": "train.evaluate"}


def command(name: str = "run") -> str:
    """Return how a command of ours is typed to work where this process was started.

    `lathe generate` where `lathe` was typed, `.venv/bin/python -m train.generate` where this
    process was started that way; from Python, `lathe` where it is installed.

    Args:
        name: `run`, `show-data`, `lint`, `generate`, `merge`, `report`, `push`, `export-metrics` or
            `evaluate`.
    """
    program = Path(sys.argv[0] if sys.argv else "")
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    python = shlex.quote(sys.orig_argv[0] if sys.orig_argv else "python")
    installed = shutil.which("lathe")
    as_module = f"{python} -m {_TYPED.get(name) or MODULES[name].removesuffix('.__main__')}"
    if module.startswith(("train.", "data.")):
        return as_module
    if module == "lathe":
        start = f"{python} -m lathe"
    elif program.name == "lathe.py":
        start = f"{python} {shlex.quote(sys.argv[0])}"
    elif program.name == "lathe" and not (installed and Path(installed).samefile(program)):
        start = shlex.quote(sys.argv[0])
    elif installed:
        start = "lathe"
    else:
        return as_module
    return start if name == "run" else f"{start} {name}"


class _Once(argparse.Action):
    """Store a value; an option that is given twice is refused, for one of the two would be lost."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if self.given and option_string is not None:
            raise argparse.ArgumentError(self, "is given twice, and takes one value; leave one out")
        self.given = True
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """argparse for one of our commands: its complaints end as every other bad input does.

    An option that takes one value is refused when it is given again.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        """Take the name of a command, and further arguments of `argparse.ArgumentParser`."""
        super().__init__(prog=command(name), allow_abbrev=False, **settings)
        self.register("action", None, _Once)

    def actions(self) -> list[argparse.Action]:
        """Return the arguments that were added, in order."""
        return list(self._actions)

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a `UserError`."""
        raise UserError(f"{message} (--help shows what is possible)")


def other_parsers() -> dict[str, CommandParser]:
    """Return the name and the options of every command but `run`."""
    return {name: import_module(MODULES[name]).parser() for name in MODULES if name != "run"}


def run_command(command: Callable[[], int], *, over_ranks: bool = False) -> int:
    """Call a command and return its exit code; 2 after bad input, 130 after Ctrl-C.

    Only a command that shares its work out may be started `over_ranks`, as by torchrun.

    What the terminal's encoding cannot show is shown as `?`. When the reader of a pipe has had
    enough (`--list-presets | head -1`), the rest goes nowhere.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if not over_ranks:
            _refuse_ranks()
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A full disk, a folder that may not be written, a card that was taken out.
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _refuse_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes, each of which would do the whole of a command."""
    if name := counted_by(environment):
        raise UserError(
            f"{name}={environment[name]}: this command is the work of one process, and each of "
            "these would do all of it; start it once, without torchrun, srun or mpirun, or "
            f"unset {name} where each is meant to do work of its own"
        )
