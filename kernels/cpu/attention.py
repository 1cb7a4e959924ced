"""Causal attention on a CPU: over blocks of queries, all documents of a micro-batch in one call.

Legend: M token rows (queries) · T rows of one document · d head size
        heads query heads · kv key/value heads · g = heads / kv queries that share a key head
        P inner rows, those of `_Layout`
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention as anywhere
from kernels.attention import visible_keys
from kernels.cpu.rounding import document_multiple
from kernels.operands import compute_dtype
from kernels.segments import Segments

# Queries of one block. The scores of a block stay in the caches, and keys behind its last query are
# never computed: at 512 tokens 5/8 of the products are left, at 128 all.
BLOCK = 128
# The longest document that is attended to in blocks: its attention weights are kept for the
# backward pass, T²/2 a head.
BLOCKS_MAX_LENGTH = 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
    module: int = 0,
    implementation: str = "sdpa",
    cache_length: int = 0,
) -> Tensor:
    """Attend causally inside each document, as `kernels.attention.attention` does.

    In blocks where `sdpa` drops nothing, nothing is cached, and no document is longer than
    `BLOCKS_MAX_LENGTH`; otherwise, and where a model has moved to another device, by that function.
    """
    drops = dropout > 0 and segments.dropout_rows is not None
    in_blocks = implementation == "sdpa" and not drops and not cache_length
    if q.device.type == "cpu" and in_blocks and max(segments.rows) <= BLOCKS_MAX_LENGTH:
        dtype = compute_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _Blocks.apply(q, k, v, segments.rows, scale, window)  # pyright: ignore
    return anywhere.attention(
        q,
        k,
        v,
        segments,
        scale=scale,
        window=window,
        dropout=dropout,
        module=module,
        implementation=implementation,
        cache_length=cache_length,
    )


class _Layout(NamedTuple):
    """Where rows of (M · kv) lie when documents of equal length are gathered behind each other.

    Inside, rows lie as (documents, kv, T, ...): a document's rows of one key head are neighbours,
    and T is its length rounded up. Rounding repeats shapes, and with them what oneDNN prepares for
    a shape, which takes as long as a small product.
    """

    groups: list[tuple[int, int, int]]  # first row, documents · kv, T
    inside: Tensor  # (P,): the row of (M · kv) that each inner row is read from; pads: 0
    outside: Tensor  # (M · kv,): the inner row that each row is read back from; tail rows: P
    pads: Tensor  # inner rows that no token has


@functools.lru_cache(maxsize=8)
def _layout(counts: tuple[int, ...], rows: int, kv: int, multiple: int) -> _Layout:
    """Lay out documents of `counts` tokens for blocks; rows behind the last are nobody's."""
    starts = [0, *itertools.accumulate(counts)]
    by_length: dict[int, list[int]] = {}
    for document, count in enumerate(counts):
        by_length.setdefault(-(-count // multiple) * multiple, []).append(document)
    groups, parts = [], []
    size = 0
    heads = torch.arange(kv)[:, None]
    for length, members in by_length.items():
        groups.append((size, len(members) * kv, length))
        size += len(members) * kv * length
        for document in members:
            rows_of = torch.full((length,), -1)
            rows_of[: counts[document]] = torch.arange(starts[document], starts[document + 1])
            parts.append(torch.where(rows_of < 0, -1, rows_of * kv + heads).flatten())
    inside = torch.cat(parts)
    real = inside >= 0
    outside = torch.full((rows * kv,), size)
    outside[inside[real]] = torch.arange(size)[real]
    return _Layout(groups, inside.clamp(min=0), outside, (~real).nonzero().squeeze(1))


class _Blocks(torch.autograd.Function):
    """Attention over blocks of queries, all documents in one call.

    Scores and softmax are in fp32 whatever the input is in, as in the fused kernel, which takes up
    to four times as long on a CPU (LOG.md). The g queries that share a key head stand beside each
    other, so that no key is repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        (rows, heads, d), kv = q.shape, k.shape[1]
        layout = _layout(counts, rows, kv, document_multiple(q.device, q.dtype))
        exact = torch.promote_types(q.dtype, torch.float32)
        grouped = _gathered(q, kv, layout)
        keys, values = _gathered(k, kv, layout), _gathered(v, kv, layout)
        exact_grouped, exact_keys = grouped.to(exact), keys.to(exact)
        out = _inner_rows(grouped)
        weights = []
        for group in layout.groups:
            q_, k_, v_, out_ = (_of(x, group, d) for x in (exact_grouped, exact_keys, values, out))
            for queries, seen in _blocks(group[2], heads // kv, window):
                mask = _block_mask(queries, seen, heads // kv, window, exact)
                seen_keys = k_[:, seen].transpose(1, 2)
                scores = torch.baddbmm(mask, q_[:, queries], seen_keys, alpha=scale)
                weight = torch.softmax(scores, -1).to(q.dtype)
                out_[:, queries] = torch.bmm(weight, v_[:, seen])
                weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.settings = counts, scale, window
        return out.index_select(0, layout.outside).view(rows, heads * d)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        q, k, v, *weights = ctx.saved_tensors
        counts, scale, window = ctx.settings
        (rows, heads, d), kv = q.shape, k.shape[1]
        layout = _layout(counts, rows, kv, document_multiple(q.device, q.dtype))
        grouped = _gathered(q, kv, layout)
        keys, values = _gathered(k, kv, layout), _gathered(v, kv, layout)
        d_out = _gathered(grads[0], kv, layout).index_fill_(0, layout.pads, 0)
        d_grouped, d_keys, d_values = (_inner_rows(x) for x in (grouped, keys, values))
        inputs = grouped, keys, values, d_out, d_grouped, d_keys, d_values
        weight_of = iter(weights)
        for group in layout.groups:
            q_, k_, v_, d_out_, d_q_, d_k_, d_v_ = (_of(x, group, d) for x in inputs)
            for queries, seen in _blocks(group[2], heads // kv, window):
                weight = next(weight_of)
                d_block = d_out_[:, queries]
                d_v_[:, seen] += torch.bmm(weight.transpose(1, 2), d_block)
                d_weight = torch.bmm(d_block, v_[:, seen].transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_weight, weight, -1, weight.dtype)
                d_q_[:, queries] = torch.bmm(d_scores, k_[:, seen])
                d_k_[:, seen] += torch.bmm(d_scores.transpose(1, 2), q_[:, queries])
        d_q, d_k, d_v = (
            x.index_select(0, layout.outside).view(rows, -1, d)
            for x in (d_grouped, d_keys, d_values)
        )
        return d_q.mul_(scale), d_k.mul_(scale), d_v, None, None, None


def _gathered(x: Tensor, kv: int, layout: _Layout) -> Tensor:
    """Return the inner rows of (M, heads, d): (P, heads / kv · d)."""
    return x.reshape(len(x) * kv, -1).index_select(0, layout.inside)


def _inner_rows(like: Tensor) -> Tensor:
    """Return zeros of the inner rows' shape, and one row more for rows of no document."""
    return like.new_zeros(len(like) + 1, like.shape[1])


def _of(x: Tensor, group: tuple[int, int, int], d: int) -> Tensor:
    """Return the inner rows of a group of documents: (documents · kv, T · x's width / d, d)."""
    start, batch, length = group
    return x[start : start + batch * length].view(batch, -1, d)


def _blocks(length: int, g: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each block's queries, times g, and the rows of the keys they see."""
    for low in range(0, length, BLOCK):
        high = min(low + BLOCK, length)
        first = 0 if window is None else max(0, low - window + 1)
        yield slice(low * g, high * g), slice(first, high)


def _block_mask(
    queries: slice, seen: slice, g: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Return 0 where a block's query sees a key and -inf elsewhere: (queries · g, keys)."""
    rows, keys = queries.stop - queries.start, seen.stop - seen.start
    first = BLOCKS_MAX_LENGTH - (keys - rows // g)
    return _all_block_masks(g, window, dtype)[:rows, first : first + keys]


@functools.lru_cache(maxsize=8)
def _all_block_masks(g: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the mask of BLOCK queries behind BLOCKS_MAX_LENGTH keys, g rows a query.

    What a query sees depends on how far away a key is, so those of other blocks are parts of it.
    """
    visible = visible_keys(BLOCK, BLOCKS_MAX_LENGTH + BLOCK, window, torch.device("cpu"))
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return mask.repeat_interleave(g, 0)
