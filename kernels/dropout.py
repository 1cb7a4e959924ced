"""Dropout without a generator: each mask bit is a pure function of where it stands.

Legend: M token rows · width columns of one activation · every key is 32 bits, held in int32.

The rule. `mix` is the 32-bit finaliser "lowbias32" (Chris Wellons, hash-prospector): an exact
bijection of 32-bit words. `fold(key, value)` = mix(mix(key ^ low word) ^ high word) chains values.

    row key     = mix(fold(fold(fold(0, seed), step), example) ^ position)      `Segments.build`
    column key  = mix(mix(module id) ^ column)
    an element is kept  ⇔  mix'(row key ^ column key) < round((1-p)·2³²) - 2³¹  as signed integers,
                           the right side at most 2³¹ - 1

Attention weights have one row a head and query, with mix(row key ^ head) as its key, and a column
for each position of a key.

mix' leaves out mix's last xor-shift, which never reaches the bits that decide the comparison. No
state is stored or advanced: a resumed run, another cut into micro-batches, another number of ranks
and the recomputation of a checkpointed layer all draw the same masks, and a kernel on another
device can draw them bit for bit, since only 32-bit xor, shift and wrapping multiplication are used.
kernels/README.md works one example through.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORD = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32  # the same bits as a signed word

# Elements of one block of `keep_mask`: few enough for its two int32 temporaries to stay in the
# caches of a CPU, enough for the cost of its eight calls not to show.
_BLOCK = {"cpu": 2**18}
_LARGE_BLOCK = 2**25  # elsewhere: few launches, at most 128 MiB for a temporary

# Integers as wide as each type: dropping multiplies the bits of a number by 0 or 1.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Draw(NamedTuple):
    """Which elements of one activation are dropped."""

    rows: Tensor  # (M,) int32 row keys, `Segments.dropout_rows`
    module: int  # `module_id` of the module that drops
    p: float  # probability of dropping, 0 < p < 1


def module_id(name: str) -> int:
    """Return a 31-bit number for a module's name, the same in every process and version."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def mix(word: int) -> int:
    """Scramble one 32-bit word on the host."""
    word ^= word >> 16
    word = word * _MULTIPLIER_1 & WORD
    word ^= word >> 15
    word = word * _MULTIPLIER_2 & WORD
    return word ^ word >> 16


def fold(key: int, value: int) -> int:
    """Chain the 64-bit integer `value` into the 32-bit `key`."""
    for part in (value & WORD, value >> 32 & WORD):
        key = mix(key ^ part)
    return key


def signed(word: int) -> int:
    """Return the int32 that has the bits of the 32-bit `word`."""
    return word - 2**32 if word >= 2**31 else word


def keep_limit(p: float) -> int:
    """Return the signed word below which an element is kept that is dropped with probability p."""
    return min(round((1 - p) * 2**32) - 2**31, 2**31 - 1)


def mix_words(words: Tensor) -> Tensor:
    """Scramble an int32 tensor element by element: `mix` in wrapping int32 arithmetic."""
    return _shift_xor(_multiply_(_shift_xor(words, 16)), 16)


def _shift_xor(words: Tensor, bits: int) -> Tensor:
    """Return words ^ words >> bits, with zeros coming in, unlike in int32's own shift."""
    return (words >> bits).bitwise_and_((1 << (32 - bits)) - 1).bitwise_xor_(words)


def _multiply_(words: Tensor) -> Tensor:
    """Apply `mix`, in place where possible, from its first product to its second."""
    return _shift_xor(words.mul_(_MULTIPLIER_1), 15).mul_(_MULTIPLIER_2)


@functools.lru_cache(maxsize=1024)
def _shifted_column_keys(module: int, width: int, device: torch.device) -> Tensor:
    """Return the column keys of a module after the first xor-shift of mix': (width,) int32."""
    columns = torch.arange(width, dtype=torch.int32, device=device)
    return _shift_xor(mix_words(columns ^ signed(mix(module))), 16)


def keep_mask(rows: Tensor, module: int, width: int, p: float) -> Tensor:
    """Return the mask of one activation: true where an element is kept.

    A shift distributes over xor, so mix' may shift its two keys before it combines them: M + width
    shifts in the place of M · width.

    Args:
        rows: (M,) int32 row keys, `Segments.dropout_rows`.
        module: `module_id` of the module that drops.
        width: columns of the activation.
        p: probability of dropping, 0 ≤ p < 1.

    Returns:
        (M, width) bool.
    """
    # Rounded up, so that the documents of attention, each with a width of its own, share an entry.
    cached_width = 1 << (width - 1).bit_length()
    columns = _shifted_column_keys(module, cached_width, rows.device)[:width]
    shifted_rows = _shift_xor(rows, 16)[:, None]
    limit = keep_limit(p)
    mask = torch.empty(len(rows), width, dtype=torch.bool, device=rows.device)
    block = max(1, _BLOCK.get(rows.device.type, _LARGE_BLOCK) // width)
    # Compared in place and copied as bytes: a CPU writes bool five times as slowly.
    parts = zip(shifted_rows.split(block), mask.view(torch.int8).split(block), strict=True)
    for part, out in parts:
        out.copy_(_multiply_(part ^ columns).lt_(limit))
    return mask


def attention_keep_mask(rows: Tensor, module: int, heads: int, keys: int, p: float) -> Tensor:
    """Return the mask of attention weights: (D, T) row keys → (D, heads, T, keys) bool.

    A key is named by its position in the document, so the mask does not depend on padding.
    """
    numbers = torch.arange(heads, dtype=torch.int32, device=rows.device)
    head_rows = mix_words(rows[:, None] ^ numbers[:, None])
    return keep_mask(head_rows.flatten(), module, keys, p).unflatten(0, head_rows.shape)


class _Drop(torch.autograd.Function):
    """x · mask / (1-p), remembering the mask at one byte an element and not the scaled copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.p = p
        return keep(x, mask).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return keep(grads[0], mask).mul_(1 / (1 - ctx.p)), None, None


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Return x · mask; what is dropped is zero even where `x` is infinite or NaN.

    The bits of x are multiplied as integers: `torch.where` takes four times as long on a CPU.
    """
    return (x.view(_BITS[x.dtype]) * mask.view(torch.int8)).view(x.dtype)


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return `x` with the elements outside `mask` zeroed and the others divided by 1-p."""
    return _Drop.apply(x, mask, p)  # pyright: ignore[reportReturnType]  # apply is untyped


def dropout(x: Tensor, rows: Tensor | None, module: int, p: float) -> Tensor:
    """Drop elements of an activation, where this pass drops at all.

    Args:
        x: (M, width) activation.
        rows: (M,) int32 row keys, `Segments.dropout_rows`; None drops nothing.
        module: `module_id` of the module that drops.
        p: probability of dropping, 0 ≤ p < 1.

    Returns:
        (M, width), `x` itself where nothing is dropped.
    """
    if p == 0 or rows is None:
        return x
    return drop(x, keep_mask(rows, module, x.shape[1], p), p)
