"""Between the start of a step and the end of its backward pass the host never waits for a device.

The step runs on meta: there an operation that would have to know a number (`_local_scalar_dense`,
`nonzero`, a copy to the host) has none to give and raises, and every other one is noted.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from small import FAMILIES, RaggedExamples, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from data.batch import Batching, micro_batches
from kernels import attention as attention_module
from kernels.dispatch import operations
from lora import LoraConfig, inject
from models.layers import set_dropout
from train.optim import build_optimizer
from train.precision import Precision
from train.step import train_step

META = torch.device("meta")
LENGTHS = [7, 31, 12, 18, 6]
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2")


class Done(Exception):
    """The device has the whole gradient to compute."""


class Trace(TorchDispatchMode):
    """Notes names of operations, and which of them take something from meta to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.to_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        given = isinstance(out, torch.Tensor) and any(x.is_meta for x in tensors)
        if given and not out.is_meta:
            self.to_host.append(name)
        return out


@pytest.mark.parametrize(
    ("method", "dropout", "recomputing"), [("lora", 0.1, True), ("full", 0.0, False)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_asks_the_device_for_nothing_up_to_its_norm(
    family: str, method: str, dropout: float, recomputing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Attention as on CUDA: meta is told of flash attention, autocast is not, and nothing is drawn.
    monkeypatch.setattr(attention_module, "way", lambda *_, **__: "varlen")
    monkeypatch.setattr(attention_module, "_seeded", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = small_model(family, operations=operations("reference", "cuda"))
    set_dropout(model, dropout)
    if method == "lora":
        inject(model, LoraConfig(r=8, lora_dropout=dropout))
    model.gradient_checkpointing = recomputing
    model.to(META)
    examples: Any = RaggedExamples(LENGTHS)
    batch = micro_batches(
        examples,
        range(len(LENGTHS)),
        Batching(micro_batch_size=3, layout="unpadded", max_length=200, pad_id=0),
    )
    optimizer = build_optimizer("adamw", model, operations=model.operations)
    micro_batches_done = []

    def done() -> None:
        raise Done

    with Trace() as trace, pytest.raises(Done):
        train_step(
            model,
            optimizer,
            batch,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            precision=Precision("fp32", META),
            scaler=None,
            draw=(42, 1),
            meanwhile=done,
            at_most=lambda: micro_batches_done.append(True),
        )
    assert len(micro_batches_done) == len(batch) == 2
    layers, passes = len(model.model.layers), 1 + recomputing
    assert trace.names.count("_flash_attention_forward") == len(batch) * layers * passes
    assert trace.names.count("_flash_attention_backward") == len(batch) * layers
    assert not trace.to_host
    assert not [name for name in trace.names if name in WAITS]
