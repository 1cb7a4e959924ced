"""safetensors files: the library reads them, and a streaming, hashed, durable writer of our own.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON {name: {dtype, shape,
data_offsets}} with an optional "__metadata__", then the tensors' bytes end to end. The library
checks the whole header before a byte of weights is touched (sizes, no overlap, no hole, nothing
missing or left over), and maps the file into memory. It writes without fsync, with modes of its own
and a copy of everything; the writer here holds one tensor at a time beyond those it is given, and
hashes what it writes, so that no byte is read twice.

Source: the format section of the safetensors README, version 0.8.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files.atomic import replacing, sha256_file
from files.errors import UserError, counted, shown
from files.faults import faultpoint
from files.strict_json import parse_json_object

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_ELEMENTS = 2**62


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its type, shape and byte range [begin, end) from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself; `tensors` in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Return the checked header of the safetensors file at `path`.

    Raises:
        UserError: the file cannot be read or is not a valid safetensors file.
    """
    return _open(Path(path))[1]


class TensorFile:
    """A safetensors file, memory-mapped: opened in microseconds, read where it is touched.

    Use it as a context manager. A tensor that `read` returned stays valid afterwards: it keeps the
    map alive until it is dropped itself.

    Raises:
        UserError: the file cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file, header = _open(self.path)
        self._file: safe_open | None = file
        self._tensors = header.tensors
        self.metadata = header.metadata

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of their bytes."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return type, shape and place of tensor `name`."""
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        """Return tensor `name` as a CPU view of the map; pages load when they are touched.

        It may be written to, which never reaches the file.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        return self._file.get_tensor(name)

    def close(self) -> None:
        """Let go of the map; it is unmapped with the last tensor that was read from it."""
        self._file = None


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> str:
    """Write `tensors` to `path` durably and return the sha256 (hex) of the file's bytes.

    The file appears whole or not at all, as `files.atomic.replacing` promises.

    Args:
        path: the file; its folder must exist.
        tensors: name → tensor on any device; each is brought to the host when its turn comes.
        metadata: strings for the header; None writes {"format": "pt"}, which readers expect.
        dtype: what floating-point tensors are cast to on the way; None keeps their own.

    Raises:
        UserError: `path` is there and is no regular file.
        OSError: the disk is full, or the folder is missing.
    """
    order = _order(tensors, dtype)
    header = _header_bytes({name: tensors[name] for name in order}, metadata, dtype)
    start = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(start)
    # A tensor is hashed while it is written: hashing alone takes longer than many a disk.
    with replacing(path) as file, ThreadPoolExecutor(1, thread_name_prefix="hash") as thread:
        file.write(start)
        for name in order:
            data = _bytes_of(tensors[name], dtype)
            hashed = thread.submit(digest.update, data)
            file.write(data)
            hashed.result()
            faultpoint("tensors.part")
    return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that several processes hold: these are `tensor`, from row `first` on."""

    tensor: Tensor
    first: int
    shape: tuple[int, ...]  # of the whole

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.tensor.dtype

    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether the elements are numbers with a point."""
        return self.tensor.is_floating_point()


def write_shares(
    path: str | Path,
    tensors: Mapping[str, Tensor | Rows],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    leads: bool,
    meet: Callable[[], None],
) -> str:
    """Write a file that several processes share: each its rows, where they belong.

    All call it with the same names, shapes and types, on a folder that all reach. No process ever
    holds, or is sent, a row that is another's.

    Args:
        path: the file; nothing is there yet, and nobody reads it before all have returned.
        tensors: name → this process's rows, or a tensor that all have, which the leader writes.
        metadata: as of `write_tensors`.
        dtype: as of `write_tensors`.
        leads: whether this process is the one that begins the file and hashes it.
        meet: returns when every process has called it.

    Returns:
        The sha256 (hex) of the file's bytes on the leader, an empty text elsewhere.

    Raises:
        OSError: the disk is full, or the folder is missing.
    """
    order = _order(tensors, dtype)
    header = _header_bytes({name: tensors[name] for name in order}, metadata, dtype)
    start = len(header).to_bytes(8, "little") + header
    sizes = {name: _num_bytes(tensors[name], dtype) for name in order}
    if leads:
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(len(start) + sum(sizes.values()))
    meet()
    place = len(start)
    with open(path, "r+b") as file:
        for name in order:
            tensor, offset = tensors[name], place
            place += sizes[name]
            if isinstance(tensor, Rows):
                assert tensor.first + len(tensor.tensor) <= tensor.shape[0], name
                if not tensor.tensor.numel():
                    continue
                offset += tensor.first * (sizes[name] // tensor.shape[0])
                tensor = tensor.tensor
            elif not leads:
                continue
            file.seek(offset)
            file.write(_bytes_of(tensor, dtype))
            faultpoint("tensors.part")
        file.flush()
        os.fsync(file.fileno())
    meet()
    return sha256_file(Path(path)) if leads else ""


def _order(tensors: Mapping[str, Tensor | Rows], dtype: torch.dtype | None) -> list[str]:
    """Widest elements first: every tensor is aligned to its element size without padding."""
    return sorted(tensors, key=lambda name: (-_stored_dtype(tensors[name], dtype).itemsize, name))


def _num_bytes(tensor: Tensor | Rows, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize


def _stored_dtype(tensor: Tensor | Rows, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _header_bytes(
    tensors: Mapping[str, Tensor | Rows],
    metadata: Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> bytes:
    """Return the JSON header, padded with spaces to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in tensors.items():
        stored = _stored_dtype(tensor, dtype)
        if stored not in _NAMES:
            raise ValueError(f"{name}: {stored} cannot be stored in safetensors")
        end = offset + _num_bytes(tensor, dtype)
        header[name] = {
            "dtype": _NAMES[stored],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _bytes_of(tensor: Tensor, dtype: torch.dtype | None) -> memoryview:
    """Return the tensor's bytes in row-major order, on the host."""
    host = tensor.detach().to("cpu", _stored_dtype(tensor, dtype)).contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def _open(path: Path) -> tuple[safe_open, Header]:
    """Return a file as the library has checked and opened it, and its header."""
    try:
        # Before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(
                    f"{path}: is a Git LFS pointer, not weights; run 'git lfs pull' first"
                )
            try:
                opened = safe_open(path, "pt")
            except SafetensorError as error:
                reason = str(error).rpartition("deserializing header: ")[2]
                # What a broken download comes to, in the words of the library's versions.
                if reason.startswith(("incomplete metadata", "MetadataIncompleteBuffer")):
                    reason = f"it is cut off, or bytes follow the last tensor ({reason})"
                size = os.fstat(file.fileno()).st_size
                raise _invalid(path, f"{reason}; it has {counted(size, 'byte')}") from None
            text = file.read(int.from_bytes(start, "little"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    # Of two equal names the library takes the last.
    try:
        entries = parse_json_object(text, f"{path}: header")
    except UserError as error:
        raise UserError(f"{error}; fetch the file again") from None
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {name: _tensor_info(path, name, entries[name], 8 + len(text)) for name in entries}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    return opened, Header(tensors, metadata)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Return what the header says of a tensor; the library has checked all but what is here."""
    if not isinstance(entry, dict):
        raise _invalid(path, f"tensor '{name}' must have dtype, shape and data_offsets")
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise UserError(
            f"{path}: tensor '{name}' has dtype {shown(kind)}, which is not read; known are "
            f"{', '.join(_DTYPES)}: of quantised weights, use the model's original ones"
        )
    if math.prod(max(dimension, 1) for dimension in shape) > _MAX_ELEMENTS:
        raise _invalid(path, f"tensor '{name}' has shape {shown(shape)}, beyond any memory")
    return TensorInfo(_DTYPES[kind], tuple(shape), data_start + begin, data_start + end)


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a valid safetensors file: {reason}; fetch the file again")
