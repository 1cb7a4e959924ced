"""Causal attention inside each document of a micro-batch.

Legend: M token rows (queries) · D documents · T rows of one document · S keys of one document
        d head size · heads query heads · kv key/value heads
        g = heads / kv queries that share a key head

Three ways compute the same: torch's fused kernels over documents of one length (`_fused`), flash
attention over all others (`kernels.varlen`), and products over whole documents (`_written_out`),
which draws dropout element by element. Which one runs is a static rule of device, type, dropout,
window and lengths: `way`. On a CPU `kernels.cpu.attention` stands before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from kernels import varlen
from kernels.dropout import attention_keep_mask, drop, fold
from kernels.operands import compute_dtype
from kernels.segments import Segments

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
    behind the real tokens, so causality alone hides them. Others, and all that have a window or
    drop weights, go through one call of `kernels.varlen` where that serves, else one by one.

    `eager` writes attention out and draws its dropout element by element, so that no draw depends
    on how a step is cut. `sdpa` calls a fused kernel, whose dropout has a generator of its own: it
    is seeded from (segments.dropout_seed, module) and put back afterwards. Only CUDA has that fused
    dropout; elsewhere attention with dropout is written out under `sdpa` too.

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
    which = way(
        q,
        segments,
        window=window,
        dropout=dropout,
        implementation=implementation,
        cache_length=cache_length,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        if which == "sdpa":
            return _fused(q, k, v, scale, window, dropout)
        return _written_out(q, k, v, scale, window, dropout, rows, module)

    draws = dropout > 0 and which != "eager"
    with _seeded(q.device, fold(segments.dropout_seed, module)) if draws else nullcontext():
        if which == "varlen":
            dtype = compute_dtype(q)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            return varlen.attend(q, k, v, segments, scale=scale, window=window, dropout=dropout)
        if segments.tail:
            q, k, v = (x[: -segments.tail] for x in (q, k, v))
        out = _by_document(q, k, v, segments, attend)
    return F.pad(out, (0, 0, 0, segments.tail)) if segments.tail else out


def attend_last(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend from the last token of each document to its own keys, all documents in one call.

    Args:
        q: (D, heads, d) rotated queries, one a document.
        keys: (D, S, kv, d) rotated keys, a document's in the first rows; the others are finite.
        values: Like `keys`.
        positions: (D,) the row of each document's last token, up to which it sees; None: the last
            row of all.
        scale: Factor of the scores.
        window: As of `attention`.

    Returns:
        (D, heads · d).
    """
    visible = None
    if positions is not None:
        row = torch.arange(keys.shape[1], device=q.device)
        visible = row <= positions[:, None]
        if window is not None:
            visible &= row > positions[:, None] - window
        visible = visible[:, None, None]
    elif window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    # The heads that share a key head are its queries: its keys are read once.
    out = F.scaled_dot_product_attention(
        q.unflatten(1, (keys.shape[2], -1)),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible,
        scale=scale,
    )
    return out.flatten(1)


def way(
    q: Tensor,
    segments: Segments,
    *,
    window: int | None = None,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    cache_length: int = 0,
) -> str:
    """Return how `attention` computes: `varlen`, `sdpa` or `eager`; arguments as there."""
    drops = dropout > 0 and segments.dropout_rows is not None
    if implementation == "eager" or (drops and q.device.type != "cuda"):
        return "eager"
    longest = max(segments.rows)
    # No fused kernel of sdpa's takes a mask of a window and forgoes what it hides.
    windowed = window is not None and window < longest
    one_call = drops or windowed or segments.tail > 0 or min(segments.rows) < longest
    if one_call and not cache_length and varlen.serves(q, segments, compute_dtype(q)):
        return "varlen"
    return "sdpa"


def kernel(q: Tensor, k: Tensor, segments: Segments, window: int | None, **settings: Any) -> str:
    """Return what `way` comes to, for records: of sdpa's kernels the one that torch picks here.

    q is (M, heads, d), k (M, kv, d); `settings` are further arguments of `way`.
    """
    which = way(q, segments, window=window, **settings)
    if which != "sdpa":
        return {"varlen": "flash attention end to end", "eager": "written out"}[which]
    longest = max(segments.rows)
    hides = window is not None and window < longest
    mask = visible_keys(longest, longest, window, q.device) if hides else None
    q, k = (x[:longest].transpose(0, 1).unsqueeze(0) for x in (q, k))
    picked = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
        q, k, k, mask, is_causal=not hides, enable_gqa=q.shape[1] != k.shape[1]
    )
    return f"sdpa, {SDPBackend(picked).name.lower()}"


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


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed a CUDA device's generator inside the block, and leave it as it was before."""
    with torch.random.fork_rng([device]):
        torch.cuda.manual_seed(seed)
        yield


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
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
        mask = visible_keys(queries, keys, window, q.device)
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
    visible = visible_keys(queries, keys, window, q.device)
    bias = scores.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    weights = torch.softmax(
        scores + bias, -1, dtype=torch.promote_types(q.dtype, torch.float32)
    ).to(q.dtype)
    if dropout > 0 and rows is not None:
        mask = attention_keep_mask(rows.view(documents, -1), module, heads, keys, dropout)
        weights = drop(weights, mask, dropout)
    out = weights.view(documents, kv, -1, keys) @ v.transpose(1, 2)
    return out.view(documents, heads, queries, -1).transpose(1, 2).flatten(2).flatten(0, 1)
