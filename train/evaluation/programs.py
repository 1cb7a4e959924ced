"""Programs that a model wrote, each run in a limited child process of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from files.child import python
from files.errors import UserError
from train.evaluation.confined import PROGRAM_FILE, kernel_refuses

MEMORY_BYTES = 2**30
SECONDS = 10
# The child ends itself in time, unless the program prevents it; starting may take long, too.
_PATIENCE_SECONDS = 3 * SECONDS + 30
_CHILD = "from train.evaluation.confined import run; run(*map(int, sys.argv[1:]))"


@dataclass(frozen=True)
class Outcome:
    """How a program ended: whether it came to its end, and if not, why."""

    passed: bool
    why: str = ""


def warning(asked: str = "--run-code") -> str:
    """Return what somebody who lets a model's programs run, as `asked`, has to know."""
    how = "by the kernel" if kernel_refuses() else "by Python alone, on this system"
    return (
        f"{asked} runs programs that a model wrote, with your rights: each in a process of its "
        f"own with {SECONDS} s, {MEMORY_BYTES // 2**20} MiB and an empty folder, where network, "
        f"further processes and files elsewhere are refused {how}; all the same they can read "
        "your files, and none of this is made to hold against a program that means harm: use a "
        "container or a machine without secrets"
    )


def require_limits(asked: str = "--run-code") -> None:
    """Refuse what was `asked` where a process cannot be limited.

    Raises:
        UserError: The system is not of Unix's kind.
    """
    if sys.platform == "win32":
        raise UserError(
            f"{asked}: this system cannot limit a process's time, memory and files; run it on "
            "Linux or macOS, such as in WSL or a container"
        )


def run_programs(
    sources: Sequence[str],
    seconds: int = SECONDS,
    *,
    asked: str = "--run-code",
    neighbours: int = 1,
) -> list[Outcome]:
    """Run programs, as many at once as there are cores, and return how each ended.

    Args:
        sources: Python sources; one that comes to its end without an error has passed.
        seconds: Time for each.
        asked: The option or setting that asked for it.
        neighbours: Processes of this machine that do so at the same time, and share its cores.

    Raises:
        UserError: No child process starts here, or none that can be limited.
    """
    require_limits(asked)
    if not (nothing := run_program("")).passed:
        raise UserError(
            f"{asked}: not even a program that does nothing comes to its end here, it "
            f"{nothing.why}; this system may not let a process be limited, use another one"
        )
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // neighbours)) as pool:
        try:
            return list(pool.map(lambda source: run_program(source, seconds, running), sources))
        except BaseException:  # Ctrl-C, which programs in sessions of their own do not hear
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                _kill(process)
            raise


def run_program(
    source: str, seconds: int = SECONDS, running: set[subprocess.Popen[bytes]] | None = None
) -> Outcome:
    """Run one program, as `run_programs` does; it is among `running` meanwhile."""
    running = set() if running is None else running
    token = secrets.token_hex(16).encode()
    with (
        tempfile.TemporaryDirectory(prefix="lathe-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as secret,
        tempfile.TemporaryFile() as answer,
    ):
        try:
            Path(folder, PROGRAM_FILE).write_text(source, encoding="utf-8", newline="\n")
        except UnicodeEncodeError:
            return Outcome(False, "is no text that a file can hold")
        secret.write(token)
        secret.seek(0)
        try:
            process = subprocess.Popen(
                python(_CHILD, str(MEMORY_BYTES), str(seconds)),
                stdin=secret,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"a program needs a child process, and none starts: {error}") from None
        running.add(process)
        try:
            code = process.wait(_PATIENCE_SECONDS + seconds - SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
            process.wait()
            running.discard(process)
        answer.seek(0)
        said = answer.read(2**12)
    if code == 0 and said == token:
        return Outcome(True)
    return Outcome(False, _why(code, said, seconds))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program, and what it may have started where the kernel did not refuse that."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(folder: str) -> dict[str, str]:
    """Return the few variables of a program: nothing of ours, where there may be secrets."""
    places = dict.fromkeys(("HOME", "TMPDIR", "TEMP", "TMP"), folder)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**places, **one_thread, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


def _why(code: int | None, said: bytes, seconds: int) -> str:
    if code is None or code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return f"took more than {seconds} s"
    if said:
        return said.decode("utf-8", "replace")
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}
        return f"died by signal {names.get(-code, -code)}"
    return f"left with exit code {code} before its tests were done"
