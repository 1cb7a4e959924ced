"""kernels.loss: value and gradients equal F.cross_entropy's, in any chunking, at a bounded peak."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.cpu.rounding
from kernels.loss import IGNORE, chunk_rows_of, linear_cross_entropy

# fp64, sums of at most 200 terms of order one: hundreds of roundings of 1.1e-16.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def problem(m=23, h=8, v=41, *, dtype=torch.float64, masked=0.4):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(m, h, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, v, (m,), generator=generator)
    targets[torch.rand(m, generator=generator) < masked] = IGNORE
    return hidden, weight, targets


def expected(hidden, weight, targets):
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    return loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 23, 1000])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_value_and_gradients(chunk_rows, masked):
    hidden, weight, targets = problem(masked=masked)
    loss, grad_hidden, grad_weight = expected(hidden, weight, targets)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
    assert ours.dtype == torch.float64 and ours.shape == ()
    (3.0 * ours).backward()
    torch.testing.assert_close(ours, loss, **EXACT)
    torch.testing.assert_close(hidden.grad, grad_hidden, **EXACT)
    torch.testing.assert_close(weight.grad, grad_weight, **EXACT)
    assert not hidden.grad[targets == IGNORE].any()


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_weights_multiply_the_loss_and_the_gradient_of_each_row(chunk_rows, monkeypatch):
    monkeypatch.setattr(kernels.cpu.rounding, "rounds", lambda device, dtype: True)
    hidden, weight, targets = problem()
    rows = (targets != IGNORE).nonzero().squeeze(1)
    weights = torch.linspace(0.1, 40.0, len(rows), dtype=torch.float64)
    losses = F.cross_entropy((hidden @ weight.T)[rows], targets[rows], reduction="none")
    expected = torch.autograd.grad(3.0 * (losses * weights).sum(), (hidden, weight))
    ours = linear_cross_entropy(
        hidden, weight, targets,
        chunk_rows=chunk_rows, gradient_scale=3.0, rows=rows, weights=weights,
    )  # fmt: skip
    torch.testing.assert_close(ours, (losses * weights).sum(), **EXACT)
    for gradient, exact in zip(
        torch.autograd.grad(3.0 * ours, (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-11)  # terms of order 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_change_no_bit(dtype):
    results = []
    for weights in (None, torch.ones(23)):
        hidden, weight, targets = problem(dtype=dtype, masked=0.0)
        loss = linear_cross_entropy(
            hidden, weight, targets, chunk_rows=7, gradient_scale=0.3, weights=weights
        )
        results.append([loss, *torch.autograd.grad(0.3 * loss, (hidden, weight))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rows_that_only_repeat_a_shape_count_for_nothing(monkeypatch):
    """Also in the gradient of the head, which is there where all of a model is trained."""
    monkeypatch.setattr(kernels.cpu.rounding, "rounds", lambda device, dtype: True)
    hidden, weight, targets = problem()
    loss, grad_hidden, grad_weight = expected(hidden, weight, targets)
    with Shapes() as shapes:
        ours = linear_cross_entropy(hidden, weight, targets)
    assert torch.Size((64, 41)) in shapes.seen
    (3.0 * ours).backward()
    torch.testing.assert_close(ours, loss, **EXACT)
    torch.testing.assert_close(hidden.grad, grad_hidden, **EXACT)
    torch.testing.assert_close(weight.grad, grad_weight, **EXACT)


def test_a_frozen_weight_gets_no_gradient_and_frozen_states_neither():
    hidden, weight, targets = problem()
    _, grad_hidden, grad_weight = expected(hidden, weight, targets)
    (3.0 * linear_cross_entropy(hidden, weight.detach(), targets)).backward()
    torch.testing.assert_close(hidden.grad, grad_hidden, **EXACT)
    assert weight.grad is None
    (3.0 * linear_cross_entropy(hidden.detach(), weight, targets)).backward()
    torch.testing.assert_close(weight.grad, grad_weight, **EXACT)


def test_without_a_graph_the_value_is_the_same():
    hidden, weight, targets = problem()
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, linear_cross_entropy(hidden, weight, targets), **EXACT)


def test_no_target_gives_zero_still_connected():
    hidden, weight, targets = problem(masked=2.0)
    assert (targets == IGNORE).all()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0.0
    loss.backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_logits_of_any_size_stay_finite():
    hidden, weight, targets = problem(dtype=torch.float32, masked=0.0)
    hidden, weight = hidden.detach() * 300, weight.detach()
    loss = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert exact > 1000 * len(targets)  # softmax itself would underflow to zero
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_fp32_gives_fp32():
    hidden, weight, targets = problem(dtype=torch.float32)
    assert linear_cross_entropy(hidden, weight, targets).dtype == torch.float32


def relative(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", ["autocast over fp32", "bf16 throughout"])
def test_bf16_is_finite_and_close(kind):
    hidden, weight, targets = problem(m=200, h=64, v=300, dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(0.125)
    loss, grad_hidden, grad_weight = expected(hidden, weight, targets)
    if kind == "autocast over fp32":
        with torch.autocast("cpu", torch.bfloat16):
            ours = linear_cross_entropy(hidden, weight, targets)
        assert ours.dtype == torch.float32
        (3.0 * ours).backward()
        grads = hidden.grad, weight.grad
        assert [g.dtype for g in grads] == [torch.float32] * 2
    else:
        half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
        ours = linear_cross_entropy(*half, targets)
        assert ours.dtype == torch.float32  # the sum over many tokens must not be bf16
        (3.0 * ours).backward()
        grads = tuple(x.grad for x in half)
        assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    # Inputs, logits and their gradient are each rounded to 8 bits (relative 2^-9 = 0.2 %).
    assert abs(ours - loss) <= 2 * 2**-9 * loss
    assert relative(grads[0].float(), grad_hidden) < 4 * 2**-9
    assert relative(grads[1].float(), grad_weight) < 4 * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_s_gradient_adds_up_over_chunks_in_fp32(dtype):
    """Equal terms, a chunk each: exact in fp32, while a sum of halves stands still.

    To 256 in 8 bits, and to 2048 in 11, adding 0.98 changes nothing.
    """
    count = 512 if dtype == torch.bfloat16 else 4096
    hidden = torch.ones(count, 8, dtype=dtype)
    weight = torch.zeros(50, 8, dtype=dtype).requires_grad_()
    targets = torch.zeros(count, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, targets, chunk_rows=1).backward()
    # softmax - onehot: 1/50 - 1 for the target, 1/50 for the others, each rounded to the type.
    of_one = torch.tensor([1 / 50 - 1, 1 / 50]).to(dtype)
    assert weight.grad[0].eq(count * of_one[0]).all()
    assert weight.grad[1:].eq(count * of_one[1]).all()


@pytest.mark.parametrize("gradient_scale", [1.0, 2.0**-9, 640.0])
def test_the_gradient_scale_cancels(gradient_scale):
    hidden, weight, targets = problem()
    loss, grad_hidden, grad_weight = expected(hidden, weight, targets)
    ours = linear_cross_entropy(hidden, weight, targets, gradient_scale=gradient_scale)
    (3.0 * ours).backward()
    torch.testing.assert_close(ours, loss, **EXACT)
    torch.testing.assert_close(hidden.grad, grad_hidden, **EXACT)
    torch.testing.assert_close(weight.grad, grad_weight, **EXACT)


def fp16_gradients(hidden, weight, targets, gradient_scale):
    """Return the gradients by hidden and weight under fp16, the scale divided out again."""
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets, gradient_scale=gradient_scale)
    grads = torch.autograd.grad(loss * gradient_scale, (hidden, weight))
    return [grad.double() / gradient_scale for grad in grads]


def test_small_fp16_gradients_live_by_the_scale():
    """Logits of 20 and 0: the others' probabilities, e^-20 = 2e-9, are below fp16's least 6e-8."""
    hidden, weight = (20 * torch.eye(64)).requires_grad_(), torch.eye(64).requires_grad_()
    targets = torch.arange(64)
    loss, exact = linear_cross_entropy(hidden, weight, targets), hidden.detach().softmax(1)
    exact.diagonal().sub_(1)
    assert loss < 64 * 1.3e-7
    (scaled, _), (lost, _) = (
        fp16_gradients(hidden, weight, targets, scale) for scale in (2.0**16, 1.0)
    )
    assert (scaled.fill_diagonal_(0) - exact.fill_diagonal_(0)).abs().max() < 2**-10 * 2.1e-9
    assert not lost.fill_diagonal_(0).any()


def test_a_smaller_scale_mends_an_fp16_overflow():
    """A token that all 256 rows predict, with states of 300: the sum of 76,800 is beyond fp16."""
    hidden = torch.full((256, 8), 300.0).requires_grad_()
    weight = torch.zeros(50, 8).requires_grad_()
    targets = torch.zeros(256, dtype=torch.int64)
    assert not fp16_gradients(hidden, weight, targets, 1.0)[1].isfinite().all()
    grad_weight = fp16_gradients(hidden, weight, targets, 2.0**-4)[1]
    # softmax - onehot is 1/50 - 1; fp16 rounds the sum to 11 bits.
    torch.testing.assert_close(
        grad_weight[0], torch.full((8,), -0.98 * 76800.0, dtype=torch.float64), rtol=2**-10, atol=0
    )


def test_backward_under_autocast_is_the_same_as_outside():
    hidden, weight, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward(retain_graph=True)
    inside = hidden.grad.clone()
    hidden.grad = None
    loss.backward()
    assert torch.equal(hidden.grad, inside)


class Shapes(TorchDispatchMode):
    """Remembers the shape of everything that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else (out,)
        self.seen += [result.shape for result in results if isinstance(result, torch.Tensor)]
        return out

    def largest(self) -> int:
        return max(shape.numel() for shape in self.seen)


