"""`python -m train.report RUN…`: report.md and plots of runs, written again; several compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from files.errors import UserError
from train.process.command import CommandParser, run_command
from train.report.compare import read_records, render_comparison, write_comparison
from train.report.page import write_report


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "report", description="Write the reports of runs again, and compare several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="write the comparison there, with a picture of the curves, instead of printing it",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of each run named on the command line, and compare several.

    Returns:
        The exit code.
    """

    def answer() -> int:
        options = parser().parse_args(arguments)
        if options.to is not None and len(options.runs) < 2:
            raise UserError("--to is for the comparison of runs: name two or more of them")
        records = read_records(options.runs)
        compared = write_comparison(records, options.to) if options.to is not None else []
        for run in options.runs:
            print(write_report(run))
        for path in compared:
            print(path)
        if options.to is None and len(records) > 1:
            print(f"\n{render_comparison(records)}", end="")
        return 0

    return run_command(answer)


if __name__ == "__main__":
    sys.exit(main())
