"""safetensors files: the library is the oracle both ways, and no malformed header gets through."""

import hashlib
import json
import os
import stat
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from files import tensors as tensors_module
from files.errors import UserError
from files.tensors import TensorFile, read_header, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def tensors_of_every_type() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        values = torch.randint(0, 100, (3, 5), generator=generator)
        tensors[f"matrix.{dtype}"] = (values > 50) if dtype == torch.bool else values.to(dtype)
        tensors[f"scalar.{dtype}"] = torch.ones((), dtype=dtype)
        tensors[f"empty.{dtype}"] = torch.zeros((4, 0, 2), dtype=dtype)
    tensors["ünïcode/../../name"] = torch.arange(7, dtype=torch.float32)
    tensors["three bytes"] = torch.arange(3, dtype=torch.uint8)
    tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return tensors


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    tensors = tensors_of_every_type()
    write_tensors(path, tensors, {"format": "pt", "note": "é"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(equal_bits(tensors[name], read[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    tensors = tensors_of_every_type()
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    with TensorFile(path) as file:
        assert sorted(file.names) == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.info(name).shape == tuple(tensor.shape)
            assert file.info(name).dtype == tensor.dtype
            assert equal_bits(tensor, file.read(name))


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    write_tensors(path, {})
    assert load_file(path) == {}
    with TensorFile(path) as file:
        assert file.names == []


def test_any_stride_is_written_in_row_major_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    base = torch.arange(24.0).reshape(4, 6)
    write_tensors(path, {"t": base.t(), "slice": base[1:3, ::2], "same": base.expand(2, 4, 6)})
    read = load_file(path)
    assert torch.equal(read["t"], base.t())
    assert torch.equal(read["slice"], base[1:3, ::2])
    assert torch.equal(read["same"], base.expand(2, 4, 6))


def test_floats_are_cast_on_the_way_and_integers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    write_tensors(path, {"w": weight, "ids": torch.arange(3)}, dtype=torch.bfloat16)
    read = load_file(path)
    assert torch.equal(read["w"], weight.to(torch.bfloat16))
    assert read["ids"].dtype == torch.int64


def test_the_digest_is_the_files_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = tensors_of_every_type()
    assert write_tensors(path, tensors) == hashlib.sha256(path.read_bytes()).hexdigest()
    for name, info in read_header(path).tensors.items():
        assert info.begin % info.dtype.itemsize == 0, name


def test_one_tensor_at_a_time_is_held_however_slow_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes faster than he hashes would pile up what is still to be hashed."""

    class Slow:
        def __init__(self, start: bytes = b"") -> None:
            self.digest = hashlib.sha256(start)

        def update(self, data: memoryview) -> None:
            time.sleep(0.01)
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    made: list[weakref.ref[memoryview]] = []
    bytes_of = tensors_module._bytes_of

    def counted(tensor: torch.Tensor, dtype: torch.dtype | None) -> memoryview:
        assert sum(one() is not None for one in made) <= 1  # the one before, hashed and written
        data = bytes_of(tensor, dtype)
        made.append(weakref.ref(data))
        return data

    monkeypatch.setattr(tensors_module, "_bytes_of", counted)
    monkeypatch.setattr(tensors_module, "hashlib", SimpleNamespace(sha256=Slow))
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, {f"{i}": torch.full((4,), float(i)) for i in range(6)})
    assert len(made) == 6
    assert written == hashlib.sha256(path.read_bytes()).hexdigest()


def test_mode_follows_the_umask_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    before = os.umask(0o027)
    try:
        write_tensors(path, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    old = path.read_bytes()
    # A meta tensor has no bytes: the failure comes after the header was written.
    with pytest.raises(NotImplementedError):
        write_tensors(path, {"a": torch.ones(2), "b": torch.ones(2, device="meta")})
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_type_without_a_name_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"z: torch\.complex64"):
        write_tensors(tmp_path / "x.safetensors", {"z": torch.ones(2, dtype=torch.complex64)})


def test_a_tensor_outlives_its_file_object_and_writing_it_does_not_reach_the_disk(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)})
    before = path.read_bytes()
    with TensorFile(path) as file:
        tensor = file.read("a")
    with pytest.raises(ValueError, match="is closed"):
        file.read("a")
    assert torch.equal(tensor, torch.arange(5.0))
    tensor += 1
    assert path.read_bytes() == before


def test_unaligned_tensors_of_old_writers_are_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64)
    header = {"a": {"dtype": "F64", "shape": [6], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    text += b" " * (1 + -len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
    with TensorFile(path) as file:
        assert file.info("a").begin % 8 == 1
        assert torch.equal(file.read("a"), values)


# --- malformed files ----------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def safetensors_bytes(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


MALFORMED = {
    "empty file": (b"", "header too small; it has 0 bytes"),
    "truncated length": (b"\x01\x00", "header too small; it has 2 bytes"),
    "length beyond the limit": ((2**63).to_bytes(8, "little") + b"{}", "header too large"),
    "header past the end": ((50).to_bytes(8, "little") + b"{}", "invalid header length"),
    "not JSON": (safetensors_bytes(b'{"a": ', b""), "invalid JSON"),
    "not an object": (safetensors_bytes(b"[1]", b""), "invalid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}', b""), "invalid UTF-8"),
    "deep nesting": (safetensors_bytes(b'{"a":' + b"[" * 100_000, b""), "recursion limit"),
    "duplicate names": (
        safetensors_bytes(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode()),
        "key 'a' stands twice",
    ),
    "metadata is no object": (safetensors_bytes({"__metadata__": 5}, b""), "expected a map"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}, b""), "expected a str"),
    "entry is no object": (safetensors_bytes({"a": 3}), "expected struct TensorInfo"),
    "entry is a list": (safetensors_bytes({"a": ["F32", [2], [0, 8]]}), "tensor 'a' must have"),
    "entry lacks a key": (safetensors_bytes({"a": {"dtype": "F32"}}), "missing field `shape`"),
    "unknown dtype": (safetensors_bytes({"a": entry("F5")}), "unknown variant `F5`"),
    "dtype is not read": (
        safetensors_bytes({"a": entry("F8_E4M3", [8])}),
        "tensor 'a' has dtype 'F8_E4M3', which is not read",
    ),
    "dtype is a number": (safetensors_bytes({"a": entry(4)}), "integer `4`"),
    "dtype is an object": (safetensors_bytes({"a": entry({"F32": None})}), "which is not read"),
    "negative dimension": (safetensors_bytes({"a": entry(shape=[-2])}), "integer `-2`"),
    "fractional dimension": (safetensors_bytes({"a": entry(shape=[2.0])}), "point `2.0`"),
    "true as dimension": (safetensors_bytes({"a": entry(shape=[True, 2])}), "boolean `true`"),
    "shape is no list": (safetensors_bytes({"a": entry(shape=2)}), "integer `2`"),
    "overflowing shape": (safetensors_bytes({"a": entry(shape=[2**40, 2**40])}), "overflow"),
    "empty, overflowing shape": (
        safetensors_bytes({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b""),
        "beyond any memory",
    ),
    "shape against bytes": (safetensors_bytes({"a": entry(shape=[3])}), "invalid shape"),
    "reversed offsets": (safetensors_bytes({"a": entry(offsets=[8, 0])}), "invalid offset"),
    "negative offset": (safetensors_bytes({"a": entry(offsets=[-8, 0])}), "integer `-8`"),
    "one offset": (safetensors_bytes({"a": entry(offsets=[8])}), "invalid length 1"),
    "three offsets": (safetensors_bytes({"a": entry(offsets=[0, 4, 8])}), "invalid length 3"),
    "overlap": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "invalid offset for tensor `b`",
    ),
    "same place twice": (safetensors_bytes({"a": entry(), "b": entry()}), "invalid offset"),
    "hole": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "invalid offset for tensor `b`",
    ),
    "hole at the start": (
        safetensors_bytes({"a": entry(offsets=[8, 16])}, bytes(16)),
        "invalid offset for tensor `a`",
    ),
    "data cut off": (safetensors_bytes({"a": entry()}, bytes(7)), "it is cut off"),
    "data left over": (safetensors_bytes({"a": entry()}, bytes(9)), "bytes follow the last tensor"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_end_in_one_sentence_naming_the_file(case: str, tmp_path: Path) -> None:
    data, reason = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for read in (read_header, TensorFile):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(tmp_path / "no.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(UserError, match="is not a regular file"):
            read_header(path)


def test_random_damage_to_a_header_never_escapes_our_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    refused = 0
    for _ in range(400):
        position = int(torch.randint(0, len(whole) - 20, (), generator=generator))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(damaged)
        try:
            with TensorFile(path) as file:
                for name in file.names:
                    file.read(name)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200
