"""Frozen layers in host memory: the bits of a model that is there whole, in two places."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from small import DROPOUTS, FAMILIES, small_model
from torch import Tensor

from files.errors import UserError
from kernels import pinned as pinning
from kernels import streamed
from kernels.dispatch import operations
from kernels.pinned import FETCH
from kernels.segments import Segments
from kernels.streamed import LayerStream
from lora import LoraConfig, inject
from models.cache import KeyValueCache
from models.layers import CausalLM
from models.recompute import POLICIES
from train.config.load import load_config
from train.inputs.known import NO_DATA, Unknown
from train.inputs.streaming import stream_layers
from train.plan import decide as deciding
from train.plan import memory as planned_memory
from train.plan.decide import Machine, decide, decide_streaming
from train.plan.document import plan_document
from train.plan.ledger import find_decoder_config
from train.plan.text import render_plan

LENGTHS = [9, 4, 7]
LAYERS = 4
CPU = torch.device("cpu")


class Simulated:
    """A boundary whose copies arrive when they are waited for, and not before."""

    def __init__(self) -> None:
        self.host: list[Tensor] = []
        self.places: list[Tensor] = []
        self.brought: list[int] = []
        self.said: list[str] = []  # copies and waits, in their order
        self._late: list[tuple[Tensor, Tensor]] = []

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.host.append(torch.zeros(shape, dtype=dtype))
        return self.host[-1]

    def on_device(self, elements: int, dtype: torch.dtype) -> Tensor:
        self.places.append(torch.full((elements,), torch.nan, dtype=dtype))
        return self.places[-1]

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        starts = [one.data_ptr() for one in self.host]
        self.brought.append(starts.index(source.data_ptr()))
        self.said.append(f"send {self.brought[-1]}")
        target.fill_(torch.nan)  # what was there may be gone from now on
        self._late.append((target, source))

    def record(self, queue: str) -> int | None:
        return len(self._late) - 1 if queue == FETCH else None

    def wait(self, queue: str, event: int | None) -> None:
        if event is None:
            return
        target, source = self._late[event]
        starts = [one.data_ptr() for one in self.host]
        self.said.append(f"wait {starts.index(source.data_ptr())}")
        target.copy_(source)

    def finish(self) -> None:
        raise AssertionError("nothing is stored")


def network(
    family: str, stored: torch.dtype, targets: list[str] | None = None, backend: str = "reference"
) -> CausalLM:
    rates = DROPOUTS if family == "starcoder2" else {}
    kernels = operations(backend, CPU)
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS, **rates}
    model = small_model(family, stored, operations=kernels, **changes)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=targets or "all-linear")
    inject(model, config, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def gradients(model: CausalLM, lowered: bool) -> tuple[Tensor, dict[str, Tensor]]:
    segments = Segments.build(LENGTHS, device="cpu", examples=[3, 1, 4], draw=(1, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        hidden = model.hidden_states(torch.arange(sum(LENGTHS)) % 90, segments)
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return hidden.detach(), found


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    different = [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])]
    assert not different


# Half adapted: layers that read one input have adapters, or none of them has.
TARGETS = [None, ["q_proj", "o_proj"]]


TYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
    "lowered": (torch.float32, True),
}


def every_pair() -> list[Any]:
    """Return all of families, types and targets; quick are half, which have every pair."""
    return [
        pytest.param(
            family,
            *TYPES[name],
            targets,
            marks=() if (i + j + k) % 2 else pytest.mark.slow,
            id=f"{family}-{name}-{('all', 'some')[k]}",
        )
        for i, family in enumerate(FAMILIES)
        for j, name in enumerate(TYPES)
        for k, targets in enumerate(TARGETS)
    ]


@pytest.mark.parametrize(("family", "stored", "lowered", "targets"), every_pair())
def test_streamed_layers_give_the_bits_of_resident_ones(
    family: str, stored: torch.dtype, lowered: bool, targets: list[str] | None
) -> None:
    resident = network(family, stored, targets)
    model = network(family, stored, targets)
    boundary = Simulated()
    stream_layers(model, CPU, boundary)
    for policy in POLICIES:
        resident.gradient_checkpointing = model.gradient_checkpointing = policy
        expected = gradients(resident, lowered)
        assert len(expected[1]) > 2 * LAYERS
        for _ in range(2):
            assert_same(expected, gradients(model, lowered))
    # No more than two layers ever were there.
    assert len(boundary.places) == 2
    assert max(map(len, boundary.places)) == max(map(len, boundary.host))


def test_triton_s_kernels_multiply_by_streamed_weights() -> None:
    if not operations_there("triton"):
        pytest.skip("Triton is not to be had here")
    resident = network("llama", torch.float32, None, "triton")
    model = network("llama", torch.float32, None, "triton")
    stream_layers(model, CPU, Simulated())
    assert_same(gradients(resident, False), gradients(model, False))


def operations_there(name: str) -> bool:
    with contextlib.suppress(UserError):
        return operations(name, CPU).name == name
    return False


@pytest.mark.parametrize("policy", POLICIES)
def test_each_layer_comes_once_a_pass_in_the_order_of_the_pass(policy: str) -> None:
    """Up, and down again from the two that are there; what a policy makes again it makes there."""
    model = network("llama", torch.float32)
    boundary = Simulated()
    stream_layers(model, CPU, boundary)
    model.gradient_checkpointing = policy
    gradients(model, False)
    assert boundary.brought == [0, 1, 2, 3, 1, 0]
    boundary.brought.clear()
    gradients(model, False)  # the two lowest are there still
    assert boundary.brought == [2, 3, 1, 0]
    boundary.brought.clear()
    with torch.no_grad():
        for _ in range(2):
            segments = Segments.build(LENGTHS, device="cpu")
            model.hidden_states(torch.arange(sum(LENGTHS)), segments)
    assert boundary.brought == [2, 3, 0, 1, 2, 3]


def test_each_layer_is_sent_for_while_the_one_before_computes() -> None:
    boundary = Simulated()
    stream = stream_layers(network("llama", torch.float32), CPU, boundary)
    for layer in (0, 1, 2, 3, 2, 1, 0):
        stream.bring(layer)
        boundary.said.append(f"{layer} computes")
    up = ["send 0", "wait 0", "send 1", "0 computes", "wait 1", "send 2", "1 computes"]
    top = ["wait 2", "send 3", "2 computes", "wait 3", "3 computes"]
    down = ["wait 2", "send 1", "2 computes", "wait 1", "send 0", "1 computes"]
    assert boundary.said == [*up, *top, *down, "wait 0", "0 computes"]


def test_a_pass_that_was_given_up_leaves_nothing_behind() -> None:
    resident, model = (network("llama", torch.float32) for _ in range(2))
    stream = stream_layers(model, CPU, Simulated())
    for layer in (3, 1, 2, 0, 3, 0):
        stream.bring(layer)
        assert_same(gradients(resident, False), gradients(model, False))


def test_generation_with_a_cache_is_the_same() -> None:
    found = []
    for streams in (False, True):
        model = network("qwen2", torch.float32)
        if streams:
            stream_layers(model, CPU, Simulated())
        cache = KeyValueCache(8)
        with torch.no_grad():
            for ids in ([5, 6, 7], [8], [9]):
                segments = Segments.build([len(ids)], device="cpu", offset=cache.length)
                found.append(model.hidden_states(torch.tensor(ids), segments, cache))
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one, other)


def test_weights_keep_their_names_and_numbers() -> None:
    resident, model = (network("starcoder2", torch.bfloat16) for _ in range(2))
    parameters = dict(model.named_parameters())
    boundary = Simulated()
    stream_layers(model, CPU, boundary)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    for name, parameter in resident.named_parameters():
        assert torch.equal(parameters[name], parameter)
    on_host = {one.untyped_storage().data_ptr() for one in boundary.host}
    for name, parameter in parameters.items():
        of_linear = "_proj.weight" in name or ".c_fc.weight" in name
        streams = "layers" in name and of_linear
        assert (parameter.untyped_storage().data_ptr() in on_host) == streams, name
        assert parameter.data_ptr() % 64 == 0 or not streams


def test_on_cuda_copies_wait_for_the_kernels_before_and_kernels_for_their_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for torch.cuda: no card has run this yet (tests/train/test_on_cuda.py does)."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            said.append(f"{self.name} wait for event {event.number}")

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

    pinned: list[int] = []

    def pin(tensor: Tensor) -> int:
        pinned.append(tensor.nbytes)
        return 0

    kernels = Stream("kernels")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: kernels)
    monkeypatch.setattr(pinning, "pin", pin)
    layers = [[torch.nn.Parameter(torch.full((2, 3), float(i)), False)] for i in range(3)]
    stream = LayerStream(layers, CPU)
    assert pinned == [256] * 3  # each is padded to where the next may begin

    def sent(event: int) -> list[str]:
        behind = [f"event {event} behind kernels", f"copies wait for event {event}"]
        return [*behind, "copy on copies", f"event {event + 1} behind copies"]

    stream.weights[0][0].dense(torch.float32)
    assert said == [*sent(1), "kernels wait for event 2", *sent(3)]
    said.clear()
    assert stream.weights[1][0].dense(torch.float32)[0, 0] == 1
    # Into the place of layer 0, behind the kernels that read it.
    assert said == ["kernels wait for event 4", *sent(5)]
    said.clear()
    stream.weights[1][0].dense(torch.float32)
    assert said == []
    monkeypatch.setattr(pinning, "pin", lambda tensor: 2)
    with pytest.raises(UserError, match=r"model\.stream_layers: 0 MiB .*CUDA error 2"):
        LayerStream(layers, CPU)


# --- the plan and the run ---

GB = 10**9
GPU = Machine("cuda", 24 * GB, (8, 0))


def planned(preset: str, memory: int, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    config = load_config(preset, overrides=changes)
    decoder = find_decoder_config(config)
    assert not isinstance(decoder, Unknown)
    return plan_document(config, NO_DATA, decoder, Machine("cuda", memory, (8, 0)), ranks)


def test_fifteen_billion_parameters_fit_24_gb_and_the_plan_says_how() -> None:
    document = planned("starcoder2-15b-lora", 24 * GB)
    assert document["streaming"] is True and document["fits"] is True
    assert document["quantization"] is None
    # 40 layers of H 6144, I 24576, 48 heads and 4 of keys and values, of 128 numbers each.
    layer = 6144 * (2 * 6144 + 2 * 512 + 2 * 24576)
    assert document["streamed_memory"] == 2 * 40 * layer
    resident = planned("starcoder2-15b-lora", 24 * GB, **{"model.stream_layers": False})
    assert resident["fits"] is False and resident["streamed_memory"] == 0
    gone = resident["memory"]["weights"] - document["memory"]["weights"]
    assert gone == 2 * 38 * layer
    text = render_plan(document)
    assert "of frozen layers in host memory, two on the device" in text
    (way,) = [way for way in document["fitting"]["ways"] if not way["changes"]]
    assert way["needed"] == document["memory"]["total"]
    assert way["slower"] >= 1 and "step predicted" in text


def test_auto_streams_only_where_the_strongest_policy_does_not_suffice() -> None:
    adamw = {"optimizer.name": "adamw"}
    known = planned("llama2-7b", 80 * GB, **adamw)
    least = min(known["memory_by_policy"].values())
    assert known["streaming"] is False
    assert planned("llama2-7b", least, **adamw)["streaming"] is False
    assert planned("llama2-7b", least - 1, **adamw)["streaming"] is True
    # Ranks that share the weights need no stream; where they are asked to have them whole, they do.
    assert planned("llama2-7b", least - 1, 2, **adamw)["streaming"] is False
    whole = planned("llama2-7b", least - 1, 2, **adamw, **{"train.sharding": "replicate"})
    assert whole["streaming"] is True
    asked = planned("llama2-7b", least - 1, 2, **adamw, **{"model.stream_layers": True})
    assert (asked["streaming"], asked["sharding"]) == (True, "replicate")
    quantised = planned("llama2-7b", 5 * GB, **{"model.quantization": "nf4"})
    assert quantised["streaming"] is False
    config = load_config("llama2-7b")
    assert decide_streaming(config, None, 0, GPU, None)[0] is None
    assert decide_streaming(config, 9, 1, Machine(None, None), None)[0] is None
    assert decide_streaming(config, 9, 1, Machine("cuda", None), None)[0] is False
    assert decide_streaming(config, 9, 1, Machine("cpu", 8), None)[0] is False


@pytest.mark.parametrize(
    ("machine", "changes", "words"),
    [
        (GPU, {"train.method": "full"}, "train.method=full"),
        (GPU, {"model.quantization": "nf4"}, "model.quantization=nf4"),
        (GPU, {"train.sharding": "shard"}, "train.sharding=shard"),
        (GPU, {"train.compile": True}, "train.compile=true"),
        (GPU, {"lora.use_dora": True}, r"lora\.use_dora=true"),
        (GPU, {"lora.init_lora_weights": "pissa"}, r"lora\.init_lora_weights=pissa"),
        (Machine("cpu", 24 * GB), {}, "on cpu: its memory is the host's"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    machine: Machine, changes: dict[str, Any], words: str
) -> None:
    given = {"train.precision": "fp32", "train.kernels": "reference", **changes}
    config = load_config(overrides={"model.stream_layers": True, **given})
    with pytest.raises(UserError, match=rf"model\.stream_layers=true .*{words}"):
        decide(config, machine)
    decide(load_config(overrides=given), machine)


@pytest.fixture
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


@pytest.mark.usefixtures("_own_cache")
def test_a_streamed_run_that_is_stopped_and_resumed_is_a_resident_one(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"train.precision": "bf16", "train.max_steps": 2, "checkpoint.steps": 1}
    whole = runs.train(runs.settings(model_folder, rows_file, tmp_path / "whole", **values))
    boundaries: list[Simulated] = []

    def boundary(*_: object) -> Simulated:
        boundaries.append(Simulated())
        return boundaries[-1]

    monkeypatch.setattr(streamed, "CudaBoundary", boundary)
    monkeypatch.setattr(planned_memory, "decide_streaming", lambda *_: (True, "for a test"))
    monkeypatch.setattr(deciding, "why_not_streamed", lambda *_: "")
    run = tmp_path / "stopped"
    given = runs.settings(model_folder, rows_file, run, **values)
    assert runs.train(given, runs.signalled(1, signal.SIGTERM)).reason == "sigterm"
    runs.resume(run)
    assert runs.trained_bits(run) == runs.trained_bits(whole.folder)
    assert runs.rows_of(run) == runs.rows_of(whole.folder)
    assert len(boundaries) == 2 and all(one.brought for one in boundaries)
