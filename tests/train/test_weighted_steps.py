"""The weights of rows (`data.weight_field`) in the loss of a step and in whole runs.

Steps are in fp64: sums of a few thousand terms differ by order below 1e-12 (test_accumulation).
"""

import dataclasses
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from runs import resume, rows_of, signalled, train, trained_bits
from small import RaggedExamples, adapted
from steps import CPU, FP32, batching, cut, gradient_step, trained
from test_step_over_ranks import on_ranks

from data.batch import MicroBatch
from data.order import balanced_shares
from models.layers import CausalLM
from train.evaluate import evaluate
from train.loss import loss_sum
from train.precision import LossScaler, Precision
from train.process.world import World
from train.report.notes import events
from train.report.record import read_record
from train.run import main

LENGTHS = [3, 40, 7, 22, 15, 2, 31, 9]
WEIGHTS = [0.5, 3.0, 1e-3, 1.0, 250.0, 0.1, 2.0, 7.0]


def weighed(
    weights: Sequence[float | None] = WEIGHTS, positions: Sequence[int] = range(8)
) -> RaggedExamples:
    """Return eight ragged examples, or those at some positions, with the weights given."""
    examples = RaggedExamples(LENGTHS)
    examples.examples = [
        dataclasses.replace(examples.examples[position], weight=weight)
        for position, weight in zip(positions, weights, strict=True)
    ]
    examples.lengths = np.array([LENGTHS[position] for position in positions])
    return examples


def assert_same(one: tuple, other: tuple, tolerance: float = 1e-12) -> None:
    assert one[0].loss == pytest.approx(other[0].loss, rel=tolerance)
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_s_loss_and_gradient_are_those_of_the_formula(scaled: bool) -> None:
    """Σ w Σ nll / Σ w · targets, by autograd over one dense computation."""
    model, scaler = adapted(), LossScaler()
    scaler.scale = 1024.0
    result, gradients = gradient_step(
        model, cut(2, examples=weighed()), scaler=scaler if scaled else None
    )
    total, weight, targets = torch.zeros((), dtype=torch.float64), 0.0, 0
    for example, own in zip(weighed().examples, WEIGHTS, strict=True):
        ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
        logits = model(ids[None])[0]
        total = total + own * F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count = int((labels[1:] != -100).sum())
        weight, targets = weight + own * count, targets + count
    assert result.targets == targets  # a count, whatever they weigh
    assert result.loss == pytest.approx(total.item() / weight, rel=1e-12)
    expected = torch.autograd.grad(total / weight, list(trained(model).values()))
    for (name, gradient), exact in zip(gradients.items(), expected, strict=True):
        assert (gradient - exact).norm() <= 1e-12 * exact.norm(), name


@pytest.mark.parametrize(("size", "layout"), [(1, "unpadded"), (3, "longest"), (4, "max_length")])
def test_every_cut_and_every_padding_gives_one_loss_and_one_gradient(
    size: int, layout: str
) -> None:
    model = adapted()
    whole = gradient_step(model, cut(8, examples=weighed()))
    assert_same(whole, gradient_step(model, cut(size, layout, examples=weighed())))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_one_loss_and_one_gradient(ranks: int) -> None:
    examples = weighed()

    def step(world: World) -> tuple:
        mine = balanced_shares(examples.lengths, world.size)[world.rank]
        batch: list[MicroBatch] = cut(2, examples=examples, indices=mine.tolist())
        return gradient_step(adapted(), batch, world=world)

    alone = gradient_step(adapted(), cut(8, examples=examples))
    for one in on_ranks(ranks, step):
        assert_same(alone, one)


def test_a_row_of_weight_two_is_the_row_twice() -> None:
    model = adapted()
    twice = cut(3, examples=weighed([2.0, 1.0, 3.0], [1, 3, 6]))
    again = cut(3, examples=weighed([None] * 6, [1, 1, 3, 6, 6, 6]))
    assert_same(gradient_step(model, twice), gradient_step(model, again))


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e30, 5e-324])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_equal_weights_change_no_bit(weight: float, name: str) -> None:
    model, precision = adapted(dtype=torch.float32), Precision(name, CPU)
    plain, equal = (
        gradient_step(model, cut(3, examples=weighed([own] * 8)), precision=precision)
        for own in (None, weight)
    )
    assert (plain[0].loss, plain[0].grad_norm) == (equal[0].loss, equal[0].grad_norm)
    assert all(torch.equal(gradient, equal[1][name]) for name, gradient in plain[1].items())


