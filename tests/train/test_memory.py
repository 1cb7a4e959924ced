"""Memory of a process on a CPU: what is in use, not what is freed and kept; and as predicted."""

import gc
from typing import Any

import pytest
import torch
from small import FAMILIES, RaggedExamples
from steps import cut, one_step
from torch.utils._python_dispatch import TorchDispatchMode

from lora import LoraConfig, inject
from models import build
from models.config import parse_config
from models.recompute import POLICIES
from train.config.load import load_config
from train.optim import build_optimizer
from train.plan.ledger import memory_ledger
from train.precision import Precision
from train.process.memory import MemoryUse, allocated_bytes

told = pytest.mark.skipif(allocated_bytes() is None, reason="this libc does not tell memory")


@told
def test_what_is_allocated_is_counted_and_what_is_freed_is_not() -> None:
    before = allocated_bytes()
    block = torch.ones(2**24)
    with_block = allocated_bytes()
    del block
    after = allocated_bytes()
    assert before is not None
    assert with_block is not None
    assert after is not None
    assert 2**26 <= with_block - before < 2**26 + 2**20
    assert abs(after - before) < 2**20


@told
def test_what_an_earlier_run_left_does_not_hide_what_this_one_takes() -> None:
    """A run in the same process leaves circles; they are freed before, not in the midst of it."""
    circle: list[object] = [torch.ones(2**24)]
    circle.append(circle)
    gc.disable()
    try:
        del circle
        use = MemoryUse(torch.device("cpu"))
    finally:
        gc.enable()
    taken = torch.ones(2**22)
    gc.collect()
    use.observe()
    assert use.training is not None
    assert taken.nbytes <= use.training < taken.nbytes + 2**20


# --- what the plan predicts ---


class Peak(TorchDispatchMode):
    """The most memory in use behind any of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, allocated_bytes() or 0)
        return out


SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DOCUMENTS = [128] * 8


def measured_and_predicted(
    family: str, method: str, precision: str, policy: str
) -> tuple[int, dict[str, int]]:
    """Return the most that model, optimizer and two steps take, and the ledger of a step."""
    decoder = parse_config(FAMILIES[family] | SIZES, "a test")
    keys = {"train.method": method, "model.gradient_checkpointing": policy, "lora.r": 8}
    keys |= {"data.max_length": 128, "train.per_device_train_batch_size": len(DOCUMENTS)}
    gc.collect()
    before = allocated_bytes()
    assert before is not None
    model = build(decoder, device="cpu")
    model.to(torch.bfloat16 if (method, precision) == ("lora", "bf16") else torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if method == "lora":
        inject(model, LoraConfig(r=8, lora_dropout=0.05))
    model.gradient_checkpointing = policy
    optimizer = build_optimizer("adamw", model, operations=model.operations)
    batch = cut(len(DOCUMENTS), examples=RaggedExamples(DOCUMENTS), max_length=128)
    computed = Precision(precision, torch.device("cpu"))
    with Peak() as peak:
        for number in (1, 2):
            one_step(model, optimizer, batch, precision=computed, draw=(42, number))
    ledger = memory_ledger(
        load_config(overrides=keys),
        decoder,
        precision=precision,
        policy=policy,
        device="cpu",
        lengths=DOCUMENTS,
    )
    return peak.most - before, ledger


@told
@pytest.mark.parametrize(
    ("family", "method", "precision"),
    [
        ("llama", "lora", "fp32"),
        ("starcoder2", "lora", "bf16"),
        ("llama", "full", "fp32"),
        ("qwen3", "full", "bf16"),
    ],
)
def test_the_peak_is_as_predicted_under_every_policy(
    family: str, method: str, precision: str
) -> None:
    measured_and_predicted(family, method, precision, "none")  # libraries prepare their kernels
    for policy in POLICIES:
        measured, ledger = measured_and_predicted(family, method, precision, policy)
        assert ledger["total"] == pytest.approx(measured, rel=0.1), (policy, ledger)
