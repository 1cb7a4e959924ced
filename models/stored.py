"""Weights that lie quantised in their files, as bitsandbytes and transformers write them.

4 bits: beside `weight`, two numbers a byte, lie `weight.absmax` and `weight.quant_map`, 16 values;
with absmax that are quantised again `weight.nested_absmax` and `weight.nested_quant_map`, 256; and
`weight.quant_state.bitsandbytes__nf4`, a JSON object as bytes. 8 bits: beside `weight` in int8 lies
the layer's `SCB`, the absmax of its rows, and `weight_format`, 0 for rows.

Source: bitsandbytes 0.50, `QuantState.as_dict` and `Linear8bitLt._save_to_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files.errors import UserError
from files.strict_json import parse_json_object
from files.tensors import TensorFile, TensorInfo
from kernels.blockwise import dynamic_map
from kernels.quantised import BLOCK, NESTED_BLOCK, nf4_map

Places = dict[str, tuple[Path, TensorInfo]]

_STATE = "quant_state.bitsandbytes__nf4"
_REMEDY = "fetch the folder again, or use the model's original weights"


@dataclass(frozen=True)
class Stored:
    """A quantised weight in its files: where the parts of `QuantisedWeight` lie."""

    kind: str
    places: Mapping[str, tuple[Path, str]]  # part → (file, name in it)
    offset: float | None  # the mean of the absmax, where they are quantised again

    def read(self) -> dict[str, Tensor]:
        """Return the parts, on the host and out of the files."""
        parts = {part: read_tensor(*place).clone() for part, place in self.places.items()}
        if self.kind == "nf4":
            parts["packed"] = parts["packed"].view(-1).view(torch.uint8)
        if self.offset is not None:
            parts["nested_offset"] = torch.tensor(self.offset)
            if torch.equal(parts["nested_map"], dynamic_map(True)):
                del parts["nested_map"]
        return parts


def take_stored(
    folder: Path, kind: str | None, shapes: Mapping[str, tuple[int, ...]], places: Places
) -> dict[str, Stored]:
    """Take the quantised weights of a model, with all their parts, out of `places`.

    Args:
        folder: The model's, for messages.
        kind: What its config.json says of them: `nf4`, `int8`, or None, and nothing is taken.
        shapes: Name → (N, K) of each weight that may be quantised.
        places: Name → where it lies, for all tensors of the folder.

    Raises:
        UserError: Parts are missing, or not what they must be.
    """
    found = {}
    for name, shape in shapes.items() if kind else ():
        take = _take_nf4 if kind == "nf4" else _take_int8
        taken = take(name, shape, places)
        if isinstance(taken, str):
            raise UserError(f"{folder}: {name} is not the {kind} weight that it should be: {taken}")
        if taken is not None:
            found[name] = taken
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a file."""
    with TensorFile(path) as file:
        return file.read(name)


def _take_nf4(name: str, shape: tuple[int, ...], places: Places) -> Stored | str | None:
    """Return a weight of 4 bits, what is wrong with it, or None where it is not quantised."""
    if f"{name}.{_STATE}" not in places:
        return None
    taken = {
        part: places.pop(key)
        for part in ("packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)
        if (key := name if part == "packed" else f"{name}.{part}") in places
    }
    path, info = taken[_STATE]
    if info.dtype != torch.uint8 or len(info.shape) != 1:
        return f"its quant_state is no row of bytes; {_REMEDY}"
    told = bytes(read_tensor(path, f"{name}.{_STATE}").tolist())
    state = parse_json_object(told, f"{path}: {name}.{_STATE}")
    nested = "nested_absmax" in taken or "nested_quant_map" in taken
    wanted: dict[str, Any] = {"shape": list(shape), "blocksize": BLOCK, "quant_type": "nf4"}
    if nested:
        wanted["nested_blocksize"] = NESTED_BLOCK
    for key, value in wanted.items():
        if state.get(key) != value:
            return f"its {key} is {state.get(key)!s:.60}, and must be {value}; {_REMEDY}"
    offset = state.get("nested_offset")
    of_fp32 = isinstance(offset, float | int) and abs(offset) <= torch.finfo(torch.float32).max
    if nested and (not of_fp32 or isinstance(offset, bool)):
        return f"its nested_offset is {offset!s:.60}, and must be a number of fp32; {_REMEDY}"
    blocks = -(-math.prod(shape) // BLOCK)
    sizes = {"absmax": (blocks, torch.uint8 if nested else torch.float32)}
    sizes["quant_map"] = (16, torch.float32)
    if nested:
        sizes["nested_absmax"] = (-(-blocks // NESTED_BLOCK), torch.float32)
        sizes["nested_quant_map"] = (256, torch.float32)
    for part, (count, dtype) in sizes.items():
        info = taken[part][1] if part in taken else None
        if info is None or info.shape != (count,) or info.dtype != dtype:
            return f"its {part} is not there, or not {count} numbers of {dtype}; {_REMEDY}"
    packed = taken["packed"][1].num_bytes if "packed" in taken else 0
    if packed != -(-math.prod(shape) // 2):
        return f"it has {packed} bytes, of {shape[0]} × {shape[1]} numbers; {_REMEDY}"
    if not torch.equal(read_tensor(taken["quant_map"][0], f"{name}.quant_map"), nf4_map()):
        return f"its quant_map is not that of nf4; {_REMEDY}"
    parts = {"packed": name, "absmax": f"{name}.absmax"}
    if nested:
        parts["nested_absmax"] = f"{name}.nested_absmax"
        parts["nested_map"] = f"{name}.nested_quant_map"
    files = {"nested_map": "nested_quant_map"}
    return Stored(
        "nf4",
        {part: (taken[files.get(part, part)][0], key) for part, key in parts.items()},
        float(offset) if nested and offset is not None else None,
    )


def _take_int8(name: str, shape: tuple[int, ...], places: Places) -> Stored | str | None:
    """Return a weight of 8 bits, what is wrong with it, or None where it is not quantised."""
    layer = name.removesuffix("weight")
    scb, form = f"{layer}SCB", f"{layer}weight_format"
    if scb not in places:
        return None
    if form in places and read_tensor(places.pop(form)[0], form).any():
        return "its weight_format is one of old cards, not rows; use the model's original weights"
    packed, absmax = places.pop(name, None), places.pop(scb)
    if packed is None or packed[1].shape != shape or packed[1].dtype != torch.int8:
        return f"it is not there, or not {shape[0]} × {shape[1]} numbers of int8; {_REMEDY}"
    if absmax[1].shape != shape[:1] or absmax[1].dtype != torch.float32:
        return f"its SCB is not one fp32 number a row; {_REMEDY}"
    return Stored("int8", {"packed": (packed[0], name), "absmax": (absmax[0], scb)}, None)
