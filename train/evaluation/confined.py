"""What a child process does to run a program that a model wrote: bind its own hands, then run it.

Nothing here is a wall against somebody who means harm; it keeps the mistakes of a model from doing
any. In this order: limits of memory, processor time, files and their sizes; where the kernel can be
asked (Linux on x86-64 and ARM64), no further process or thread, no socket, no signal to others, and
no file outside the program's folder; and in Python itself, an audit hook, which no program can take
out again, that refuses the same, and to load libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

from data.limited import limit_resources, one_line

PROGRAM_FILE = "program.py"
FILES_WRITTEN = 64  # of at most a MiB each
_OPEN_FILES = 64

# What is refused: beginnings of audit events' names.
_REFUSED = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.kill", "os.startfile", "ctypes.", "pty.", "webbrowser.", "syslog.", "urllib."),
)
# What changes files: name of the audit event → which of its arguments are paths, and whether its
# last ones are the folders that these are relative to, as file descriptors.
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod"), (slice(0, 1), True)),
    **dict.fromkeys(("os.chown", "os.utime"), (slice(0, 1), True)),
    **dict.fromkeys(("os.truncate", "os.chflags", "os.lchown"), (slice(0, 1), False)),
    **dict.fromkeys(("os.setxattr", "os.removexattr"), (slice(0, 1), False)),
    **dict.fromkeys(("os.rename", "os.link"), (slice(0, 2), True)),
    "os.symlink": (slice(1, 2), True),
}

# Of each machine: the kernel's number for it, and those of the calls that are refused.
# Source: Linux 6.18, include/uapi/linux/audit.h and arch/*/tools/syscall*.tbl.
_CALLS = {
    "x86_64": (
        0xC000003E,
        # socket socketpair clone fork vfork execve kill ptrace tkill tgkill execveat
        (41, 53, 56, 57, 58, 59, 62, 101, 200, 234, 322),
    ),
    "aarch64": (
        0xC00000B7,
        # ptrace tkill kill tgkill socket socketpair clone execve execveat
        (117, 130, 129, 131, 198, 199, 220, 221, 281),
    ),
}
# The same everywhere: pidfd_send_signal io_uring_setup pidfd_open clone3.
_CALLS_OF_ALL = (424, 425, 434, 435)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_SECCOMP, _NO_NEW_PRIVILEGES = 22, 38


def kernel_refuses() -> bool:
    """Return whether the kernel can be asked to refuse calls on this machine."""
    return sys.platform == "linux" and platform.machine() in _CALLS


def run(memory: int, seconds: int) -> None:
    """Run the program in the current folder, and say to standard output how it ended.

    Standard input holds a token that nobody can guess. It is read when the program has come to its
    end, and is written out then; a program that leaves before, in whatever way, has not passed.

    Args:
        memory: Bytes of address space.
        seconds: Time for the program.
    """
    token_file, answer_file, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    read, write, leave = os.read, os.write, os._exit
    with open(PROGRAM_FILE, encoding="utf-8") as file:
        source = file.read()
    limit_resources(memory, CPU=seconds + 2, NPROC=0, NOFILE=_OPEN_FILES)
    if kernel_refuses():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the kernel lets no process give up privileges")
        _write_here_alone(libc)
        _refuse_calls(libc)
    sys.addaudithook(_guard(os.path.realpath(".")))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        exec(compile(source, PROGRAM_FILE, "exec"), {"__name__": "program"})
    except BaseException as error:
        with contextlib.suppress(BaseException):  # what the program raised may raise again
            said = one_line(f"{type(error).__name__}: {error}").encode("utf-8", "replace")
            write(answer_file, said)
        leave(1)
    write(answer_file, read(token_file, 2**10))
    leave(0)


def _guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that lets files be changed in `folder` alone, and little else happen."""
    left = FILES_WRITTEN
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, fsdecode, null, inside = os.path.realpath, os.fsdecode, os.devnull, folder + os.sep

    def within(path: Any, base: int = -1) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = fsdecode(path)
        text = real(text if base == -1 else f"/dev/fd/{base}/{text}")
        return text == null or text.startswith(inside)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = given
            if flags & writing and not isinstance(path, int):
                left -= 1
                if left < 0 or not within(path):
                    raise PermissionError(f"writes {path!r}")
        elif event in _CHANGES:
            which, relative = _CHANGES[event]
            paths = given[which]
            bases = given[-len(paths) :] if relative else [-1] * len(paths)
            if not all(map(within, paths, bases)):
                raise PermissionError(f"{event} {paths!r}")
        elif event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not for programs under test")

    return hook


def _write_here_alone(libc: ctypes.CDLL) -> None:
    """Have the kernel refuse files outside the current folder, if it can: Landlock.

    Source: landlock(7) of Linux 6.18.
    """
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    # Write a file, remove and make anything; later kernels know of moving and truncating too.
    write, newer = 1 << 1, (1 << 13) * (version >= 2) | (1 << 14) * (version >= 3)
    changes = write | newer | sum(1 << bit for bit in range(4, 13))
    rules = libc.syscall(_CREATE_RULESET, struct.pack("Q", changes), 8, 0)
    for place, allowed in ((".", changes), (os.devnull, write)):
        opened = os.open(place, os.O_PATH)
        if libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, opened), 0):
            raise OSError(ctypes.get_errno(), "the kernel takes no rule for files")
        os.close(opened)
    if libc.syscall(_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no rules for files")
    os.close(rules)


def _refuse_calls(libc: ctypes.CDLL) -> None:
    """Have the kernel answer calls for processes, sockets and signals with "not permitted".

    Source: seccomp(2), bpf of Linux: (code, jump if true, jump if false, operand).
    """
    machine, calls = _CALLS[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow = (answer, 0, 0, 0x00050000 | errno.EPERM), (answer, 0, 0, 0x7FFF0000)
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), refuse, (load, 0, 0, 0)]
    # Above are x86-64's calls of another kind (x32), which no Python makes.
    program += [(at_least, 0, 1, 0x40000000), refuse]
    for number in (*calls, *_CALLS_OF_ALL):
        program += [(equal, 0, 1, number), refuse]
    packed = b"".join(struct.pack("HBBI", *line) for line in (*program, allow))
    lines = ctypes.create_string_buffer(packed, len(packed))
    # struct sock_fprog: a count, and behind its padding a pointer.
    described = struct.pack("HxxxxxxP", len(program) + 1, ctypes.addressof(lines))
    if libc.prctl(_SECCOMP, 2, described, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of calls")
