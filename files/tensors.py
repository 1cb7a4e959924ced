"""safetensors files: a header reader, memory-mapped reads, and a streaming, hashed, durable writer.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON {name: {dtype, shape,
data_offsets}} with an optional "__metadata__", then the tensors' bytes end to end. The reader
checks the whole header before a byte of weights is touched: types, sizes, no overlap, no hole,
nothing behind the last tensor. The writer holds one tensor at a time beyond those it is given,
and hashes what it writes, so that no byte is read twice.

Source: the format section of the safetensors README, version 0.8.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from files.atomic import replacing
from files.errors import UserError
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
_MAX_HEADER_BYTES = 100_000_000
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
    with _open(Path(path)) as file:
        return _read_header(file, Path(path))


class TensorFile:
    """A safetensors file, memory-mapped: opened in microseconds, read where it is touched.

    Use it as a context manager. A tensor that `read` returned stays valid afterwards: it keeps the
    map alive until it is dropped itself.

    Raises:
        UserError: the file cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _open(self.path) as file:
            header = _read_header(file, self.path)
            # Copy-on-write: writable as torch asks, yet a write never reaches the file.
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
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
        """Return tensor `name` as a CPU view of the map; pages load when they are touched."""
        info = self._tensors[name]
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.begin % info.dtype.itemsize:
            # Files of old writers: torch wants elements at multiples of their size.
            data = bytearray(self._map[info.begin : info.end])
            return torch.frombuffer(data, dtype=info.dtype).view(info.shape)
        count = info.num_bytes // info.dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.begin)
        return flat.view(info.shape)

    def close(self) -> None:
        """Let go of the map; it is unmapped with the last tensor that was read from it."""
        self._map = None


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
    # Widest elements first keeps every tensor aligned to its element size without padding.
    order = sorted(tensors, key=lambda name: (-_stored_dtype(tensors[name], dtype).itemsize, name))
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


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _header_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, dtype: torch.dtype | None
) -> bytes:
    """Return the JSON header, padded with spaces to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in tensors.items():
        stored = _stored_dtype(tensor, dtype)
        if stored not in _NAMES:
            raise ValueError(f"{name}: {stored} cannot be stored in safetensors")
        end = offset + tensor.numel() * stored.itemsize
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


def _open(path: Path) -> BinaryIO:
    try:
        # Before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_header(file: BinaryIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if start == b"version ":
        raise UserError(f"{path}: is a Git LFS pointer, not weights; run 'git lfs pull' first")
    if len(start) < 8:
        raise _invalid(path, f"{size} bytes cannot hold a header")
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER_BYTES:
        raise _invalid(path, f"a header of {length:,} bytes is beyond {_MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise _invalid(path, f"its header of {length:,} bytes ends beyond the file's {size:,}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _invalid(path, "its header does not begin with '{'")
    try:
        entries = parse_json_object(text, f"{path}: header")
    except UserError as error:
        raise UserError(f"{error}; fetch the file again") from None
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid(path, "__metadata__ must map names to strings")
    tensors = {name: _tensor_info(path, name, entries[name], 8 + length) for name in entries}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, metadata)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(path, f"tensor '{name}' must have dtype, shape and data_offsets alone")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise UserError(
            f"{path}: tensor '{name}' has dtype {kind!r:.40}, which is not read; known are "
            f"{', '.join(_DTYPES)}: of quantised weights, use the model's original ones"
        )
    if not _all_counts(shape):
        raise _invalid(path, f"tensor '{name}' has shape {shape!r:.80}")
    if not _all_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(path, f"tensor '{name}' has data_offsets {offsets!r:.80}")
    extent = 1
    for dimension in shape:
        extent *= max(dimension, 1)
    if extent > _MAX_ELEMENTS:
        raise _invalid(path, f"tensor '{name}' has shape {shape!r:.80}, beyond any memory")
    dtype = _DTYPES[kind]
    needed = 0 if 0 in shape else extent * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _invalid(
            path,
            f"tensor '{name}' of shape {shape} and dtype {kind} needs {needed:,} bytes, "
            f"but has {offsets[1] - offsets[0]:,}",
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(path: Path, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
    """Refuse overlaps, holes, and bytes missing or left over at the end."""
    for name, info in tensors.items():
        if info.begin != position:
            fault = "overlaps the one before it" if info.begin < position else "follows a hole"
            raise _invalid(path, f"tensor '{name}' {fault}")
        position = info.end
    if position > size:
        raise _invalid(path, f"it is cut off: {size:,} bytes where {position:,} are described")
    if position < size:
        raise _invalid(path, f"{size - position:,} bytes follow the last tensor")


def _all_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a valid safetensors file: {reason}; fetch the file again")
