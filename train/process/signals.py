"""Signals become requests that the loop answers between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_APART_SECONDS = 2.0


class Signals:
    """SIGINT and SIGTERM ask to stop after the step in progress, SIGUSR1 asks for a checkpoint.

    A second SIGINT or SIGTERM exits at once, without saving. Under torchrun it is only a second one
    where some time lies between: what signals every process of a job reaches a rank twice, once by
    way of torchrun. Outside the main thread (some
    notebooks) Python allows no handlers, so nothing is installed there.

    Attributes:
        stop: The signal that asked to stop, None so far.
        save: Whether a checkpoint was asked for.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.save = False
        self._previous: dict[signal.Signals, Any] = {}
        self._asked_at = 0.0
        self._apart = _APART_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask_to_stop)
            if hasattr(signal, "SIGUSR1"):
                self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask_to_save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, _: FrameType | None) -> None:
        if self.stop is not None:
            if time.monotonic() - self._asked_at < self._apart:
                return
            os._exit(128 + number)
        self._asked_at = time.monotonic()
        self.stop = signal.Signals(number)
        # Written past Python's buffers, one of which this handler may have interrupted.
        name = "Ctrl-C" if number == signal.SIGINT else self.stop.name
        with contextlib.suppress(OSError):
            os.write(
                2,
                f"\n{name}: stopping after the next whole step, saved; once more stops at "
                "once, unsaved\n".encode(),
            )

    def _ask_to_save(self, _: int, __: FrameType | None) -> None:
        self.save = True
