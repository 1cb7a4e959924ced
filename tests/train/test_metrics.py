"""metrics.jsonl and TensorBoard: the rows, a kill, and what a resume leaves of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from children import python

from files.errors import UserError
from train.log.metrics import Metrics, read_metrics


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / (3 + step),
        "learning_rate": 2e-4 / (1 + step),
        "grad_norm": 0.1 + 0.2,
        "targets": 100,
        "tokens": 200,
        "seconds": 0.5,
        **changes,
    }


def eval_row(step: int, split: str = "valid", loss: float = 0.7) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "loss": loss,
        "targets": 50,
        "best": True,
        "train_loss": 0.8,
    }


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_rows_are_written_whole_unrounded_and_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.train(train_row(1), log=False)
    metrics.eval(eval_row(1))
    # Read before close: a kill at this moment loses nothing.
    lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"kind": "train", **train_row(1)},
        {"kind": "eval", **eval_row(1)},
    ]
    assert lines[-1] == "" and "0.30000000000000004" in lines[0]
    metrics.close()


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.train(train_row(1, loss=math.nan, grad_norm=math.inf), log=True)
    metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None and row["grad_norm"] is None
    assert "train/loss" not in scalars(tmp_path)


def test_a_resume_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.eval(eval_row(0))
    for step in (1, 2, 3, 4):
        metrics.train(train_row(step), log=True)
        if step == 2 or step == 4:
            metrics.eval(eval_row(step))
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().split("\n")[:4]
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')  # the kill came in the middle of a row

    metrics = Metrics(tmp_path, tensorboard=False, resume_step=2)
    assert path.read_text().split("\n")[:-1] == kept  # the rows of step 0, 1, 2 and its evaluation
    metrics.train(train_row(3), log=True)
    metrics.close()
    assert [(row["kind"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_start_from_the_beginning_drops_every_row(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.eval(eval_row(0))
    metrics.train(train_row(1), log=True)
    metrics.close()
    Metrics(tmp_path, tensorboard=False, resume_step=0).close()
    assert read_metrics(tmp_path) == []


def test_an_evaluation_done_again_replaces_its_row(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.train(train_row(4), log=False)
    metrics.eval(eval_row(4, split="valid"))
    metrics.eval(eval_row(4, split="test", loss=0.9))
    metrics.close()
    metrics = Metrics(tmp_path, tensorboard=False, resume_step=4)
    metrics.eval(eval_row(4, split="test", loss=0.6))
    metrics.close()
    rows = read_metrics(tmp_path)
    assert [(row["kind"], row.get("split"), row["loss"]) for row in rows] == [
        ("train", None, 1 / 7),
        ("eval", "valid", 0.7),
        ("eval", "test", 0.6),
    ]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*delete this line"):
        read_metrics(tmp_path)


def test_tensorboard_has_the_logged_steps_under_the_agreed_tags(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.train(train_row(1, tokens=100, seconds=1.0), log=False)
    metrics.train(train_row(2, tokens=500, seconds=2.0), log=True, extra={"memory/peak_gib": 1.5})
    metrics.eval(eval_row(2))
    metrics.eval(eval_row(2, split="test", loss=0.25))
    metrics.close()
    single = {"train/loss": 0.2, "train/epoch": 0.2, "train/learning_rate": 2e-4 / 3}
    single |= {"train/grad_norm": 0.3, "train/tokens_per_second": 600 / 3, "time/step_seconds": 2.0}
    single |= {"memory/peak_gib": 1.5, "eval/loss": 0.7, "test/loss": 0.25}
    shown = scalars(tmp_path)
    assert shown.keys() == single.keys()
    for tag, value in single.items():
        # TensorBoard keeps fp32: half of 2**-23, relative.
        assert shown[tag] == [(2, pytest.approx(value, rel=2**-24))], tag


def test_the_speed_shown_is_that_since_the_last_logged_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=True)
    for step, tokens in ((1, 1000), (2, 30), (3, 50)):
        metrics.train(train_row(step, tokens=tokens, seconds=1.0), log=step != 2)
    metrics.close()
    assert scalars(tmp_path)["train/tokens_per_second"] == [(1, 1000.0), (3, (30 + 50) / 2)]


@pytest.mark.parametrize("resume_step", [0, 2])
def test_tensorboard_shows_no_step_twice_after_a_resume(
    tmp_path: Path, resume_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files are read in the order of their names: the second, the process, then the number of the
    # writer in it, as text. Two writers of one process and second, the ninth and tenth of all,
    # would be read in the wrong order; a resumed run is a process of its own.
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for first, loss in ((1, 1.0), (resume_step + 1, 2.0)):
        metrics = Metrics(tmp_path, tensorboard=True, resume_step=first - 1)
        for step in range(first, 5):
            metrics.train(train_row(step, loss=loss), log=True)
        metrics.close()
    expected = [(step, 1.0 if step <= resume_step else 2.0) for step in range(1, 5)]
    assert scalars(tmp_path)["train/loss"] == expected


def test_neither_torch_nor_tensorboard_is_imported_before_it_is_wanted(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from train.log.metrics import Metrics;"
        f"Metrics(Path({str(tmp_path)!r}), tensorboard=False).close();"
        "assert not {'torch', 'tensorboard'} & set(sys.modules)"
    )
    python("-c", code)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"kind": "train", "step": ' + "9" * 5000 + "}",
        '{"kind": "train", "step": true}',
        '{"kind": ["train"], "step": 1}',
        '{"kind": "eval", "step": 1, "split": []}',
        '{"kind": "train", "step": 1, "step": 2}',
        '{"kind": "train", "step": 1, "loss": NaN}',
    ],
)
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + line + "\n")
    for read in (
        lambda: read_metrics(tmp_path),
        lambda: Metrics(tmp_path, tensorboard=False, resume_step=1),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert f"{path}:2: not a row of metrics" in str(caught.value)
