"""The one place where a backend is chosen: once, when a model is built, by a static rule.

A model keeps the `Operations` that it was given and calls nothing else for its arithmetic, so what
ran is a matter of record and never of what happened to be importable at the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from files.errors import UserError, did_you_mean
from kernels import attention, linears, loss, reference

BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Operations:
    """The operations of one backend; their signatures are those of `kernels.reference`."""

    name: str
    linears: Callable[..., list[Tensor]]
    rms_norm: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    gelu_tanh: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


_REFERENCE = Operations(
    name="reference",
    linears=linears.linears,
    rms_norm=reference.rms_norm,
    layer_norm=reference.layer_norm,
    rotary=reference.rotary,
    swiglu=reference.swiglu,
    gelu_tanh=reference.gelu_tanh,
    attention=attention.attention,
    linear_cross_entropy=loss.linear_cross_entropy,
)


def operations(backend: str = "auto", device: torch.device | str = "cpu") -> Operations:
    """Return the operations of `backend` for `device`; `auto` is `reference` on every device.

    Raises:
        UserError: the backend is unknown, or is `triton`, which this version does not have.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"train.kernels is '{backend}', but must be one of {', '.join(BACKENDS)}"
            f"{did_you_mean(backend, BACKENDS)}"
        )
    if backend == "triton":
        raise UserError(
            f"train.kernels is 'triton', but this version has no Triton kernels for "
            f"{torch.device(device).type}; use train.kernels=auto or train.kernels=reference"
        )
    return _REFERENCE
