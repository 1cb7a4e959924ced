"""Blocks of 8-bit numbers against bitsandbytes: its map, its nearest value, its two kernels."""

import bitsandbytes  # noqa: F401  # registers the operations
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from kernels.blockwise import (
    BLOCK,
    blocks_of,
    dequantise_blocks,
    dynamic_map,
    quantise_blocks,
)

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def numbers(signed: bool, elements: int = 64 * BLOCK) -> torch.Tensor:
    """Return numbers of a block of every size from 1e-8 to 100."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-8, 2, blocks_of(elements)).repeat_interleave(BLOCK)[:elements]
    x = torch.randn(elements, generator=generator) * size
    return x if signed else x.square()


@SIGNS
def test_the_map_is_theirs(signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), create_dynamic_map(signed))


@SIGNS
@pytest.mark.parametrize("elements", [64 * BLOCK, 1000, 255])
def test_indices_and_largest_values_are_theirs(signed: bool, elements: int) -> None:
    """Given fp64, their CPU kernel compares with all 256 values; given fp32, it looks them up."""
    x = numbers(signed, elements)
    theirs, largest = torch.ops.bitsandbytes.quantize_blockwise(
        x.double(), dynamic_map(signed), BLOCK
    )
    indices, ours = quantise_blocks(x.view(1, -1), signed)
    assert torch.equal(ours.view(-1), largest)
    found = indices.view(-1)[:elements]
    differing = (found != theirs).nonzero()
    # Their distances are rounded: what lies on a midpoint but for that may go either way.
    scaled = (x / largest.repeat_interleave(BLOCK)[:elements])[differing]
    values = dynamic_map(signed).double()
    distances = [(scaled - values[i[differing].long()]).abs() for i in (found, theirs)]
    torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-9)
    assert len(differing) < 1e-3 * elements + 1


@SIGNS
def test_no_number_is_nearer_to_another_value(signed: bool) -> None:
    """Nor to the value of their fp32 kernel, which is another for some of them."""
    x = numbers(signed)
    indices, largest = quantise_blocks(x.view(1, -1), signed)
    scaled = (x.view(-1, BLOCK) / largest.view(-1, 1)).double()
    values = dynamic_map(signed).double()
    ours = (scaled - values[indices[0].long()]).abs()
    nearest = (scaled.unsqueeze(-1) - values).abs().amin(-1)
    torch.testing.assert_close(ours, nearest, rtol=1e-5, atol=1e-9)


@SIGNS
def test_a_tie_goes_down(signed: bool) -> None:
    values = dynamic_map(signed)
    between = (values[:-1] + values[1:]) / 2
    indices, largest = quantise_blocks(torch.cat([between, torch.ones(1)]).view(1, -1), signed)
    assert largest.item() == 1.0
    assert torch.equal(indices.view(-1)[:-1].int(), torch.arange(255, dtype=torch.int32))


@SIGNS
def test_numbers_come_back_as_theirs_do(signed: bool) -> None:
    x = numbers(signed, 1000)
    indices, largest = quantise_blocks(x.view(2, 500), signed)
    found = dequantise_blocks(indices, largest, 500, signed)
    for row in range(2):
        theirs = torch.ops.bitsandbytes.dequantize_blockwise(
            indices[row].view(-1), largest[row], dynamic_map(signed), BLOCK, torch.float32
        )
        assert torch.equal(found[row], theirs[:500])


@SIGNS
def test_zeros_and_numbers_too_small_for_a_reciprocal_stay_finite(signed: bool) -> None:
    x = torch.zeros(3, BLOCK)
    x[1, 7], x[2] = 1e-42, 3e-39
    indices, largest = quantise_blocks(x, signed)
    back = dequantise_blocks(indices, largest, BLOCK, signed)
    assert back.isfinite().all()
    assert torch.equal(back[0], torch.zeros(BLOCK))
    assert not back[1][torch.arange(BLOCK) != 7].any()
    assert back.max() <= 3e-39
