"""The reference operations against slow, literal forms of the same formulas, in fp64.

fp64 tolerances: 1e-12, some thousand roundings of 1.1e-16, on values of order one.
"""

import math
from typing import Any

import pytest
import torch

from kernels import reference

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def test_rms_norm():
    x, weight = random(4, 16), random(16)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.1).value, expected, **EXACT)


def test_rms_norm_rounds_before_the_weight_comes_in():
    x, weight = random(64, 16).bfloat16() * 3, random(16).bfloat16()
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    actual = reference.rms_norm(x, weight, 1e-6).value
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, normed.bfloat16() * weight)


@pytest.mark.parametrize("trained", [True, False])
def test_rms_norm_gradient(trained: bool) -> None:
    x, weight = random(3, 5).requires_grad_(), random(5).requires_grad_(trained)
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-3).value, (x, weight))
    reference.rms_norm(x, weight, 1e-3).value.sum().backward()
    assert (weight.grad is not None) == trained


def test_rms_norm_under_autocast_stays_in_fp32() -> None:
    x, weight = random(6, 64).float(), random(64).float()
    with torch.autocast("cpu", torch.bfloat16):
        under = reference.rms_norm(x, weight, 1e-6).value
    assert torch.equal(under, reference.rms_norm(x, weight, 1e-6).value)


def test_swiglu_gradient() -> None:
    gate, up = random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: reference.swiglu(g, u).value, (gate, up))


def test_layer_norm():
    x, weight, bias = random(4, 16), random(16), random(16, seed=1)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 0.1).value, expected, **EXACT)
    mixed = reference.layer_norm(x.bfloat16(), weight.float(), bias.float(), 0.1).value
    assert mixed.dtype == torch.bfloat16


def test_activations():
    gate, up = random(4, 16), random(4, 16, seed=1)
    swiglu = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(reference.swiglu(gate, up).value, swiglu, **EXACT)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + torch.tanh(inner))
    torch.testing.assert_close(reference.gelu_tanh(gate), gelu, **EXACT)


def rotary_tables(rows: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = random(rows, d // 2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def test_rotary_turns_the_two_halves_against_each_other():
    q, k, (cos, sin) = random(5, 4, 6), random(5, 2, 6), rotary_tables(5, 6)
    for x, turned in zip((q, k), reference.rotary(q, k, cos, sin), strict=True):
        as_complex = torch.complex(x[..., :3], x[..., 3:])
        expected = as_complex * torch.complex(cos[:, None, :3], sin[:, None, :3])
        expected = torch.cat((expected.real, expected.imag), -1)
        torch.testing.assert_close(turned, expected, **EXACT)


def test_rotary_gradient_and_types():
    q, k, (cos, sin) = random(3, 2, 4), random(3, 1, 4), rotary_tables(3, 4)
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: reference.rotary(q, k, cos, sin), (q, k))
    half = reference.rotary(q.bfloat16(), k.bfloat16(), cos.float(), sin.float())
    assert [x.dtype for x in half] == [torch.bfloat16] * 2
