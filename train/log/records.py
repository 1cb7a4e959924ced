"""What a run records of its steps and evaluations: metrics.jsonl, TensorBoard, the console."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.config.schema import RunConfig
from train.inputs.dataset import Data
from train.log.busy_cores import BusyCores, busy_text, threads_spin
from train.log.console import Console
from train.log.metrics import Metrics
from train.plan.steps import RunPlan
from train.precision import LossScaler
from train.process.command import command
from train.process.memory import peak_memory
from train.state import EvalResult, StepResult, TrainState


@dataclass(frozen=True)
class Records:
    """The records of one run: `step` and `evaluation` enter what happened, once, everywhere."""

    plan: RunPlan
    data: Data
    state: TrainState
    scaler: LossScaler | None
    folder: Path
    device: torch.device
    metrics: Metrics
    console: Console
    cores: BusyCores
    busy: Callable[[], bool]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        plan: RunPlan,
        data: Data,
        state: TrainState,
        scaler: LossScaler | None,
        folder: Path,
        device: torch.device,
        *,
        busy: Callable[[], bool],
    ) -> Records:
        """Open a run's records, to go on after the steps that `state` has done.

        Args:
            config: The run's configuration.
            plan: Its plan: which steps are logged.
            data: Its rows, which steps that went wrong are told by.
            state: Its state, live.
            scaler: The loss scaler under fp16.
            folder: Where metrics.jsonl and TensorBoard's events lie.
            device: Whose memory is told.
            busy: Whether this process itself keeps a core busy beside the training, now.
        """
        return cls(
            *(plan, data, state, scaler, folder, device),
            metrics=Metrics(folder, tensorboard=config.log.tensorboard, resume_step=state.step),
            console=Console(
                config.log.progress,
                plan.total_steps,
                first_step=state.step,
                memory=lambda: float(peak_memory(device)),
            ),
            cores=BusyCores(threads_spin(device.type, torch.get_num_threads())),
            busy=busy,
        )

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.say(text)

    def step(self, result: StepResult, spike: float | None) -> None:
        """Enter the step just done.

        Args:
            result: What it did.
            spike: How many standard deviations its loss is above those before, where it is a spike.
        """
        step = self.state.step
        row: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": self.plan.epoch_of(step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "targets": result.targets,
            "tokens": result.tokens,
            "seconds": result.seconds,
        }
        if result.skipped is not None:
            row["skipped"] = result.skipped
        if spike is not None:
            row["spike"] = spike
        if result.skipped is not None or spike is not None:
            row["examples"] = list(result.examples)
            row["rows"] = [self.data.train.row_of(index) for index in result.examples]
        if self.state.micro_batch_divisor > 1:
            row["micro_batch_divisor"] = self.state.micro_batch_divisor
        if self.scaler is not None:
            row["loss_scale"] = self.scaler.scale
        log = self.plan.logs_at(step)
        memory = {"memory/peak_gib": peak_memory(self.device) / 2**30} if log else None
        self.metrics.train(row, log=log, extra=memory)
        self.console.train(row, log=log)
        if self.busy():
            self.cores.restart()
        elif (waiting := self.cores.waiting()) is not None:
            resume = f"{command()} --resume {shlex.quote(str(self.folder))}"
            self.say(busy_text(waiting, resume))

    def evaluation(
        self, split: str, result: EvalResult, *, best: bool = False, train_loss: float | None = None
    ) -> None:
        """Enter an evaluation of a split after the step just done.

        Args:
            split: `valid` or `test`.
            result: What it gave.
            best: Whether it is the best so far.
            train_loss: The mean loss of the steps since the last one (nats per target).
        """
        row = {
            "kind": "eval",
            "step": self.state.step,
            "split": split,
            "loss": result.loss,
            "targets": result.targets,
            "best": best,
            "train_loss": train_loss,
            "seconds": result.seconds,
        }
        if result.reduced_batch_size is not None:
            row["reduced_batch_size"] = result.reduced_batch_size
        self.metrics.eval(row)
        self.console.eval(row)
