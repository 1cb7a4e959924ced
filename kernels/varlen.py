"""Causal attention over documents end to end, in one call: flash attention as torch has it.

Legend: M token rows · D documents · heads query heads · kv key/value heads · d head size

`aten::_flash_attention_forward` takes rows end to end and the row each document begins at, so that
no pad is computed and no document is a launch of its own. It groups query heads that share a key
head, takes a window, and drops weights by torch's generator; torch has its derivative, which draws
the same weights again. `torch.nn.attention.varlen` offers less of it: no dropout, and before torch
2.12 no shared key heads. Whether it serves is a static rule of device, type and sizes.

Source: torch 2.5 to 2.13, native_functions.yaml and derivatives.yaml; 2.13 added keywords alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.segments import Segments

# Flash attention indexes its padded gradients by 32 bits: 128 rows more a document at most.
_MOST_ELEMENTS = 2**31
_PADDING = 128
_ASKED = {"dropout_p", "scale", "window_size_left", "window_size_right"}


def serves(q: Tensor, segments: Segments, dtype: torch.dtype) -> bool:
    """Return whether `attend` computes attention of (M, heads, d) queries in `dtype`."""
    _, heads, d = q.shape
    rows = sum(segments.rows) + segments.tail + _PADDING * (segments.num_documents + 1)
    return (
        q.device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and d % 8 == 0
        and d <= 256
        and rows * heads * d < _MOST_ELEMENTS
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and offered()
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Attend inside each document: q (M, heads, d), k and v (M, kv, d), one type → (M, heads · d).

    Rows behind the last document attend to one another: nobody reads them, and without a gradient
    they give none.
    """
    begin, longest = segments.boundaries, max(*segments.rows, segments.tail)
    # A window counts the keys before the query, ours the query too.
    behind = -1 if window is None else window - 1
    out, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, begin, begin, longest, longest),
        dropout_p=dropout,
        is_causal=window is None,
        return_debug_mask=False,
        scale=scale,
        window_size_left=behind,
        window_size_right=0,
    )
    return out.flatten(1)


@functools.cache
def offered() -> bool:
    """Return whether the installed torch's operation can be asked for all of it."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return _ASKED.issubset(argument.name for argument in schema.arguments)
