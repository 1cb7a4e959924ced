"""Host memory that a CUDA device copies to and from by itself, and what lies between the two."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from files.errors import UserError

# The queues: to the device, on it, and back.
FETCH, COMPUTE, STORE = "fetch", "compute", "store"


def pin(tensor: Tensor) -> int:
    """Page-lock a host tensor where it lies, for as long as it is there; return CUDA's error or 0.

    torch's own pinned memory comes in powers of two, up to twice what is needed.
    """
    if not tensor.numel():
        return 0
    cuda: Any = torch.cuda.cudart()
    error = int(cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if not error:
        weakref.finalize(tensor, cuda.cudaHostUnregister, tensor.data_ptr())
    return error


class Boundary(Protocol):
    """What lies between the host's memory and the device's: places, transfers, order."""

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros in host memory that transfers need not copy first."""
        ...

    def on_device(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor on the device, with anything in it."""
        ...

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """Copy, when the queue comes to it."""
        ...

    def record(self, queue: str) -> Any:
        """Return an event that has happened once the queue has done all that it was given."""
        ...

    def wait(self, queue: str, event: Any) -> None:
        """Let what the queue is given from now on wait for an event."""
        ...

    def finish(self) -> None:
        """Wait, on the host, for all transfers."""
        ...


class CudaBoundary:
    """The boundary of a CUDA device: pinned memory, and a stream that lasts for each direction."""

    def __init__(self, device: torch.device, asked: str, remedy: str) -> None:
        """Take the device, and for the error: what asks for host memory, and what to use else."""
        self.device = device
        self._because = asked, remedy
        self._streams: dict[str, torch.cuda.Stream] = {}

    def _stream(self, queue: str) -> torch.cuda.Stream:
        if queue == COMPUTE:
            return torch.cuda.current_stream(self.device)
        if queue not in self._streams:
            self._streams[queue] = torch.cuda.Stream(self.device)
        return self._streams[queue]

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros that are page-locked where they lie.

        Raises:
            UserError: The system does not let go of so much memory.
        """
        tensor = torch.zeros(shape, dtype=dtype)
        if error := pin(tensor):
            asked, remedy = self._because
            raise UserError(
                f"{asked}: {tensor.nbytes / 2**20:,.0f} MiB of host memory cannot be pinned (CUDA "
                f"error {error}); free memory, raise the container's limit, or use {remedy}"
            )
        return tensor

    def on_device(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor of the current stream's."""
        return torch.empty(elements, dtype=dtype, device=self.device)

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """Begin a copy on a queue's stream."""
        with torch.cuda.stream(self._stream(queue)):
            target.copy_(source, non_blocking=True)

    def record(self, queue: str) -> torch.cuda.Event:
        """Return an event behind what a queue's stream has been given."""
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: torch.cuda.Event) -> None:
        """Let a queue's stream wait."""
        self._stream(queue).wait_event(event)

    def finish(self) -> None:
        """Wait for the stream that stores; what was fetched is stored behind it."""
        self._stream(STORE).synchronize()
