"""Activations that Triton makes and differentiates inside the layer that reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from against_fp64 import DTYPES, compare, draw, poisoned, slow  # noqa: F401
from interpreted import DEVICE
from torch import Tensor

from kernels import linears as plain
from kernels.operands import Made, Operands
from kernels.segments import Segments

pytest.importorskip("triton")

from kernels.triton import inputs, linears

FEATURES = 24
# The operation, the exact one, and how many axes each of its sources has.
KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "gelu": (inputs.gelu_again, lambda x, b: F.gelu(x + b, approximate="tanh"), (2, 1)),
    "gelu without a bias": (inputs.gelu_again, lambda x: F.gelu(x, approximate="tanh"), (2,)),
    "swiglu": (inputs.swiglu_again, lambda g, u: F.silu(g) * u, (2, 2)),
}


def never(*_: Tensor) -> Tensor:
    raise AssertionError("the activation is made beside the layer that reads it")


def unmade(again: Callable[..., Tensor], *sources: Tensor) -> Made:
    if again is inputs.gelu_again and len(sources) == 1:
        return Made(never, again, (*sources, None))
    return Made(never, again, sources)


def problem(
    kind: str, rows: int, width: int, rank: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Return sources, A, B and bias, which get gradients, and the frozen weight."""
    sources = [
        draw(*(rows, width)[2 - axes :], dtype=dtype, seed=50 + i, scale=2.0)
        for i, axes in enumerate(KINDS[kind][2])
    ]
    a = draw(rank, width, dtype=dtype, seed=1, scale=width**-0.5)
    b = draw(FEATURES, rank, dtype=dtype, seed=2, scale=rank**-0.5)
    bias = draw(FEATURES, dtype=dtype, seed=3)
    weight = draw(FEATURES, width, dtype=dtype, seed=4, scale=width**-0.5)
    return [*sources, a, b, bias], weight


# Two tiles of rows and of columns, the second cut short; two ranges of rows that programs share.
SHAPES = [(70, 96, 4), slow(9, 20, 33), slow(1100, 72, 16), slow(40, 130, 65)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_inside_the_layer_that_reads_it(
    kind: str, p: float, rows: int, width: int, rank: int, dtype: torch.dtype
) -> None:
    again, exact, axes = KINDS[kind]
    count = len(axes)
    tensors, weight = problem(kind, rows, width, rank, dtype)
    lengths = [rows - rows // 3, rows // 3]
    segments = Segments.build(lengths, device=DEVICE, examples=[4, 9], draw=(42, 3))

    def layer(a: Tensor, b: Tensor, bias: Tensor) -> list[Operands]:
        return [Operands(weight.to(a.dtype), bias, a, b, 2.0, p, 7)]

    def fused(*leaves: Tensor) -> Tensor:
        x = unmade(again, *leaves[:count])
        return linears.linears(x, layer(*leaves[count:]), segments)[0]

    def plain_form(*leaves: Tensor) -> Tensor:
        x = exact(*leaves[:count])
        x = x + (x.to(dtype).double() - x).detach()  # an activation is rounded to its type
        return plain.linears(x, layer(*leaves[count:]), segments)[0]

    # As in test_linears, and the activation's own rounding and sums.
    terms = 2 * (rows + width)
    terms += 0 if dtype == torch.float32 else round(2**25 * torch.finfo(dtype).eps)
    compare(fused, plain_form, tensors, terms)


def test_rows_that_several_programs_share() -> None:
    """Two ranges of 550 rows, which is no multiple of a tile."""
    tensors, weight = problem("swiglu", 1100, 8, 4, torch.float32)
    segments = Segments.build([1100], device=DEVICE, examples=[4], draw=(42, 3))

    def run(make: Callable[..., Tensor | Made], layers: Callable[..., list[Tensor]]) -> Callable:
        def of(gate: Tensor, up: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
            layer = Operands(weight.to(a.dtype), bias, a, b, 2.0, 0.1, 7)
            return layers(make(gate, up), [layer], segments)[0]

        return of

    compare(
        run(lambda *xs: unmade(inputs.swiglu_again, *xs), linears.linears),
        run(KINDS["swiglu"][1], plain.linears),
        tensors,
        1100,
    )


def test_only_what_is_asked_for_has_a_gradient_and_the_same_bits_again() -> None:
    tensors, weight = problem("gelu", 70, 96, 4, torch.float32)
    x, inner_bias, a, b, bias = tensors
    runs = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
        layer = Operands(weight, bias, *leaves[1:], 2.0, 0.0, 7)
        made = unmade(inputs.gelu_again, leaves[0], inner_bias)
        (y,) = linears.linears(made, [layer])
        kept = y.grad_fn.saved_tensors if y.grad_fn is not None else ()
        assert [t.data_ptr() for t in kept if t is not None and t.shape == x.shape] == [
            leaves[0].data_ptr()
        ]
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))
    assert inner_bias.grad is None
    assert bias.grad is None


def test_an_activation_that_others_read_is_made_for_them() -> None:
    """Two readers, a frozen one, one whose weight is trained: each asks for the value."""
    tensors, weight = problem("swiglu", 9, 20, 4, torch.float32)
    gate, up, a, b, _ = (t.requires_grad_() for t in tensors)
    asked = []

    def make(*sources: Tensor) -> Tensor:
        asked.append(sources)
        return F.silu(sources[0]) * sources[1]

    made = Made(make, inputs.swiglu_again, (gate, up))
    adapted = Operands(weight, None, a, b)
    exact = made.value @ weight.T
    for layers in (
        [adapted, adapted],
        [Operands(weight)],
        [Operands(weight.clone().requires_grad_(), None, a, b)],
        [Operands(weight.clone().requires_grad_())],  # as in full fine-tuning that makes it again
    ):
        asked.clear()
        y = linears.linears(made._replace(remake=layers[0].lora_a is None), layers)[0]
        assert len(asked) == 1
        extra = 0 if layers[0].lora_a is None else made.value @ a.T @ b.T
        torch.testing.assert_close(y, exact + extra)
