"""The small trained parameters as views of one buffer: who sees what, and where it does not fit."""

import pytest
import torch
from small import small_model
from torch import nn
from torch.nn import Parameter

from lora import LoraConfig, inject
from train.optim import buffers as flat
from train.optim import build_optimizer
from train.optim.adafactor import Adafactor
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer

NAMES = ("adamw", "adafactor")


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
