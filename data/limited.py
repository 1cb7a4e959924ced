"""Work on files that nobody has vouched for, in a child process with a time and a memory limit.

What a downloaded tokenizer or chat template does, its author decides: it may run for ever, ask for
all memory there is, or abort the process. So it does it in a child, which a module serves with one
function:

    def answer(request: Any) -> Iterator[Any]: ...

Requests and answers are JSON, a line each, through pipes. Each answer has its own time limit; a
child that breaks a limit or dies is killed, and the next question starts another. Where the system
knows no memory limit for a process (macOS, Windows), a note says so and the time limit still holds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from files.child import python
from files.errors import UserError, note

ANSWER_SECONDS = 5.0
MEMORY_BYTES = 2**30
# Starting takes 0.1 s, but many nodes that read Python from one network disk need far longer.
_START_SECONDS = 120.0
# What the child may write into files: there is only the text of its own death.
_WRITE_BYTES = 2**20
# A child has one thread: each more would reserve address space that counts against its limit.
_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}
_PROGRAM = "import json; from data.limited import serve; serve(*json.loads(sys.argv[1]))"


class _BrokenError(Exception):
    """The child broke a limit or died; the message says how, as the predicate of a sentence."""


class LimitedChild:
    """A process that answers for one module, started by the first question.

    Several threads may ask; a process forked from this one starts a child of its own.

    Args:
        module: Name of the module with the function `answer`.
        memory: Bytes of address space that the child may have.
        seconds: Time for one answer.
    """

    def __init__(
        self, module: str, *, memory: int = MEMORY_BYTES, seconds: float = ANSWER_SECONDS
    ) -> None:
        self._module = module
        self._memory = memory
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def ask(self, request: str, subject: Callable[[int], str], remedy: str) -> list[Any]:
        """Return all answers to a request.

        Args:
            request: JSON.
            subject: What the child works on after so many answers: messages begin with it.
            remedy: What to do when a limit is broken: messages end with it.

        Raises:
            UserError: The module refused the request (its own sentence), or the child took too
                long, needed too much memory, or died.
        """
        answers: list[Any] = []
        with self._lock:
            try:
                refusal = self._exchange(request.encode() + b"\n", answers)
            except _BrokenError as error:
                self._close()
                raise UserError(f"{subject(len(answers))} {error}; {remedy}") from None
            except BaseException:  # Ctrl-C in the middle: the answer would be the next one's
                self._close()
                raise
        if refusal is not None:
            raise UserError(refusal)
        return answers

    def close(self) -> None:
        """End the child, if there is one; a later question starts another."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _exchange(self, line: bytes, answers: list[Any]) -> str | None:
        """Collect the answers, and return why the module refused to go on, if it did."""
        if self._child is None or self._child.owner != os.getpid():
            self._close()
            self._child = _Child(self._module, self._memory, self._seconds)
            atexit.unregister(self.close)
            atexit.register(self.close)
        self._child.send(line)
        while "end" not in (message := self._child.receive(self._seconds)):
            answers.append(message["answer"])
        return message["end"]


class _Child:
    """One process and its pipes."""

    def __init__(self, module: str, memory: int, seconds: float) -> None:
        self.owner = os.getpid()
        self._memory = memory
        self._seconds = seconds
        self._unread = bytearray()
        try:
            self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
            # A session of its own: Ctrl-C in the terminal is the parent's business.
            self._process = subprocess.Popen(
                python(_PROGRAM, json.dumps([module, memory, seconds])),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            raise _BrokenError(f"needs a child process, and none starts ({error})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        # A thread reads, since not every system can wait for a pipe with a time limit.
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            if not self.receive(_START_SECONDS)["memory_is_limited"]:
                _note_unlimited_memory()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        """Pass on what the child writes, and at its end an empty piece."""
        piece = b"more"
        with self._answers:
            while piece:
                piece = os.read(self._answers.fileno(), 2**16)
                self._arrived.put(piece)

    def send(self, line: bytes) -> None:
        # It cannot block for long: a child reads the whole line before it answers.
        try:
            self._requests.write(line)
            self._requests.flush()
        except OSError:
            raise _BrokenError(self._death()) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message of the child."""
        deadline = time.monotonic() + seconds
        searched = 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            try:
                piece = self._arrived.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise _BrokenError(f"took more than {seconds:.3g} s") from None
            if not piece:
                raise _BrokenError(self._death())
            self._unread += piece
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return json.loads(line)

    def close(self) -> None:
        """Kill the process, if it is this one's child, and let go of the pipes."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._reader.join(timeout=1)  # at once, unless a process of the child's own lives on
        else:
            self._answers.close()  # the reader is the parent's thread
        self._printed.close()
        with contextlib.suppress(OSError):  # a request may be left that nobody reads any more
            self._requests.close()

    def _death(self) -> str:
        """Return how the process ended, which it has just done."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its pipe and went on"
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            return f"took more than {self._seconds:.3g} s"
        self._printed.seek(0)
        text = self._printed.read(_WRITE_BYTES).decode("utf-8", "replace")
        # What Rust says before it aborts, and the name of Python's exception.
        if "memory allocation of" in text or "MemoryError" in text:
            return f"needed more than {self._memory // 2**20} MiB of memory"
        said = f" (it said: {one_line(text.strip().rpartition(chr(10))[2])})" if text else ""
        if code < 0:
            names = {known.value: known.name for known in signal.Signals}
            return f"died by signal {names.get(-code, -code)}{said}"
        return f"ended with exit code {code}{said}"


def one_line(text: str, most: int = 300) -> str:
    """Return what others wrote as one line for a message: no control characters, not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * most])
    line = " ".join(line.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


@functools.cache
def _note_unlimited_memory() -> None:
    """Say once what is not bounded here."""
    note(
        "this system sets no limit to a process's memory: the time that a tokenizer or a chat "
        "template takes is bounded, what it allocates is not"
    )


def serve(module: str, memory: int, seconds: float) -> None:
    """Answer the requests on standard input until it ends: the child's main function."""
    # What a library prints must not be taken for an answer: it goes where the errors go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    memory_is_limited = limit_resources(memory)

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    answer = importlib.import_module(module).answer
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it may come as ignored by the parent
    tell({"memory_is_limited": memory_is_limited})
    for line in sys.stdin.buffer:
        try:
            _end_oneself_after(seconds)
            for value in answer(json.loads(line)):
                tell({"answer": value})
                _end_oneself_after(seconds)
            refusal = None
        except UserError as error:
            refusal = str(error)
        _end_oneself_after(None)
        tell({"end": refusal})


def limit_resources(memory: int, **others: int) -> bool:
    """Set what limits the system knows for this process; return whether memory's is among them.

    Args:
        memory: Bytes of address space.
        others: Further limits by their names in `resource`, without `RLIMIT_`.
    """
    try:
        import resource
    except ImportError:  # Windows
        return False
    refused = set()
    for kind, most in {"AS": memory, "CORE": 0, "FSIZE": _WRITE_BYTES, **others}.items():
        limit = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(limit)[1]
        lowest = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (lowest, lowest))
        except (ValueError, OSError):  # macOS takes no RLIMIT_AS
            refused.add(kind)
    return "AS" not in refused


def _end_oneself_after(seconds: float | None) -> None:
    """End this process a second after the parent would: the parent may have been killed."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0 if seconds is None else seconds + 1)
