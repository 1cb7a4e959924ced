"""Causal attention inside each document of a micro-batch.

Legend: M token rows (queries) · D documents · T rows of one document · S keys of one document
        d head size · heads query heads · kv key/value heads
        g = heads / kv queries that share a key head

Four ways compute the same: torch's fused kernel over documents of one length (`_fused`) and over
all others (`kernels.varlen`), products over blocks of queries on a CPU (`_Blocks`), and products
over whole documents (`_written_out`), which draws dropout element by element. Which one runs is a
static rule of device, type, dropout and length.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import varlen
from kernels.dropout import attention_keep_mask, drop, fold
from kernels.operands import compute_dtype
from kernels.rounding import document_multiple
from kernels.segments import Segments

# Queries of one block on a CPU. The scores of a block stay in the caches, and keys behind its last
# query are never computed: at 512 tokens 5/8 of the products are left, at 128 all.
BLOCK = 128
# The longest document that a CPU attends to in blocks: its attention weights are kept for the
# backward pass, T²/2 a head.
BLOCKS_MAX_LENGTH = 1024


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Attends in a batch of equally long documents: (q, k, v, row keys) → (D·T, heads·d).
_Attend = Callable[..., Tensor]


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
    """Attend causally inside each document.

    Documents of equal row counts, padded ones above all, go through one batched call; pads lie
    behind the real tokens, so causality alone hides them. Others go through one call too where
    `kernels.varlen` serves, else one by one.

    `eager` writes attention out and draws its dropout element by element, so that no draw depends
    on how a step is cut. `sdpa` calls the fused kernel, whose dropout has a generator of its own:
    it is seeded from (segments.dropout_seed, module) and put back afterwards. Only CUDA has that
    fused dropout; elsewhere attention with dropout is written out under `sdpa` too. On a CPU `sdpa`
    takes documents of up to `BLOCKS_MAX_LENGTH` rows in blocks instead of the fused kernel.

    Args:
        q: (M, heads, d) rotated queries.
        k: (M, kv, d) rotated keys; (cache_length + M, kv, d) behind a cache.
        v: values, like `k`.
        segments: the documents of the M rows.
        scale: factor of the scores.
        window: query i sees the keys j with i - window < j ≤ i; None sees all j ≤ i.
        dropout: probability of dropping an attention weight, where `segments` has row keys.
        module: `module_id` that keys the dropout.
        implementation: `sdpa` or `eager`.
        cache_length: keys of this one document that stand before the M rows.

    Returns:
        (M, heads · d).
    """
    if cache_length and segments.num_documents != 1:
        raise ValueError("a key-value cache holds one document")
    if segments.dropout_rows is None:
        dropout = 0.0
    if cache_length and window is not None:  # keys that not even the first query can see
        k, v = (x[max(0, cache_length - window + 1) :] for x in (k, v))
    fused = implementation == "sdpa" and (dropout == 0 or q.device.type == "cuda")
    longest = max(segments.rows)
    dtype = compute_dtype(q)
    if fused and q.device.type == "cpu" and not cache_length and longest <= BLOCKS_MAX_LENGTH:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _Blocks.apply(q, k, v, segments.rows, scale, window)  # pyright: ignore

    if segments.tail:
        q, k, v = (x[: -segments.tail] for x in (q, k, v))
    unequal = len(set(segments.rows)) > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        if fused:
            return _fused(q, k, v, scale, window, dropout)
        return _written_out(q, k, v, scale, window, dropout, rows, module)

    if fused and dropout == 0 and unequal and varlen.serves(q, segments, dtype):
        out = varlen.attend(q.to(dtype), k.to(dtype), v.to(dtype), segments, scale, window)
    else:
        draws = fused and dropout > 0
        with _seeded(q.device, fold(segments.dropout_seed, module)) if draws else nullcontext():
            out = _by_document(q, k, v, segments, attend)
    return F.pad(out, (0, 0, 0, segments.tail)) if segments.tail else out


def _by_document(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: _Attend) -> Tensor:
    """Apply `attend` to all documents in one batch where they are equally long, else one by one."""
    counts, rows = segments.rows, segments.dropout_rows
    if rows is not None:
        rows = rows[: len(rows) - segments.tail]
    if len(set(counts)) == 1:
        batch = (x.unflatten(0, (len(counts), -1)) for x in (q, k, v))
        return attend(*batch, rows)
    # split, unlike slicing, has one backward call for all documents.
    pieces = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
    row_pieces = [None] * len(counts) if rows is None else rows.split(counts)
    outputs = [
        attend(*(x.unsqueeze(0) for x in piece), row_piece)
        for piece, row_piece in zip(pieces, row_pieces, strict=True)
    ]
    return torch.cat(outputs)


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
        exact = _exact(q.dtype)
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
    visible = _visible(BLOCK, BLOCKS_MAX_LENGTH + BLOCK, window, torch.device("cpu"))
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return mask.repeat_interleave(g, 0)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed a CUDA device's generator inside the block, and leave it as it was before."""
    with torch.random.fork_rng([device]):
        torch.cuda.manual_seed(seed)
        yield


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each of the last `queries` of `keys` positions sees: (T, S) bool."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float
) -> Tensor:
    """Attend through F.scaled_dot_product_attention: q (D, T, heads, d), k and v (D, S, kv, d)."""
    queries, keys = q.shape[1], k.shape[1]
    windowed = window is not None and window < keys
    mask = None
    if windowed or 1 < queries < keys:
        mask = _visible(queries, keys, window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and queries == keys,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    dropout: float,
    rows: Tensor | None,
    module: int,
) -> Tensor:
    """Attend by two products and a softmax: q (D, T, heads, d), k and v (D, S, kv, d).

    The g query heads that share a key head stand under each other, (D, kv, g·T, d), so that no key
    is repeated.
    """
    documents, queries, heads, _ = q.shape
    keys, kv = k.shape[1:3]
    grouped = (q * scale).unflatten(2, (kv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (grouped @ k.permute(0, 2, 3, 1)).view(documents, heads, queries, keys)
    # Added, not filled in: the backward pass of a sum costs nothing.
    visible = _visible(queries, keys, window, q.device)
    bias = scores.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    weights = torch.softmax(scores + bias, -1, dtype=_exact(q.dtype)).to(q.dtype)
    if dropout > 0 and rows is not None:
        mask = attention_keep_mask(rows.view(documents, -1), module, heads, keys, dropout)
        weights = drop(weights, mask, dropout)
    out = weights.view(documents, kv, -1, keys) @ v.transpose(1, 2)
    return out.view(documents, heads, queries, -1).transpose(1, 2).flatten(2).flatten(0, 1)
