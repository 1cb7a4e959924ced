"""Rounding to bf16 up or down by chance, without a generator: a pure function of the place.

Legend: R rows · C columns of one parameter; a vector is a column.

bf16 keeps the upper 16 bits of an fp32 number. A number between two neighbours is rounded to the
one away from zero as often as it lies near it: a uniform 16-bit number is added to the bits, and
the lower 16 are cut off. The mean over draws is the number itself, so that updates smaller than
half a step of bf16, which rounding to the nearest drops every time, are kept in the mean. A number
that bf16 holds stays as it is.

The draw is that of dropout (kernels/dropout.py), by row and column of the whole parameter:

    row key     = mix(fold(fold(fold(salt, seed), step), parameter id) ^ row)
    column key  = mix(mix(parameter id) ^ column)
    added       = the upper 16 bits of mix(row key ^ column key)

so that a resumed run, another cut into blocks and another number of ranks round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dropout import fold, mix, mix_words, module_id, signed

# Apart from the masks of dropout, whatever an example's number is.
_SALT = mix(module_id("stochastic rounding"))


def row_keys(
    seed: int, step: int, name: str, first: int, count: int, device: torch.device
) -> Tensor:
    """Return the keys of `count` rows of a parameter from row `first` on: (count,) int32."""
    key = fold(fold(fold(_SALT, seed), step), module_id(name))
    rows = torch.arange(first, first + count, dtype=torch.int32, device=device)
    return mix_words(rows ^ signed(key))


def column_keys(name: str, count: int, device: torch.device) -> Tensor:
    """Return the keys of a parameter's first `count` columns: (count,) int32."""
    columns = torch.arange(count, dtype=torch.int32, device=device)
    return mix_words(columns ^ signed(mix(module_id(name))))


def round_to_bf16(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Round by chance.

    Args:
        values: (..., R, C) fp32, finite.
        rows: (..., R) int32, `row_keys`.
        columns: (..., C) int32, `column_keys`.

    Returns:
        (..., R, C) bf16.
    """
    words = mix_words(rows.unsqueeze(-1) ^ columns.unsqueeze(-2))
    words = (words >> 16).bitwise_and_(0xFFFF).add_(values.contiguous().view(torch.int32))
    return words.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
