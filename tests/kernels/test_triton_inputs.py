"""Inputs of Triton's adapted linear layers that are made again, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from against_fp64 import DTYPES, bound, compare, draw, poisoned  # noqa: F401
from interpreted import DEVICE
from torch import Tensor

from kernels import linears as plain
from kernels.operands import Made, Operands
from kernels.segments import Segments

pytest.importorskip("triton")

from kernels.triton import elementwise, inputs, linears, norms

ROWS, WIDTH, FEATURES = 70, 96, 24  # two tiles of rows and of columns, the second cut short


def exact_norm(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    if bias:
        return F.layer_norm(x, (x.shape[1],), weight, *bias, 1e-5)
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def gelu(x: Tensor, bias: Tensor | None = None) -> Made:
    return Made(elementwise.gelu_tanh, inputs.gelu_again, (x, bias))


# How an input is made, by our kernels and exactly, and how many axes each of its sources has.
MADE: dict[str, tuple[Callable[..., Made], Callable[..., Tensor], tuple[int, ...]]] = {
    "gelu": (gelu, lambda x, b: F.gelu(x + b, approximate="tanh"), (2, 1)),
    "gelu without a bias": (gelu, lambda x: F.gelu(x, approximate="tanh"), (2,)),
    "swiglu": (elementwise.swiglu, lambda g, u: F.silu(g) * u, (2, 2)),
    "layer norm": (lambda *xs: norms.layer_norm(*xs, 1e-5), exact_norm, (2, 1, 1)),
    "rms norm": (lambda *xs: norms.rms_norm(*xs, 1e-5), exact_norm, (2, 1)),
}


def sources_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    return [
        draw(*(ROWS, WIDTH)[2 - axes :], dtype=dtype, seed=50 + i)
        for i, axes in enumerate(MADE[kind][2])
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MADE)
def test_an_input_is_made_again_and_not_kept(kind: str, dtype: torch.dtype) -> None:
    ours, exact, axes = MADE[kind]
    count = len(axes)
    weight = draw(FEATURES, WIDTH, dtype=dtype, scale=WIDTH**-0.5)
    factors = [
        tensor
        for seed in (10, 20)  # two adapters
        for tensor in (
            draw(4, WIDTH, dtype=dtype, seed=seed, scale=WIDTH**-0.5),
            draw(FEATURES, 4, dtype=dtype, seed=seed + 1, scale=0.5),
        )
    ]
    segments = Segments.build([ROWS], device=DEVICE, examples=[4], draw=(42, 3))
    kept = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (ROWS, WIDTH):
            kept.add(tensor.data_ptr())
        return tensor

    def operands(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Operands]:
        frozen = weight.to(a.dtype)
        pairs = ((a, b), (c, d))
        return [Operands(frozen, None, *pair, 2.0, 0.1, i) for i, pair in enumerate(pairs)]

    def made(*leaves: Tensor) -> tuple[Tensor, ...]:
        x = ours(*leaves[:count])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = tuple(linears.linears(x, operands(*leaves[count:]), segments))
        assert kept == {leaf.data_ptr() for leaf in leaves[:count] if leaf.dim() == 2}
        return outputs

    def plain_form(*leaves: Tensor) -> tuple[Tensor, ...]:
        x = exact(*leaves[:count])
        x = x + (x.to(dtype).double() - x).detach()  # an activation is rounded to its type
        return tuple(plain.linears(x, operands(*leaves[count:]), segments))

    # As in test_linears, and the input's own rounding and sums.
    terms = 2 * (ROWS + WIDTH)
    terms += 0 if dtype == torch.float32 else round(2**25 * torch.finfo(dtype).eps)
    compare(made, plain_form, [*sources_of(kind, dtype), *factors], terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MADE)
def test_the_plain_form_makes_what_the_kernels_made(kind: str, dtype: torch.dtype) -> None:
    """What another backend's linears would make it by: within a rounding."""
    x = MADE[kind][0](*sources_of(kind, dtype))
    difference = (x.again(*x.sources).double() - x.value.double()).abs().max()
    assert difference <= bound(dtype, WIDTH) * x.value.abs().max()


def test_an_input_is_kept_where_weights_are_trained() -> None:
    x, up = (draw(ROWS, WIDTH, dtype=torch.float32, seed=i).requires_grad_() for i in (1, 2))
    weight = draw(FEATURES, WIDTH, dtype=torch.float32, seed=3).requires_grad_()
    a, b = draw(4, WIDTH, dtype=torch.float32), draw(FEATURES, 4, dtype=torch.float32)
    made = elementwise.swiglu(x, up)
    (y,) = linears.linears(made, [Operands(weight, None, a, b)])
    y.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, made.value.detach().sum(0).expand(FEATURES, WIDTH))


def test_what_the_kernels_cannot_make_is_kept() -> None:
    x = draw(ROWS, WIDTH, dtype=torch.float32)
    assert inputs.tile_arguments(torch.relu, (x,)) is None
    assert inputs.tile_arguments(inputs.swiglu_again, (x.t(), x.t())) is None
    a, b = draw(4, WIDTH, dtype=torch.float32), draw(FEATURES, 4, dtype=torch.float32)
    a.requires_grad_()
    weight = draw(FEATURES, WIDTH, dtype=torch.float32)
    gradients = []
    for given in (Made.by(torch.relu, x), x.relu()):
        (y,) = linears.linears(given, [Operands(weight, None, a, b)])
        gradients.append(torch.autograd.grad(y.sum(), a)[0])
    assert torch.equal(*gradients)
