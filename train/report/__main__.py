"""`python -m train.report RUN…`: report.md and plots of runs, written again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from train.process.command import CommandParser, run_command
from train.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of each run named on the command line; return the exit code."""

    def answer() -> int:
        parser = CommandParser("report", description="Write the reports of runs again.")
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
        for run in parser.parse_args(arguments).runs:
            print(write_report(run))
        return 0

    return run_command(answer)


if __name__ == "__main__":
    sys.exit(main())
