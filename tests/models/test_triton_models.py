"""Whole models over Triton's kernels: the loss and gradients of the reference."""

import pytest
import torch
from interpreted import DEVICE, TRITON
from small import FAMILIES, RaggedExamples, adapted, small_model
from steps import cut

from kernels.dispatch import operations
from models.layers import CausalLM
from train.loss import loss_sum

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def model_of(family: str, backend: str, method: str) -> CausalLM:
    chosen = operations(backend, DEVICE)
    own = {"residual_dropout": 0.1, "embedding_dropout": 0.1} if family == "starcoder2" else {}
    if method == "full":
        return small_model(family, operations=chosen, **own).to(DEVICE)
    return adapted(0.1, family, torch.float32, operations=chosen, **own).to(DEVICE)


# Between them every kernel and every place that one stands in; interpreted, each takes seconds.
QUICK = [("qwen2", "full", False), ("qwen3", "lora", False), ("starcoder2", "lora", True)]
REST = [(f, m, False) for f in FAMILIES for m in ("lora", "full") if (f, m, False) not in QUICK]


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_loss_and_gradients_are_those_of_the_reference(
    family: str, method: str, checkpointing: bool
) -> None:
    (batch,) = cut(3, examples=RaggedExamples([3, 11, 5]))
    sides = []
    for backend in ("reference", "triton"):
        model = model_of(family, backend, method)
        model.gradient_checkpointing = checkpointing
        loss = loss_sum(model, batch, torch.device(DEVICE), (42, 7))
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found
        sides.append((loss.detach(), found))
    (loss, gradients), (other_loss, other_gradients) = sides
    # fp32 sums in other orders, over two layers: a few hundred roundings of 2⁻²⁴.
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - other_gradients[name]).norm() / gradient.norm()
        assert difference <= 1e-4, name


@pytest.mark.parametrize(
    ("method", "policy"),
    [("full", "norms"), ("lora", "mlp"), pytest.param("full", "layers", marks=pytest.mark.slow)],
)
def test_policies_change_no_more_than_an_input_s_last_bit(method: str, policy: str) -> None:
    """Layers run the same kernels again; what is made again otherwise is by torch's formulas."""
    (batch,) = cut(3, examples=RaggedExamples([3, 11, 5]))
    sides = []
    for chosen in ("none", policy):
        model = model_of("starcoder2", "triton", method)
        model.gradient_checkpointing = chosen
        loss = loss_sum(model, batch, torch.device(DEVICE), (42, 7))
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        sides.append((loss.detach(), found))
    (loss, gradients), (other_loss, other_gradients) = sides
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        if policy == "layers":
            assert torch.equal(gradient, other_gradients[name]), name
        difference = (gradient - other_gradients[name]).norm() / gradient.norm()
        assert difference <= 1e-6, name
