"""Signals become requests between steps; a second one ends the process at once."""

import os
import signal
import time

import pytest
from children import python

from train.process.signals import Signals


def test_requests_are_noted_and_handlers_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (signals.stop, signals.save) == (None, True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_exits_at_once() -> None:
    program = (
        "import os, signal\n"
        "from train.process.signals import Signals\n"
        "with Signals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never', flush=True)\n"
    )
    done = python("-c", program, code=128 + signal.SIGINT)
    assert done.stdout == "still here\n"
    # What the first one does is said at once: a step, or loading weights, may take a while.
    assert "Ctrl-C: stopping after the next whole step" in done.stderr


def test_torchrun_passes_on_what_every_process_got_and_that_is_one_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.stop, ended) == (signal.SIGTERM, [])
        now += 3
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]
