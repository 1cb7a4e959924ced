"""Moments in host memory: as AdamW bit for bit, in order, and never more than two buckets away."""

import contextlib
import gc
import signal
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from small import small_config, small_model
from steps import EXAMPLES, cut, one_step
from torch import Tensor, nn
from torch.nn import Parameter

from files.errors import UserError
from kernels.pinned import COMPUTE, FETCH, STORE, CudaBoundary
from train import assemble
from train.config.load import load_config
from train.inputs.known import NO_DATA
from train.optim import adamw as plain
from train.optim import buffers as flat
from train.optim import build_optimizer, paged, rounded
from train.optim.buffers import Optimizer
from train.optim.paged import PagedMoments, buffer_bytes
from train.plan import memory
from train.plan.decide import Machine, decide_paging
from train.plan.document import plan_document
from train.plan.ledger import memory_ledger
from train.plan.text import render_plan

HOST = "host"
QUEUES = (FETCH, COMPUTE, STORE, HOST)


@dataclass
class Simulated:
    """A device boundary whose queues keep vector clocks: what is not ordered by events is a race.

    Work is done at once, in the order in which the host gives it out. Two accesses to the same
    bytes, one of them a write, must be ordered all the same: the earlier one's queue time must be
    known to the later one's queue, by events and by what the host waited for.
    """

    clocks: dict[str, dict[str, int]] = field(
        default_factory=lambda: {queue: dict.fromkeys(QUEUES, 0) for queue in QUEUES}
    )
    seen: list[tuple[str, int, bool, int, int]] = field(default_factory=list)
    hosts: list[Tensor] = field(default_factory=list)
    devices: list[Tensor] = field(default_factory=list)
    copies: list[tuple[str, int]] = field(default_factory=list)
    away: int = 0
    most_away: int = 0

    def on_host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.hosts.append(torch.zeros(shape, dtype=dtype))
        return self.hosts[-1]

    def on_device(self, elements: int, dtype: torch.dtype) -> Tensor:
        self.devices.append(torch.full((elements,), torch.nan, dtype=dtype))
        return self.devices[-1]

    def touch(self, queue: str, tensor: Tensor, *, writes: bool) -> None:
        """Note an access, and hold it against the earlier ones to the same bytes."""
        clock = self.clocks[queue]
        begin, size = tensor.data_ptr(), tensor.nbytes
        for other, time, wrote, first, end in self.seen:
            if (writes or wrote) and first < begin + size and begin < end:
                assert clock[other] >= time, f"race: {queue} with {other}"
        self.seen.append((queue, clock[queue], writes, begin, begin + size))

    def learn(self, queue: str, clock: dict[str, int]) -> None:
        """Let a queue know what another one's clock knows, and begin a new moment of its own."""
        own = self.clocks[queue]
        own.update({name: max(own[name], clock[name]) for name in QUEUES})
        own[queue] += 1

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        self.learn(queue, self.clocks[HOST])
        self.touch(queue, source, writes=False)
        self.touch(queue, target, writes=True)
        self.copies.append((queue, len(source)))
        self.away += len(source) if queue == FETCH else -len(source)
        self.most_away = max(self.most_away, self.away)
        target.copy_(source)

    def record(self, queue: str) -> dict[str, int]:
        return dict(self.clocks[queue])

    def wait(self, queue: str, event: dict[str, int]) -> None:
        self.learn(queue, event)

    def finish(self) -> None:
        self.learn(HOST, self.clocks[STORE])


SHAPES = {
    "a.weight": (16, 20),
    "b.weight": (7, 5),
    "c.bias": (33,),
    "d.weight": (9, 31),
    "e.weight": (16, 20),
}


def built(dtype: torch.dtype, boundary: Simulated | None, bucket: int, **given: Any) -> Optimizer:
    generator = torch.Generator().manual_seed(1)
    model = nn.ParameterDict(
        {
            name.replace(".", "_"): Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in SHAPES.items()
        }
    )
    moments = PagedMoments(boundary, bucket) if boundary else None
    seed = 3 if dtype == torch.bfloat16 else None
    return build_optimizer(
        "paged_adamw", model, weight_decay=0.1, rounding_seed=seed, moments=moments, **given
    )


