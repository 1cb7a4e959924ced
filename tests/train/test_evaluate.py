"""Evaluation: the token mean over the set, whatever the batch, and without dropout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import DROPOUTS, RaggedExamples, small_model
from steps import CPU, EXAMPLES, FP32, batching

from data.batch import LAYOUTS
from models.layers import CausalLM
from train.evaluate import evaluate
from train.precision import Precision


def loss_of(model: CausalLM, precision: str = "fp32", **settings: Any) -> float:
    given = batching(**{"size": 3, **settings})
    result = evaluate(model, EXAMPLES, given, Precision(precision, CPU))
    assert result.targets == EXAMPLES.num_targets.sum()
    return result.loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_it_is_the_token_mean_without_dropout(batch_size: int, layout: str) -> None:
    """Against dense logits, in fp64; batches of 3 leave one of 2 at the end."""
    model = small_model("starcoder2", torch.float64, **DROPOUTS)
    total = 0.0
    for example in EXAMPLES.examples:
        ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = model(ids[None])[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
    loss = loss_of(model, size=batch_size, layout=layout)
    assert loss == pytest.approx(total / EXAMPLES.num_targets.sum(), rel=1e-12)


def test_longest_come_first_in_the_run_s_precision_and_nothing_is_recorded() -> None:
    lengths: list[int] = []

    def watch(layer: torch.nn.Module, given: tuple[Any, ...]) -> None:
        _, _, segments, *_ = given
        lengths.extend(segments.lengths)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_grad_enabled()

    model = small_model("llama")
    watching = model.model.layers[0].register_forward_pre_hook(watch)
    loss = loss_of(model, "bf16")
    watching.remove()
    assert lengths == sorted(EXAMPLES.lengths, reverse=True)
    # bf16 rounds to 8 bits, and a mean of many losses errs by less than one of them.
    assert loss == pytest.approx(loss_of(model), rel=2**-8)
    assert loss != loss_of(model)


def test_a_set_without_targets_is_zero_not_nan() -> None:
    empty = RaggedExamples([4, 3])
    for example in empty.examples:
        example.labels.fill(-100)
    result = evaluate(small_model("llama"), empty, batching(2), FP32)  # type: ignore[arg-type]
    assert (result.loss, result.targets) == (0.0, 0)
