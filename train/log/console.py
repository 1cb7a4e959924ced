"""What a run says at the terminal: a panel, a progress line, evaluations, a summary.

On a terminal the progress line renews itself in place; in a file or a pipe there are plain lines
at the logged steps.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from files.errors import counted
from train.config.schema import METRICS
from train.log.metrics import read_metrics
from train.process.command import command
from train.text import (
    ASCII_BOX,
    UNICODE_BOX,
    aligned,
    format_count,
    format_duration,
    format_loss,
    numbered,
    panel,
    size_text,
)

Rows = Sequence[tuple[str, str]]

SEPARATOR = " · "
# The bar comes last: on a narrow terminal it is what is cut off.
BAR_FORMAT = "{desc} {bar:12}"
LEFT_OUT_FIRST = ("memory", "norm", "epoch", "speed")


def progress_line(
    row: Mapping[str, Any],
    total_steps: int,
    *,
    tokens_per_second: float | None = None,
    memory_bytes: float | None = None,
    eta_seconds: float | None = None,
    width: int | None = None,
) -> str:
    """Return one step as a line: where it is, what it did, how fast, how long still.

    `row` is a train row of metrics.jsonl. What is None is left out, and what is wanted least until
    the line fits into `width` columns.
    """
    norm = row["grad_norm"]
    parts = {
        "step": f"step {row['step']}/{total_steps}",
        "epoch": f"epoch {row['epoch']:.2f}",
        "loss": f"loss {format_loss(row['loss'])}",
        "learning rate": f"lr {row['learning_rate']:.1e}",
        "norm": f"|g| {'non-finite' if norm is None or not math.isfinite(norm) else f'{norm:.3g}'}",
    }
    if tokens_per_second is not None:
        parts["speed"] = f"{format_count(tokens_per_second)} tok/s"
    if memory_bytes is not None:
        parts["memory"] = size_text(memory_bytes)
    if eta_seconds is not None:
        parts["time"] = f"ETA {format_duration(eta_seconds)}"
    if row.get("skipped"):
        parts["skipped"] = f"skipped: {row['skipped']}"
    for name in LEFT_OUT_FIRST:
        if width is not None and len(SEPARATOR.join(parts.values())) > width:
            parts.pop(name, None)
    return SEPARATOR.join(parts.values())


def event_lines(row: Mapping[str, Any]) -> list[str]:
    """Return what a step's row tells beside its progress: an update left out, a spike."""
    rows = sorted(set(row.get("rows") or []))
    where = f"; {numbered('row', rows)} of data.train" if rows else ""
    lines = []
    if row.get("skipped"):
        lines.append(f"step {row['step']}: no weight was changed ({row['skipped']}){where}")
    if row.get("spike"):
        lines.append(
            f"step {row['step']}: the loss, {format_loss(row['loss'])}, is {row['spike']:.1f} "
            f"standard deviations above that of the steps before{where}"
        )
    return lines


def eval_line(row: Mapping[str, Any], total_steps: int) -> str:
    """Return one evaluation as a line, the train loss since the last one beside it."""
    parts = [f"{row['split']} loss {format_loss(row['loss'])}", f"step {row['step']}/{total_steps}"]
    shown = [name for name in METRICS if row.get(name) is not None]
    if row.get("holes"):
        shown.remove("exact_match")
    parts += [f"{name.replace('_', ' ')} {row[name]:.4g}" for name in shown]
    if row.get("completed"):
        parts.append(f"{row['completed']:,} rows completed")
    if row.get("train_loss") is not None:
        parts.append(f"train loss {format_loss(row['train_loss'])}")
    parts.append(counted(row["targets"], "target"))
    if row.get("holes"):
        parts.append(f"{row['exact_match']:.1%} of {counted(row['holes'], 'hole')} filled exactly")
    if row.get("seconds") is not None:
        parts.append(format_duration(row["seconds"]))
    if row.get("reduced_batch_size"):
        parts.append(f"out of memory: batches of {row['reduced_batch_size']}")
    if row.get("best"):
        parts.append("best so far")
    return SEPARATOR.join(parts)


def redrawn_text(earlier: Mapping[str, Any], total_steps: int) -> str:
    """Return what a resume that changed the length of a run, to `total_steps`, did to its rate."""
    return (
        f"the schedule is redrawn from step {earlier['until'] + 1:,} on, for {total_steps:,} steps "
        f"instead of {earlier['total_steps']:,}: the learning rate of that step is "
        f"{earlier['learning_rate_after']:.3g} instead of {earlier['learning_rate_before']:.3g}"
    )


