"""Norms, activations, rotary embeddings and attention in plain PyTorch: the path of the CPU.

It is also what other backends are tested against, with `kernels/linears.py` and `kernels/loss.py`.

Legend: M token rows (queries) · H hidden size · D documents · T rows of one document
        S keys of one document · d head size · heads query heads · kv key/value heads
        g = heads / kv queries that share a key head

Where SEMANTICS demands fp32 inside an operation, fp64 input stays fp64 (`_exact`). All of it works
under autocast; without it, biases that are kept in fp32 are cast to their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import attention_keep_mask, drop, fold
from kernels.segments import Segments


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast_to(x: Tensor, parameter: Tensor) -> Tensor:
    """Return `parameter` in the type of `x`, unless autocast is there to choose the type."""
    return parameter if torch.is_autocast_enabled(x.device.type) else parameter.to(x.dtype)


# --- norms, activations, rotary embeddings ---


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / √(mean(x²) + eps) · weight over the last axis: (M, H) → (M, H).

    The quotient is made in fp32 and cast back before the weight comes in (SEMANTICS §6).
    """
    normed = F.rms_norm(x.to(_exact(x.dtype)), (x.shape[-1],), None, eps)
    return normed.to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / √(variance + eps) · weight + bias over the last axis: (M, H) → (M, H)."""
    weight, bias = _cast_to(x, weight), _cast_to(x, bias)
    # Autocast on a CPU wants one type of both: a bias that is trained (lora.bias) is in fp32.
    return F.layer_norm(x, (x.shape[-1],), weight.to(bias.dtype), bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, element by element."""
    return F.silu(gate) * up


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, the one StarCoder2 was trained with."""
    return F.gelu(x, approximate="tanh")


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: (M, heads, d) queries.
        k: (M, kv, d) keys.
        cos: (M, d); its two halves are equal, and so are those of `sin`.
        sin: (M, d).

    Returns:
        Both, rotated, in their own types: x·cos + cat(-x₂, x₁)·sin with x₁, x₂ the halves of d.
    """
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # pyright: ignore


class _Rotary(torch.autograd.Function):
    """Three calls and no saved activation; the backward pass turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin[:, None, :half]
    turned = x * cos[:, None]
    turned[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return turned.to(x.dtype)


# --- attention ---

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
    fused dropout; elsewhere attention with dropout is written out under `sdpa` too.

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
