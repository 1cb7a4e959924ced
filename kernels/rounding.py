"""Sizes that are rounded up on a CPU, so that the shapes of products repeat.

oneDNN prepares a product for its shape and keeps what it prepared. For a shape that it has not seen
that takes about 0.2 ms, as long as the product of a small model; steps of documents of ever new
lengths would pay it hundreds of times each. Its products are those in bf16; fp32 ones are MKL's,
which prepares nothing. The rule is one of device, type and size alone, so that a resumed run
rounds as the first one did.
"""

from __future__ import annotations

import torch

_SMALLEST = 64


def row_multiple(rows: int, device: torch.device | str, dtype: torch.dtype) -> int:
    """Return what a number of rows is rounded up to a multiple of: at most an eighth of it.

    Between two powers of two there are eight sizes, of which the mean row count wastes 4 %.
    """
    if not rounds(device, dtype):
        return 1
    return max(_SMALLEST, 1 << max(0, rows.bit_length() - 4))


def document_multiple(device: torch.device | str, dtype: torch.dtype) -> int:
    """Return what attention rounds the length of a document up to a multiple of."""
    return _SMALLEST if rounds(device, dtype) else 1


def rounds(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Return whether products of this type on this device are prepared shape by shape."""
    return torch.device(device).type == "cpu" and dtype == torch.bfloat16
