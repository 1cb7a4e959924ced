"""Launch parameters of the Triton kernels, from sizes and the device alone."""

from __future__ import annotations

import torch
import triton


def block_of(width: int) -> int:
    """Return the power of two that holds a row of `width` elements."""
    return triton.next_power_of_2(width)


def warps_of(block: int) -> int:
    """Return the warps that share a row: 8 elements a thread at least, 16 warps at most."""
    return min(16, max(1, block // 256))


def backward_programs(device: torch.device, rows: int) -> int:
    """Return how many programs share the rows of a backward pass: four for each multiprocessor."""
    if device.type != "cuda":
        return min(rows, 4)
    return min(rows, 4 * torch.cuda.get_device_properties(device).multi_processor_count)