def test_logits_of_all_rows_never_exist_at_once():
    hidden, weight, targets = problem(m=64, h=4, v=500, masked=0.0)
    with Shapes() as shapes:
        linear_cross_entropy(hidden, weight, targets, chunk_rows=8).backward()
    assert shapes.largest() == 8 * 500  # a chunk's logits; the weight's gradient has 500 · 4
    with Shapes() as shapes:
        F.cross_entropy(hidden @ weight.T, targets)
    assert shapes.largest() == 64 * 500  # the measure does see what it should


class Asked(TorchDispatchMode):
    """Fails where an operation has to know values before it knows its result's shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        assert func not in waits, func
        return func(*args, **(kwargs or {}))


def test_with_the_rows_given_no_value_is_asked_for():
    hidden, weight, targets = problem()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    rows = (targets != -100).nonzero().squeeze(1)
    with Asked():
        loss = linear_cross_entropy(hidden, weight, targets, rows=rows)
        found = torch.autograd.grad(loss, (hidden, weight))
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(AssertionError), Asked():
        linear_cross_entropy(hidden, weight, targets)


def test_the_gradient_of_a_frozen_weight_is_never_computed():
    hidden, weight, targets = problem()
    for head in (weight, weight.detach()):
        with Shapes() as shapes:
            linear_cross_entropy(hidden, head, targets)
        assert (weight.shape in shapes.seen) == head.requires_grad


def test_no_gradient_is_computed_where_none_is_recorded():
    hidden, weight, targets = problem()
    with torch.no_grad(), Shapes() as shapes:
        linear_cross_entropy(hidden, weight, targets)
    assert weight.shape not in shapes.seen


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "device", "rows"),
    [
        (49_152, torch.bfloat16, "cuda", 2688),  # 2730.67 down to a multiple of 64
        (151_936, torch.bfloat16, "cuda", 832),
        (32_000, torch.bfloat16, "cuda", 4096),  # 4194 would fit
        (49_152, torch.bfloat16, "cpu", 256),
        (10**7, torch.float32, "cuda", 64),
    ],
)
def test_a_chunk_is_as_long_as_its_memory_allows(vocabulary, dtype, device, rows):
    assert chunk_rows_of(vocabulary, dtype, device) == rows
    assert rows == 64 or rows * vocabulary * dtype.itemsize <= 256 * 2**20
