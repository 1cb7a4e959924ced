"""Trained parameters as views of one buffer: who sees what, norms, and shares of the rows."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interpreted import DEVICE, TRITON
from small import small_model
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import operations
from lora import LoraConfig, inject
from train.optim import buffers as flat
from train.optim import build_optimizer
from train.optim.adafactor import Adafactor
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer, Sharing, clip_factor

NAMES = ("adamw", "adafactor")
interpreted = pytest.mark.skipif(
    not TRITON or DEVICE == "cuda", reason="needs Triton's interpreter: triton, and no GPU"
)


def inside(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Return whether a tensor's memory is a part of a buffer's."""
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_all_adapters_and_their_gradients_lie_in_one_buffer(name: str) -> None:
    model = small_model("llama")
    inject(model, LoraConfig(r=3, lora_alpha=8), seed=3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = build_optimizer(name, model)
    assert not optimizer.lone
    for key, parameter in model.named_parameters():
        if key in trained:
            assert parameter is trained[key] is optimizer.parameters[key]
            assert torch.equal(parameter, values[key])
            assert inside(parameter, optimizer.weights)
            assert parameter.data_ptr() % 64 == 0  # as matrix products want it
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    for key, parameter in trained.items():
        assert parameter.grad is not None
        assert inside(parameter.grad, optimizer.gradients)
        assert not torch.equal(parameter, values[key])


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_any_size_begin_where_matrix_products_want_them(name: str) -> None:
    model = nn.ModuleDict({f"{n}": nn.Linear(n, 3) for n in (1, 5, 7, 11)})
    optimizer = build_optimizer(name, model)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in optimizer.parameters.values())
    views = dict(optimizer.views(optimizer.gradients))
    assert all(view.data_ptr() % 64 == 0 for view in views.values())


