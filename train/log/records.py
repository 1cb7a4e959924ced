"""What a run records of its steps and evaluations: metrics.jsonl, TensorBoard, the console."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from train.log.busy_cores import BusyCores, busy_text, threads_spin
from train.log.console import Console
from train.log.metrics import Metrics
from train.log.step_trace import StepTrace
from train.process.command import command
from train.process.memory import peak_memory
from train.state import EvalResult, Run, StepResult


class Records:
    """The records of one run: `step` and `evaluation` enter what happened, once, everywhere.

    Rank 0 alone has any (`metrics`); the others are silent.
    """

    def __init__(self, run: Run, busy: Callable[[], bool]) -> None:
        """Open them, to go on after the steps that the run's state has done.

        `busy` tells whether this process itself keeps a core busy beside the training, now.
        """
        log, done = run.config.log, run.state.step
        device = run.precision.device
        self.run, self.busy = run, busy
        self.metrics = None
        if run.world.first:
            self.metrics = Metrics(run.folder, tensorboard=log.tensorboard, resume_step=done)
        self.console = Console(
            log.progress,
            run.plan.total_steps,
            first_step=done,
            memory=lambda: float(peak_memory(device)),
        )
        self.cores = BusyCores(threads_spin(device.type, torch.get_num_threads()))
        traced = run.plan.profile_steps if run.world.first else range(0)
        self.trace = StepTrace(run.folder, traced, device.type, self.say)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.say(text)

    def sync(self) -> None:
        """Bring every row to the disk itself, as a checkpoint that relies on them needs."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        """Take the progress line away, and bring everything to the disk, a trace begun too."""
        self.trace.close()
        self.console.close()
        if self.metrics is not None:
            self.metrics.close()

    def step(self, result: StepResult, spike: float | None) -> None:
        """Enter the step just done; a `spike` is how many standard deviations its loss is above."""
        if self.metrics is None:
            return
        run, step = self.run, self.run.state.step
        numbers = asdict(result)
        del numbers["skipped"], numbers["examples"]
        row: dict[str, Any] = {"step": step, "epoch": run.plan.epoch_of(step), **numbers}
        if result.skipped is not None:
            row["skipped"] = result.skipped
        if spike is not None:
            row["spike"] = spike
        if result.skipped is not None or spike is not None:
            row["examples"] = list(result.examples)
            row["rows"] = [run.data.train.row_of(index) for index in result.examples]
        if run.state.micro_batch_divisor > 1:
            row["micro_batch_divisor"] = run.state.micro_batch_divisor
        if run.state.gradient_checkpointing is not None:
            row["gradient_checkpointing"] = run.model.gradient_checkpointing
        if run.scaler is not None:
            row["loss_scale"] = run.scaler.scale
        log = run.plan.logs_at(step)
        memory = {"memory/peak_gib": peak_memory(run.precision.device) / 2**30} if log else None
        self.metrics.train(row, log=log, extra=memory)
        self.console.train(row, log=log)
        if self.busy():
            self.cores.restart()
        elif (waiting := self.cores.waiting()) is not None:
            resume = f"{command()} --resume {shlex.quote(str(run.folder))}"
            self.say(busy_text(waiting, resume))

    def evaluation(
        self, split: str, result: EvalResult, *, best: bool = False, train_loss: float | None = None
    ) -> None:
        """Enter an evaluation, and the mean loss of the steps since the last one."""
        if self.metrics is None:
            return
        row = {
            "step": self.run.state.step,
            "split": split,
            "loss": result.loss,
            "targets": result.targets,
            "best": best,
            "train_loss": train_loss,
            "seconds": result.seconds,
        }
        for name in self.run.config.eval.metrics or ():
            row[name] = result.value(name)
        if result.reduced_batch_size is not None:
            row["reduced_batch_size"] = result.reduced_batch_size
        if result.holes:
            row["holes"] = result.holes
        if result.completed:
            row["completed"] = result.completed
        row |= result.rates
        self.metrics.eval(row)
        self.console.eval(row)
