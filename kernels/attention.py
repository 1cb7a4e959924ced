"""Causal attention inside each document of a micro-batch.

Legend: M token rows (queries) · D documents · T rows of one document · S keys of one document
        d head size · heads query heads · kv key/value heads
        g = heads / kv queries that share a key head

Three ways compute the same: torch's fused kernel (`_fused`), products over blocks of queries on a
CPU (`_Blocks`), and products over whole documents (`_written_out`), which draws dropout element by
element. Which one runs is a static rule of device, dropout and length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import attention_keep_mask, drop, fold
from kernels.operands import compute_dtype
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
    behind the real tokens, so causality alone hides them. Others go one by one.

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
    if fused and q.device.type == "cpu" and not cache_length and longest <= BLOCKS_MAX_LENGTH:
        dtype = compute_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _Blocks.apply(q, k, v, segments.rows, scale, window)  # pyright: ignore

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        if fused:
            return _fused(q, k, v, scale, window, dropout)
        return _written_out(q, k, v, scale, window, dropout, rows, module)

    draws = fused and dropout > 0
    with _seeded(q.device, fold(segments.dropout_seed, module)) if draws else nullcontext():
        return _by_document(q, k, v, segments, attend)


def _by_document(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: _Attend) -> Tensor:
    """Apply `attend` to all documents in one batch where they are equally long, else one by one."""
    counts, rows = segments.rows, segments.dropout_rows
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


class _Blocks(torch.autograd.Function):
    """Attention over blocks of queries, all documents in one call.

    Scores and softmax are in fp32 whatever the input is in, as in the fused kernel, which takes up
    to four times as long on a CPU (LOG.md). Inside, rows lie as (kv, M·g, d): the g queries that
    share a key head stand beside each other, so that no key is repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: Sequence[int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        (rows, heads, d), kv = q.shape, k.shape[1]
        g = heads // kv
        exact = _exact(q.dtype)
        grouped = q.view(rows, kv, g, d).transpose(0, 1).reshape(kv, rows * g, d)
        keys, values = (x.transpose(0, 1).contiguous() for x in (k, v))
        scaled, exact_keys = grouped.to(exact) * scale, keys.to(exact)
        out = torch.empty_like(grouped)
        weights = []
        for queries, seen in _blocks(counts, g, window):
            scores = torch.bmm(scaled[:, queries], exact_keys[:, seen].transpose(1, 2))
            number, total = scores.shape[1] // g, scores.shape[2]
            scores.unflatten(1, (-1, g)).add_(_block_mask(number, total, window, exact))
            weight = torch.softmax(scores, -1).to(q.dtype)
            out[:, queries] = torch.bmm(weight, values[:, seen])
            weights.append(weight)
        ctx.save_for_backward(grouped, keys, values, *weights)
        ctx.layout = counts, scale, window
        return out.view(kv, rows, g, d).transpose(0, 1).reshape(rows, heads * d)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        grouped, keys, values, *weights = ctx.saved_tensors
        counts, scale, window = ctx.layout
        kv, rows, d = keys.shape
        g = grouped.shape[1] // rows
        d_out = grads[0].view(rows, kv, g, d).transpose(0, 1).reshape(kv, rows * g, d)
        d_grouped = torch.empty_like(grouped)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        blocks = _blocks(counts, g, window)
        for (queries, seen), weight in zip(blocks, weights, strict=True):
            d_block = d_out[:, queries]
            d_values[:, seen] += torch.bmm(weight.transpose(1, 2), d_block)
            d_weight = torch.bmm(d_block, values[:, seen].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weight, weight, -1, weight.dtype)
            d_grouped[:, queries] = torch.bmm(d_scores, keys[:, seen])
            d_keys[:, seen] += torch.bmm(d_scores.transpose(1, 2), grouped[:, queries])
        d_q = d_grouped.mul_(scale).view(kv, rows, g, d).transpose(0, 1).reshape(rows, kv * g, d)
        return d_q, d_keys.mul_(scale).transpose(0, 1), d_values.transpose(0, 1), None, None, None


def _blocks(counts: Sequence[int], g: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each block's queries, times g, and the rows of the keys they see."""
    start = 0
    for count in counts:
        for low in range(start, start + count, BLOCK):
            high = min(low + BLOCK, start + count)
            first = start if window is None else max(start, low - window + 1)
            yield slice(low * g, high * g), slice(first, high)
        start += count


@functools.lru_cache(maxsize=256)
def _block_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where a query sees a key and -inf elsewhere: (queries, 1, keys)."""
    visible = _visible(queries, keys, window, torch.device("cpu"))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]


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
