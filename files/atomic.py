"""Files that are either whole or not there, file hashes, and the lock on a run's folder.

A file is written beside its destination, flushed to the disk, and renamed over it; the folder is
flushed last, because a rename is a change of the folder. A process that is killed at any moment
leaves the old file or the new one, never a mixture, and at most a temporary file whose name starts
with `.tmp-`, which `replacing` of the same name does not trip over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from files.errors import UserError, note
from files.faults import faultpoint

TEMPORARY_PREFIX = ".tmp-"
LOCK_NAME = "run.lock"
HOLDER_NAME = "run.lock.json"  # not in the lock itself: whoever tries a lock may empty its file
# Windows: the bytes as they are, and no way to open a folder.
_BINARY = getattr(os, "O_BINARY", 0)
_FOLDER = getattr(os, "O_DIRECTORY", None)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new binary file that takes the place of `path` when the block ends without an error.

    The permissions of a new file follow the umask; those of a file that is replaced are kept. A
    symbolic link is followed, so that the file it names is replaced and the link stays. When the
    block raises, `path` is untouched and nothing is left beside it.

    Raises:
        UserError: `path` is there and is no regular file (a folder, a device, a pipe).
        OSError: the file cannot be written (disk full, no permission); its `filename` is `path`.
    """
    destination = Path(os.path.realpath(path))
    temporary = destination.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    mode = _permissions_to_keep(destination)
    try:
        # O_EXCL: never write through something that lies there. 0o666 is cut down by the umask.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        try:
            with open(descriptor, "w+b") as file:
                faultpoint("file.created")
                yield file
                file.flush()
                faultpoint("file.written")
                if mode is not None:
                    os.chmod(temporary, mode)
                os.fsync(file.fileno())
            faultpoint("file.synced")
            os.replace(temporary, destination)
            faultpoint("file.renamed")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(destination.parent)
    except OSError as error:
        # A full disk is noticed by a write that knows no file name: say which file it was.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _permissions_to_keep(destination: Path) -> int | None:
    """Return the permission bits of the file at `destination`, or None where there is none."""
    try:
        mode = destination.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{destination}: is there and is no regular file, so it is not replaced; "
            "move it away or write to another path"
        )
    return stat.S_IMODE(mode)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all, and flush it to the disk.

    Line ends are written as they are. Raises as `replacing` does.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all.

    Numbers are written unrounded (Python's shortest text that reads back to the same bits).

    Raises:
        ValueError: `value` holds NaN or an infinity, which are not JSON.
        TypeError: `value` holds something that JSON does not know.
        UserError, OSError: as `replacing`.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def fsync_folder(path: str | Path) -> None:
    """Flush the folder's list of names to the disk: after it, a rename survives a power cut.

    Windows has no such call, and keeps the order of renames itself.
    """
    if _FOLDER is None:
        return
    descriptor = os.open(path, os.O_RDONLY | _FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str | Path) -> None:
    """Flush the file's content to the disk, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of the file's bytes as 64 lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_locked(folder: str | Path) -> bool | None:
    """Return whether a process has the right to write in a run's folder; None: nobody can tell."""
    path = Path(folder) / LOCK_NAME
    if not path.is_file():
        return None
    lock = FileLock(path, mode=stat.S_IMODE(path.stat().st_mode))
    try:
        with warnings.catch_warnings(action="ignore"):
            lock.acquire(blocking=False)
    except Timeout:
        return True if isinstance(lock, FileLock) else None
    except (OSError, NotImplementedError):
        return None
    lock.release()
    return False if isinstance(lock, FileLock) else None


class RunLock:
    """The right to write in a run's folder, held by one process at a time.

    ```python
    with RunLock(run_folder):
        ...
    ```

    The lock is the system's (`filelock` on `run.lock`), so it ends with the process however that
    ends, SIGKILL included. The files stay, and `run.lock.json` names the last holder. Where the
    file system has no locks, a note says so.

    Raises:
        UserError: on entering, when another process holds the lock (which one, and where), or the
            folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> RunLock:
        if self._lock is not None:
            raise RuntimeError(f"the lock on {self.folder} is already held by this object")
        path = self.folder / LOCK_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written as a run folder ({error.strerror}); "
                "choose another one with train.output_dir"
            ) from None
        self._lock = FileLock(path, mode=stat.S_IMODE(path.stat().st_mode))
        has_locks = True
        try:
            with warnings.catch_warnings(action="ignore"):  # that it takes a file as the lock
                self._lock.acquire(blocking=False)
        except Timeout:
            has_locks = isinstance(self._lock, FileLock)
            if has_locks:
                self._lock = None
                raise UserError(
                    f"{self.folder}: run folder in use by {self._holder()}; wait until it ends, "
                    "stop it, or choose another folder with train.output_dir"
                ) from None
        except (OSError, NotImplementedError):
            has_locks = False
        # Without locks the library takes a mere file for one; a kill would leave it, and it would
        # keep every later run out.
        if not (has_locks and isinstance(self._lock, FileLock)):
            self._lock.release()
            note(
                f"{self.folder}: this file system has no locks: make sure that no second process "
                "writes to this run"
            )
        # Who holds it is a courtesy: where it cannot be written, the run will say so.
        with contextlib.suppress(OSError):
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            (self.folder / HOLDER_NAME).write_text(json.dumps(holder), encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()
            self._lock = None

    def _holder(self) -> str:
        """Return who holds the lock; the holder may be in the middle of writing it."""
        try:
            holder = json.loads((self.folder / HOLDER_NAME).read_bytes())
            return f"process {int(holder['process'])} on host {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
