"""The memory that a run may use where it computes. torch is imported where CUDA is asked alone."""

from __future__ import annotations

import os
import re
from pathlib import Path


def available_memory(device: str) -> int | None:
    """Return the bytes that a run may use: a CUDA card's memory, or the RAM that is free now.

    None where the system does not tell.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[1]
    limits = [bytes_ for bytes_ in (_free_ram(), _cgroup_room()) if bytes_ is not None]
    return min(limits, default=None)


def _free_ram() -> int | None:
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        told = None
    if told:
        return int(told.group(1)) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _cgroup_room() -> int | None:
    """Return what a container's limit still allows."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = (folder / "memory.current").read_text().strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None
