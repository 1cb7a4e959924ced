"""8-bit numbers of a dynamic map, in blocks: how bitsandbytes keeps an optimizer's moments.

Legend: n tensors, each of B blocks of 256 numbers.

A block is its largest absolute value and, for each number, the index of the nearest of 256 values
between -1 and 1 (0 and 1 where no number is negative), which that largest value scales. They lie as
a floating-point format lays them: seven decades, of which each larger one is cut twice as finely.

The nearest value is found by comparing with the midpoints; a tie goes down.

Source: Dettmers 2016 (arXiv 1511.04561); bitsandbytes 0.50.2 `create_dynamic_map`, and the default
    `quantize_blockwise` (its CPU kernel looks values up in a coarse table and misses the nearest).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7
_CPU = torch.device("cpu")
# Below it 1/x is infinite in fp32.
_TINY = 1e-38


@functools.cache
def dynamic_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """Return the map's 256 values, ascending, (256,) fp32: with negative ones, or without."""
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        cells = 2 ** (decade if signed else decade + 1)
        bounds = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2.0 * 10 ** (decade - _DECADES + 1)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@functools.cache
def _midpoints(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed, device)
    return (values[:-1] + values[1:]) / 2


def blocks_of(elements: int) -> int:
    """Return how many blocks so many numbers fill, the last one perhaps in part."""
    return -(-elements // BLOCK)


def quantise_blocks(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers in 8 bits.

    Args:
        values: (n, E) finite numbers.
        signed: Whether any may be negative.

    Returns:
        (n, B, 256) uint8 indices, of which those behind a tensor's E stand for 0; (n, B) largest
        absolute values.
    """
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK))
    padded = padded.view(len(values), -1, BLOCK)
    largest = padded.abs().amax(dim=-1)
    scaled = padded * (1.0 / largest.clamp(min=_TINY)).unsqueeze(-1)
    bounds = _midpoints(signed, values.device).to(values.dtype)
    return torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8), largest


def dequantise_blocks(indices: Tensor, largest: Tensor, elements: int, signed: bool) -> Tensor:
    """Return the numbers that `quantise_blocks` was given, as nearly as they are kept: (n, E)."""
    values = dynamic_map(signed, indices.device).to(largest.dtype)
    scaled = values[indices.int()].mul_(largest.unsqueeze(-1))
    return scaled.view(len(indices), -1)[:, :elements]
