"""Whole models over Triton's kernels: the loss and gradients of the reference."""

import pytest
import torch
from interpreted import DEVICE, TRITON
from small import FAMILIES, RaggedExamples, small_model

from data.batch import Batching, micro_batches
from kernels.dispatch import operations
from lora import LoraConfig, inject
from models.layers import CausalLM
from train.loss import loss_sum

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
LENGTHS = [3, 11, 5]


def model_of(family: str, backend: str, method: str) -> CausalLM:
    model = small_model(family, torch.float32, operations=operations(backend, DEVICE))
    if method == "lora":
        inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1), seed=3)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):  # away from 0, or A has no gradient
                parameter.data.normal_(0, 0.1, generator=generator)
    return model.to(DEVICE)


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [*((f, m, False) for f in FAMILIES for m in ("lora", "full")), ("starcoder2", "lora", True)],
)
def test_loss_and_gradients_are_those_of_the_reference(
    family: str, method: str, checkpointing: bool
) -> None:
    batch = micro_batches(
        RaggedExamples(LENGTHS),
        [0, 1, 2],
        Batching(micro_batch_size=3, layout="unpadded", max_length=48, pad_id=0),
    )[0]
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
