"""A trace of a few steps, for Perfetto or chrome://tracing: `train.profile_steps`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile

PROFILE_FOLDER = "profile"


class StepTrace:
    """Traces the steps of a range with torch.profiler, from the first to the last, in one file.

    What is computed is the same, bit for bit: shapes are not recorded, for which the profiler would
    keep tensors alive. A run that is stopped between them leaves the trace of those that were done.

    Args:
        folder: The run's folder.
        steps: The steps; an empty range traces nothing.
        device: `cpu`, `cuda` or `mps`; of CUDA the card's side is traced too.
        say: Tells the user a line.
    """

    def __init__(self, folder: Path, steps: range, device: str, say: Callable[[str], None]) -> None:
        self._folder, self._steps, self._device, self._say = folder, steps, device, say
        self._profiler: profile | None = None
        self._done: list[int] = []

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Trace what is done in this block, where `step` is one of those asked for."""
        if step not in self._steps:
            yield
            return
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._profiler is None:
            card = [ProfilerActivity.CUDA] if self._device == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *card])
            self._profiler.start()
        with record_function(f"step {step}"):
            yield
        self._done.append(step)
        if step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """End the trace, if there is one, and write it."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if not self._done:
            return
        path = self._folder / PROFILE_FOLDER / f"steps-{self._done[0]}-{self._done[-1]}.json.gz"
        path.parent.mkdir(exist_ok=True)
        temporary = self._folder / f".tmp-{path.name}"
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        self._say(f"profiled: {path} (open it in Perfetto, or at chrome://tracing)")
