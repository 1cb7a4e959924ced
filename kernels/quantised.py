"""Weights in four or eight bits, in the formats of bitsandbytes: made, held, made tensors again.

Legend: N output features · K input features · n = N·K

    nf4     the numbers, row after row, in blocks of 64: |the largest|, absmax, and for each number
            the nearest of 16 quantiles of a normal distribution of x · (1/absmax), a tie the lower;
            two numbers a byte, the first in the high half. The absmax are quantised once more:
            their mean is subtracted, and blocks of 256 take the nearest of 256 values that lie the
            denser the smaller they are. 0.5 + (1 + 4/256)/64 = 0.5159 bytes a number.
    int8    127 · x / absmax, rounded, absmax that of a row: LLM.int8()'s weights, of numbers
            rounded to fp16 first, as there. Inputs are not quantised, so no column is an outlier
            and none is held back. 1 byte a number and 4 a row.

They are made on the host, so that the bytes do not depend on the device. Becoming a tensor again
is one product, or two, in fp32 and one rounding.

Source: bitsandbytes 0.50 on a CPU (Dettmers et al. 2023, QLoRA, and 2022, LLM.int8()), whose bytes
these are to the bit. In its own ways: a last block that is not full is divided by its absmax, not
multiplied by the inverse; and what the absmax are compared with is rounded first, to one of 65,536
steps from -1 to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.blockwise import dynamic_map

KINDS = ("nf4", "int8")
BLOCK = 64  # numbers with one absmax
NESTED_BLOCK = 256  # absmax with one of their own
PIECE_ON_A_CPU = 2**18  # numbers that are made at a time: what a cache holds
_STEPS = 65536
_SMALLEST = 1e-38  # of an absmax that is divided by

# Quantiles of the normal distribution, -1 and 1 and 0 among them: seven below 0 and eight above.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class QuantisedWeight(nn.Module):
    """A frozen (N, K) weight in few bits, in the place of a linear layer's `weight`.

    It offers what else is asked of a weight: shape, type, device, and that it is not trained. It is
    a module so that it goes where its model goes; its buffers keep their types whatever the model
    is turned into.

    Args:
        kind: `nf4` or `int8`.
        shape: (N, K).
        dtype: The type of the weight that it stands for.
        parts: Its tensors: `packed`, (⌈n/2⌉,) uint8 or (N, K) int8; `absmax`, one a block or a row,
            fp32 or, quantised once more, uint8; then `nested_absmax`, fp32, `nested_offset`, the
            mean, and, where it is not the usual one, `nested_map`, (256,) fp32.
        dequantise: What makes a tensor of it: `Operations.dequantise`.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_map: Tensor | None
    requires_grad = False

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parts: Mapping[str, Tensor],
        dequantise: Callable[[QuantisedWeight, torch.dtype], Tensor],
    ):
        super().__init__()
        self.kind, self.shape, self.dtype = kind, torch.Size(shape), dtype
        for name in ("packed", "absmax", "nested_absmax", "nested_offset", "nested_map"):
            self.register_buffer(name, parts.get(name))
        self.dequantise = dequantise

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a tensor, (N, K), that nobody else holds."""
        return self.dequantise(self, dtype)

    def nbytes(self) -> int:
        """Return the bytes that it takes."""
        return sum(part.nbytes for part in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedWeight:
        for name, part in self._buffers.items():
            if part is not None:
                moved = fn(part)
                same = moved.dtype == part.dtype
                self._buffers[name] = moved if same else part.to(moved.device)
        return self


def quantised(value: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the parts of `QuantisedWeight` that a weight comes to.

    Args:
        value: (N, K) on the host, of any floating-point type.
        kind: `nf4` or `int8`.
    """
    if kind == "int8":
        return _int8(value)
    packed, absmax = _nf4(value.reshape(-1))
    offset = absmax.mean()
    nested, nested_absmax = _dynamic(absmax.sub_(offset))
    return {
        "packed": packed,
        "absmax": nested,
        "nested_absmax": nested_absmax,
        "nested_offset": offset,
    }


