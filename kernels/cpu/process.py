"""What a process that computes on a CPU sets once: its allocator, and oneDNN's caches."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3): when freed memory goes back to the system, how much more than
# asked for is taken from it, and from what size on an allocation is a mapping of its own.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLDS = (2**30, 2**25)  # older versions of glibc take no more than half a heap


def keep_freed_memory() -> None:
    """Let a process that computes on a CPU keep the memory that it frees, for its next step.

    glibc maps large blocks one by one and gives them back when they are freed, so that each step
    pays a page fault for every 4 KiB of its activations (LOG.md, 2026-11-21).
    Blocks above 1 GiB, the weights of large models, stay mappings. Without glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # The others would stop glibc from raising this threshold by itself, so it has to be taken.
    if any(mallopt(_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)


def prepare_process() -> None:
    """Set this process up to compute on a CPU; before its first product, or half is in vain."""
    keep_freed_memory()
    # oneDNN and its wrapper in torch keep what they built for each of the last 1,024 shapes, and
    # would grow by hundreds of MB. Sizes are rounded (`kernels.cpu.rounding`), so that 256 hold
    # those that come back (LOG.md, 2026-11-21). Both read their variable at first use.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "256")
