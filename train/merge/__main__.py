"""`python -m train.merge RUN_OR_ADAPTER OUT`: a Hugging Face model folder of adapter and base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from train.config.schema import KEYS
from train.process.command import CommandParser, run_command
from train.saving.artifact import adapter_folder


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "merge",
        description="Fold an adapter into its base, and write a Hugging Face model folder.",
    )
    parser.add_argument("run_or_adapter", type=Path, metavar="RUN_OR_ADAPTER")
    parser.add_argument("out", type=Path, metavar="OUT", help="empty, or not there yet")
    parser.add_argument("--base", metavar="FOLDER", help="the base model, if not the one it names")
    parser.add_argument(
        "--quantization",
        choices=KEYS["model.quantization"].rule.words,
        help="fold it into the base's weights quantised so",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="rows for the receipt, if not the run's valid set"
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="write nothing where a logit differs by more"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""

    def answer() -> int:
        options = parser().parse_args(argv)
        adapter_folder(options.run_or_adapter)  # torch, for what is not there, would take seconds
        from train.merge.fold import merge_adapter

        asked = options.run_or_adapter, options.out, options.base, options.quantization
        print(merge_adapter(*asked, data=options.data, tolerance=options.tolerance))
        return 0

    return run_command(answer)


if __name__ == "__main__":
    sys.exit(main())
