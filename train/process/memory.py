"""What to do where memory does not suffice: cut the work smaller, or say what would help."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from files.errors import UserError, counted
from train.process.world import World

Result = TypeVar("Result")

# Beside `torch.OutOfMemoryError`, allocations fail with a plain RuntimeError: on the CPU, in CUDA
# calls outside torch's allocator, and on MPS.
_MESSAGES = ("DefaultCPUAllocator", "out of memory")


# The older name of the variable is still read.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_allocator() -> None:
    """Let blocks of CUDA memory grow, unless the user has configured the allocator.

    Every step brings sizes that no step had; in blocks of fixed sizes the gaps between them add up
    to gigabytes. torch reads this when CUDA starts: call it before anything asks for the device.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def take_card(device: str, world: World) -> None:
    """Make the card of this rank's number on its node the one that it computes on.

    Call it before anything asks for memory: that would take some of the first card in every rank.

    Raises:
        UserError: The node has more ranks than cards.
    """
    if device != "cuda" or world.size == 1:
        return
    cards = torch.cuda.device_count()
    if world.local_rank >= cards:
        raise UserError(
            f"rank {world.rank} of {world.size} is number {world.local_rank} on its node "
            f"(LOCAL_RANK), where torch sees {counted(cards, 'card')}, numbered from 0: start at "
            f"most {cards} there (torchrun --nproc-per-node {cards}), or look at "
            "CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(world.local_rank)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    )


def within_memory(compute: Callable[[], Result], device: torch.device) -> Result | None:
    """Return what `compute` returns, or None where it runs out of memory.

    What it had allocated by then is free again, on CUDA for other sizes too, as long as `compute`
    leaves nothing behind that refers to it.
    """
    try:
        return compute()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Below the block, not in it: up to its end the error's frames hold what did not fit.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


# What ranks that share a model say where one has too little memory: they end together, and a resume
# halves their micro-batches.
OF_A_RANK = "out of memory on rank"


def does_not_fit(what: str, tokens: int, saved: str = "") -> UserError:
    """Return the error of a single example, of so many tokens, that memory does not suffice for."""
    return UserError(
        f"{what}: out of memory with a single example of {tokens:,} tokens in a micro-batch"
        f"{saved}; lower data.max_length, or set train.precision=bf16, in a new run, or continue "
        "this one with --resume where more memory is free"
    )


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo] | None:
    if not sys.platform.startswith("linux"):
        return None
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = _Mallinfo
    return mallinfo


def allocated_bytes() -> int | None:
    """Return the bytes of this process's memory that are in use, not those freed and kept.

    It takes some 40 µs. None where libc does not tell (glibc does, from 2.33 on).
    """
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    told = mallinfo()
    return told.uordblks + told.hblkhd


def peak_memory(device: torch.device) -> int:
    """Return the most memory (bytes) in use so far: the card's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


class MemoryUse:
    """The memory that a model and its training take, beside what the process held before.

    Made before the model is loaded. CUDA counts by itself; on other devices `observe` is called
    where a micro-batch holds the most.

    Attributes:
        peak_before: Highest use of the process by then (bytes), as `peak_memory` gives it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()  # what an earlier run in this process left would be freed in the midst of it
        self.peak_before = peak_memory(device)
        self._allocated_before = allocated_bytes()
        self._most: int | None = None

    def observe(self) -> None:
        """Note how much is in use now."""
        now, before = allocated_bytes(), self._allocated_before
        if self._device.type != "cuda" and now is not None and before is not None:
            self._most = max(self._most or 0, now - before)

    @property
    def peak(self) -> int:
        """The most memory of the process so far (bytes)."""
        return peak_memory(self._device)

    @property
    def training(self) -> int | None:
        """The most that model and training have taken (bytes); None where nobody could look."""
        return self.peak - self.peak_before if self._device.type == "cuda" else self._most
