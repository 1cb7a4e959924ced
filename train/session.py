"""What a process holds while a run trains: model, optimizer, state, records; the loop asks here."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import MicroBatch
from data.examples import Examples
from files.atomic import write_json
from files.errors import UserError
from files.faults import faultpoint
from files.folders import damage, recover_folder, replace_folder, step_of, sweep
from files.hub import ModelSource, hashed_weights
from files.tensors import TensorFile, write_tensors
from lora import fill_adapter
from models.layers import CausalLM
from models.weights import fill, weights_files
from train.command import command
from train.config.load import flat
from train.config.schema import RunConfig
from train.early_stopping import EarlyStopping
from train.evaluate import EvalResult, evaluate
from train.log.busy_cores import BusyCores, busy_text, threads_spin
from train.log.console import Console
from train.log.metrics import Metrics
from train.log.samples import samples_so_far
from train.memory import allocated_bytes, is_out_of_memory
from train.optim.adamw import build_optimizer
from train.plan.decide import available_memory
from train.plan.steps import RunPlan
from train.precision import LossScaler, Precision
from train.prepare import Data
from train.saving.background import BackgroundWriter
from train.saving.checkpoints import Checkpoints, TrainState, room_on_disk
from train.saving.folder import (
    device_name,
    export,
    package_versions,
    peak_memory,
    status_document,
    trained_tensors,
    write_trained,
)
from train.saving.resume import Resume, check_identity
from train.step import StepResult, train_step


@dataclass(frozen=True)
class MemoryBefore:
    """What a process holds before its model is loaded, in bytes.

    Attributes:
        peak: Its highest use so far, as `peak_memory` gives it.
        allocated: What is in use, as `allocated_bytes` gives it; None where that is not told.
    """

    peak: int
    allocated: int | None

    @classmethod
    def of(cls, device: torch.device) -> MemoryBefore:
        """Return what this process holds now."""
        return cls(peak_memory(device), allocated_bytes())


class Session:
    """The mutable side of a run.

    Attributes:
        model: The decoder, its trainable parameters marked.
        optimizer: Their update rule.
        scaler: The loss scaler under fp16, else None.
        state: What a resume continues from.
        samples: Completions shown in the report.
        writer: What writes saves in the background.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        data: Data,
        source: ModelSource,
        model: CausalLM,
        precision: Precision,
        folder: Path,
        resume: Resume | None,
        memory_before: MemoryBefore,
    ) -> None:
        """Build the optimizer and the records, and take up the checkpoint of `resume`.

        `memory_before` is what this process held before the model was loaded.

        Raises:
            UserError: The checkpoint does not fit the configuration, the data or the base model.
        """
        self.config, self.plan, self.data, self.source = config, plan, data, source
        self.model, self.precision, self.folder = model, precision, folder
        self.device = precision.device
        self.memory_before, self._training_memory = memory_before, None
        self.optimizer = build_optimizer(
            config.optimizer.name,
            model,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            operations=model.operations,
        )
        self.scaler = LossScaler() if precision.needs_loss_scaler else None
        self.state = TrainState(
            EarlyStopping(config.eval.early_stopping_patience, config.eval.early_stopping_threshold)
        )
        for name in ("best", "final"):
            recover_folder(folder / name)
        sweep(folder)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.total_limit)
        self.writer = BackgroundWriter()
        warnings = self._take_up(resume) if resume is not None and resume.state else []
        self.samples = samples_so_far(folder) if self.state.step else []
        self.console = Console(
            config.log.progress,
            plan.total_steps,
            first_step=self.state.step,
            memory=lambda: float(peak_memory(self.device)),
        )
        self.metrics = Metrics(
            folder, tensorboard=config.log.tensorboard, resume_step=self.state.step
        )
        self._cores = BusyCores(threads_spin(self.device.type, torch.get_num_threads()))
        self._saved_at = time.monotonic()
        if resume is not None and resume.state is not None:
            # Not before: a resume that is refused changes nothing.
            warnings += self._settle(resume)
        for warning in warnings:
            self.console.say(warning)
        # The base model's files are hashed as they are now, while the first steps are done.
        self.writer.submit(lambda: self.identity)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close the records; what broke off with an error is left with a status that says so."""
        self.writer.close()
        self.console.close()
        if error is None:
            self.metrics.close()
            return
        # On a full disk neither can be written, which must not stand before the error itself.
        with contextlib.suppress(OSError):
            self.metrics.close()
        with contextlib.suppress(OSError):
            self.write_status("failed", "error", error=f"{type(error).__name__}: {error}")

    # -- what the loop asks for -------------------------------------------------------------------

    def step(
        self,
        step: int,
        batch: list[MicroBatch],
        learning_rate: float,
        meanwhile: Callable[[], object] | None = None,
    ) -> StepResult:
        """Do one optimizer step on the trainable parameters; `meanwhile` as in `train_step`.

        Raises:
            UserError: Memory ran out while weights were being updated: they are now neither the old
                nor the new ones.
        """
        try:
            return train_step(
                self.model,
                self.optimizer,
                batch,
                learning_rate=learning_rate,
                max_grad_norm=self.config.optimizer.max_grad_norm,
                precision=self.precision,
                scaler=self.scaler,
                device=self.device,
                draw=(self.config.train.seed, step),
                meanwhile=meanwhile,
                at_most=self._observe_memory if self._observes_memory else None,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.writer.wait()
            steps = self.checkpoints.steps()
            last = f"from {self.checkpoints.path(steps[-1])}" if steps else "at the first step"
            raise UserError(
                f"step {step}: out of memory in the update of the weights, which cannot be undone; "
                f"--resume {self.folder} goes on {last} where more memory is free"
            ) from None

    @property
    def _observes_memory(self) -> bool:
        """Whether memory is looked at in each step.

        CUDA counts it by itself, and recomputing needs the most in the middle of the backward pass,
        where nobody looks.
        """
        return self.device.type != "cuda" and not self.model.gradient_checkpointing

    def _observe_memory(self) -> None:
        """Note how much of a processor's memory the model and its training have in use now."""
        now, before = allocated_bytes(), self.memory_before.allocated
        if now is not None and before is not None:
            self._training_memory = max(self._training_memory or 0, now - before)

    def record_step(self, result: StepResult, learning_rate: float, spike: float | None) -> None:
        """Enter the step just done into metrics and console.

        Args:
            result: What it did.
            learning_rate: Its rate.
            spike: How many standard deviations its loss is above those before, where it is a spike.
        """
        step = self.state.step
        row: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": self.plan.epoch_of(step),
            "loss": result.loss,
            "learning_rate": learning_rate,
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
        if self.writer.busy:
            self._cores.restart()
        elif (waiting := self._cores.waiting()) is not None:
            resume = f"{command()} --resume {shlex.quote(str(self.folder))}"
            self.console.say(busy_text(waiting, resume))

    def evaluate(self, examples: Examples) -> EvalResult:
        """Return the token mean of the loss over a set."""
        settings = self.config.train
        return evaluate(
            self.model,
            examples,
            precision=self.precision,
            device=self.device,
            batch_size=self.config.eval.per_device_batch_size
            or settings.per_device_train_batch_size,
            batching=self.config.data.batching,
            max_length=self.config.data.max_length,
            pad_id=self.data.tokenizer.pad_id,
        )

    def evaluate_valid(self) -> bool:
        """Evaluate the valid set, where there is one; return whether the state is the best yet."""
        if self.data.valid is None:
            return False
        state = self.state
        result = self.evaluate(self.data.valid)
        faultpoint("evaluation.done")
        best = state.stopping.observe(state.step, result.loss)
        train_loss = (
            state.loss_since_eval / state.targets_since_eval if state.targets_since_eval else None
        )
        self.record_evaluation("valid", result, best=best, train_loss=train_loss)
        state.loss_since_eval, state.targets_since_eval = 0.0, 0
        return best

    def record_evaluation(
        self, split: str, result: EvalResult, *, best: bool = False, train_loss: float | None = None
    ) -> None:
        """Enter an evaluation into metrics and console."""
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

    def save_is_due(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last save."""
        minutes = self.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, *, best: bool, checkpoint: bool) -> None:
        """Copy the state, and write `best/` and the step's checkpoint from the copy.

        The writing is done in the background: training waits for the copy alone, and for a save
        before this one that is not done yet. Where the host has no room for a copy, it waits for
        the writing. A checkpoint is written after the `best/` that it speaks of.

        Args:
            best: Whether to replace `best/`.
            checkpoint: Whether to write a checkpoint.

        Raises:
            UserError: The save before this one could not be written.
        """
        self.writer.wait()
        state = self.state
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory(self.device))
        state.scaler = self.scaler.state() if self.scaler is not None else None
        tensors = trained_tensors(self.model, self.config)
        moments = self.optimizer.state_tensors() if checkpoint else {}
        room = available_memory("cpu")
        in_background = room is None or 2 * (_num_bytes(tensors) + _num_bytes(moments)) < room
        if in_background:
            tensors, moments = _copied(tensors), _copied(moments)
        faultpoint("save.copied")
        write = partial(
            self._write,
            state.to_dict(),
            self.status("running", "training"),
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

    # -- files ------------------------------------------------------------------------------------

    def export(self, folder: Path) -> dict[str, str]:
        """Fill `folder` with what a user takes away of the present weights; return hashes."""
        tensors = trained_tensors(self.model, self.config)
        return export(self.model, tensors, self.config, self.source, self.data, folder)

    def write_final(self, fill: Callable[[Path], Mapping[str, str]], step: int) -> None:
        """Make `final/` anew: the state of `step`, which `fill` writes (`replace_folder`)."""
        self._replace_folder(self.folder / "final", fill, step)

    def _replace_folder(
        self, target: Path, fill: Callable[[Path], Mapping[str, str]], step: int
    ) -> None:
        what, room = (
            f"{target.name}/ of step {step}",
            _num_bytes(trained_tensors(self.model, self.config)),
        )
        with room_on_disk(what, self.folder, room, "make room and continue with --resume"):
            replace_folder(target, fill, step=step)

    def status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Return the content of status.json."""
        self.state.peak_memory_bytes = max(self.state.peak_memory_bytes, peak_memory(self.device))
        training = self._training_memory
        if self.device.type == "cuda":
            training = peak_memory(self.device) - self.memory_before.peak
        return status_document(
            self.state,
            self.plan,
            condition=condition,
            reason=reason,
            memory_before_bytes=self.memory_before.peak,
            training_memory_bytes=training,
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            total_parameters=sum(p.numel() for p in self.model.parameters()),
            samples=[asdict(sample) for sample in self.samples],
            **more,
        )

    def write_status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Write status.json and return it."""
        status = self.status(condition, reason, **more)
        write_json(self.folder / "status.json", status)
        return status

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree with: configuration, data, base model, machine."""
        config = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flat(self.config).items()
        }
        weights = [] if self.config.model.random_init else weights_files(self.source.folder)
        return {
            "config": config,
            "data": self.data.fingerprints,
            "model": {
                "commit": self.source.commit,
                "config": self.model.config.raw,
                "files": hashed_weights(weights),
            },
            "machine": {
                "device": device_name(self.device),
                "torch threads": torch.get_num_threads(),
                **package_versions(),
            },
        }

    def load_trained(self, folder: Path) -> None:
        """Put the trained tensors of a checkpoint, `best/` or `final/` into the model, in place."""
        if self.config.train.method == "lora":
            with TensorFile(folder / "adapter_model.safetensors") as file:
                fill_adapter(self.model, {name: file.read(name) for name in file.names})
        else:
            fill(self.model, folder, torch.float32, self.device)

    def _write(
        self,
        state: dict[str, Any],
        status: dict[str, Any],
        tensors: dict[str, Tensor],
        moments: dict[str, Tensor] | None,
        best: bool,
    ) -> None:
        """Write what `save` copied: `best/`, then the checkpoint, then the status.

        Args:
            state: `TrainState.to_dict()`.
            status: Content of status.json.
            tensors: The trained tensors.
            moments: The optimizer's tensors; None writes no checkpoint.
            best: Whether to replace `best/`.
        """
        faultpoint("save.begun")
        if best:
            self._replace_folder(
                self.folder / "best",
                lambda folder: export(
                    self.model, tensors, self.config, self.source, self.data, folder
                ),
                state["step"],
            )
        if moments is not None:
            self.metrics.sync()
            self.checkpoints.save(
                state,
                self.identity,
                lambda folder: {
                    **write_trained(
                        self.model, tensors, self.config, self.source, folder, torch.float32
                    ),
                    "optimizer.safetensors": write_tensors(
                        folder / "optimizer.safetensors", moments
                    ),
                },
                expected_bytes=_num_bytes(tensors) + _num_bytes(moments),
            )
            write_json(self.folder / "status.json", status)
        faultpoint("save.done")

    def _take_up(self, resume: Resume) -> list[str]:
        """Continue from a checkpoint: weights, optimizer, scaler, state. Returns warnings.

        Nothing is changed on the disk.
        """
        assert resume.checkpoint is not None
        assert resume.state is not None
        assert resume.identity is not None
        warnings = check_identity(resume.identity, self.identity)
        best_step = resume.state.stopping.best_step
        if self.config.checkpoint.load_best_at_end and self._best_is_lost(resume, best_step):
            raise UserError(
                f"--resume: {self.folder / 'best'} is not that of step {best_step}, which has no "
                "checkpoint to make it from again, but checkpoint.load_best_at_end=true promises "
                "it: resume from a checkpoint at or before that step"
            )
        self.load_trained(resume.checkpoint)
        with TensorFile(resume.checkpoint / "optimizer.safetensors") as file:
            self.optimizer.load_state({name: file.read(name) for name in file.names})
        patience = self.state.stopping.patience
        self.state = resume.state
        self.state.stopping.patience = patience
        self.state.resumed_from.append(self.state.step)
        if self.scaler is not None and self.state.scaler is not None:
            self.scaler.load(self.state.scaler)
        return warnings

    def _settle(self, resume: Resume) -> list[str]:
        """Put the run's folder into the state of the checkpoint taken up; return warnings."""
        state, stopping = self.state, self.state.stopping
        warnings = []
        if self._best_is_lost(resume, stopping.best_step):
            warnings.append(
                f"{self.folder / 'best'} is not that of step {stopping.best_step}: it is deleted, "
                "and the next evaluation is the best"
            )
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            stopping.best_step = stopping.best_loss = None
        elif stopping.best_step is not None:
            self._mend_best(resume, stopping.best_step)
        self.checkpoints.set_newer_aside(state.step)
        # A kill may have come between a checkpoint and the deletion of those beyond the limit.
        self.checkpoints.rotate(stopping.best_step)
        final = self.folder / "final"
        if state.step < self.plan.total_steps and final.is_dir():
            aside = self.folder / "aside-final"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        return warnings

    def _mend_best(self, resume: Resume, best_step: int) -> None:
        """Make `best/` from the checkpoint of `best_step` where it is not that step's already."""
        best, checkpoint = self.folder / "best", self.checkpoints.path(best_step)
        if whole_best(best, best_step) or damage(checkpoint) is not None:
            return
        assert resume.checkpoint is not None
        self.load_trained(checkpoint)
        self._replace_folder(best, self.export, best_step)
        self.load_trained(resume.checkpoint)

    def _best_is_lost(self, resume: Resume, best_step: int | None) -> bool:
        """Return whether `best/` is not that of `best_step` and nothing will make it so.

        A checkpoint of that step does, and so do the same steps and evaluations where a kill came
        after a newer best was written and before its checkpoint.
        """
        best = self.folder / "best"
        if best_step is None or whole_best(best, best_step):
            return False
        if damage(self.checkpoints.path(best_step)) is None:
            return False
        assert resume.identity is not None
        assert resume.state is not None
        decides = ("eval.", "train.max_steps", "train.num_train_epochs")
        same = all(
            resume.identity["config"].get(key) == value
            for key, value in self.identity["config"].items()
            if key.startswith(decides)
        )
        comes_again = damage(best) is None and (step_of(best) or 0) > resume.state.step
        return not (same and comes_again)


def whole_best(best: Path, step: int) -> bool:
    """Return whether `best/` is whole and holds the state of `step`."""
    return damage(best) is None and step_of(best) == step


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
