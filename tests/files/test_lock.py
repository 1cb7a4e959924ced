"""A run's folder has one writer, on any system."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import ROOT, python

from files.atomic import RunLock
from files.errors import UserError

HOLDER = """
import sys, time
from files.atomic import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refusal, RunLock(tmp_path / "run"):
            pass
        assert f"in use by process {holder.pid} on host {socket.gethostname()}" in str(
            refusal.value
        )
    finally:
        holder.kill()  # SIGKILL: no exit handler runs
        holder.communicate()
    with RunLock(tmp_path / "run"):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), RunLock(tmp_path):
            pass
        raise KeyError
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_without_locks_in_the_file_system_the_run_goes_on_and_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lustre mounted without them, some FUSE; nothing is left that a later run would wait for."""

    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        for _ in range(2):
            with RunLock(tmp_path):
                pass
            said = capsys.readouterr().err
            assert said.startswith(f"note: {tmp_path}: this file system has no locks: ")
            assert said.count("\n") == 1
    with RunLock(tmp_path):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("umask")
def test_a_lock_that_was_left_keeps_nobody_out_and_others_of_the_group_may_lock(
    tmp_path: Path,
) -> None:
    """Whatever lies in the files, half written or of another host."""
    for left in ("", "{", '{"process": 1, "host": "elsewhere"}'):
        (tmp_path / "run.lock").write_text(left)
        (tmp_path / "run.lock.json").write_text(left)
        with RunLock(tmp_path):
            assert (tmp_path / "run.lock").stat().st_mode & 0o777 == 0o664


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_nothing_of_ours_imports_fcntl() -> None:
    """`filelock` knows how each system locks."""
    for folder in ("files", "kernels", "lora", "models", "data", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "fcntl" not in path.read_text(encoding="utf-8"), path


WINDOWS = """
import importlib, os, pathlib, signal, sys
sys.modules.update(dict.fromkeys(("resource", "fcntl", "pwd", "grp", "termios", "readline")))
for name in ("SIGALRM", "SIGUSR1", "SIGKILL", "SIGPIPE", "setitimer", "pthread_sigmask"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "fchmod", "fork", "getsid", "pread", "pwrite", "sysconf"):
    delattr(os, name)
for folder in ("files", "lora", "models", "data", "train", "kernels"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if "triton" not in path.name and "demo" not in path.parts:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from files.atomic import RunLock, write_text
write_text(sys.argv[1] + "/a", "b")
"""


def test_everything_is_imported_without_what_only_unix_has(tmp_path: Path) -> None:
    """Torch and filelock are imported first: on Windows they have ways of their own."""
    program = "import filelock, numpy, tokenizers, torch, tqdm, jinja2, huggingface_hub\n" + WINDOWS
    python("-c", program, str(tmp_path))
    assert (tmp_path / "a").read_text() == "b"


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"choose another one with train\.output_dir"),
        RunLock(tmp_path / "file"),
    ):
        pass
