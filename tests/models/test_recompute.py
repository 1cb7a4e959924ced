"""Every policy gives the loss and the gradients of a pass that keeps everything, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import DROPOUTS, FAMILIES, adapted, small_model
from torch import Tensor

from kernels.segments import Segments
from models import recompute
from models.layers import CausalLM
from models.recompute import POLICIES, HostRing
from train.config.load import load_config
from train.config.schema import ModelSettings

LENGTHS = [9, 4, 7]
RECOMPUTING = POLICIES[1:]


def network(family: str, method: str, precision: str) -> CausalLM:
    """Return a network of adapters on a base, or of fp32 masters, with dropout."""
    rates = DROPOUTS if family == "starcoder2" else {}
    stored = torch.bfloat16 if (method, precision) == ("lora", "bf16") else torch.float32
    if method == "full":
        return small_model(family, stored, **rates)
    model = adapted(0.2, family, torch.float32, **rates)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(stored)
    return model


def gradients(
    model: CausalLM, precision: str, pack: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the hidden states of ragged documents, and the gradients of all that is trained."""
    ids = torch.arange(sum(LENGTHS)) % 90
    segments = Segments.build(LENGTHS, device="cpu", examples=[3, 1, 4], draw=(1, 5))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n}
    lowered: Any = contextlib.nullcontext()
    if precision == "bf16":
        lowered = torch.autocast("cpu", torch.bfloat16)
    noted: Any = contextlib.nullcontext()
    if pack is not None:
        noted = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with noted, lowered:
        hidden = model.hidden_states(ids, segments)
    weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden.float() * weight).sum().backward()
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found.keys() == trained.keys()
    return hidden.detach(), found


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one[0], other[0])
    different = [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])]
    assert not different


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_policy_changes_a_bit(family: str, method: str, precision: str) -> None:
    model = network(family, method, precision)
    expected = gradients(model, precision)
    assert all(grad.any() for grad in expected[1].values())
    for policy in RECOMPUTING:
        model.gradient_checkpointing = policy
        for _ in range(2):  # a ring is used again
            assert_same(expected, gradients(model, precision))


def test_true_and_false_are_spellings() -> None:
    model = network("llama", "lora", "fp32")
    assert model.gradient_checkpointing == "none"
    for spelled, policy in ((True, "layers"), (False, "none"), ("mlp", "mlp")):
        model.gradient_checkpointing = spelled  # type: ignore[assignment]
        assert model.gradient_checkpointing == policy


def test_the_configuration_takes_all_policies() -> None:
    (rule,) = (
        field.metadata["rule"]
        for field in ModelSettings.__dataclass_fields__.values()
        if field.name == "gradient_checkpointing"
    )
    assert rule.words == ("auto", *POLICIES)
    for policy in POLICIES:
        config = load_config(overrides={"model.gradient_checkpointing": policy})
        assert config.model.gradient_checkpointing == policy


def test_each_policy_keeps_less_than_the_one_before() -> None:
    for method in ("lora", "full"):
        model = network("qwen3", method, "fp32")
        sizes = []
        for policy in POLICIES:
            kept: dict[int, int] = {}

            def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            model.gradient_checkpointing = policy
            gradients(model, "fp32", pack)
            sizes.append(sum(kept.values()))
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)


# --- a boundary between host and device ---


def test_an_offloaded_input_is_in_the_ring_alone_and_comes_back_from_there() -> None:
    model = network("llama", "lora", "fp32")
    model.gradient_checkpointing = "offload"
    expected = gradients(model, "fp32")
    inputs: list[weakref.ref[Tensor]] = []
    send = HostRing.send

    class Watched(HostRing):
        def send(self, layer: int, x: Tensor) -> Callable[[], Tensor]:
            inputs.append(weakref.ref(x))
            return send(self, layer, x)

    buffers: list[Tensor] = []

    def place(x: Tensor) -> Tensor:
        buffers.append(recompute.host_buffer(x))
        return buffers[-1]

    model._policy = "offload", Watched(place)
    segments = Segments.build(LENGTHS, device="cpu", examples=[3, 1, 4], draw=(1, 5))
    hidden = model.hidden_states(torch.arange(sum(LENGTHS)) % 90, segments)
    gc.collect()
    assert [ref() for ref in inputs] == [None] * 2
    assert len(buffers) == 2
    buffers[1].mul_(2)
    hidden.sum().backward()
    spoiled = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(not torch.equal(grad, expected[1][n]) for n, grad in spoiled.items())
    model.zero_grad(set_to_none=True)
    # Nothing of it is left, and the buffers are used again.
    assert_same(expected, gradients(model, "fp32"))
    assert len(buffers) == 2


def test_a_ring_grows_and_forgets_what_was_given_up() -> None:
    ring = HostRing()
    first = ring.send(0, torch.ones(2, 3))
    ring.send(1, torch.full((2, 3), 2.0))
    assert torch.equal(first(), torch.ones(2, 3))
    # The micro-batch ended in its backward pass: what was on its way is not what comes next.
    ring.send(0, torch.zeros(4, 3))
    second = ring.send(1, torch.full((4, 3), 5.0))
    assert torch.equal(second(), torch.full((4, 3), 5.0))
    small = ring.send(0, torch.full((1, 3), 7.0))
    assert torch.equal(small(), torch.full((1, 3), 7.0))


def test_on_cuda_copies_wait_for_what_they_read_and_readers_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for torch.cuda: no card has run this yet (tests/train/test_on_cuda.py does)."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: object = "copies") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} wait for {other.name}")

        def wait_event(self, event: Event) -> None:
            said.append(f"{self.name} wait for event {event.number}")

        def synchronize(self) -> None:
            said.append("the host waits")

    class Event:
        made = 0

        def record(self, stream: Stream) -> None:
            Event.made += 1
            self.number = Event.made
            said.append(f"event {self.number} behind {stream.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        said.append(f"copy on {stream.name}")
        yield

    kernels = Stream("kernels")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: kernels)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, stream: said.append(f"used by {stream.name}")
    )
    ring = HostRing(beside=lambda device: True)
    copied = ["copies wait for kernels", "copy on copies", "used by copies"]
    back = [ring.send(layer, torch.full((2, 3), float(layer))) for layer in (0, 1)]
    sent = [*copied, "event 1 behind copies", *copied, "event 2 behind copies"]
    assert said == sent
    said.clear()
    assert torch.equal(back[1](), torch.full((2, 3), 1.0))
    # The kernels wait for their own input, and only then the next one sets out: beside them.
    came = [*copied, "event 3 behind copies", "kernels wait for event 3"]
    assert said == [*came, *copied, "event 4 behind copies"]
    said.clear()
    assert torch.equal(back[0](), torch.zeros(2, 3))
    assert said == ["kernels wait for event 4"]
    ring.send(0, torch.ones(4, 3))
    assert said[1] == "the host waits"  # a buffer is replaced
