"""`eval.metrics`: what is measured beside the loss, recorded, and what the best state goes by."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows_of, settings, train
from small import DROPOUTS, small_model
from steps import CPU, EXAMPLES, FP32, batching
from test_step_over_ranks import on_ranks

from files.errors import UserError
from train.config.load import load_config
from train.evaluate import evaluate
from train.evaluation import during
from train.precision import Precision
from train.report.record import read_record
from train.state import EvalResult


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_is_the_share_of_targets_that_are_the_likeliest(batch_size: int) -> None:
    """Against dense logits."""
    model = small_model("starcoder2", torch.float64, **DROPOUTS)
    right = 0
    for example in EXAMPLES.examples:
        ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
        with torch.no_grad():
            likeliest = model(ids[None])[0, :-1].argmax(-1)
        right += int((likeliest == labels[1:]).sum())
    found = evaluate(model, EXAMPLES, batching(batch_size), FP32, accuracy=True)
    assert found.token_accuracy == right / EXAMPLES.num_targets.sum()
    plain = evaluate(model, EXAMPLES, batching(batch_size), FP32)
    assert plain.token_accuracy is None
    assert found.loss == pytest.approx(plain.loss, rel=1e-12)
    for precision in ("bf16", "fp32"):
        given = EXAMPLES, batching(batch_size), Precision(precision, CPU)
        loss = evaluate(small_model("llama"), *given).loss
        again = evaluate(small_model("llama"), *given, accuracy=True).loss
        assert again == pytest.approx(loss, rel=1e-6)


def test_over_ranks_it_is_that_of_the_whole_set() -> None:
    model = small_model("llama")
    alone = evaluate(model, EXAMPLES, batching(2), FP32, accuracy=True)
    assert alone.token_accuracy is not None
    for result in on_ranks(
        3, lambda world: evaluate(model, EXAMPLES, batching(2), FP32, world, accuracy=True)
    ):
        assert result.token_accuracy == alone.token_accuracy


def test_lower_is_better_of_every_distance() -> None:
    result = EvalResult(loss=2.0, targets=9, seconds=0.1, token_accuracy=0.75)
    distances = [result.distance(m) for m in ("loss", "perplexity", "token_accuracy")]
    assert distances == [2.0, math.exp(2.0), 0.25]
    lost = dataclasses.replace(result, loss=math.nan)
    assert math.isnan(lost.distance("token_accuracy"))  # of no number any token is the likeliest
    assert dataclasses.replace(result, loss=1e9).perplexity == math.inf


@pytest.mark.usefixtures("cache")
def test_a_run_records_them_and_keeps_and_stops_by_the_one_that_is_named(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls to the end, the accuracy is highest at step 2 and stops the run at 4."""
    planted = iter([0.2, 0.5, 0.4, 0.5, 0.9])
    losses = iter([5.0, 4.0, 3.0, 2.0, 1.0])

    def told(*given: Any, accuracy: bool, **named: Any) -> EvalResult:
        assert accuracy
        return EvalResult(next(losses), 9, 0.1, token_accuracy=next(planted))

    monkeypatch.setattr(during, "evaluate", told)
    more = {
        "eval.steps": 1,
        "eval.metrics": "token_accuracy,perplexity",
        "eval.best_metric": "token_accuracy",
        "eval.early_stopping_patience": 2,
        "train.max_steps": 9,
        "checkpoint.load_best_at_end": True,
    }
    outcome = train(settings(model_folder, rows_file, tmp_path / "run", **more))
    rows = rows_of(outcome.folder, "eval")
    assert [row["token_accuracy"] for row in rows] == [0.2, 0.5, 0.4, 0.5]
    assert [row["perplexity"] for row in rows] == [math.exp(row["loss"]) for row in rows]
    assert [row["best"] for row in rows] == [True, True, False, False]
    assert outcome.reason == "early_stopping"
    status = json.loads((outcome.folder / "status.json").read_text())
    assert status["best"] == {"step": 2, "token_accuracy": 0.5}
    manifest = json.loads((outcome.folder / "final" / "manifest.json").read_text())
    assert manifest["step"] == 2
    best = read_record(outcome.folder).best
    assert best is not None and best["step"] == 2
    report = (outcome.folder / "report.md").read_text()
    assert "token accuracy" in report and "| 0.5000 |" in report


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval.best_metric": "perplexity"}, "is not measured; add it to eval.metrics"),
        ({"eval.metrics": "accuracy"}, 'holds "accuracy"; did you mean .token_accuracy'),
        ({"eval.metrics": ["perplexity", "bleu"]}, 'holds "bleu" .it takes token_accuracy . perp'),
        ({"eval.best_metric": "accuracy"}, "did you mean 'token_accuracy'"),
    ],
)
def test_what_is_not_measured_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)