class Console:
    """The voice of one run."""

    def __init__(
        self,
        # `auto` renews one line in place on a terminal and prints plain lines elsewhere; True and
        # False choose one of the two.
        progress: str | bool,
        total_steps: int,  # steps of the whole run
        *,
        first_step: int = 0,  # steps done before this process (a resume)
        # Returns the bytes of memory in use now; None leaves memory out of the progress line.
        memory: Callable[[], float] | None = None,
        stream: TextIO | None = None,  # where to speak; standard output if None
        clock: Callable[[], float] = time.monotonic,  # seconds that only go forward
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._in_place = self._stream.isatty() if progress == "auto" else bool(progress)
        self._total_steps = total_steps
        self._first_step = first_step
        self._memory = memory
        self._clock = clock
        self._started: float | None = None
        self._bar: tqdm | None = None
        self._tokens = 0
        self._seconds = 0.0

    def panel(self, title: str, rows: Rows) -> None:
        """Print named values in a box, names and values each aligned."""
        joined = "".join(UNICODE_BOX)
        box = UNICODE_BOX if self._encodable(joined) == joined else ASCII_BOX
        for line in panel(title, rows, box):
            self.say(line)

    def train(self, row: Mapping[str, Any], log: bool) -> None:
        """Show one step: in place on a terminal; elsewhere as a line, where `log` says so.

        What else its row tells stays on a line of its own.
        """
        if self._started is None:
            self._start(row["seconds"])
        for line in event_lines(row):
            self.say(line)
        self._tokens += row["tokens"]
        self._seconds += row["seconds"]
        if self._bar is None and not log:
            return
        line = progress_line(
            row,
            self._total_steps,
            tokens_per_second=self._tokens / self._seconds if self._seconds > 0 else None,
            memory_bytes=self._memory() if self._memory else None,
            eta_seconds=self._seconds_to_go(row["step"]),
            width=None if self._bar is None else shutil.get_terminal_size().columns - 1,
        )
        if self._bar is None:
            self.say(line)
        else:
            self._bar.set_description_str(self._encodable(line), refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        if log:
            self._tokens, self._seconds = 0, 0.0

    def eval(self, row: Mapping[str, Any]) -> None:
        """Print one evaluation as a line that stays."""
        self.say(eval_line(row, self._total_steps))

    def say(self, text: str) -> None:
        """Print a line that stays, above the progress line where there is one."""
        text = self._encodable(text)
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            # tqdm's own way: the bar is cleared, the text written, and the bar drawn again.
            tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Take the progress line away; what is said afterwards is plain."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def summary(self, title: str, rows: Rows, commands: Rows = ()) -> None:
        """Print the closing panel and, below it, what to type next, with what that does."""
        self.close()
        self.panel(title, rows)
        for line in aligned(commands):
            self.say(f"  {line}")

    def _start(self, seconds_of_first_step: float) -> None:
        """Set the clock that the time to go is reckoned from, and begin the progress line."""
        self._started = self._clock() - seconds_of_first_step
        if self._in_place:
            self._bar = tqdm(
                total=self._total_steps,
                initial=self._first_step,
                bar_format=BAR_FORMAT,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def _seconds_to_go(self, step: int) -> float | None:
        """Return the time to the end at the pace so far, evaluations and saves included."""
        done = step - self._first_step
        if self._started is None or done <= 0:
            return None
        return (self._clock() - self._started) / done * (self._total_steps - step)

    def _encodable(self, text: str) -> str:
        """Return the text, its characters that the stream cannot show replaced."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, errors="replace").decode(encoding)


def closing_summary(status: Mapping[str, Any], folder: Path) -> tuple[str, Rows, Rows]:
    """Return the arguments of `Console.summary` for a run that has just ended."""
    step, total, best = status["step"], status["total_steps"], status.get("best")
    title = f"{status['state']} ({status['reason']}) after {step} of {counted(total, 'step')}"
    rows = []
    if best:
        (metric,) = best.keys() - {"step"}
        name = f"best valid {metric.replace('_', ' ')}"
        rows.append((name, f"{format_loss(best[metric])} at step {best['step']}"))
    tests = [row["loss"] for row in read_metrics(folder) if row.get("split") == "test"]
    if tests:
        rows.append(("test loss", " → ".join(format_loss(loss) for loss in dict.fromkeys(tests))))
    if status.get("seconds"):
        tokens = format_count(status.get("tokens") or 0)
        rows.append(("time in steps", f"{format_duration(status['seconds'])} for {tokens} tokens"))
    if status.get("peak_memory_bytes"):
        rows.append(("peak memory", size_text(status["peak_memory_bytes"])))
    rows.append(("folder", str(folder)))
    return title, rows, _next_commands(status, folder)


def _next_commands(status: Mapping[str, Any], folder: Path) -> Rows:
    place, report = shlex.quote(str(folder)), shlex.quote(str(folder / "report.md"))
    if status["state"] == "finished":
        whole = (folder / "final" / "config.json").is_file()  # trained in full: nothing to merge
        return (
            ("read", report),
            ("try", f"{command('generate')} --run {place} --prompt '…'"),
            ("curves", f"tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}"),
            *((("merge", f"{command('merge')} {place} MERGED_MODEL"),) if not whole else ()),
        )
    if status["reason"] == "non_finite":
        return (
            ("read", f"{report} (which rows and steps)"),
            ("then", "mend the rows, or start anew with a lower optimizer.learning_rate"),
        )
    return (
        ("go on", f"{command()} --resume {place}"),
        ("report", f"{command('report')} {place}"),
    )
