"""Whether others want this machine's cores: said once, with what helps.

OpenMP's threads wait for each other by spinning. Where another process has one of their cores, all
of them burn time until that one comes back, and training slows down far more than in proportion.
"""

from __future__ import annotations

import time
from pathlib import Path

# Long enough that a compiler or a backup that comes and goes is not worth a line.
WINDOW_SECONDS = 20.0
# A process that has the machine for itself waits for a core about never; beside one other on each
# core it waits half of the time.
SHARE = 0.25
REMEDY = (
    "threads that wait for each other spin, and each of these makes them yield: start again with "
    "OMP_WAIT_POLICY=passive in the environment, or with OMP_NUM_THREADS set to the cores that are "
    "free (a resumed run ends in the same bits with the same number of threads)"
)


class BusyCores:
    """Watches how long this process's threads are ready to run and get no core.

    The figures are the kernel's own (`/proc/self/task/*/schedstat`: time on a core, time waiting
    for one, both in ns); where there are none, nothing is ever said.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._said = False
        self._since = time.monotonic()
        self._before = self._times()

    def observe(self) -> str | None:
        """Return the one sentence where the cores are busy with something else, else None."""
        if self._said or time.monotonic() - self._since < WINDOW_SECONDS:
            return None
        now, before = self._times(), self._before
        self._since, self._before = time.monotonic(), now
        both = now.keys() & before.keys()
        ran = sum(now[task][0] - before[task][0] for task in both)
        waited = sum(now[task][1] - before[task][1] for task in both)
        if waited <= SHARE * (ran + waited):
            return None
        self._said = True
        share = waited / (ran + waited)
        return (
            f"the cores are busy with something else: {share:.0%} of the time is spent waiting "
            + (f"for one; {REMEDY}")
        )

    def _times(self) -> dict[str, tuple[int, int]]:
        """Return thread → (ns on a core, ns waiting for one)."""
        found = {}
        try:
            for task in self._tasks.iterdir():
                ran, waited, _ = (task / "schedstat").read_text().split()
                found[task.name] = int(ran), int(waited)
        except (OSError, ValueError):  # no such system, or a thread that ended meanwhile
            return found
        return found
