"""The one place where a backend is chosen: once, when a model is built, by a static rule.

A model keeps the `Operations` that it was given and calls nothing else for its arithmetic, so what
ran is a matter of record and never of what happened to be importable at the time of a call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from files.errors import UserError, did_you_mean
from kernels import attention, linears, loss, quantised, reference
from kernels.cpu import attention as cpu_attention
from kernels.operands import Made
from kernels.triton import launch

BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Operations:
    """The operations of one backend; their signatures are those of the reference's functions."""

    name: str
    linears: Callable[..., list[Tensor]]
    rms_norm: Callable[..., Made]
    layer_norm: Callable[..., Made]
    add: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Made]]
    add_layer_norm: Callable[..., tuple[Tensor, Made]]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Made]
    linear_gelu: Callable[..., Made]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    dequantise: Callable[..., Tensor]
    # Updates of fp32 masters in place; None where the optimizers' own PyTorch does it.
    adamw_: Callable[..., None] | None = None
    adafactor_: Callable[..., Any] | None = None


_REFERENCE = Operations(
    name="reference",
    linears=linears.linears,
    rms_norm=reference.rms_norm,
    layer_norm=reference.layer_norm,
    add=reference.add,
    add_rms_norm=reference.add_rms_norm,
    add_layer_norm=reference.add_layer_norm,
    rotary=reference.rotary,
    swiglu=reference.swiglu,
    linear_gelu=linears.linear_gelu,
    attention=attention.attention,
    linear_cross_entropy=loss.linear_cross_entropy,
    dequantise=quantised.dequantise,
)
_REFERENCE_ON_CPU = replace(_REFERENCE, attention=cpu_attention.attention)


def operations(backend: str = "auto", device: torch.device | str = "cpu") -> Operations:
    """Return the operations of `backend` for `device`.

    `auto` is, on CUDA from Ampere on, what a committed record shows Triton to gain on that class of
    device (`kernels.triton.launch`) and, where no record says so, all that Triton has: interpreter
    and compile tests vouch for it, and a run checks it first (`train.kernel_check`). Elsewhere, and
    where triton is not installed, it is `reference`.

    Raises:
        UserError: the backend is unknown, or is `triton`, which cannot run here.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"train.kernels is '{backend}', but must be one of {', '.join(BACKENDS)}"
            f"{did_you_mean(backend, BACKENDS)}"
        )
    device = torch.device(device)
    if backend == "triton":
        return _triton(device)
    return _automatic(device) if backend == "auto" else _reference(device)


def _reference(device: torch.device) -> Operations:
    return _REFERENCE_ON_CPU if device.type == "cpu" else _REFERENCE


def _automatic(device: torch.device) -> Operations:
    installed = importlib.util.find_spec("triton") is not None
    if installed and not launch.decided(device) and _compiles_for(device):
        return _triton(device)
    gains = launch.measured(device).get("gains", [])
    known = {field.name for field in fields(Operations)} - {"name"}
    if unknown := set(gains) - known:
        raise UserError(
            f"{launch.TUNED}: gains name {', '.join(sorted(unknown))}, which is no "
            "operation; write the file anew with python -m benchmarks.kernels --decide"
        )
    if not gains or not installed:
        return _reference(device)
    kernels = _triton(device)
    taken = {name: getattr(kernels, name) for name in gains}
    chosen = replace(_reference(device), name=f"reference, triton's {', '.join(gains)}", **taken)
    if ("linears" in taken) != ("linear_gelu" in taken):
        mixed = functools.partial(chosen.linear_gelu, linears=chosen.linears)
        chosen = replace(chosen, linear_gelu=mixed)
    return chosen


def _compiles_for(device: torch.device) -> bool:
    """Return whether the compile test vouches for a device; an unseen CUDA card is a new one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cuda"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _triton(device: torch.device) -> Operations:
    """Return the Triton kernels; attention is the reference's."""
    other = "use train.kernels=auto or train.kernels=reference"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests, on any device
    if device.type != "cuda" and not interpreted:
        raise UserError(
            f"train.kernels is 'triton', but its kernels run on CUDA, not on {device.type}; {other}"
        )
    try:
        from kernels.triton import dropout, elementwise, norms, updates
        from kernels.triton import linears as triton_linears
        from kernels.triton import loss as triton_loss
        from kernels.triton import quantised as triton_quantised
    except ImportError as error:
        raise UserError(
            f"train.kernels is 'triton', but triton cannot be imported ({error}); install it with "
            f"pip install triton, or {other}"
        ) from None
    return replace(
        _reference(device),
        name="triton",
        linears=triton_linears.linears,
        rms_norm=norms.rms_norm,
        layer_norm=norms.layer_norm,
        add=dropout.add,
        add_rms_norm=norms.add_rms_norm,
        add_layer_norm=norms.add_layer_norm,
        rotary=elementwise.rotary,
        swiglu=elementwise.swiglu,
        linear_gelu=elementwise.linear_gelu,
        linear_cross_entropy=functools.partial(
            loss.linear_cross_entropy, cross_entropy=triton_loss.cross_entropy_
        ),
        dequantise=triton_quantised.dequantise,
        adamw_=updates.adamw_,
        adafactor_=updates.adafactor_,
    )