def updated(optimizer: Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step(0.1)
    optimizer.clear_gradients()


@pytest.mark.parametrize("name", NAMES)
def test_backward_passes_add_to_the_buffer_from_the_first_step_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "LONE_ELEMENTS", 8)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    optimizer = build_optimizer(name, model)
    assert list(optimizer.lone) == ["1.weight"]
    x = torch.randn(4, 3)
    for _ in range(2):
        updated(optimizer, model(x).square().mean())
        assert not optimizer.gradients.any()
        assert optimizer.lone["1.weight"].grad is None
    grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for _ in range(2):
        model(x).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    count = optimizer.gradients.count_nonzero()
    assert count == sum(int(g.count_nonzero()) for g in (grads[0], grads[1], grads[3]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_others_put_in_place_are_taken_up(name: str) -> None:
    def trained_with(replace: bool) -> Parameter:
        weight = Parameter(torch.ones(4, 3))
        optimizer = (AdamW if name == "adamw" else Adafactor)({"w": weight})
        for step in range(1, 4):
            gradient = torch.linspace(-step, 1, 12).view(4, 3)
            if replace or weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad.add_(gradient)
            optimizer.gradient_norm()
            optimizer.step(0.1)
            optimizer.clear_gradients()
        return weight

    assert torch.equal(trained_with(True), trained_with(False))


def test_parameters_of_two_kinds_are_refused() -> None:
    mixed = {"a": Parameter(torch.zeros(2)), "b": Parameter(torch.zeros(2, dtype=torch.float64))}
    with pytest.raises(ValueError, match="of one type on one device"):
        AdamW(mixed)


def test_a_norm_without_gradients_is_refused() -> None:
    weights = {"a": Parameter(torch.zeros(2)), "b": Parameter(torch.zeros(2))}
    optimizer = AdamW(weights)
    weights["a"].grad = torch.ones(2)
    with pytest.raises(ValueError, match="no gradient reached 1 of 2 trained parameters: b"):
        optimizer.gradient_norm()


def doubled(tensors: dict[str, Parameter]) -> float:
    """Return the norm of the gradients, added up in fp64."""
    squares = [p.grad.double().square().sum() for p in tensors.values() if p.grad is not None]
    return math.sqrt(sum(squares))


def test_the_norm_of_many_numbers_is_exact_to_a_few_roundings() -> None:
    """One after another, a million fp32 squares are added with an error of 1e-5 and more."""
    weights = {"a": Parameter(torch.zeros(1000, 1000)), "b": Parameter(torch.zeros(1100, 1000))}
    generator = torch.Generator().manual_seed(0)
    optimizer = AdamW(weights)
    assert list(optimizer.lone) == ["b"]
    for parameter in weights.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    assert optimizer.gradient_norm() == pytest.approx(doubled(weights), rel=1e-6)


class NormLengths(TorchDispatchMode):
    """Remembers how many numbers each norm adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linalg_vector_norm.default:
            x, _, dim = (*args, *(kwargs or {}).values(), None, None)[:3]
            self.seen.append(x.numel() if dim is None else x.shape[dim[0]])
        return func(*args, **(kwargs or {}))


def test_a_norm_adds_up_few_numbers_at_a_time() -> None:
    """So that no digit is lost on any machine, however its processor adds.

    The squares of the first 256 numbers are 2^24, to which fp32 adds nothing when it adds 1: as
    soon as an accumulator has met one of them, the ones behind it are lost. They are as many as
    the accumulators of any processor, so that over the whole buffer all are lost, and in pieces
    only those of the first.
    """
    weights = {"a": Parameter(torch.zeros(1 << 20)), "b": Parameter(torch.zeros(1100, 1000))}
    optimizer = AdamW(weights)
    assert list(optimizer.lone) == ["b"]
    weights["a"].grad = torch.ones(1 << 20)
    weights["a"].grad[:256] = 4096.0
    weights["b"].grad = torch.ones(1100, 1000)
    with NormLengths() as lengths:
        norm = optimizer.gradient_norm()
    assert max(lengths.seen) <= 1 << 12
    assert norm == pytest.approx(doubled(weights), rel=1e-6)


class Ranks:
    """A sum over threads that stand for the ranks of a sharded run; one computes at a time."""

    def __init__(self, count: int) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.arrived, self.read = (threading.Barrier(count, timeout=60) for _ in range(2))
        self.turn = threading.Lock()  # Triton's interpreter serves one

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.given[threading.get_ident()] = x
        self.turn.release()
        self.arrived.wait()
        total = torch.stack([*self.given.values()]).sum(0)
        self.read.wait()
        self.turn.acquire()
        return total


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("adamw", "reference"),
        ("adafactor", "reference"),
        pytest.param("adafactor", "triton", marks=interpreted),
    ],
)
def test_shards_of_the_rows_are_updated_as_the_whole(name: str, backend: str) -> None:
    """Two ranks share the rows of every parameter, unevenly or all to one; the norm is of all."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    shapes = {"m": (6, 5), "n": (6, 5), "o": (2, 9), "bias": (8,)}
    generator = torch.Generator().manual_seed(3)

    def drawn() -> dict[str, torch.Tensor]:
        # Rows of very different sizes, so that halves differ in all that is averaged.
        return {
            key: torch.randn(shape, generator=generator, dtype=dtype)
            * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
            for key, shape in shapes.items()
        }

    start, gradients = drawn(), [drawn() for _ in range(3)]

    def trained(
        part: Callable[[torch.Tensor], torch.Tensor], sharing: Sharing | None
    ) -> dict[str, Any]:
        weights = {key: Parameter(part(value).clone()) for key, value in start.items()}
        model = nn.ParameterDict(weights)
        optimizer = build_optimizer(
            name, model, weight_decay=0.1, operations=operations(backend), sharing=sharing
        )
        norms = []
        for of_step in gradients:
            for key, value in of_step.items():
                weights[key].grad = part(value).clone()
            norms.append(optimizer.gradient_norm())
            optimizer.step(0.1, clip_factor(norms[-1], 1.0))
        return {"norms": torch.tensor(norms), **{k: p.detach() for k, p in weights.items()}}

    whole, ranks = trained(lambda x: x, None), Ranks(2)
    sharing = Sharing(ranks.reduce, {key: shape[0] for key, shape in shapes.items()})

    def half(rank: int) -> dict[str, Any]:
        with ranks.turn:
            return trained(lambda x: x.tensor_split([-(-2 * len(x) // 3)])[rank], sharing)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(half, range(2))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for key, value in whole.items():
        found = first[key] if key == "norms" else torch.cat([first[key], second[key]])
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
