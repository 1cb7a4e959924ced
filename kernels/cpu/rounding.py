"""Which library multiplies, and the sizes that are rounded up for it so that shapes repeat.

oneDNN prepares a product for its shape and keeps what it prepared. For a shape that it has not seen
that takes as long as the product of a small model; steps of documents of ever new
lengths would pay it again and again. On a CPU its products are those in bf16; fp32 ones are MKL's,
which prepares nothing. The rule is one of device, type and size alone, so that a resumed run
rounds as the first one did.

CUDA's libraries prepare nothing, but its allocator keeps blocks by size, and tiles are of 128 rows:
the rest of the last one is computed anyway.
"""

from __future__ import annotations

import torch

_SMALLEST = 64
_ROWS_OF_A_TILE = 128


def row_multiple(rows: int, device: torch.device | str, dtype: torch.dtype) -> int:
    """Return what a number of rows is rounded up to a multiple of.

    On a CPU that is, from 512 rows on, at most an eighth of them: between two powers of two there
    are eight sizes, of which the mean row count wastes 4 %. Fewer rows are rounded up to 64.
    """
    if torch.device(device).type == "cuda":
        return _ROWS_OF_A_TILE
    if not rounds(device, dtype):
        return 1
    return max(_SMALLEST, 1 << max(0, rows.bit_length() - 4))


def document_multiple(device: torch.device | str, dtype: torch.dtype) -> int:
    """Return what attention rounds the length of a document up to a multiple of."""
    return _SMALLEST if rounds(device, dtype) else 1


def rounds(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Return whether products of this type on this device are prepared shape by shape."""
    return library(device, dtype) == "oneDNN"


def library(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the name of the library that torch multiplies matrices of this type with."""
    kind = torch.device(device).type
    if kind != "cpu":
        return {"cuda": "cuBLAS", "mps": "Metal"}.get(kind, kind)
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return "oneDNN"
    return "MKL" if dtype.itemsize >= 4 and torch.backends.mkl.is_available() else "torch"
