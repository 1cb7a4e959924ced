"""What a run's folder says, read from its files alone."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from files.atomic import is_locked
from files.errors import UserError, counted, no_such_folder
from files.strict_json import read_json_object
from train.config.schema import LOWER_IS_BETTER
from train.log.metrics import METRICS_FILE, Row, read_metrics


@dataclass(frozen=True)
class Record:
    """What a run's folder says. A file that is not there yet is an empty dictionary or list."""

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    train: list[Row]
    valid: list[Row]
    test: list[Row]

    @property
    def name(self) -> str:
        """The run's name: as configured, or its folder's."""
        return self.section("train").get("run_name") or self.folder.resolve().name

    @property
    def step(self) -> int:
        """Steps done."""
        return max([row["step"] for row in self.train] + [self.status.get("step") or 0])

    @property
    def total_steps(self) -> int | None:
        """Steps planned."""
        return self.plan.get("total_steps") or self.status.get("total_steps")

    @property
    def best(self) -> Row | None:
        """The evaluation of the valid set that is best by `eval.best_metric`, the first of equals.

        That is the one with the lowest loss where nothing else was asked for.
        """
        metric = self.section("eval").get("best_metric") or "loss"
        sign = 1 if metric in LOWER_IS_BETTER else -1
        finite = [row for row in self.valid if row.get(metric) is not None]
        return min(finite, key=lambda row: sign * row[metric], default=None)

    @property
    def outcome(self) -> str:
        """How the run ended, or where it is, in words."""
        state, reason = self.status.get("state", "no status"), self.status.get("reason")
        steps = counted(self.step, "step")
        if self.total_steps:
            steps = f"{self.step:,} of {counted(self.total_steps, 'step')}"
        return f"{state}{f' ({reason})' if reason else ''} after {steps}"

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the configuration; what it calls `none` is None."""
        values = self.config.get(name) or {}
        return {key: None if value == "none" else value for key, value in values.items()}

    def train_loss_beside(self, row: Row) -> float | None:
        """Return the token mean of the train loss since the evaluation before `row`.

        Before training it is the loss of step 1, which was measured on the very same weights.
        """
        if row.get("train_loss") is not None:
            return row["train_loss"]
        before = max(
            (other["step"] for other in self.valid if other["step"] < row["step"]), default=0
        )
        last = max(row["step"], 1)
        span = [
            step
            for step in self.train
            if before < step["step"] <= last and step["loss"] is not None
        ]
        targets = sum(step["targets"] for step in span)
        return sum(step["loss"] * step["targets"] for step in span) / targets if targets else None


def _tell_interrupted(folder: Path, status: dict[str, Any]) -> None:
    """Make the status of a run whose process was killed say so: it had no time to."""
    if status.get("state") == "running" and is_locked(folder) is False:
        signs = [folder / name for name in ("status.json", METRICS_FILE)]
        last = max(path.stat().st_mtime for path in signs if path.is_file())
        when = datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        status |= {"state": "interrupted", "reason": f"no sign since {when}"}


def read_record(folder: Path) -> Record:
    """Return what a run's folder says.

    Raises:
        UserError: The folder is no run's, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_such_folder(folder)}")
    written = [
        name for name in ("plan.json", "status.json", METRICS_FILE) if (folder / name).is_file()
    ]
    if not (folder / "config.toml").is_file() or not written:
        raise UserError(
            f"{folder}: not the folder of a run: that has a config.toml and a metrics.jsonl "
            "(the newest ones are in runs/)"
        )
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.toml'}: not TOML: {error}") from None
    documents = {
        name: read_json_object(path) if (path := folder / f"{name}.json").is_file() else {}
        for name in ("plan", "environment", "status")
    }
    rows = read_metrics(folder)
    _tell_interrupted(folder, documents["status"])
    evals = [row for row in rows if row["kind"] == "eval"]
    return Record(
        folder=folder,
        config=config,
        **documents,
        train=[row for row in rows if row["kind"] == "train"],
        valid=[row for row in evals if row["split"] == "valid"],
        test=[row for row in evals if row["split"] == "test"],
    )
