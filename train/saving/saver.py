"""What a run keeps on the disk while it trains: checkpoints, `best/`, `final/`, status.json."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from files.atomic import write_json
from files.faults import faultpoint
from files.folders import replace_folder
from files.tensors import TensorFile
from lora import count_parameters, fill_adapter
from models.weights import fill
from train.config.schema import LOWER_IS_BETTER
from train.inputs.base_model import base_dtype
from train.inputs.sharding import place, reshard
from train.process.room import available_memory
from train.saving.checkpoints import Checkpoints, room_on_disk
from train.saving.folder import (
    export,
    trained_tensors,
    utc_now,
    write_trained,
)
from train.saving.shares import (
    Tensors,
    copied,
    held_bytes,
    num_bytes,
    optimizer_tensors,
    writer_of,
)
from train.state import Run

# Writes files into a folder, and returns the sha256 of those that it hashed.
Fill = Callable[[Path], Mapping[str, str]]


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


@dataclass
class Saver:
    """Writes the state of a run: what is to be saved is copied, and written in the background.

    Every rank comes to every method. Rank 0 writes; where ranks share what is trained, each writes
    its rows into the files that rank 0 begins.
    """

    run: Run  # the run, live
    checkpoints: Checkpoints  # those of its folder
    # Returns what a resumed run must agree with (`train.saving.identity`), once made.
    identity: Callable[[], dict[str, Any]]
    # Brings the rows of metrics.jsonl to the disk, which a checkpoint relies on.
    sync: Callable[[], None]
    writer: BackgroundWriter  # what writes in the background

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()
        self._number = 0

    def is_due(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last checkpoint."""
        minutes = self.run.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, *, best: bool, checkpoint: bool) -> None:
        """Copy the state, and write `best/` or the step's checkpoint, or both, from the copy.

        The writing is done in the background: training waits for the copy alone, and for a save
        before this one that is not done yet. Where the host has no room for a copy, it waits for
        the writing. A checkpoint is written after the `best/` that it speaks of.

        Raises:
            UserError: The save before this one could not be written.
        """
        run = self.run
        if checkpoint:
            self._saved_at = time.monotonic()
        if not self._writes:
            return
        self.writer.wait()
        # First: it notes the highest use of memory, which the state holds too.
        status = self.status("running", "training")
        run.state.scaler = run.scaler.state() if run.scaler is not None else None
        tensors = trained_tensors(run)
        moments = optimizer_tensors(run.optimizer) if checkpoint else {}
        room = available_memory("cpu")
        in_background = room is None or 2 * (held_bytes(tensors) + held_bytes(moments)) < room
        if in_background:
            tensors, moments = copied(tensors), copied(moments)
        faultpoint("save.copied")
        self._number += 1
        write = partial(
            self._write,
            f"save-{self._number}",
            run.state.to_dict(),
            status,
            tensors,
            moments if checkpoint else None,
            best,
        )
        if in_background:
            self.writer.submit(write)
        else:
            write()

    @property
    def _writes(self) -> bool:
        """Whether this rank has something to write: rank 0, and all that share what is trained."""
        return self.run.world.first or self.run.optimizer.sharing is not None

    def _write(
        self,
        key: str,
        state: dict[str, Any],
        status: dict[str, Any],
        tensors: Tensors,
        moments: Tensors | None,
        best: bool,
    ) -> None:
        """Write what `save` copied: `best/`, then the checkpoint, then the status.

        Without `moments`, the optimizer's tensors, no checkpoint is written.
        """
        faultpoint("save.begun")
        run = self.run
        if best:
            self._replace(
                f"{key}-best", "best", partial(export, run, tensors=tensors), state["step"]
            )
        if moments is not None:
            self.sync()
            self._together(
                f"{key}-checkpoint",
                lambda fill: self.checkpoints.save(
                    state, self.identity(), fill, num_bytes(tensors) + num_bytes(moments)
                ),
                lambda folder: {
                    **write_trained(run, tensors, folder, base_dtype(run.config)),
                    "optimizer.safetensors": writer_of(run)(
                        folder / "optimizer.safetensors", moments
                    ),
                },
            )
            if run.world.first:
                write_json(run.folder / "status.json", status)
        faultpoint("save.done")

    def replace(self, name: str, fill: Fill, step: int) -> None:
        """Make `best/` or `final/` anew: the state of `step`, which `fill` writes.

        Raises:
            UserError: The disk is full.
        """
        if self._writes:
            self._number += 1
            self._replace(f"replace-{self._number}", name, fill, step)

    def _replace(self, key: str, name: str, fill: Fill, step: int) -> None:
        folder = self.run.folder
        remedy = "make room and continue with --resume"

        def make(fill: Fill) -> None:
            room = num_bytes(trained_tensors(self.run))
            with room_on_disk(f"{name}/ of step {step}", folder, room, remedy):
                replace_folder(folder / name, fill, step=step)

        self._together(key, make, fill)

    def _together(self, key: str, make: Callable[[Fill], object], fill: Fill) -> None:
        """Let rank 0 `make` a folder that all ranks fill, each with its rows of shared tensors.

        `make` is given what fills the folder, and need not call it where all is there already.
        """
        run, told = self.run, False
        if run.optimizer.sharing is None:
            make(fill)
            return
        if not run.world.first:
            place = run.world.told(key)
            if place:
                fill(Path(place))
            return

        def announced(folder: Path) -> Mapping[str, str]:
            nonlocal told
            told = True
            run.world.told(key, lambda: str(folder))
            return fill(folder)

        make(announced)
        if not told:
            run.world.told(key)

    def status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Return the content of status.json.

        Args:
            condition: `running`, `finished`, `preempted` or `failed`.
            reason: Why: `started`, `completed`, `early_stopping`, `sigint`, `sigterm`,
                `non_finite`, `out_of_memory`, `error`.
            more: Further fields.
        """
        run, state = self.run, self.run.state
        state.peak_memory_bytes = max(state.peak_memory_bytes, run.memory.peak)
        best_step, distance = state.stopping.best_step, state.stopping.best_loss
        metric = run.config.eval.best_metric
        if metric not in LOWER_IS_BETTER and distance is not None:
            distance = 1 - distance
        parameters = count_parameters(run.model)
        return {
            "state": condition,
            "reason": reason,
            "step": state.step,
            "total_steps": run.plan.total_steps,
            "epoch": run.plan.epoch_of(state.step) if state.step else 0.0,
            "best": None if best_step is None else {"step": best_step, metric: distance},
            "seconds": state.seconds,
            "tokens": state.tokens,
            "targets": state.targets,
            "skipped": state.skipped,
            "peak_memory_bytes": state.peak_memory_bytes,
            "resumed_from": list(state.resumed_from),
            "process": os.getpid(),
            "updated": utc_now(),
            "memory_before_bytes": run.memory.peak_before,
            "training_memory_bytes": run.memory.training,
            "trainable_parameters": parameters.trainable,
            "total_parameters": parameters.total,
            "samples": [asdict(sample) for sample in run.samples],
            **more,
        }

    def write_status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Write status.json and return it."""
        status = self.status(condition, reason, **more)
        if self.run.world.first:
            write_json(self.run.folder / "status.json", status)
        return status


def load_trained(run: Run, folder: Path) -> None:
    """Put the trained tensors of a checkpoint, `best/` or `final/` into the model, in place."""
    if run.config.train.method == "lora":
        with TensorFile(folder / "adapter_model.safetensors") as file:
            fill_adapter(run.model, {name: file.read(name) for name in file.names})
        return
    reshard(run.model)
    fill(run.model, folder, torch.float32, run.precision.device, place)
