"""`python -m train.evaluate RUN_OR_MODEL --data FILE`: how good a model is on rows of its own.

Loss, perplexity and token accuracy of every row's targets; and where rows have a prompt, what the
model makes of some of them: whether that parses, is the reference, is near it, and passes the row's
tests. Every mean has its standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.source import Row, read_rows
from files.errors import UserError, note
from files.hub import resolve_model
from train.config.command_line import parse
from train.config.load import load_config, resolve_key
from train.config.schema import KEYS
from train.evaluation.problems import Problem, problem_of
from train.evaluation.programs import require_limits, warning
from train.generation.sampling import Sampling
from train.process.command import CommandParser, run_command
from train.saving.checkpoints import STEP_FOLDER

# Rows that are completed where --complete does not say; of rows with tests all are.
_COMPLETED = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names, print what was found; return the exit code."""
    return run_command(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> int:
    options = parser().parse_intermixed_args(argv)
    _check(options)
    overrides = _overrides(options.settings)
    run = _run_of(Path(options.model))
    config = load_config(file=run / "config.toml", overrides=overrides) if run else None
    if run is None and not Path(options.model, "adapter_config.json").is_file():
        resolve_model(options.model, weights=False)  # a wrong name is said before any row is read
    column = overrides.get("data.split_column") or (config and config.data.split_column)
    if options.split and not column and Path(options.data).expanduser().is_file():
        raise UserError(
            f"--split {options.split}: {options.data} is one file, and nothing says which of its "
            "rows are of that split; name their column with data.split_column=COLUMN, or give a "
            "file of that split and leave --split out"
        )
    problems = _problems(options, column if options.split else None)
    if options.complete is None and not problems:
        options.complete = _COMPLETED
    from train.evaluation.command import evaluate_asked

    print(evaluate_asked(options, run, config, overrides, problems))
    return 0


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "evaluate",
        description="Measure a run, an adapter or a model on rows: loss, perplexity and token "
        "accuracy, and of completions whether they parse, match and pass tests.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="folder, or a model's hub id")
    parser.add_argument("settings", nargs="*", metavar="data.key=value", help="how rows are read")
    parser.add_argument("--data", required=True, metavar="FILE", help="as data.train names rows")
    parser.add_argument("--split", choices=["train", "valid", "test"], help="its rows alone")
    parser.add_argument("--base", help="the adapter's base, if not as adapter_config.json says")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--complete",
        type=int,
        metavar="N",
        help=f"rows to complete, evenly spread (default {_COMPLETED}, of rows with tests all; 0: "
        "the loss alone)",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the completions of rows with tests on this machine, limited; see the warning",
    )
    parser.add_argument("--k", default="1", metavar="K,…", help="pass@k for these k (default 1)")
    parser.add_argument("--samples", type=int, metavar="N", help="completions of a row")
    parser.add_argument("--completions", type=Path, metavar="FILE", help="write them as JSON Lines")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows computed at once")
    parser.add_argument("--device", default="auto", choices=KEYS["train.device"].rule.words)
    parser.add_argument("--dtype", default="auto", choices=KEYS["train.precision"].rule.words)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and fill in what follows from others."""
    options.sampling = Sampling(
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    options.sampling.refuse_to_choose_of_one()
    try:
        options.k = sorted({int(number) for number in options.k.split(",")})
    except ValueError:
        raise UserError(f"--k {options.k}: must be whole numbers, as in --k 1,10") from None
    if options.samples is None:
        options.samples = max(1, options.k[-1])
    least = {"complete": 0, "samples": 1, "batch_size": 1, "seed": 0}
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value}: must be at least {lowest}")
    if options.k[0] < 1 or options.k[-1] > options.samples:
        raise UserError(
            f"--k {','.join(map(str, options.k))}: must be from 1 to --samples {options.samples}"
        )
    if options.samples > 1 and options.temperature == 0:
        raise UserError(
            f"{options.samples} greedy completions of a row are all the same: give a --temperature "
            "above 0, such as 0.8"
        )
    if options.run_code:
        require_limits()


def _overrides(settings: Sequence[str]) -> dict[str, str]:
    written = parse(settings).overrides if settings else {}
    overrides = {resolve_key(name): value for name, value in written.items()}
    for name, key in zip(written, overrides, strict=True):
        if not key.startswith("data.") or key in ("data.train", "data.valid", "data.test"):
            raise UserError(
                f"{name}: an evaluation takes settings of how rows are read (data.format, "
                "data.max_length, …) and has options for all else; --help shows them"
            )
    return overrides


def _run_of(place: Path) -> Path | None:
    """Return the run that a folder is, or is a part of."""
    if (place / "config.toml").is_file():
        return place
    whole = place.resolve()
    is_checkpoint = STEP_FOLDER.fullmatch(whole.name) and whole.parent.name == "checkpoints"
    run = whole.parent.parent if is_checkpoint else whole.parent
    is_part = is_checkpoint or whole.name in ("final", "best")
    return run if is_part and (run / "config.toml").is_file() else None


def _problems(options: argparse.Namespace, column: str | None) -> list[tuple[Row, Problem]]:
    """Return the rows with their tests, none where rows have none.

    Raises:
        UserError: Rows behind the first have no tests, or nobody has allowed to run programs.
    """
    found: list[tuple[Row, Problem]] = []
    for row in read_rows(options.data, split_column=column, split=options.split):
        problem = problem_of(row)
        if problem is None:
            if found:
                raise UserError(f"{row.where}: has no tests, as the rows before it have; part them")
            break
        found.append((row, problem))
    if found and options.complete != 0:
        if not options.run_code:
            raise UserError(
                f"{found[0][0].where}: rows with tests are measured by running what the model "
                "writes on this machine, which may do harm: allow that with --run-code, or give "
                "--complete 0 for the loss alone"
            )
        note(warning())
    if options.run_code and not found:
        raise UserError(
            f"--run-code: {options.data} has no rows with tests (HumanEval's columns prompt, test "
            "and entry_point, or MBPP's code and test_list); leave it out"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
