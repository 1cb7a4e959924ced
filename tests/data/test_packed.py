"""Packed files of rows are read like the ones that were packed."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pyarrow
import pytest

from data.examples import _content
from data.locate import open_source
from data.packed import ending_of, kind_of_rows
from data.source import read_rows
from data.splits import split_labels
from files.errors import UserError

CONTENTS = {
    ".jsonl": '{"text": "añb"}\n\n{"text": "c"}\n',
    ".json": '{"rows": [{"text": "añb"},\n {"text": "c"}]}',
    ".csv": 'text,n\n"a\nb",1\nc,2\n',
}


def packed(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content)
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


@pytest.mark.parametrize("packing", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("form", CONTENTS)
def test_what_was_packed_is_read(tmp_path: Path, form: str, packing: str) -> None:
    content = CONTENTS[form].encode()
    plain, other = tmp_path / f"a{form}", tmp_path / f"b{form}{packing}"
    plain.write_bytes(content)
    other.write_bytes(packed(content, packing.lower()))
    expected = [(row.values, row.where.split(":")[-1]) for row in read_rows(plain)]
    assert [(row.values, row.where.split(":")[-1]) for row in read_rows(other)] == expected
    assert len(expected) == 2


def test_the_form_within_is_part_of_what_is_cached(tmp_path: Path) -> None:
    """The same bytes are other rows under another ending."""
    sources = []
    for form in (".jsonl", ".csv"):
        file = tmp_path / f"a{form}.gz"
        file.write_bytes(packed(b'{"text": "a"}\n', ".gz"))
        sources.append(_content(open_source(file)))
    assert sources[0] != sources[1]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_what_cannot_be_unpacked_is_said(tmp_path: Path, packing: str) -> None:
    whole = packed(b'{"text": "a"}\n' * 40_000, packing)
    for content in (b"x" * 100, whole[: len(whole) // 2], whole[:-3]):
        file = tmp_path / f"a.jsonl{packing}"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl.*cannot be unpacked .*fetch it again"):
            list(read_rows(file))
    file.write_bytes(packed(b'{"text": "' + b"a" * (17 * 2**20) + b'"}', packing))
    with pytest.raises(UserError, match="row over 16 MiB"):
        list(read_rows(file))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        list(read_rows(file))


def test_zstandard_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(packed(b"{}\n", ".zst"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"\.zst needs pyarrow; run `pip install pyarrow`"):
        list(read_rows(tmp_path / "a.jsonl.zst"))


def test_folders_and_their_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.jsonl.gz", "test.jsonl.gz"):
        (tmp_path / name).write_bytes(packed(f'{{"text": "{name}"}}\n'.encode(), ".gz"))
    names = [file.name for file in open_source(tmp_path, "train").files]
    assert names == [str(tmp_path / "train-00000-of-00001.jsonl.gz")]
    assert split_labels("a/test.jsonl.gz") == ("test", {"test"})
    (tmp_path / "train.jsonl").write_text('{"text": "train"}\n')
    with pytest.raises(UserError, match=r"several formats \(.jsonl, .jsonl.gz\)"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.parquet.gz", "a.tar.gz", "a.gz"])
def test_other_packings_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be in one of .*also as .gz or .zst"):
        open_source(tmp_path / name)


def test_endings() -> None:
    assert [ending_of(name) for name in ("a.b/c", "A.JSONL.GZ", "a.py.gz", "x.csv")] == [
        *("", ".jsonl.gz", ".gz", ".csv"),
    ]
    assert [kind_of_rows(name) for name in ("c", "a.json.zst", "x.csv")] == ["", ".json", ".csv"]
