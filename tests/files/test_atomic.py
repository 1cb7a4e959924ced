"""A file is whole or not there."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded import disk_calls

from files import atomic
from files.atomic import replacing, sha256_file, write_json, write_text
from files.errors import UserError


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_and_json_are_written_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é\r\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\nb\n".encode()
    value = {"loss": 0.1 + 0.2, "steps": [1, 2], "none": None, "text": "é"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused_and_the_old_file_stays(
    tmp_path: Path, number: float
) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": number})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


@pytest.mark.usefixtures("umask")
def test_permissions_follow_the_umask_or_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "new")
    assert mode_of(path) == 0o640
    path.chmod(0o604)
    write_text(path, "newer")
    assert mode_of(path) == 0o604


def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_new_content_is_on_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path,
) -> None:
    for _ in range(2):  # a new file, and one in the place of another
        with disk_calls(tmp_path) as calls:
            write_text(tmp_path / "a", "12345")
        assert calls == ["fsync .tmp-*", "rename .tmp-* a", "fsync ."]


def test_all_bytes_are_with_the_system_when_it_is_asked_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five bytes stay in Python's buffer until they are flushed: an fsync would not see them."""
    sizes: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(tmp_path / "a", "12345")
    assert sizes == [5]


def test_nothing_is_written_through_what_lies_at_the_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = uuid.UUID(int=7)
    monkeypatch.setattr(atomic.uuid, "uuid4", lambda: name)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".tmp-{name.hex}").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a", "12345")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="no regular file"):
            write_text(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    # A limit on file sizes stands for a full disk: the same write fails, without a mount.
    path = tmp_path / "a.bin"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as failure:
            write_text(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.errno == errno.EFBIG
    assert failure.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_killed_at_any_write_the_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for event in ("write", "fsync", "replace", "fsync folder"):
        path.write_bytes(b"old")
        child = multiprocessing.get_context("fork").Process(
            target=write_and_die, args=(path, event)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert path.read_bytes() == (b"new" if event == "fsync folder" else b"old")


def write_and_die(path: Path, event: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if event == "fsync":
        os.fsync = die
    if event == "replace":
        os.replace = die
    if event == "fsync folder":
        atomic.fsync_folder = die
    with replacing(path) as file:
        file.write(b"new")
        if event == "write":
            die()


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-4's own example.
    assert sha256_file(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
