"""Triton's adapted linear layers against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from against_fp64 import DTYPES, bound, compare, draw, layers_of, poisoned, slow  # noqa: F401
from interpreted import DEVICE

from kernels import linears as plain
from kernels.dropout import keep_mask, mix, signed
from kernels.segments import Segments

pytest.importorskip("triton")

from kernels.triton import adapters, linears

# (features, rank, bias) of each layer that reads x.
LAYERS = {
    "one": [(24, 4, False)],
    "q, k and v": [(520, 4, True), (8, 4, True), (8, 4, True)],
    "gate and up": [(40, 16, False), (40, 16, False)],
    "ranks apart, q plain": [(24, 0, True), (8, 3, True), (8, 5, False)],
    "k plain": [(24, 4, False), (8, 0, False), (8, 17, False)],
    "a rank that is read twice": [(24, 33, True), (8, 4, False)],
}
# Rows and width are two tiles each, the second cut short.
QUICK = [
    *(("one", 0.0), ("q, k and v", 0.1), ("ranks apart, q plain", 0.1)),
    ("a rank that is read twice", 0.1),
]
CASES = [pytest.param(70, 96, p, LAYERS[name], id=f"{name}, {p}") for name, p in QUICK] + [
    slow(rows, width, p, layers, id=f"{rows} x {width}, {name}, {p}")
    for rows, width in ((9, 20), (130, 96))
    for name, layers in LAYERS.items()
    for p in (0.0, 0.1)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "p", "outputs"), CASES)
def test_linears(
    rows: int, width: int, p: float, outputs: list[tuple[int, int, bool]], dtype: torch.dtype
) -> None:
    x, tensors, operands = layers_of(rows, width, outputs, p, dtype)
    lengths = [rows - rows // 3, rows // 3]
    segments = Segments.build(lengths, device=DEVICE, examples=[4, 9], draw=(42, 3))
    # Two products one after another, each of them rounded, and the sum over the layers.
    compare(
        lambda x, *flat: tuple(linears.linears(x, operands(flat), segments)),
        lambda x, *flat: tuple(plain.linears(x, operands(flat), segments)),
        [x, *tensors],
        rows + width + (0 if dtype == torch.float32 else round(2**24 * torch.finfo(dtype).eps)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, slow(32), 64])
def test_the_backward_pass_through_b(rank: int, dtype: torch.dtype) -> None:
    """Two ranges of rows, two blocks of columns: dB is exact to fp32, ds is rounded once."""
    rows, widths, scales = 1030, [600, 40, 20], [2.0, 0.5, 3.0]
    whole = draw(rows, sum(widths), dtype=dtype)
    grads = [dy if j else dy.contiguous() for j, dy in enumerate(whole.split(widths, dim=1))]
    b = draw(sum(widths), rank, dtype=dtype, seed=1, scale=rank**-0.5)
    low_rank = draw(rows, 3, rank, dtype=dtype, seed=2)
    d_low, d_b = adapters.through_b(grads, b, low_rank, scales)
    assert (d_low.dtype, d_b.dtype) == (dtype, torch.float32)
    # What reads dy twice multiplies in half precision, which returns fp32 on CUDA alone.
    rounded = dtype if rank > 32 and DEVICE == "cpu" else torch.float32
    pieces = zip(grads, b.split(widths), d_b.split(widths), scales, strict=True)
    for j, (dy, b_j, d_b_j, scale) in enumerate(pieces):
        dy = dy.double()
        for ours, exact, terms, kind in (
            (d_low[:, j], scale * dy @ b_j.double(), widths[j], dtype),
            (d_b_j, scale * dy.t() @ low_rank[:, j].double(), rows, rounded),
        ):
            difference = (ours.double() - exact).abs().max()
            assert difference <= bound(kind, terms) * exact.abs().max(), (j, kind)


def test_an_adapter_without_dropout_keeps_every_word_beside_one_with() -> None:
    x, tensors, operands = layers_of(1, 2, [(2, 1, False), (2, 1, False)], 0.1, torch.float32)
    first, second = operands(tensors)
    first = first._replace(dropout=0.0)
    # The row key for which the first module's word of column 0 is the largest of all.
    word = 0x7FFFFFFF
    for multiplier, bits in ((0x846CA68B, 15), (0x7FEB352D, 16)):
        word = word * pow(multiplier, -1, 2**32) % 2**32
        word ^= word >> bits
        word ^= (word >> 2 * bits) if 2 * bits < 32 else 0
    row_key = word ^ mix(mix(first.module))
    segments = dataclasses.replace(
        Segments.build([1], device=DEVICE, examples=[0], draw=(1, 1)),
        dropout_rows=torch.tensor([signed(row_key)], dtype=torch.int32, device=DEVICE),
    )
    assert not keep_mask(segments.dropout_rows, first.module, 1, 2.0**-40).any()  # pyright: ignore
    for one, other in zip(
        linears.linears(x, [first, second], segments),
        plain.linears(x, [first, second], segments),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_rows_that_several_programs_share(dtype: torch.dtype) -> None:
    rows = 1100  # two ranges of 550, which is no multiple of a tile
    x, tensors, operands = layers_of(rows, 8, [(8, 4, False)], 0.1, dtype)
    segments = Segments.build([rows], device=DEVICE, examples=[4], draw=(42, 3))
    compare(
        lambda x, *flat: tuple(linears.linears(x, operands(flat), segments)),
        lambda x, *flat: tuple(plain.linears(x, operands(flat), segments)),
        [x, *tensors],
        rows,
    )


def test_frozen_tensors_get_no_gradient_and_dropout_needs_segments() -> None:
    x, tensors, operands = layers_of(9, 20, [(24, 4, True)], 0.5, torch.float32)
    weight, bias, a, b = tensors
    x.requires_grad_()
    a.requires_grad_()
    b.requires_grad_()
    (y,) = linears.linears(x, operands(tensors))
    exact = x @ weight.T + bias + 2.0 * (x @ a.T) @ b.T
    torch.testing.assert_close(y, exact)
    y.sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_the_kernels_give_the_same_bits_again() -> None:
    x, tensors, operands = layers_of(130, 96, [(24, 4, True), (8, 4, True)], 0.1, torch.float32)
    segments = Segments.build([130], device=DEVICE, examples=[4], draw=(42, 3))
    runs = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *tensors)]
        outputs = linears.linears(leaves[0], operands(leaves[1:]), segments)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
        runs.append([*outputs, *gradients])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))
