"""Quantised weights made tensors in one pass of Triton's: packed bytes read, numbers written.

Legend: n numbers of a weight

Bytes a number, with c bytes each: nf4 0.516 + c, int8 1 + c. The formulas are those of
`kernels/quantised.py`; the product and the sum that make an absmax are contracted to one rounding.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantised import QuantisedWeight, nested_table, nf4_map, place_of_tables
from kernels.triton.jit import kernel
from kernels.triton.launch import launch


@kernel()
def _nf4(
    packed_ptr,
    table_ptr,
    absmax_ptr,
    nested_map_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    out_ptr,
    count,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the numbers of BLOCK bytes, two each; 32 bytes have one absmax, 256 absmax another."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first + tl.arange(0, BLOCK)
    inside = 2 * byte < count
    packed = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
    block = byte // 32
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if NESTED:
        value = tl.load(nested_map_ptr + absmax.to(tl.int32), mask=inside, other=0.0)
        largest = tl.load(nested_absmax_ptr + block // 256, mask=inside, other=0.0)
        absmax = value * largest + tl.load(nested_offset_ptr)
    high = tl.load(table_ptr + (packed >> 4), mask=inside, other=0.0) * absmax
    low = tl.load(table_ptr + (packed & 15), mask=inside, other=0.0) * absmax
    at = 2 * first + tl.arange(0, 2 * BLOCK)
    out = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=at < count)


@kernel()
def _int8(packed_ptr, absmax_ptr, out_ptr, width, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    packed = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.float32)
    out = packed * tl.load(absmax_ptr + tl.program_id(0)) * 0.007874015748031496  # 1/127
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight as a tensor; see `kernels.quantised.dequantise`."""
    packed = weight.packed
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    settings = launch("elementwise", packed.device)
    if weight.kind == "int8":
        rows, width = weight.shape
        grid = rows, triton.cdiv(width, settings["BLOCK"])
        _int8[grid](packed, weight.absmax, out, width, **settings)
        return out
    nested = weight.nested_absmax is not None
    _nf4[(triton.cdiv(packed.numel(), settings["BLOCK"]),)](
        packed,
        nf4_map(place_of_tables(packed)),
        weight.absmax,
        nested_table(weight) if nested else None,
        weight.nested_absmax,
        weight.nested_offset,
        out,
        weight.shape.numel(),
        NESTED=nested,
        **settings,
    )
    return out
