"""The command `lathe`: everything that the trainer does, from any folder, whatever that holds.

    lathe [run] …      the same as `python -m train.run …`; a setting or an option alone means `run`
    lathe show-data …  `train.show_data`: the rows as they will be trained
    lathe lint …       `data.lint`: what is wrong with rows
    lathe generate …   `train.generate`
    lathe merge …      `train.merge`
    lathe report …     `train.report`
    lathe push …       `train.publish.push`
    lathe export-metrics …  `train.publish.export_metrics`
    lathe evaluate …   `train.evaluate`

Nearly every project has a `train.py`, a `data.py` or a folder `models`. Where those are importable
(PYTHONPATH=., another package's `data` in the same environment), they are not ours: importing this
module makes Python find our own folders beside this file, and everything else where it did before.
This module itself imports nothing that another file could stand in for.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

HOUSE = os.path.dirname(os.path.abspath(__file__))
FOLDERS = ("files", "kernels", "lora", "models", "data", "train")


class OwnFolders:
    """A finder of `sys.meta_path` that knows our folders and nothing else."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Return where one of our folders is, None for any other module."""
        return PathFinder.find_spec(name, [HOUSE]) if name in FOLDERS else None


if OwnFolders not in sys.meta_path:
    sys.meta_path.insert(0, OwnFolders)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line with the command that it names, and return its exit code."""
    from train.process.command import MODULES

    given = list(sys.argv[1:] if argv is None else argv)
    name = given.pop(0) if given and given[0] in MODULES else "run"
    return import_module(MODULES[name]).main(given)


if __name__ == "__main__":
    sys.exit(main())
