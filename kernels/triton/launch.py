"""What was measured of the Triton kernels: launch parameters, and which are worth taking.

`triton_launch.json` has an entry for each class of device. Its `launch` holds what
`python -m benchmarks.tune` found fastest; where it has nothing, `DEFAULTS` serve. Its `gains` are
the operations that `python -m benchmarks.kernels --decide` found faster than the reference in the
records; without it `auto` takes all on CUDA (`kernels.dispatch`). Nothing is tried out at a user's
step, and since parameters decide in which order sums are made they are a matter of record, like the
code: a resumed run computes the same bits.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from files.errors import UserError
from files.strict_json import read_json_object

TUNED = Path(__file__).with_suffix(".json")

# Tiles of adapted layers: what fits registers with 64 columns of sums.
_TILE = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "num_warps": 4, "num_stages": 3}

DEFAULTS: dict[str, dict[str, int]] = {
    "adamw": {"BLOCK": 1024, "num_warps": 4},
    "adafactor": {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256, "num_warps": 4},
    "elementwise": {"BLOCK": 1024, "num_warps": 4},
    "cross_entropy": {"BLOCK": 8192, "num_warps": 16},
    "low_rank": _TILE,
    "input_gradient": _TILE,
    "adapter_gradient": _TILE,
    "activation_forward": _TILE,
    "activation_backward": {**_TILE, "BLOCK_ROWS": 32, "num_stages": 2},
    # Many columns, for few parts of ds; above rank 16 half as many.
    "through_b": {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 512, "num_warps": 8, "num_stages": 2},
    # Not arguments of the launch: elements of a row a warp, backward programs a multiprocessor.
    "norms": {"warp_elements": 256, "programs": 4},
}


def launch(kernel: str, device: torch.device) -> dict[str, int]:
    """Return the tile, warps and stages of a kernel of `DEFAULTS`, as arguments of its launch."""
    return DEFAULTS[kernel] | measured(device).get("launch", {}).get(kernel, {})


def capability(device: torch.device) -> str:
    """Return the class of a device that parameters are kept for: `sm_80`, `sm_90`, or its type."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def measured(device: torch.device) -> dict[str, Any]:
    """Return the entry of a device's class: `launch` and `gains`, either of which may be absent."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {}
    return entries().get(capability(device), {})


def decided(device: torch.device) -> bool:
    """Return whether records say which operations to take on a device's class."""
    return "gains" in measured(device)


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """Return what `triton_launch.json` holds, by capability.

    Raises:
        UserError: It is not what `benchmarks.tune` and `benchmarks.kernels --decide` write.
    """
    if not TUNED.exists():
        return {}
    found = read_json_object(TUNED)
    for capability, entry in found.items():
        fault = _fault(entry)
        if fault is not None:
            raise UserError(
                f"{TUNED}: {capability}: {fault}; write the file anew with python -m "
                "benchmarks.tune and python -m benchmarks.kernels --decide, or delete it"
            )
    return found


def _fault(entry: Any) -> str | None:
    """Return what is wrong with the entry of a class of device, or None."""
    if not isinstance(entry, dict) or entry.keys() - {"launch", "gains"}:
        return f"{entry!r} must be an object with `launch` and `gains`"
    gains, kernels = entry.get("gains", []), entry.get("launch", {})
    if not isinstance(gains, list) or not all(isinstance(name, str) for name in gains):
        return f"gains {gains!r} must be a list of operations"
    if not isinstance(kernels, dict) or kernels.keys() - DEFAULTS.keys():
        return f"launch must be an object with kernels among {', '.join(DEFAULTS)}"
    for kernel, settings in kernels.items():
        if not isinstance(settings, dict) or settings.keys() != DEFAULTS[kernel].keys():
            return f"{kernel} must have {', '.join(DEFAULTS[kernel])}"
        for name, value in settings.items():
            power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if not power and not (name == "num_stages" and value in (1, 2, 3, 4, 5)):
                return f"{kernel}.{name} is {value!r}, but must be a power of two"
    return None


def write_entries() -> None:
    """Write what `entries` holds now, for a benchmark that has changed it."""
    TUNED.write_text(json.dumps(entries(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def block_of(width: int) -> int:
    """Return the power of two that holds a row of `width` elements."""
    return 1 << (width - 1).bit_length()


def norm_warps(block: int, device: torch.device) -> int:
    """Return how many warps share a row of a norm, 16 at most."""
    return min(16, max(1, block // launch("norms", device)["warp_elements"]))


def norm_programs(rows: int, device: torch.device) -> int:
    """Return how many programs share the rows of a norm's backward pass."""
    return min(rows, launch("norms", device)["programs"] * multiprocessors(device))


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA card has; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
