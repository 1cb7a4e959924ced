"""What a run writes down: a row for every step in metrics.jsonl, and TensorBoard beside it.

`metrics.jsonl` is the record: one JSON object a line, handed to the operating system as it is
written. TensorBoard is a view that may lose its tail; nothing reads it back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.atomic import write_text
from files.errors import UserError
from files.faults import faultpoint
from files.strict_json import parse_json_object
from train.config.schema import METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
EVAL_TAGS = {"valid": "eval/loss", "test": "test/loss"}

Row = dict[str, Any]


def read_metrics(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics.jsonl in the order they were written.

    Without the file there are none. A last line without its newline was cut off by a kill and is
    left out.

    Raises:
        UserError: A complete line is not a JSON object with a kind and a step.
    """
    return [json.loads(line) for line in _whole_lines(folder / METRICS_FILE)]


class Metrics:
    """The writer of a run's metrics.jsonl and TensorBoard events.

    After a resume no step stands twice: rows beyond the checkpoint are dropped before the first new
    one is written.

    Args:
        folder: The run's folder.
        tensorboard: Whether to write TensorBoard events too.
        resume_step: Step of the checkpoint that the run goes on from; 0 when it starts from the
            beginning, which drops every row of an earlier attempt.

    Raises:
        UserError: TensorBoard is wanted but not installed, or the present metrics.jsonl is damaged.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resume_step: int = 0) -> None:
        self._path = folder / METRICS_FILE
        # A torn last line goes, and what will be written again: from step 0 that is everything, the
        # evaluation before training included.
        rows = _keep(self._path, lambda row: resume_step > 0 and row["step"] <= resume_step)
        self._keys = {_key(row) for row in rows}
        self._writer = _open_tensorboard(folder, resume_step) if tensorboard else None
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        # Speed needs a span of time: tokens and seconds since the last logged step.
        self._tokens = 0
        self._seconds = 0.0

    def train(
        self, row: Mapping[str, Any], log: bool, extra: Mapping[str, float] | None = None
    ) -> None:
        """Write the row of one step.

        Args:
            row: `step`, `epoch`, `loss` (nats per target, as differentiated), `learning_rate` of
                that step, `grad_norm` before clipping, `targets`, `tokens` (padding left out),
                `seconds` (the step alone).
            log: Whether the step is one for TensorBoard too.
            extra: More TensorBoard values by tag (`memory/allocated_gib`, `time/data_seconds`).
        """
        row = self._write("train", row)
        self._tokens += row["tokens"]
        self._seconds += row["seconds"]
        if not log:
            return
        if self._writer is not None:
            shown = ("loss", "learning_rate", "grad_norm", "epoch")
            values = {f"train/{name}": row[name] for name in shown}
            if self._seconds > 0:
                values["train/tokens_per_second"] = self._tokens / self._seconds
            values["time/step_seconds"] = row["seconds"]
            self._show({**values, **(extra or {})}, row["step"])
        self._tokens, self._seconds = 0, 0.0

    def eval(self, row: Mapping[str, Any]) -> None:
        """Write the row of one evaluation.

        The same evaluation done again (a finished run resumed at its last step) replaces its row.
        """
        row = self._write("eval", row)
        tag = EVAL_TAGS.get(row["split"], f"{row['split']}/loss")
        asked = {tag.replace("loss", plain(name)): row[name] for name in METRICS if name in row}
        self._show({tag: row["loss"], **asked}, row["step"])

    def sync(self) -> None:
        """Bring every row to the disk itself, as a checkpoint that relies on them needs."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Bring everything to the disk and close the files."""
        self.sync()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, values: Mapping[str, Any]) -> Row:
        row = {"kind": kind} | {name: _finite(value) for name, value in values.items()}
        key = _key(row)
        if key in self._keys:
            self._file.close()
            _keep(self._path, lambda other: _key(other) != key)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._keys.add(key)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        faultpoint("metrics.written")
        return row

    def _show(self, values: Mapping[str, float | None], step: int) -> None:
        if self._writer is None:
            return
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)


def plain(name: str) -> str:
    """Return a metric's name in letters that every tracker takes: `pass_at_1`."""
    return name.replace("@", "_at_")


def _finite(value: Any) -> Any:
    """Return null's None for a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(row: Row) -> tuple[str, str, int]:
    """Return what may stand only once in the file."""
    return row["kind"], row.get("split", ""), row["step"]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json_object(line.encode(), str(path))
            kind, step, split = row.get("kind"), row.get("step"), row.get("split", "")
            whole = isinstance(kind, str) and isinstance(split, str) and type(step) is int
        except UserError:
            whole = False
        if not whole:
            raise UserError(
                f"{path}:{number}: not a row of metrics (a JSON object with a kind and a step): "
                "the file is damaged; delete this line to go on without it"
            )
    return lines


def _keep(path: Path, wanted: Callable[[Row], bool]) -> list[Row]:
    """Rewrite the file, in one move, with the rows that `wanted` accepts, and return them."""
    lines = _whole_lines(path)
    kept = [line for line in lines if wanted(json.loads(line))]
    text = "".join(line + "\n" for line in kept)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)
    return [json.loads(line) for line in kept]


def require_tensorboard() -> type[SummaryWriter]:
    """Return TensorBoard's writer.

    Raises:
        UserError: The package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "log.tensorboard=true needs the package tensorboard, which is not installed: install "
            "it, "
            "or pass log.tensorboard=false (metrics.jsonl is written either way)"
        ) from None
    return SummaryWriter


def _open_tensorboard(folder: Path, resume_step: int) -> SummaryWriter:
    writer = require_tensorboard()
    target = folder / TENSORBOARD_FOLDER
    # Events of an earlier attempt at the steps to come would else be drawn a second time.
    purge_step = resume_step + 1 if resume_step else 0
    earlier = target.is_dir() and any(target.iterdir())
    return writer(log_dir=str(target), purge_step=purge_step if earlier else None)
