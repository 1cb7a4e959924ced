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
from torch import Tensor

from files.atomic import write_json
from files.faults import faultpoint
from files.folders import replace_folder
from files.tensors import TensorFile, write_tensors
from lora import fill_adapter
from models.weights import fill
from train.plan.decide import available_memory
from train.saving.checkpoints import Checkpoints, room_on_disk
from train.saving.folder import export, trained_tensors, utc_now, write_trained
from train.state import Run


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
    """Writes the state of a run: what is to be saved is copied, and written in the background."""

    run: Run  # the run, live
    checkpoints: Checkpoints  # those of its folder
    # Returns what a resumed run must agree with (`train.saving.identity`), once made.
    identity: Callable[[], dict[str, Any]]
    # Brings the rows of metrics.jsonl to the disk, which a checkpoint relies on.
    sync: Callable[[], None]
    writer: BackgroundWriter  # what writes in the background

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()

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
        self.writer.wait()
        run = self.run
        # First: it notes the highest use of memory, which the state holds too.
        status = self.status("running", "training")
        run.state.scaler = run.scaler.state() if run.scaler is not None else None
        tensors = trained_tensors(run.model, run.config)
        moments = run.optimizer.state_tensors() if checkpoint else {}
        room = available_memory("cpu")
        in_background = room is None or 2 * (_num_bytes(tensors) + _num_bytes(moments)) < room
        if in_background:
            tensors, moments = _copied(tensors), _copied(moments)
        faultpoint("save.copied")
        write = partial(
            self._write,
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
        if checkpoint:
            self._saved_at = time.monotonic()

    def _write(
        self,
        state: dict[str, Any],
        status: dict[str, Any],
        tensors: dict[str, Tensor],
        moments: dict[str, Tensor] | None,
        best: bool,
    ) -> None:
        """Write what `save` copied: `best/`, then the checkpoint, then the status.

        Without `moments`, the optimizer's tensors, no checkpoint is written.
        """
        faultpoint("save.begun")
        if best:
            self.replace("best", partial(export, self.run, tensors=tensors), state["step"])
        if moments is not None:
            self.sync()
            self.checkpoints.save(
                state,
                self.identity(),
                lambda folder: {
                    **write_trained(self.run, tensors, folder, torch.float32),
                    "optimizer.safetensors": write_tensors(
                        folder / "optimizer.safetensors", moments
                    ),
                },
                expected_bytes=_num_bytes(tensors) + _num_bytes(moments),
            )
            write_json(self.run.folder / "status.json", status)
        faultpoint("save.done")

    def replace(self, name: str, fill: Callable[[Path], Mapping[str, str]], step: int) -> None:
        """Make `best/` or `final/` anew: the state of `step`, which `fill` writes.

        Raises:
            UserError: The disk is full.
        """
        folder = self.run.folder
        room = _num_bytes(trained_tensors(self.run.model, self.run.config))
        remedy = "make room and continue with --resume"
        with room_on_disk(f"{name}/ of step {step}", folder, room, remedy):
            replace_folder(folder / name, fill, step=step)

    def status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Return the content of status.json.

        Args:
            condition: `running`, `finished`, `preempted` or `failed`.
            reason: Why: `started`, `completed`, `early_stopping`, `sigint`, `sigterm`,
                `non_finite`, `error`.
            more: Further fields.
        """
        run, state = self.run, self.run.state
        state.peak_memory_bytes = max(state.peak_memory_bytes, run.memory.peak)
        best_step, best_loss = state.stopping.best_step, state.stopping.best_loss
        parameters = list(run.model.parameters())
        return {
            "state": condition,
            "reason": reason,
            "step": state.step,
            "total_steps": run.plan.total_steps,
            "epoch": run.plan.epoch_of(state.step) if state.step else 0.0,
            "best": None if best_step is None else {"step": best_step, "loss": best_loss},
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
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "total_parameters": sum(p.numel() for p in parameters),
            "samples": [asdict(sample) for sample in run.samples],
            **more,
        }

    def write_status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Write status.json and return it."""
        status = self.status(condition, reason, **more)
        write_json(self.run.folder / "status.json", status)
        return status


def load_trained(run: Run, folder: Path) -> None:
    """Put the trained tensors of a checkpoint, `best/` or `final/` into the model, in place."""
    if run.config.train.method == "lora":
        with TensorFile(folder / "adapter_model.safetensors") as file:
            fill_adapter(run.model, {name: file.read(name) for name in file.names})
    else:
        fill(run.model, folder, torch.float32, run.precision.device)


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
