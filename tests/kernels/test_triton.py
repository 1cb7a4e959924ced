"""Triton's norms, rotary embeddings, activations and loss against fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from against_fp64 import DTYPES, bound, compare, draw, layers_of, poisoned, slow  # noqa: F401
from interpreted import DEVICE
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.case import TRITON, Case, Room
from kernels import linears as plain
from kernels import reference
from kernels.dropout import Draw, keep_mask, module_id
from kernels.loss import IGNORE, linear_cross_entropy
from kernels.operands import Made
from kernels.segments import Segments

pytest.importorskip("triton")

from kernels.triton import dropout, elementwise, launch, loss, norms

SHAPES = [(37, 130), *map(slow, [(3, 7), (16, 64), (5, 1025)])]
WIDE = [(5, 1025), *map(slow, [(1, 2), (3, 7), (16, 64), (37, 130), (3, 2000)])]


# --- the cases of the benchmarks, at small shapes -------------------------------------------------

# A norm behind an addition, with or without a mean; queries and keys that are rotated.
ADDED = [(37, 130, centred) for centred in (False, True)]
ADDED += [slow(*shape, c) for shape in ((3, 7), (16, 64), (5, 1025)) for c in (False, True)]
HEADS = [(6, 2, 20), slow(1, 1, 2), slow(3, 3, 8), slow(12, 4, 64)]


def check(make: Callable[[Room], Case], dtype: torch.dtype, terms: int) -> None:
    """Compare what Triton's side of a case gives, gradients too, with the case's exact results."""
    case = make(Room(torch.device(DEVICE), dtype, dry=False))
    ours, exact = case.sides[TRITON](0.0).results(), case.exact(0.0)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        difference = (ours[name].double() - value).abs().max() / value.abs().max()
        assert difference <= bound(dtype, terms), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "centred"), ADDED)
def test_norms_with_an_addition(rows: int, hidden: int, centred: bool, dtype: torch.dtype) -> None:
    case = partial(kernel_cases.norm, rows, hidden, centred, frozen=False)
    check(case, dtype, 4 * (rows + hidden))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv", "d"), HEADS)
def test_rotary(heads: int, kv: int, d: int, dtype: torch.dtype) -> None:
    check(partial(kernel_cases.rotary, 11, heads, kv, d), dtype, 2)


# --- norms ---------------------------------------------------------------------------------------


def some_draw(rows: int) -> Draw:
    segments = Segments.build([rows], device=DEVICE, examples=[4], draw=(42, 3))
    assert segments.dropout_rows is not None
    return Draw(segments.dropout_rows, module_id("model.layers.0.mlp.residual_dropout"), 0.3)


def values(pair: tuple[Tensor, Made]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].value


def exact_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, slow((1, 2))])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(shape[1], dtype=dtype, seed=1)]
    compare(lambda x, w: norms.rms_norm(x, w, 1e-5).value, exact_rms, inputs, sum(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rms_norm_rounds_before_the_weight_comes_in(dtype: torch.dtype) -> None:
    """As the reference does: but for a quotient that fp32 puts on the other side of a tie."""
    x, weight = draw(64, 130, dtype=dtype) * 3, draw(130, dtype=dtype, seed=1)
    ours = norms.rms_norm(x, weight, 1e-6).value
    assert (ours == reference.rms_norm(x, weight, 1e-6).value).double().mean() > 0.99
    late = x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * weight.float()
    assert (ours == late.to(dtype)).double().mean() < 0.9  # the measure does see what it should


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype) + 3  # a mean away from 0
    inputs = [x, *(draw(shape[1], dtype=dtype, seed=i) for i in (1, 2))]
    compare(
        lambda x, w, b: norms.layer_norm(x, w, b, 1e-5).value,
        lambda x, w, b: F.layer_norm(x, (shape[1],), w, b, 1e-5),
        inputs,
        4 * sum(shape),  # the mean, of size 3, is taken out in fp32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4100)])  # the last: dropped by a kernel of its own
@pytest.mark.parametrize("centred", [False, True])
def test_norms_with_a_dropped_addition(
    shape: tuple[int, int], dtype: torch.dtype, centred: bool
) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)]
    inputs += [draw(shape[1], dtype=dtype, seed=i) for i in ((2, 3) if centred else (2,))]
    which = some_draw(shape[0])
    mask = keep_mask(*which[:2], shape[1], which.p)

    def rounded(x: Tensor) -> Tensor:
        return x + (x.to(dtype).double() - x).detach()

    def exact(x: Tensor, change: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        # What is dropped, and the sum, are tensors of the plain form: rounded to their type.
        total = rounded(x + rounded(change * mask / (1 - which.p)))
        if centred:
            return total, F.layer_norm(total, (shape[1],), weight, *bias, 1e-5)
        return total, exact_rms(total, weight)

    ours = norms.add_layer_norm if centred else norms.add_rms_norm
    compare(lambda *tensors: values(ours(*tensors, 1e-5, which)), exact, inputs, 4 * sum(shape))
    plain_form = reference.add_layer_norm if centred else reference.add_rms_norm
    total = plain_form(*inputs, 1e-5, which)[0]  # pyright: ignore
    assert torch.equal(ours(*inputs, 1e-5, which)[0], total)  # pyright: ignore


@pytest.mark.parametrize("centred", [False, True])
def test_a_change_of_a_stream_that_nothing_normalises_is_dropped_backward_too(
    centred: bool,
) -> None:
    x, change = (draw(5, 7, dtype=torch.float32, seed=i).requires_grad_() for i in (0, 1))
    weight = draw(7, dtype=torch.float32, seed=2)
    which = some_draw(5)
    total, _ = (
        norms.add_layer_norm(x, change, weight, weight, 1e-5, which)
        if centred
        else norms.add_rms_norm(x, change, weight, 1e-5, which)
    )
    total.backward(torch.ones_like(total))
    assert change.grad is not None
    assert torch.equal(change.grad, reference.add(None, torch.ones_like(x), which))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WIDE)
def test_addition_of_what_is_dropped(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The bits of the plain form, forward and backward."""
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)]
    inputs[1][0, 0], inputs[1][-1, -1] = float("inf"), float("nan")
    which = some_draw(shape[0])
    sides = []
    for add in (dropout.add, reference.add):
        x, change = (tensor.clone().requires_grad_() for tensor in inputs)
        total, alone = add(x, change, which), add(None, change, which)
        upstream = draw(*shape, dtype=dtype, seed=2)
        sides.append([total, alone, *torch.autograd.grad(total, (x, change), upstream)])
    for ours, plain_one in zip(*sides, strict=True):
        torch.testing.assert_close(ours, plain_one, rtol=0, atol=0, equal_nan=True)
    assert dropout.add(None, inputs[0]) is inputs[0]


