"""What the terminal shows: progress in place, whole evaluation lines, panel and summary."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from train.log.console import (
    Console,
    closing_summary,
    eval_line,
    progress_line,
)
from train.process.command import command
from train.text import format_count, format_duration, format_loss


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and can say what it would show."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines left standing: a return goes to the line's start, text overwrites."""
        lines, column = [""], 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append("")
                column = 0
            else:
                lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "epoch": 0.2, "loss": 0.8123, "learning_rate": 2e-4}
    return row | {"grad_norm": 0.41, "targets": 90, "tokens": 5800, "seconds": 1.0} | changes


def eval_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {"kind": "eval", "step": step, "split": "valid", "loss": 0.77114, "targets": 12_345}
    return row | {"best": True, "train_loss": 0.80432} | changes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.7, "1m00"),
        (725, "12m05"),
        (3599.7, "1h00"),
        (6720, "1h52"),
        (47 * 3600 + 59 * 60, "47h59"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (912, "912"),
        (999, "999"),
        (999.96, "1.0k"),
        (5812, "5.8k"),
        (36_929_536, "36.9M"),
        (1_543_714_304, "1.54B"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


def test_losses() -> None:
    assert [format_loss(loss) for loss in (0.77114, None, math.nan)] == ["0.7711"] + 2 * [
        "non-finite"
    ]


def test_the_progress_line_says_where_how_well_how_fast_and_how_long() -> None:
    line = progress_line(
        train_row(312),
        3120,
        tokens_per_second=5800.0,
        memory_bytes=22_870_000_000,
        eta_seconds=6720,
    )
    assert line == (
        "step 312/3120 · epoch 0.20 · loss 0.8123 · lr 2.0e-04 · |g| 0.41 · 5.8k tok/s · 21.3 GiB "
        "· ETA 1h52"
    )
    narrow = progress_line(
        train_row(312),
        3120,
        tokens_per_second=5800.0,
        memory_bytes=22_870_000_000,
        eta_seconds=6720,
        width=79,
    )
    assert narrow == (
        "step 312/3120 · epoch 0.20 · loss 0.8123 · lr 2.0e-04 · 5.8k tok/s · ETA 1h52"
    )
    skipped = progress_line(train_row(1, loss=None, grad_norm=None, skipped="non-finite"), 10)
    assert "loss non-finite" in skipped and "|g| non-finite · skipped: non-finite" in skipped


def test_what_does_not_happen_at_every_step_stays_on_a_line_whatever_is_logged() -> None:
    stream = io.StringIO()
    console = Console(False, 10, stream=stream)
    console.train(train_row(1), log=False)
    console.train(train_row(2, loss=None, skipped="non-finite", rows=[7, 3, 7]), log=False)
    console.train(train_row(3, spike=8.26, rows=[*range(10)]), log=False)
    assert stream.getvalue().splitlines() == [
        "step 2: no weight was changed (non-finite); rows 3, 7 of data.train",
        "step 3: the loss, 0.8123, is 8.3 standard deviations above that of the steps before; "
        "rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of data.train",
    ]


def test_an_evaluation_line_has_the_train_loss_beside_and_marks_the_best() -> None:
    assert eval_line(eval_row(312, seconds=12.0), 3120) == (
        "valid loss 0.7711 · step 312/3120 · train loss 0.8043 · 12,345 targets · 12s · best so far"
    )
    before_training = eval_line(eval_row(0, best=False, train_loss=None), 3120)
    assert before_training == "valid loss 0.7711 · step 0/3120 · 12,345 targets"
    cut = eval_line(eval_row(1, best=False, train_loss=None, reduced_batch_size=4), 3120)
    assert cut.endswith("12,345 targets · out of memory: batches of 4")


def test_without_a_terminal_there_are_plain_lines_at_the_logged_steps_alone() -> None:
    stream = io.StringIO()
    clock = Clock()
    console = Console("auto", 10, stream=stream, clock=clock)
    for step in range(1, 5):
        clock.now += 2.0
        console.train(train_row(step, seconds=2.0 if step == 1 else 1.0), log=step % 2 == 0)
    console.eval(eval_row(4))
    console.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split(" · ")[0] for line in lines] == [
        "step 2/10",
        "step 4/10",
        "valid loss 0.7711",
    ]
    # Two seconds of wall time a step, though the step alone took one: saves and evaluations count.
    assert lines[1].endswith("5.8k tok/s · ETA 12s")


def test_the_time_to_go_counts_from_the_step_of_a_resume() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(False, 100, first_step=90, stream=stream, clock=clock)
    clock.now = 10.0
    console.train(train_row(91, seconds=2.0), log=False)
    clock.now = 18.0
    console.train(train_row(95), log=True)
    assert stream.getvalue().endswith("ETA 10s\n")


def test_on_a_terminal_evaluation_lines_stand_whole_above_the_progress_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = Console("auto", 4, stream=stream, memory=lambda: 2**30)
    for step in range(1, 5):
        console.train(train_row(step), log=False)
        if step % 2 == 0:
            console.eval(eval_row(step))
    assert "1.0 GiB" in stream.getvalue()
    console.close()
    console.say("done")
    lines = [line for line in stream.screen() if line]
    # The progress line itself is gone; what was said stands, and nothing is left over on its lines.
    assert lines == [eval_line(eval_row(2), 4), eval_line(eval_row(4), 4), "done"]


@pytest.mark.parametrize(
    ("progress", "terminal", "in_place"), [(True, False, True), (False, True, False)]
)
def test_progress_can_be_forced_either_way(progress: bool, terminal: bool, in_place: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    console = Console(progress, 2, stream=stream)
    console.train(train_row(1), log=True)
    console.close()
    assert ("\r" in stream.getvalue()) == in_place


def test_the_panel_is_a_box_with_straight_edges() -> None:
    stream = io.StringIO()
    Console(False, 1, stream=stream).panel("Lathe", [("model", "tiny"), ("effective batch", "64")])
    assert stream.getvalue().splitlines() == [
        "┌─ Lathe ───────────────┐",
        "│ model            tiny │",
        "│ effective batch  64   │",
        "└───────────────────────┘",
    ]


def test_a_stream_without_unicode_gets_an_ascii_panel_and_never_an_error() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    console = Console(False, 10, stream=stream)
    console.panel("A title longer than its rows", [("a", "b")])
    console.train(train_row(1), log=True)
    lines = raw.getvalue().decode("ascii").splitlines()
    assert (
        lines[0] == "+- A title longer than its rows -+"
        and len({len(line) for line in lines[:3]}) == 1
    )
    assert lines[3].startswith("step 1/10")


def test_the_summary_tells_the_outcome_and_what_to_type_next(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    rows = [eval_row(step, split="test", loss=loss) for step, loss in ((0, 2.0), (4, 1.5))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = {
        "state": "finished",
        "reason": "completed",
        "step": 4,
        "total_steps": 4,
        "best": {"step": 4, "loss": 0.5},
        "seconds": 61.0,
        "tokens": 23_200,
        "peak_memory_bytes": 2**30,
    }
    stream = io.StringIO()
    Console(False, 4, stream=stream).summary(*closing_summary(status, folder))
    text = stream.getvalue()
    assert "finished (completed) after 4 of 4 steps" in text
    assert "0.5000 at step 4" in text and "2.0000 → 1.5000" in text
    assert "1m01 for 23.2k tokens" in text
    assert f"{command('generate')} --run '{folder}' --prompt" in text
    assert command("merge") in text
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")  # trained in full: nothing to merge
    assert "merge" not in dict(closing_summary(status, folder)[2])
    stopped = status | {"state": "preempted", "reason": "sigint", "best": None}
    commands = dict(closing_summary(stopped, folder)[2])
    assert commands["go on"] == f"{command()} --resume '{folder}'"
