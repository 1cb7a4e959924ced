"""Writing while the training goes on: one job in flight, and none of its errors lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """A thread that does one job after another, the next one only when the last one has ended.

    A job that failed stops the run: its error is raised by the next call of any method.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._job: Future[object] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Begin a job as soon as the one before it has ended.

        Raises:
            Exception: what the job before it ended with.
        """
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raise what a job that has ended ended with; wait for nothing."""
        if self._job is not None and self._job.done():
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether a job is in flight."""
        return self._job is not None and not self._job.done()

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            Exception: what the job ended with.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """End the thread after its job, whose error, if any, nobody is told any more."""
        self._thread.shutdown(wait=True)
