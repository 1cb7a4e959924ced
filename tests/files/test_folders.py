"""Folders are whole and verified, or not there."""

import hashlib
import json
from pathlib import Path

import pytest
from recorded import disk_calls

from files import folders
from files.atomic import sha256_file
from files.faults import FAULT_POINTS, listening
from files.folders import damage, recover_folder, replace_folder, step_of, sweep


def fill(folder: Path) -> dict[str, str]:
    (folder / "optimizer.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "state.json").write_text('{"step": 3}')
    return {"state.json": sha256_file(folder / "state.json")}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    replace_folder(tmp_path / "best", fill, step=3)
    return tmp_path / "best"


def test_the_manifest_lists_every_file_and_the_step(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["files"] == {
        name: {"size": (whole / name).stat().st_size, "sha256": sha256_file(whole / name)}
        for name in ("optimizer.safetensors", "state.json")
    }
    assert step_of(whole) == 3
    assert damage(whole) is None


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_every_flipped_bit_and_every_truncation_is_noticed(whole: Path, file: str) -> None:
    path = whole / file
    content = path.read_bytes()
    for offset in range(0, len(content), max(1, len(content) // 40)):
        for bit in (0, 5):
            broken = bytearray(content)
            broken[offset] ^= 1 << bit
            path.write_bytes(broken)
            assert damage(whole) is not None, f"bit {bit} of byte {offset}"
        path.write_bytes(content[:offset])
        assert damage(whole) is not None, f"cut at {offset}"
    path.write_bytes(content[:-1])
    assert damage(whole) is not None, "cut at its last byte"
    path.write_bytes(content)
    assert damage(whole) is None


def test_missing_and_surplus_files_are_damage(whole: Path) -> None:
    (whole / "stranger").write_text("x")
    assert "stranger" in str(damage(whole))
    (whole / "stranger").unlink()
    (whole / "state.json").unlink()
    assert "state.json" in str(damage(whole))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 1, "sha256": ""}', "{", "[" * 10**5])
def test_what_is_no_manifest_is_damage(whole: Path, text: str) -> None:
    (whole / "manifest.json").write_text(text)
    assert "manifest.json" in str(damage(whole))


def test_the_whole_folder_is_replaced(whole: Path) -> None:
    def other(folder: Path) -> dict[str, str]:
        (folder / "new").touch()
        return {}

    replace_folder(whole, other)
    assert {path.name for path in whole.iterdir()} == {"new", "manifest.json"}
    assert [path.name for path in whole.parent.iterdir()] == ["best"]
    assert step_of(whole) is None


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(whole: Path) -> None:
    def full(folder: Path) -> dict[str, str]:
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_folder(whole, full)
    assert damage(whole) is None
    assert [path.name for path in whole.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("killed_after", ["filling", "the first rename", "the second rename"])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path: Path, killed_after: str) -> None:
    target, new, trash = tmp_path / "best", tmp_path / ".tmp-best", tmp_path / ".trash-best"
    for folder, file in ((target, "old"), (new, "new")):
        folder.mkdir()
        (folder / file).touch()
    if killed_after != "filling":
        target.rename(trash)
    if killed_after == "the second rename":
        new.rename(target)
    recover_folder(target)
    expected = "old" if killed_after == "filling" else "new"
    assert [path.name for path in target.iterdir()] == [expected]

    def killed(folder: Path) -> dict[str, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, killed)
    assert [path.name for path in target.iterdir()] == [expected]


def test_points_are_passed_in_the_order_that_the_protocol_needs(tmp_path: Path) -> None:
    """Files are synced before the folder has its name, and the old one goes last."""
    replace_folder(tmp_path / "best", fill)
    passed: list[str] = []
    with listening(passed.append):
        replace_folder(tmp_path / "best", fill)
    folders = [name for name in passed if name.startswith("folder.")]
    steps = ("made", "filled", "manifested", "synced", "aside", "renamed", "done")
    assert folders == [f"folder.{step}" for step in steps]
    assert set(passed) <= FAULT_POINTS


def test_all_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path) -> None:
    """The whole sequence: what a power cut leaves is one of its beginnings.

    The manifest comes last of the files, every file and the list of their names are synced before
    the rename, the list that holds the folder after it; the old folder goes when all that is done.
    """
    synced = [
        "fsync .tmp-best/.tmp-*",
        "rename .tmp-best/.tmp-* .tmp-best/manifest.json",
        "fsync .tmp-best",
        *sorted(
            f"fsync .tmp-best/{name}"
            for name in ("manifest.json", "optimizer.safetensors", "state.json")
        ),
        "fsync .tmp-best",
    ]
    with disk_calls(tmp_path) as calls:
        replace_folder(tmp_path / "best", fill)
    calls[3:6] = sorted(calls[3:6])  # the files in any order
    assert calls == [*synced, "rename .tmp-best best", "fsync ."]
    with disk_calls(tmp_path) as calls:
        replace_folder(tmp_path / "best", fill)
    calls[3:6] = sorted(calls[3:6])
    assert calls == [
        *synced,
        "rename best .trash-best",
        "rename .tmp-best best",
        "fsync .",
        "delete .trash-best",
    ]


def test_a_recovered_folder_s_name_is_on_the_disk(tmp_path: Path) -> None:
    for name in (".tmp-best", ".trash-best"):
        (tmp_path / name).mkdir()
    with disk_calls(tmp_path) as calls:
        recover_folder(tmp_path / "best")
    assert calls == ["rename .tmp-best best", "fsync ."]


def test_a_file_whose_hash_is_known_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(folders, "sha256_file", lambda path: read.append(path.name) or "0" * 64)
    replace_folder(tmp_path / "best", fill)
    assert read == ["optimizer.safetensors"]
    manifest = json.loads((tmp_path / "best" / "manifest.json").read_text())
    known = hashlib.sha256(b'{"step": 3}').hexdigest()
    assert manifest["files"]["state.json"]["sha256"] == known


def test_a_sweep_takes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".tmp-step-00000002", ".trash-step-00000001", "step-00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".tmp-0f").touch()
    (tmp_path / ".hidden").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "step-00000003"]
