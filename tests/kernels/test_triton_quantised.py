"""Triton's dequantisation against the plain one, interpreted where there is no GPU."""

from typing import Any

import pytest
import torch
from interpreted import DEVICE, TRITON

from kernels import quantised as plain
from kernels.blockwise import dynamic_map
from kernels.dispatch import operations
from kernels.linears import linears
from kernels.operands import Operands
from kernels.quantised import KINDS, QuantisedWeight, quantised

pytestmark = pytest.mark.skipif(not TRITON, reason="triton is not installed")
# Blocks that are not full, an odd count, more than a program's bytes, more absmax than a block.
SHAPES = ((7, 9), (64, 64), (37, 129), (48, 520))


def weight(shape: tuple[int, ...], kind: str, **changes: Any) -> QuantisedWeight:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    parts = {name: part.to(DEVICE) for name, part in quantised(value, kind).items()}
    made = operations("triton", DEVICE).dequantise
    return QuantisedWeight(kind, shape, torch.float32, parts | changes, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantise(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    quantised_weight = weight(shape, kind)
    out, expected = quantised_weight.dense(dtype), plain.dequantise(quantised_weight, dtype)
    assert out.dtype == dtype
    # On a card an absmax is contracted to one rounding, and the interpreter cuts bf16 off: either
    # comes to the next number at most.
    exact = DEVICE == "cpu" and dtype != torch.bfloat16
    steps = 0 if exact else torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=steps, atol=0)


def test_absmax_that_are_not_quantised_again_and_a_map_of_its_own() -> None:
    usual = weight((48, 520), "nf4")
    parts = {"packed": usual.packed, "absmax": plain.scales(usual)}
    made = operations("triton", DEVICE).dequantise
    plainer = QuantisedWeight("nf4", (48, 520), torch.float32, parts, made)
    torch.testing.assert_close(plainer.dense(torch.float32), usual.dense(torch.float32))
    own = weight((48, 520), "nf4", nested_map=dynamic_map(True).to(DEVICE) * 0.5)
    expected = plain.dequantise(own, torch.float32)
    torch.testing.assert_close(own.dense(torch.float32), expected)
    assert not torch.equal(expected, usual.dense(torch.float32))


def test_linears_over_quantised_weights() -> None:
    """Values and gradients of the fused layers are those of the plain ones, weight by weight."""
    generator = torch.Generator().manual_seed(1)
    run = operations("triton", DEVICE)
    shapes = (96, 32, 32)  # two narrow ones are joined

    def random(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(DEVICE)

    x = random(10, 80).requires_grad_()
    layers = [
        Operands(
            weight((n, 80), kind),
            random(n),
            random(4, 80).requires_grad_(),
            random(n, 4).requires_grad_(),
            2.0,
        )
        for n, kind in zip(shapes, ("nf4", "int8", "nf4"), strict=True)
    ]
    upstream = [random(10, n) for n in shapes]
    leaves = [x, *(factor for layer in layers for factor in layer[2:4])]
    found = [
        (*out, *torch.autograd.grad(out, leaves, upstream))
        for out in (run.linears(x, layers), linears(x, layers))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
