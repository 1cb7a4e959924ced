"""Host memory that a CUDA device copies to and from by itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


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
