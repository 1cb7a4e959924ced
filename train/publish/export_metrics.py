"""`python -m train.publish.export_metrics RUN --to csv|wandb|mlflow|trackio`: metrics elsewhere.

What metrics.jsonl holds of a run goes to another tracker after the run, under TensorBoard's tags.
The trackers are no dependencies: each is imported when it is asked for.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from files.atomic import write_text
from files.errors import UserError, counted
from train.log.metrics import EVAL_TAGS, plain
from train.process.command import CommandParser, run_command
from train.report.record import Record, read_record

Values = dict[str, float]
PROJECT = "lathe"
# MLflow's own bound on the text of a parameter.
_LONGEST_PARAMETER = 6000
# What names a row, or examples in it: no measurements.
_NO_VALUES = ("kind", "step", "split", "best", "examples", "rows", "skipped")


def values_by_step(record: Record) -> dict[int, Values]:
    """Return step → tag → value, in the order of the steps; what is not finite is left out.

    Tags are TensorBoard's: `train/loss`, `eval/loss`, `test/loss`; other columns of a row stand
    under the same heads (`train/grad_norm`, `eval/targets`). A step's rows are one entry.
    """
    found: dict[int, Values] = {}
    for row in sorted([*record.train, *record.valid, *record.test], key=lambda row: row["step"]):
        values = found.setdefault(row["step"], {})
        head = EVAL_TAGS[row["split"]].split("/")[0] if "split" in row else "train"
        for name, value in row.items():
            if name not in _NO_VALUES and isinstance(value, int | float):
                values[f"{head}/{plain(name)}"] = value
    return found


def to_csv(record: Record) -> str:
    """Return the metrics as CSV: a line a step, a column a tag, nothing where there is none."""
    steps = values_by_step(record)
    tags = list(dict.fromkeys(tag for values in steps.values() for tag in values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *tags])
    for step, values in steps.items():
        writer.writerow([step, *(values.get(tag, "") for tag in tags)])
    return text.getvalue()


def to_wandb(wandb: Any, record: Record, project: str) -> None:
    """Log the metrics to Weights & Biases.

    Source: docs.wandb.ai, `wandb.init` and `Run.log`; a config's keys may hold no dots.
    """
    with wandb.init(project=project, name=record.name, config=record.config) as run:
        for step, values in values_by_step(record).items():
            run.log(values, step=step)


def to_mlflow(mlflow: Any, record: Record, project: str) -> None:
    """Log the metrics to MLflow.

    Source: mlflow.org, `mlflow.set_experiment`, `start_run`, `log_params`, `log_metrics`.
    """
    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=record.name):
        mlflow.log_params(
            {
                f"{section}.{name}": str(value)[:_LONGEST_PARAMETER]
                for section, settings in record.config.items()
                if isinstance(settings, dict)
                for name, value in settings.items()
            }
        )
        for step, values in values_by_step(record).items():
            mlflow.log_metrics(values, step=step)


def to_trackio(trackio: Any, record: Record, project: str) -> None:
    """Log the metrics to Trackio.

    Source: huggingface.co/docs/trackio, `trackio.init`, `trackio.log`, `trackio.finish`.
    """
    trackio.init(project=project, name=record.name, config=record.config)
    try:
        for step, values in values_by_step(record).items():
            trackio.log(values, step=step)
    finally:
        trackio.finish()


TRACKERS: dict[str, Callable[[Any, Record, str], None]] = {
    "wandb": to_wandb,
    "mlflow": to_mlflow,
    "trackio": to_trackio,
}


def export_metrics(run: Path, to: str, project: str = PROJECT) -> str:
    """Log a run's metrics to a tracker, and return a sentence saying so.

    Args:
        run: The run's folder, in any state.
        to: `wandb`, `mlflow` or `trackio`, whose own settings say where the metrics go.
        project: The project (MLflow: the experiment) that the run becomes a part of.

    Raises:
        UserError: The folder is no run's, holds no metrics, the package is not installed, or it
            refuses.
    """
    record = read_record(run)
    steps = _require_steps(record)
    try:
        module = import_module(to)
    except ImportError:
        raise UserError(
            f"--to {to} needs the package {to}, which is not installed: `pip install {to}`, or "
            "--to csv, which needs none"
        ) from None
    try:
        TRACKERS[to](module, record, project)
    except Exception as error:  # whatever a package of others stumbles over
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--to {to}: {to} did not take the metrics ({reason})") from error
    return f"{counted(steps, 'step')} of {record.name} went to {to}, project {project}"


def _require_steps(record: Record) -> int:
    if not (steps := len(values_by_step(record))):
        raise UserError(f"{record.folder}: has no metrics yet (no step, no evaluation)")
    return steps


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "export-metrics", description="Give a run's metrics to another program or tracker."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--to", choices=("csv", *TRACKERS), required=True)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="of --to csv: the file; none: printed"
    )
    parser.add_argument("--project", metavar="NAME", help=f"of the trackers: default {PROJECT}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""

    def answer() -> int:
        options = parser().parse_args(arguments)
        if options.to != "csv":
            if options.out is not None:
                raise UserError("--out goes with --to csv")
            print(export_metrics(options.run, options.to, options.project or PROJECT))
            return 0
        if options.project is not None:
            raise UserError("--project is for a tracker; a CSV has none")
        record = read_record(options.run)
        steps = _require_steps(record)
        if options.out is None:
            print(to_csv(record), end="")
            return 0
        if options.out.exists():
            raise UserError(f"--out {options.out}: is there already; choose another file")
        write_text(options.out, to_csv(record))
        print(f"{options.out}: {counted(steps, 'step')} of {record.name}")
        return 0

    return run_command(answer)


if __name__ == "__main__":
    sys.exit(main())