def test_a_frozen_weight_s_gradient_is_not_made() -> None:
    x = draw(5, 8, dtype=torch.float32).requires_grad_()
    weight = draw(8, dtype=torch.float32, seed=1)
    norms.rms_norm(x, weight, 1e-5).value.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


# --- rotary and activations ----------------------------------------------------------------------


def test_rotary_takes_slices_of_wider_rows() -> None:
    wide = draw(7, 6 * 8, dtype=torch.float32)
    q = wide[:, : 4 * 8].unflatten(-1, (4, 8))
    k = wide[:, 4 * 8 :].unflatten(-1, (2, 8))
    cos, sin = draw(7, 4, dtype=torch.float32).repeat(1, 2), draw(7, 8, dtype=torch.float32)
    sin = sin[:, :4].repeat(1, 2)
    for one, other in zip(
        elementwise.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WIDE)
def test_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)
    # In the derivatives terms of the size of the input, up to 12 here, cancel.
    compare(lambda g, u: elementwise.swiglu(g, u).value, lambda g, u: F.silu(g) * u, [gate, up], 48)
    compare(elementwise.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [gate], 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WIDE)
def test_gelu_with_a_bias(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype, scale=3.0), draw(shape[1], dtype=dtype, seed=1)]
    spread = torch.stack([inputs[1], inputs[1]], 1)[:, 0]  # not contiguous
    assert elementwise.gelu_tanh(inputs[0], spread).equal(elementwise.gelu_tanh(*inputs))
    compare(
        elementwise.gelu_tanh,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        inputs,
        48 + shape[0],
    )


def test_gelu_takes_the_bias_of_the_layer_before_it() -> None:
    x, tensors, operands = layers_of(37, 24, [(40, 4, True)], 0.0, torch.float32)
    leaves = [x, *tensors]

    def plain_one(x: Tensor, *rest: Tensor) -> Tensor:
        return plain.linear_gelu(x, operands(rest)[0]).value

    def fused(x: Tensor, *rest: Tensor) -> Tensor:
        return elementwise.linear_gelu(x, operands(rest)[0]).value

    compare(fused, plain_one, leaves, 400)


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [9001, slow(2), slow(41), slow(1024)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_chunk(vocabulary: int, dtype: torch.dtype, weighted: bool) -> None:
    logits = draw(6, vocabulary, dtype=dtype, scale=4.0)
    targets = torch.tensor([0, vocabulary - 1, 1, 0, vocabulary // 2], device=DEVICE)
    exact = logits[:5].double().requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.3, 0.0, 0.75], device=DEVICE) if weighted else None
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected if weights is None else expected * weights).sum().mul(0.25).backward()
    losses, gradient = loss.cross_entropy_(logits, targets, 0.25, weights)
    assert gradient.data_ptr() == logits.data_ptr()
    assert not gradient[5].any()
    assert exact.grad is not None
    terms = bound(torch.float32, vocabulary)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=terms, atol=16 * terms)
    assert (gradient[:5].double() - exact.grad).abs().max() <= 0.25 * bound(dtype, vocabulary)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_the_maximum_is_carried_from_block_to_block(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(launch.DEFAULTS["cross_entropy"], "BLOCK", 16)
    logits = torch.stack([torch.arange(100.0), -torch.arange(100.0)]).to(dtype).to(DEVICE) / 4
    targets = torch.tensor([3, 99], device=DEVICE)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    losses, gradient = loss.cross_entropy_(logits.clone(), targets, 1.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    exact = logits.double().softmax(-1) - F.one_hot(targets, 100)
    assert (gradient.double() - exact).abs().max() <= bound(dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_the_loss_through_its_head(dtype: torch.dtype) -> None:
    hidden = draw(23, 8, dtype=dtype)
    weight = draw(41, 8, dtype=dtype, seed=1)
    targets = torch.arange(23, device=DEVICE)
    targets[::5] = IGNORE
    compare(
        lambda h, w: linear_cross_entropy(
            h, w, targets, chunk_rows=7, cross_entropy=loss.cross_entropy_
        ),
        lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum"),
        [hidden, weight],
        41,
    )


def test_weights_of_one_change_no_bit() -> None:
    logits, targets = draw(6, 41, dtype=torch.float32, scale=4.0), torch.arange(6, device=DEVICE)
    plain = loss.cross_entropy_(logits.clone(), targets, 0.3)
    ones = loss.cross_entropy_(logits.clone(), targets, 0.3, torch.ones(6, device=DEVICE))
    assert all(torch.equal(one, other) for one, other in zip(plain, ones, strict=True))