def test_an_evaluation_counts_every_target_once() -> None:
    model: CausalLM = adapted()
    plain, weighted = (
        evaluate(model, examples, batching(3), FP32)  # type: ignore[arg-type]
        for examples in (weighed([None] * 8), weighed())
    )
    assert (plain.loss, plain.targets) == (weighted.loss, weighted.targets)
    batch = cut(8, examples=weighed())[0]
    assert loss_sum(model, batch, CPU, None) != loss_sum(model, batch, CPU, None, 1.0, 1.0)


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the rows of other runs, those that are trained on with weights; two weigh 0."""
    folder = Path(shutil.copytree(rows_file, tmp_path_factory.mktemp("weighed") / "rows"))
    lines = (folder / "train.jsonl").read_text().splitlines()
    written = [
        json.dumps({**json.loads(line), "score": 0 if number < 2 else number / 4})
        for number, line in enumerate(lines)
    ]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in written))
    return folder


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of one epoch, of 20 rows in 4 steps."""
    asked = {"data.weight_field": "score", "eval.on_start": True, "train.num_train_epochs": 1}
    return runs.settings(model, rows, output, **{**asked, **changes})


@pytest.fixture(scope="module")
def run(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(model_folder, rows, tmp_path_factory.mktemp("run") / "run")).folder


def test_a_resume_is_bit_equal(model_folder: Path, rows: Path, run: Path, tmp_path: Path) -> None:
    stopped = train(
        settings(model_folder, rows, tmp_path / "run"), signalled(2, signal.SIGTERM)
    ).folder
    resume(stopped)
    assert trained_bits(stopped) == trained_bits(run)
    assert rows_of(stopped) == rows_of(run)
    assert len(rows_of(run, "train")) == 4


def test_valid_rows_need_no_weight_and_the_first_loss_is_theirs_alone(
    model_folder: Path, rows: Path, run: Path, tmp_path: Path
) -> None:
    """The valid loss before training is that of a run without weights; the train loss is not."""
    changes = {"data.weight_field": None, "train.max_steps": 1}
    plain = train(settings(model_folder, rows, tmp_path / "plain", **changes)).folder
    assert rows_of(plain, "eval")[0] == rows_of(run, "eval")[0]
    assert rows_of(plain, "train")[0]["loss"] != rows_of(run, "train")[0]["loss"]


def test_plan_panel_and_report_tell_of_the_weights(
    model_folder: Path, rows: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = settings(model_folder, rows, tmp_path / "none")
    assert main([*runs.arguments(values), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "20 (data) of weight 0.5 to 5.25, 5 valid" in said
    assert "2 of 22 rows (9.1%) are dropped: longer than data.max_length=48, of weight 0 " in said
    assert main([*runs.arguments(values), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    written = json.loads((run / "plan.json").read_text())
    assert planned["data"] == written["data"]
    assert planned["data"]["weightless"] == 2
    assert [event for event in events(read_record(run)) if "`score`" in event]


def test_a_plan_without_a_model_counts_the_rows_that_weigh_something(
    rows: Path, capsys: pytest.CaptureFixture[str], refused: runs.Refused
) -> None:
    """As it checks their other columns."""
    asked = [f"data.train={rows / 'train.jsonl'}", "--plan", "--json"]
    assert main([*asked, "data.weight_field=score"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 20
    said = refused(main, *asked, "data.weight_field=scores")
    assert 'train.jsonl:1: field "scores" missing' in said and "did you mean 'score'" in said


def test_another_column_of_weights_is_no_resume(
    run: Path, tmp_path: Path, refused: runs.Refused
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    said = refused(main, "--resume", copy, "data.weight_field=none")
    assert "data.weight_field" in said
