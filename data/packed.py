"""Files of rows that are packed with gzip or Zstandard: what they hold, unpacked as it is read."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from files.errors import UserError

PACKINGS = (".gz", ".zst")
_HOLD_ROWS = (".jsonl", ".json", ".csv")  # a Parquet file is packed within


def ending_of(name: str | PurePath) -> str:
    """Return the ending that tells what a file holds: `.csv`, `.jsonl.gz`; in small letters."""
    form, ending = (["", "", *PurePath(str(name).lower()).suffixes])[-2:]
    return form + ending if ending in PACKINGS and form in _HOLD_ROWS else ending


def kind_of_rows(name: str | PurePath) -> str:
    """Return the form of the rows in a file, packed or not: `.jsonl` of `a.jsonl.gz`."""
    return "." + ending_of(name).split(".")[1] if ending_of(name) else ""


def open_file(path: Path, name: str) -> BinaryIO:
    """Open a file for reading as it lies there.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


def opened(path: Path, name: str) -> BinaryIO:
    """Open a file for reading, unpacked.

    Raises:
        UserError: It cannot be read, or Zstandard is not to be had; while it is read, too: it is
            damaged or cut off.
    """
    file = open_file(path, name)
    packing = ending_of(path)
    if packing.endswith(".gz"):
        return io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=file), file, name))
    if packing.endswith(".zst"):
        try:
            import pyarrow
        except ImportError:
            file.close()
            raise UserError(f"{name}: .zst needs pyarrow; run `pip install pyarrow`") from None
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")
        return io.BufferedReader(_Unpacked(stream, file, name))
    return file


class _Unpacked(io.RawIOBase):
    """What a packed file holds; what is wrong with it is said in words."""

    def __init__(self, stream: Any, file: BinaryIO, name: str) -> None:
        self._stream, self._file, self._name = stream, file, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{self._name}: cannot be unpacked ({reason}); it is damaged or cut off, fetch it "
                "again"
            ) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()
