"""Whether something else keeps the cores busy that a run on the CPU computes on.

OpenMP's threads share each operation and spin while they wait for the last of them. Where another
process takes a core away, all wait for the thread that lost it, on cores that they keep busy
themselves: a run becomes not twice but 20 times as slow, and nothing shows why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

# Long enough that a compiler that comes and goes is not worth a line.
WINDOW_SECONDS = 20.0
# Share of their time that a run's threads wait for a core; alone on a machine it is below 1 %.
MUCH = 0.25

# Tokens a second of the demo, measured; LOG.md has the commands and the machine.
FIGURES = "102 tokens/s, 2,478 with the first and 1,509 with OMP_NUM_THREADS=1"

Times = Mapping[str, tuple[int, int]]


def thread_times() -> Times:
    """Return for each thread of this process how long it ran, and waited for a core to run on.

    In ns, as Linux counts them (`schedstat`); empty elsewhere.
    """
    found = {}
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            with suppress(OSError, ValueError):  # it has ended
                ran, waited, _ = (thread / "schedstat").read_text().split()
                found[thread.name] = int(ran), int(waited)
    return found


class BusyCores:
    """Tells once, between two steps, that threads of this process wait much for a core."""

    def __init__(
        self,
        # Whether there is anything to tell: threads that wait for each other by spinning.
        spinning: bool,
        times: Callable[[], Times] = thread_times,  # the times of the threads so far
        clock: Callable[[], float] = time.monotonic,  # seconds that only go forward
    ) -> None:
        self._to_tell = spinning
        self._times, self._clock = times, clock
        self.restart()

    def restart(self) -> None:
        """Leave out what was until now: the run itself kept its cores busy."""
        if self._to_tell:
            self._since, self._before = self._clock(), self._times()

    def waiting(self) -> float | None:
        """Return the share of their time that threads waited, where it is much, once; else None."""
        if not self._to_tell or self._clock() - self._since < WINDOW_SECONDS:
            return None
        before, now = self._before, self._times()
        ran = sum(now[thread][0] - before[thread][0] for thread in now.keys() & before.keys())
        waited = sum(now[thread][1] - before[thread][1] for thread in now.keys() & before.keys())
        self.restart()
        if waited <= MUCH * (ran + waited):
            return None
        self._to_tell = False
        return waited / (ran + waited)


def threads_spin(device: str, threads: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a run's threads wait for each other by spinning."""
    passive = environment.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
    return device == "cpu" and threads > 1 and not passive


def busy_text(waiting: float, resume: str) -> str:
    """Return what to tell the user; `resume` is the command that goes on with the run."""
    return (
        f"the cores are busy with something else: threads of this run waited {waiting:.0%} of "
        "their time for one, and OpenMP's threads, which spin while they wait for each other, then "
        "lose far more than that. Free the cores, or stop here (Ctrl-C saves) and go on with\n"
        f"  OMP_WAIT_POLICY=passive {resume}\n"
        "or with OMP_NUM_THREADS=N for N free cores, which may change the last bits (measured with "
        f"a busy process on each of two cores: {FIGURES})"
    )
