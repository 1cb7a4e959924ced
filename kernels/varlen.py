"""Causal attention over documents of unequal length in one call: flash attention as torch has it.

Legend: M token rows · D documents · heads query heads · kv key/value heads · d head size

`torch.nn.attention.varlen` takes rows end to end and the row each document begins at, so that no
pad is computed and no document is a launch of its own. Whether it serves is a static rule of the
device, type and sizes, and of what the installed torch's function can be asked for: before 2.11 it
had neither scale nor window, before 2.12 no keys that several query heads share.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.segments import Segments

# Flash attention indexes its padded gradients by 32 bits: 128 rows more a document at most.
_MOST_ELEMENTS = 2**31
_PADDING = 128


def serves(q: Tensor, segments: Segments, dtype: torch.dtype) -> bool:
    """Return whether `attend` computes attention of (M, heads, d) queries in `dtype`."""
    _, heads, d = q.shape
    rows = sum(segments.rows) + _PADDING * segments.num_documents
    return (
        q.device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and d % 8 == 0
        and d <= 256
        and rows * heads * d < _MOST_ELEMENTS
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and {"scale", "window_size"} <= _parameters()
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    """Attend inside each document: q (M, heads, d), k and v (M, kv, d), one type → (M, heads · d).

    Rows behind the last document are not among the M.
    """
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _parameters():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    begin, longest = segments.boundaries, max(segments.rows)
    # A window counts the keys before the query, ours the query too.
    behind = -1 if window is None else window - 1
    options |= {"scale": scale, "window_size": (behind, 0)}
    return _function()(q, k, v, begin, begin, longest, longest, **options).flatten(1)


@functools.cache
def _function() -> Callable[..., Any]:
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


@functools.cache
def _parameters() -> frozenset[str]:
    """Return what the installed torch's function can be asked for; nothing where there is none."""
    try:
        return frozenset(inspect.signature(_function()).parameters)
    except ImportError:
        return frozenset()
