"""What CUDA's autocast casts in a forward pass: every operation of it is walked through, no card.

Fake tensors on `cuda` carry no data, but torch's own autocast treats them as a card's. They take
neither a backward pass nor Python's indices where torch was built without CUDA: the first casts
nothing that matters here, for it runs outside of autocast, and the second is put into operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import FAMILIES, small_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import reference
from kernels.segments import Segments
from lora import LoraConfig, inject
from models.layers import CausalLM

HALF, WHOLE = torch.bfloat16, torch.float32
LENGTHS = (20, 17)
ROWS = sum(LENGTHS)
DOWN, UP = (WHOLE, HALF), (HALF, WHOLE)


class Casts(TorchDispatchMode):
    """Counts the casts of activations, which are those of as many rows as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].is_floating_point()
        if cast and out.ndim > 1 and len(out) % ROWS == 0:
            self.seen[args[0].dtype, out.dtype] += 1
        return out


class Indices(TorchFunctionMode):
    """Puts slices and new axes into operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, key, *value = args
        for axis, part in enumerate(key if isinstance(key, tuple) else (key,)):
            if part is None:
                x = x.unsqueeze(axis)
            else:
                x = torch.ops.aten.slice(x, axis, part.start, part.stop, part.step or 1)
        return None if value else x  # there is nothing to write


@contextlib.contextmanager
def autocast_on_cuda() -> Iterator[Casts]:
    casts = Casts()
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", HALF)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Indices(), casts:
            yield casts
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)


class Loss(nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, segments: Segments) -> Tensor:
        ids = torch.empty(ROWS, dtype=torch.int64, device="cuda")
        hidden = self.model.hidden_states(ids, segments)
        return self.model.operations.linear_cross_entropy(
            hidden, self.model.head_weight(), ids, rows=ids
        )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_cast_where_a_formula_says_so_and_never_by_autocast(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA over a bf16 base; full fine-tuning, whose residual stream is in fp32 as its weights."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    lora = method == "lora"
    model = small_model(family, HALF if lora else WHOLE, head_dim=16)
    if lora:
        inject(model, LoraConfig(r=8, lora_dropout=0.0))
    layers = len(model.model.layers)
    segments = Segments.build(LENGTHS, device="cpu")
    with autocast_on_cuda() as casts:
        loss = Loss(model)
        state = {n: torch.empty_like(p, device="cuda") for n, p in loss.state_dict().items()}
        on_cuda = {
            name: torch.empty_like(getattr(segments, name), device="cuda")
            for name in ("positions", "boundaries")
        }
        out = functional_call(loss, state, (dataclasses.replace(segments, **on_cuda),))
    assert out.dtype == WHOLE and out.device.type == "cuda"

    expected: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    expected[UP] += 1  # logits, for their softmax
    expected[DOWN] += 1  # its gradient is made in the place of the logits
    if family == "qwen3":  # norms of q and k, RMSNorm's quotient being in fp32
        expected += Counter({UP: 2 * layers, DOWN: 2 * layers})
    if lora:
        expected[DOWN] += 2  # cos and sin
        if family != "starcoder2":
            expected += Counter({UP: 2 * layers + 1, DOWN: 2 * layers + 1})
    else:
        expected[DOWN] += 2 * layers  # what q, k and v read together, and what the MLP reads
        expected[DOWN] += 2 * layers  # q and k, turned by tables in fp32
        expected[DOWN] += 1  # what the head reads
    assert casts.seen == expected


@pytest.mark.parametrize("trained", [HALF, WHOLE])
def test_layer_norm_stays_in_the_type_of_its_input(trained: torch.dtype) -> None:
    """Autocast casts it to fp32 by itself; a bias that is trained is in fp32 anyway."""
    with autocast_on_cuda() as casts:
        x, weight = (torch.empty(size, dtype=HALF, device="cuda") for size in ((ROWS, 8), (8,)))
        bias = torch.empty(8, dtype=trained, device="cuda")
        assert torch.nn.functional.layer_norm(x, (8,), weight, weight).dtype == WHOLE
        assert casts.seen == {UP: 1}
        assert reference.layer_norm(x, weight, bias, 1e-5).value.dtype == HALF
        assert reference.add_layer_norm(x, x, weight, bias, 1e-5)[1].value.dtype == HALF
        assert casts.seen == {UP: 1}
