"""Loss and accuracy of rows against transformers; standard errors against matrix formulas."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import EOS, reference_model
from small import DROPOUTS, RaggedExamples, small_model
from steps import CPU, FP32, batching

from data.batch import LAYOUTS
from files.errors import UserError
from models import load_model
from train.evaluate import evaluate
from train.evaluation import likelihood
from train.evaluation.likelihood import Scores, mean, score
from train.precision import Precision

LENGTHS = [3, 40, 7, 22, 15, 2, 31, 9]


def ragged(vocabulary: int = 96) -> Any:
    examples: Any = RaggedExamples(LENGTHS, vocabulary=vocabulary)
    examples.rows = np.array([0, 1, 2, 2, 2, 3, 4, 5])  # a row makes several examples
    return examples


@pytest.mark.parametrize("family", ["Qwen2", "Starcoder2"])
def test_loss_and_accuracy_of_each_row_are_transformers(family: str, tmp_path: Path) -> None:
    reference = reference_model(family).double()
    reference.save_pretrained(tmp_path)
    model, examples = load_model(tmp_path, dtype=torch.float64), ragged(EOS)
    for example in examples.examples[:4]:  # every other token is the likeliest
        for place in range(2, len(example.input_ids), 2):
            prefix = torch.from_numpy(example.input_ids[:place]).long()
            with torch.no_grad():
                likeliest = int(reference(prefix[None]).logits[0, -1].argmax())
            example.input_ids[place] = likeliest
            if example.labels[place] != -100:
                example.labels[place] = likeliest
    found = score(model, examples, batching(3), FP32)
    for index, example in enumerate(examples.examples):
        ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[1:], reduction="sum").item()
        right = (logits.argmax(-1) == labels[1:]).sum().item()
        # transformers' RMS norms are in fp32, whatever the model is in.
        rel = 1e-9 if family == "Starcoder2" else 1e-6
        assert found.loss[index] == pytest.approx(loss, rel=rel)
        assert found.correct[index] == right
    assert 20 < found.correct.sum() < found.targets.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_sum_is_the_training_s_own_evaluation(layout: str, precision: str) -> None:
    model, examples = small_model("starcoder2", **DROPOUTS), ragged()
    given = batching(3, layout)
    found = score(model, examples, given, Precision(precision, CPU)).estimates()["loss"]
    trained = evaluate(model, examples, given, Precision(precision, CPU))
    # Both are sums of the same fp32 numbers, in another order.
    assert found.value == pytest.approx(trained.loss, rel=1e-6)


def test_an_error_is_the_sandwich_of_an_intercept_clustered_by_row() -> None:
    """(XᵀX)⁻¹ Σ_r XᵣᵀuᵣuᵣᵀXᵣ (XᵀX)⁻¹ · R / (R − 1) over single tokens, X a column of ones."""
    random = np.random.default_rng(0)
    row_of = random.integers(0, 12, 300)
    y = random.normal(size=300) + row_of % 3
    x = np.ones((300, 1))
    bread = np.linalg.inv(x.T @ x)
    residual = y - x[:, 0] * (bread @ x.T @ y)[0]
    meat = np.zeros((1, 1))
    for row in range(12):
        part = x[row_of == row].T @ residual[row_of == row]
        meat += np.outer(part, part)
    expected = math.sqrt((bread @ meat @ bread)[0, 0] * 12 / 11)
    found = mean(y, np.ones(300), row_of)
    assert found.value == pytest.approx(y.mean(), rel=1e-12)
    assert found.error == pytest.approx(expected, rel=1e-12)
    assert found.rows == 12
    # Summed up beforehand it is the same.
    sums = np.bincount(row_of, weights=y)
    again = mean(sums, np.bincount(row_of), np.arange(12))
    assert again.error == pytest.approx(expected, rel=1e-12)


def test_of_a_number_for_each_row_it_is_the_usual_one() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    found = mean(values, [1] * 5, range(5))
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5), rel=1e-12)
    assert mean([2.0], [4], [0]).error is None
    assert math.isnan(mean([], [], []).value)
    # A row without a target says nothing.
    assert mean([*values, 0.0], [1] * 5 + [0], range(6)) == found


def test_perplexity_is_e_to_the_loss_and_so_is_its_error() -> None:
    scores = Scores(np.array([6.0, 2.0]), np.array([1, 2]), np.array([2, 2]), np.array([0, 1]))
    found = scores.estimates()
    assert found["loss"].value == 2.0 and found["token_accuracy"].value == 0.75
    assert found["loss"].error == pytest.approx(1.0)  # √(2 · (2² + 2²)) / 4
    assert found["perplexity"].value == pytest.approx(math.exp(2))
    assert found["perplexity"].error == pytest.approx(math.exp(2) * 1.0)


def test_smaller_batches_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = small_model("llama"), ragged()
    expected = score(model, examples, batching(8), FP32)
    token_losses = likelihood.token_losses
    most = 2

    def short(model: Any, batch: Any, device: torch.device) -> Any:
        if len(batch.examples) > most:
            raise MemoryError
        return token_losses(model, batch, device)

    monkeypatch.setattr(likelihood, "token_losses", short)
    found = score(model, examples, batching(8), FP32)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    assert (found.correct == expected.correct).all()
    most = 0
    with pytest.raises(UserError, match="evaluation: out of memory"):
        score(model, examples, batching(8), FP32)
