"""DoRA's layer against its formula, differentiated by autograd in fp64; its norms in blocks."""

import pytest
import torch

from kernels import dora
from kernels.dora import weight_norms
from kernels.dropout import keep_mask
from kernels.linears import linears
from kernels.operands import Operands
from kernels.segments import Segments

SCALE, MODULE = 0.7, 11


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(dropout: float, *, bias: bool, train_base: bool) -> Operands:
    """Return a layer whose magnitudes are far from the norms of its rows."""
    weight, a, b = random(5, 8, seed=1), random(3, 8, seed=2), random(5, 3, seed=3)
    tensors = weight, random(5, seed=4) if bias else None, a, b
    trained = [
        None if x is None else x.requires_grad_(train_base or number > 0)
        for number, x in enumerate(tensors)
    ]
    magnitude = (2 + random(5, seed=5).abs()).requires_grad_()
    assert trained[0] is not None
    return Operands(trained[0], *trained[1:], SCALE, dropout, MODULE, magnitude)


def formula(x: torch.Tensor, layer: Operands, segments: Segments | None) -> torch.Tensor:
    """Return y = xWᵀ + b + (ρ-1) ⊙ x̃Wᵀ + ρ ⊙ s·x̃AᵀBᵀ, in operations that autograd knows."""
    weight, bias, a, b, scale, p, module, magnitude = layer
    assert a is not None
    assert b is not None
    assert magnitude is not None
    ratio = magnitude / (weight + scale * b @ a).norm(dim=1).detach()
    dropped = x
    if segments is not None and p:
        dropped = x * keep_mask(segments.dropout_rows, module, x.shape[1], p) / (1 - p)
    y = x @ weight.T + (ratio - 1) * (dropped @ weight.T)
    y = y + ratio * (scale * (dropped @ a.T @ b.T))
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_are_the_formulas(
    dropout: float, train_base: bool, bias: bool
) -> None:
    one = layer(dropout, bias=bias, train_base=train_base)
    segments = Segments.build([4, 3], device="cpu", examples=(0, 1), draw=(5, 2))
    x = random(7, 8, seed=9).requires_grad_()
    # A plain one reads the same input.
    plain = Operands(random(4, 8, seed=7), None)
    leaves = [t for t in (x, *one) if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = random(7, 5, seed=10), random(7, 4, seed=11)
    ours = linears(x, [one, plain], segments)
    theirs = [formula(x, one, segments), x @ plain.weight.T]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(ys, leaves, upstream) for ys in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_without_dropout_it_is_the_weight_with_other_lengths() -> None:
    one = layer(0.4, bias=True, train_base=False)
    x = random(7, 8, seed=9)
    whole = one.weight + SCALE * one.lora_b @ one.lora_a  # pyright: ignore
    whole = whole / whole.norm(dim=1, keepdim=True) * one.magnitude.unsqueeze(1)  # pyright: ignore
    (y,) = linears(x, [one])
    torch.testing.assert_close(y, x @ whole.T + one.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5, 1024])
def test_norms_are_made_in_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_ROWS", rows)
    weight, a, b = random(5, 8, seed=1).float(), random(3, 8, seed=2), random(5, 3, seed=3)
    expected = (weight.double() + SCALE * b @ a).norm(dim=1)
    torch.testing.assert_close(weight_norms(weight, a, b, SCALE), expected, rtol=1e-12, atol=0)


def test_on_the_host_nothing_but_the_input_is_kept() -> None:
    """For the backward pass: the input and M·r numbers, never a second M x N beside the output."""
    one = layer(0.0, bias=True, train_base=False)
    x = random(64, 8, seed=9).requires_grad_()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    ):
        linears(x, [one])
    assert sum(size for size in kept.values() if size >= 64) == 64 * 8 + 64 * 3