def train(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(optimizer.parameters.values()):
            generator = torch.Generator().manual_seed(100 * step + index)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.gradient_norm()
        optimizer.step(1e-2 / step, 0.7)


def same(one: Optimizer, other: Optimizer) -> None:
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name
    states = one.state_tensors(), other.state_tensors()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def inside(part: Tensor, whole: Tensor) -> bool:
    return whole.data_ptr() <= part.data_ptr() < whole.data_ptr() + whole.nbytes


@pytest.fixture
def boundary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """Return a boundary that hears of every update's use of the moments."""
    simulated = Simulated()
    honest = plain.adamw_update

    def update(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, **given: Any):
        simulated.learn(COMPUTE, simulated.clocks[HOST])
        for moment in (first, second):
            assert not any(inside(moment, host) for host in simulated.hosts)
            if any(inside(moment, device) for device in simulated.devices):
                simulated.touch(COMPUTE, moment, writes=True)
        honest(weight, gradient, first, second, **given)

    for module in (plain, rounded):
        monkeypatch.setattr(module, "adamw_update", update)
    yield simulated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bucket", "lone"), [(1 << 24, 1 << 20), (50, 100), (33, 0), (11, 30)])
def test_updates_are_adamw_s_bit_for_bit_in_two_buckets_at_a_time(
    dtype: torch.dtype, bucket: int, lone: int, boundary: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    away, resident = built(dtype, boundary, bucket), built(dtype, None, bucket)
    assert not boundary.copies
    for step in range(1, 4):
        train(away, range(step, step + 1))
        train(resident, range(step, step + 1))
    same(away, resident)
    elements = sum(host.numel() for host in boundary.hosts)
    if dtype == torch.bfloat16:  # parameter by parameter, without what fills the buffer up
        elements = 2 * sum(p.numel() for p in away.parameters.values())
    assert sum(n for queue, n in boundary.copies if queue == FETCH) == 3 * elements
    assert sum(n for queue, n in boundary.copies if queue == STORE) == 3 * elements
    # Both moments of two buckets: what there is room for, and what was ever fetched and not stored.
    longest = max(len(device) for device in boundary.devices)
    rows = max(31 if dtype == torch.bfloat16 else 1, bucket)
    assert longest <= rows
    assert len(boundary.devices) == 4
    assert boundary.most_away <= 4 * longest
    assert boundary.away == 0


def test_a_checkpoint_is_read_from_the_host_s_memory_and_written_to_it(
    boundary: Simulated,
) -> None:
    away, resident = built(torch.float32, boundary, 100), built(torch.float32, None, 100)
    train(resident, range(1, 3))
    away.load_state(resident.state_tensors())
    assert not boundary.copies
    assert not boundary.devices
    for name, parameter in away.parameters.items():
        parameter.data.copy_(resident.parameters[name])
    train(away, range(3, 5))
    train(resident, range(3, 5))
    state = away.state_tensors()
    for name, tensor in state.items():
        if name != "steps":
            # The host may read: the last bucket is stored.
            boundary.touch(HOST, tensor, writes=False)
            pointers = {host.untyped_storage().data_ptr() for host in boundary.hosts}
            assert tensor.untyped_storage().data_ptr() in pointers
    same(away, resident)
    assert len(boundary.devices) == 4
    back = built(torch.float32, None, 100)
    back.load_state(state)
    for name, tensor in back.state_tensors().items():
        assert torch.equal(tensor, state[name])


def test_a_race_is_seen() -> None:
    """The simulation itself: an update that does not wait for the transfer, and one that does."""
    simulated = Simulated()
    host = simulated.on_host(torch.Size([4]), torch.float32)
    device = simulated.on_device(4, torch.float32)
    simulated.copy(FETCH, device, host)
    arrived = simulated.record(FETCH)
    with pytest.raises(AssertionError, match="race: compute with fetch"):
        simulated.touch(COMPUTE, device, writes=True)
    simulated.wait(COMPUTE, arrived)
    simulated.touch(COMPUTE, device, writes=True)


def test_nothing_is_fetched_before_the_gradient_is_known_to_be_finite(
    boundary: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("llama")
    optimizer = build_optimizer("paged_adamw", model, moments=PagedMoments(boundary, 1000))
    honest: Callable[[], float] = optimizer.gradient_norm
    copies_at_norm: list[int] = []

    def norm() -> float:
        copies_at_norm.append(len(boundary.copies))
        return honest()

    monkeypatch.setattr(optimizer, "gradient_norm", norm)
    assert one_step(model, optimizer, cut(len(EXAMPLES))).skipped is None
    assert copies_at_norm == [0]
    done = len(boundary.copies)
    assert done > 0
    with torch.no_grad():
        model.head_weight()[3, 3] = torch.nan
    assert one_step(model, optimizer, cut(len(EXAMPLES))).skipped == "non-finite"
    assert len(boundary.copies) == done


def test_it_pages_where_a_card_s_memory_asks_for_it() -> None:
    config = load_config(overrides={"optimizer.name": "paged_adamw"})
    gpu = Machine("cuda", 100)
    assert decide_paging(config, 101, 1, gpu) == (True, "101 B needed without it, 100 B there")
    assert decide_paging(config, 100, 1, gpu)[0] is False
    assert decide_paging(config, 101, 1, Machine("cpu", 100))[0] is False
    assert decide_paging(config, 101, 1, Machine(None, None))[0] is None
    assert decide_paging(config, None, 1, gpu)[0] is None
    assert decide_paging(config, 101, 0, gpu)[0] is False
    plain_adamw = load_config(overrides={"optimizer.name": "adamw"})
    assert decide_paging(plain_adamw, 101, 1, gpu)[0] is False


def test_the_plan_says_what_paging_saves() -> None:
    """A model of 19 million parameters, on a card that has room for all but a byte."""
    decoder = small_config("llama", vocab_size=4096, hidden_size=1024, intermediate_size=1024)
    config = load_config(
        overrides={
            "train.method": "full",
            "train.precision": "bf16",
            "optimizer.name": "paged_adamw",
            "train.kernels": "reference",
            "train.per_device_train_batch_size": 1,
            "data.max_length": 16,
            "model.gradient_checkpointing": False,
        }
    )
    beside = memory_ledger(config, decoder, precision="bf16", device="cuda")
    parameters = beside["gradients"] // 4
    assert beside["optimizer"] == 8 * parameters

    def planned(memory: int) -> dict[str, Any]:
        return plan_document(config, NO_DATA, decoder, Machine("cuda", memory))

    roomy = planned(beside["total"])
    assert (roomy["paging"], roomy["host_memory"], roomy["fits"]) == (False, 0, True)
    assert roomy["memory"] == beside
    tight = planned(beside["total"] - 1)
    assert tight["paging"] is True
    assert tight["host_memory"] == 8 * parameters
    # Two buffers, each of both moments of a bucket.
    buffers = 2 * 2 * 4 * paged.BUCKET_ELEMENTS
    assert tight["memory"]["optimizer"] == buffer_bytes(parameters) == buffers
    assert tight["paging_saves"] == roomy["paging_saves"] == 8 * parameters - buffers > 0
    assert "paging" in render_plan(roomy)
    assert render_plan(tight).count("of the device's") == 1
    for name in ("weights", "gradients", "activations"):
        assert tight["memory"][name] == beside[name]
    assert buffer_bytes(1000) == 2 * 2 * 4 * 1000
    assert roomy["disk"] == tight["disk"]


@pytest.fixture
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    "changes",
    [{}, {"train.method": "full"}, {"train.method": "full", "train.masters": "bf16"}],
    ids=["lora", "full", "bf16 masters"],
)
def test_a_paged_run_that_is_stopped_and_resumed_is_a_resident_one(
    changes: dict[str, Any],
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {
        "optimizer.name": "paged_adamw",
        "train.precision": "bf16",
        "train.max_steps": 2,
        "checkpoint.steps": 1,
        **changes,
    }
    whole = runs.train(runs.settings(model_folder, rows_file, tmp_path / "whole", **values))
    boundaries: list[Simulated] = []

    def boundary(*_: object) -> Simulated:
        boundaries.append(Simulated())
        return boundaries[-1]

    monkeypatch.setattr(assemble, "CudaBoundary", boundary)
    monkeypatch.setattr(memory, "decide_paging", lambda *_: (True, "for a test"))
    run = tmp_path / "stopped"
    given = runs.settings(model_folder, rows_file, run, **values)
    assert runs.train(given, runs.signalled(1, signal.SIGTERM)).reason == "sigterm"
    runs.resume(run)
    assert runs.trained_bits(run) == runs.trained_bits(whole.folder)
    assert runs.rows_of(run) == runs.rows_of(whole.folder)
    assert [len(one.devices) for one in boundaries] == [4, 4]
    assert all(one.copies for one in boundaries)


class Stream:
    """What a CUDA stream is asked."""

    def __init__(self, device: object = None) -> None:
        self.waited: list[object] = []
        self.finished = 0

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        self.finished += 1


def test_a_cuda_boundary_has_two_streams_that_last_and_pins_memory_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for torch.cuda: no card has run this yet (tests/train/test_on_cuda.py does)."""
    made: list[Stream] = []
    computing = Stream()
    used: list[object] = []
    pinned: dict[int, int] = {}

    def stream(device: object) -> Stream:
        made.append(Stream())
        return made[-1]

    class Event:
        def record(self, on: object) -> None:
            used.append(on)

    @contextlib.contextmanager
    def on(stream: object) -> Iterator[None]:
        used.append(stream)
        yield

    def register(pointer: int, size: int, flags: int) -> int:
        pinned[pointer] = size
        return 0

    cuda = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    for name, value in {
        "Stream": stream,
        "Event": Event,
        "stream": on,
        "current_stream": lambda device: computing,
        "cudart": lambda: cuda,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    boundary: Any = CudaBoundary(torch.device("cpu"), "paged_adamw", "adafactor")
    away, resident = built(torch.float32, boundary, 50), built(torch.float32, None, 50)
    for step in range(1, 4):
        train(away, range(step, step + 1))
        train(resident, range(step, step + 1))
    same(away, resident)
    assert len(made) == 2
    assert {id(one) for one in used} == {id(one) for one in (*made, computing)}
    assert (made[0].waited and made[1].waited and computing.waited) and made[1].finished
    state = [t for name, t in away.state_tensors().items() if name != "steps"]
    held = {tensor.untyped_storage().data_ptr() for tensor in state}
    assert pinned.keys() == held
    del away, state
    gc.collect()
    assert not pinned
    cuda.cudaHostRegister = lambda *_: 2
    with pytest.raises(UserError, match=r"paged_adamw: 0 MiB .*, or use adafactor"):
        boundary.on_host(torch.Size([1]), torch.float32)