def quantised_shapes(shape: tuple[int, ...], kind: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and type of the parts that `quantised` makes of a weight."""
    rows, columns = shape
    if kind == "int8":
        return {"packed": (shape, torch.int8), "absmax": ((rows,), torch.float32)}
    count = rows * columns
    blocks = -(-count // BLOCK)
    return {
        "packed": ((-(-count // 2),), torch.uint8),
        "absmax": ((blocks,), torch.uint8),
        "nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
        "nested_offset": ((), torch.float32),
    }


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight as a tensor, (N, K): made in fp32, a piece at a time, and rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    piece = _piece(weight.device)
    if weight.kind == "int8":
        rows = max(1, piece // weight.shape[1])
        parts = (part.split(rows) for part in (out, weight.packed, weight.absmax))
        for target, packed, absmax in zip(*parts, strict=True):
            target.copy_(packed.float().mul_(absmax[:, None]).mul_(1 / 127))
        return out
    absmax, pairs = scales(weight), _pairs(place_of_tables(weight.packed))
    flat = out.view(-1)
    for start in range(0, len(flat), piece):
        target = flat[start : start + piece]
        packed = weight.packed[start // 2 : (start + piece) // 2]
        values = pairs.index_select(0, packed.int()).view(torch.float32)[: len(target)]
        blocks = absmax[start // BLOCK : (start + piece) // BLOCK]
        full = len(target) // BLOCK
        values[: full * BLOCK].view(full, BLOCK).mul_(blocks[:full, None])
        if full < len(blocks):
            values[full * BLOCK :].mul_(blocks[full])
        target.copy_(values)
    return out


def scales(weight: QuantisedWeight) -> Tensor:
    """Return the absmax of an nf4 weight's blocks, in fp32."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax
    values = nested_table(weight).index_select(0, weight.absmax.int())
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
    return values.mul_(nested).add_(weight.nested_offset)


def nested_table(weight: QuantisedWeight) -> Tensor:
    """Return the map of the absmax of an nf4 weight's blocks, (256,) fp32."""
    own = weight.nested_map
    return dynamic_map(True, place_of_tables(weight.packed)) if own is None else own


def place_of_tables(packed: Tensor) -> torch.device:
    """Return where a weight's tables lie; on meta if it does, whatever device is pretended."""
    return torch.device("meta") if packed.is_meta else packed.device


@functools.cache
def nf4_map(device: torch.device | str = "cpu") -> Tensor:
    """Return the 16 values of a number over its absmax, (16,) fp32 ascending."""
    return torch.tensor(NF4, device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values that each byte stands for, (256,), as eight bytes of whatever type."""
    table = nf4_map(device)
    byte = torch.arange(256, device=device)
    return torch.stack((table[byte >> 4], table[byte & 15]), 1).view(torch.int64).view(-1)


def _piece(device: torch.device) -> int:
    """Return how many numbers are made at a time; elsewhere what fills a card."""
    return PIECE_ON_A_CPU if device.type == "cpu" else 2**24


def _nf4(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers, two a byte, and the absmax of their blocks."""
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-len(flat) // BLOCK))
    table = nf4_map()
    middles = (table[:-1] + table[1:]) / 2
    for start in range(0, len(flat), _piece(flat.device)):
        part = flat[start : start + _piece(flat.device)].float()
        full = len(part) // BLOCK
        blocks, rest = part[: full * BLOCK].view(full, BLOCK), part[full * BLOCK :]
        largest = blocks.abs().amax(1)
        scaled = (blocks * largest.clamp(min=_SMALLEST).reciprocal()[:, None]).view(-1)
        if len(rest):
            of_rest = rest.abs().amax().clamp(min=_SMALLEST)
            largest = torch.cat((largest, of_rest[None]))
            scaled = torch.cat((scaled, rest / of_rest))
        if len(scaled) % 2:
            scaled = torch.cat((scaled, scaled.new_zeros(1)))
        codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
        packed[start // 2 : start // 2 + len(codes) // 2] = codes[::2] << 4 | codes[1::2]
        absmax[start // BLOCK : start // BLOCK + len(largest)] = largest
    return packed, absmax


def _dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of values in `dynamic_map`, uint8, and the absmax of their blocks."""
    table = dynamic_map(True)
    steps = torch.arange(_STEPS) / ((_STEPS - 1) / 2) - 1
    nearest = torch.bucketize(steps, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    padded = torch.cat((values, values.new_zeros(-len(values) % NESTED_BLOCK)))
    blocks = padded.view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.reciprocal()[:, None]).nan_to_num(-1.0)  # where all are 0
    step = ((scaled + 1) * ((_STEPS - 1) / 2) + 0.5).floor_().clamp_(0, _STEPS - 1)
    return nearest[step.view(-1)[: len(values)].long()], absmax


def _int8(value: Tensor) -> dict[str, Tensor]:
    packed = torch.empty(value.shape, dtype=torch.int8)
    absmax = torch.empty(len(value))
    rows = max(1, _piece(value.device) // value.shape[1])
    for part, target, largest in zip(
        *(x.split(rows) for x in (value, packed, absmax)), strict=True
    ):
        half = part.half()
        largest.copy_(half.abs().amax(1))
        factor = 127 / largest.clamp(min=_SMALLEST)
        target.copy_(torch.round(half.float() * factor[:, None]))
    return {"packed": packed, "absmax": absmax}
