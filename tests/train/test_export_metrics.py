"""Metrics as CSV, and to trackers: stand-ins with the calls that their documentation has."""

import csv
import io
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import make_run, rewrite, rows_of
from runs import Refused

from train.publish.export_metrics import main

Calls = list[tuple[Any, ...]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of two steps, evaluated before and after, with one loss that is not finite."""
    folder = make_run(tmp_path / "run", steps=2, valid={0: 2.0, 2: 1.5})
    rows = rows_of(folder)
    for row in rows:
        row.pop("seconds")
        if row["kind"] == "train":
            row |= {"learning_rate": 0.1, "grad_norm": 3.0, "targets": 9, "tokens": 10}
            row |= {"loss": None if row["step"] == 1 else 1.75, "rows": [4], "epoch": 0.5}
        else:
            row |= {"train_loss": None}
    test = {"kind": "eval", "step": 2, "split": "test", "loss": 1.6, "targets": 7}
    rewrite(folder, [*rows, test])
    return folder


OF_A_STEP = {
    "train/learning_rate": 0.1,
    "train/grad_norm": 3.0,
    "train/targets": 9,
    "train/tokens": 10,
    "train/epoch": 0.5,
}
EXPECTED = {
    0: {"eval/loss": 2.0, "eval/targets": 40_000},
    1: OF_A_STEP,
    2: OF_A_STEP
    | {"train/loss": 1.75, "eval/loss": 1.5, "eval/targets": 40_000}
    | {"test/loss": 1.6, "test/targets": 7},
}


def test_a_csv_has_a_line_a_step(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    assert main([str(run), "--to", "csv"]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(printed)))
    found = {
        int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
        for row in rows
    }
    assert found == EXPECTED
    out = tmp_path / "m.csv"
    assert main([str(run), "--to", "csv", "--out", str(out)]) == 0
    assert out.read_text() == printed and "3 steps of run" in capsys.readouterr().out
    assert "is there already" in refused(main, run, "--to", "csv", "--out", out)


class Wandb:
    """`wandb.init(...)` is a run, which `with` finishes; `run.log(values, step=)`."""

    def __init__(self) -> None:
        self.calls: Calls = []

    @contextmanager
    def init(self, *, project: str, name: str, config: dict[str, Any]) -> Any:
        self.calls.append(("init", project, name, config))
        yield SimpleNamespace(log=lambda data, step: self.calls.append((step, data)))
        self.calls.append(("finish",))


class Mlflow:
    """`mlflow.set_experiment`, `with mlflow.start_run`, `log_params`, `log_metrics`."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def set_experiment(self, experiment_name: str) -> None:
        self.calls.append(("experiment", experiment_name))

    @contextmanager
    def start_run(self, *, run_name: str) -> Any:
        self.calls.append(("init", run_name))
        yield None
        self.calls.append(("finish",))

    def log_params(self, params: dict[str, Any]) -> None:
        assert all(len(str(value)) <= 6000 for value in params.values())
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((step, metrics))


class Trackio:
    """`trackio.init`, `trackio.log(metrics, step=)`, `trackio.finish()`."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def init(self, project: str, name: str, config: dict[str, Any]) -> None:
        self.calls.append(("init", project, name, config))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", Wandb), ("mlflow", Mlflow), ("trackio", Trackio)]
)
def test_a_tracker_gets_every_step_in_order(
    name: str,
    module: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = module()
    monkeypatch.setitem(sys.modules, name, tracker)
    assert main([str(run), "--to", name, "--project", "mine"]) == 0
    assert f"3 steps of run went to {name}, project mine" in capsys.readouterr().out
    begin, steps, end = tracker.calls[:-4], tracker.calls[-4:-1], tracker.calls[-1]
    assert steps == [(step, values) for step, values in EXPECTED.items()]
    assert end == ("finish",)
    if name == "mlflow":
        assert begin[:2] == [("experiment", "mine"), ("init", "run")]
        assert begin[2][1]["optimizer.learning_rate"] == "0.0002"
    else:
        ((_, project, called, config),) = begin
        assert (project, called) == ("mine", "run")
        assert config["optimizer"]["learning_rate"] == 0.0002


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_there_or_refuses_is_one_sentence(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert f"`pip install {name}`" in refused(main, run, "--to", name)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no key\nmore")

    broken = SimpleNamespace(init=fail, set_experiment=fail)
    monkeypatch.setitem(sys.modules, name, broken)
    assert f"{name} did not take the metrics (no key)" in refused(main, run, "--to", name)


def test_what_makes_no_sense_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--out goes with --to csv" in refused(main, run, "--to", "wandb", "--out", "x.csv")
    assert "a CSV has none" in refused(main, run, "--to", "csv", "--project", "x")
    assert "invalid choice" in refused(main, run, "--to", "excel")
    assert "required: --to" in refused(main, run)
    empty = make_run(tmp_path / "empty", steps=0, valid={})
    assert "has no metrics yet" in refused(main, empty, "--to", "csv")
    assert "no such folder" in refused(main, tmp_path / "none", "--to", "csv")
