"""What a process holds while a run trains: model, optimizer, state, records; the loop asks here."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.batch import MicroBatch
from data.examples import Examples
from files.hub import ModelSource
from files.tensors import TensorFile, write_tensors
from lora import fill_adapter
from models.layers import CausalLM
from models.weights import fill
from train.checkpoint import Checkpoints, TrainState, recover_folder, replace_folder, sweep
from train.config import flat
from train.console import Console
from train.early_stopping import EarlyStopping
from train.evaluate import EvalResult, evaluate
from train.folder import export, package_versions, peak_memory, write_status, write_trained
from train.metrics import Metrics
from train.optimizers import build_optimizer
from train.plan import RunPlan
from train.precision import LossScaler, Precision
from train.prepare import Data
from train.resume import Resume, check_identity
from train.samples import samples_so_far
from train.settings import RunConfig
from train.step import StepResult, train_step


class Session:
    """The mutable side of a run.

    Attributes:
        model: The decoder, its trainable parameters marked.
        optimizer: Their update rule.
        scaler: The loss scaler under fp16, else None.
        state: What a resume continues from.
        samples: Completions shown in the report.
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
    ) -> None:
        """Build the optimizer and the records, and take up the checkpoint of `resume`.

        Raises:
            UserError: The checkpoint does not fit the configuration, the data or the base model.
        """
        self.config, self.plan, self.data, self.source = config, plan, data, source
        self.model, self.precision, self.folder = model, precision, folder
        self.device = precision.device
        self.optimizer = build_optimizer(
            config.optimizer.name,
            model,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.scaler = LossScaler() if precision.needs_loss_scaler else None
        self.state = TrainState(
            EarlyStopping(config.eval.early_stopping_patience, config.eval.early_stopping_threshold)
        )
        for name in ("best", "final"):
            recover_folder(folder / name)
        sweep(folder)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.total_limit)
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
        self._saved_at = time.monotonic()
        for warning in warnings:
            self.console.say(warning)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close the records; what broke off with an error is left with a status that says so."""
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

    def step(self, step: int, batch: list[MicroBatch], learning_rate: float) -> StepResult:
        """Do one optimizer step on the trainable parameters."""
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
        )

    def record_step(self, result: StepResult, learning_rate: float) -> None:
        """Enter the step just done into metrics and console."""
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
        if self.scaler is not None:
            row["loss_scale"] = self.scaler.scale
        log = self.plan.logs_at(step)
        memory = {"memory/peak_gib": peak_memory(self.device) / 2**30} if log else None
        self.metrics.train(row, log=log, extra=memory)
        self.console.train(row, log=log)

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

    def evaluate_and_keep_best(self) -> None:
        """Evaluate the valid set, where there is one; the best state goes to `best/` at once."""
        if self.data.valid is None:
            return
        state = self.state
        result = self.evaluate(self.data.valid)
        best = state.stopping.observe(state.step, result.loss)
        train_loss = (
            state.loss_since_eval / state.targets_since_eval if state.targets_since_eval else None
        )
        self.record_evaluation("valid", result, best=best, train_loss=train_loss)
        state.loss_since_eval, state.targets_since_eval = 0.0, 0
        if best:
            replace_folder(self.folder / "best", self.export)

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
        self.metrics.eval(row)
        self.console.eval(row)

    def save_is_due(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last save."""
        minutes = self.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def save(self) -> None:
        """Write the checkpoint of this step, and the status beside it."""
        state = self.state
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory(self.device))
        state.scaler = self.scaler.state() if self.scaler is not None else None
        self.metrics.sync()
        trained = sum(parameter.numel() for parameter in self.optimizer.parameters.values())
        moments = sum(
            tensor.numel() * tensor.element_size()
            for tensor in self.optimizer.state_tensors().values()
        )
        self.checkpoints.save(
            state, self.identity(), self._write_tensors, expected_bytes=4 * trained + moments
        )
        self.write_status("running", "training")
        self._saved_at = time.monotonic()

    # -- files ------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Fill `folder` with what a user takes away of the present weights."""
        export(self.model, self.config, self.source, self.data, folder)

    def write_status(self, condition: str, reason: str, **more: Any) -> dict[str, Any]:
        """Write status.json and return it."""
        self.state.peak_memory_bytes = max(self.state.peak_memory_bytes, peak_memory(self.device))
        return write_status(
            self.folder,
            self.state,
            self.plan,
            condition=condition,
            reason=reason,
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            total_parameters=sum(p.numel() for p in self.model.parameters()),
            samples=[asdict(sample) for sample in self.samples],
            **more,
        )

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must agree with: configuration, data, base model, machine."""
        config = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flat(self.config).items()
        }
        files = {
            path.name: path.stat().st_size
            for path in sorted(self.source.folder.glob("*.safetensors"))
        }
        return {
            "config": config,
            "data": self.data.fingerprints,
            "model": {
                "commit": self.source.commit,
                "config": self.model.config.raw,
                "files": files,
            },
            "machine": {
                "device": self.device.type,
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

    def _write_tensors(self, folder: Path) -> None:
        write_trained(self.model, self.config, self.source, folder, torch.float32)
        write_tensors(folder / "optimizer.safetensors", self.optimizer.state_tensors())

    def _take_up(self, resume: Resume) -> list[str]:
        """Continue from a checkpoint: weights, optimizer, scaler, state. Returns warnings."""
        assert resume.checkpoint is not None
        assert resume.state is not None
        assert resume.identity is not None
        warnings = check_identity(resume.identity, self.identity())
        self.load_trained(resume.checkpoint)
        with TensorFile(resume.checkpoint / "optimizer.safetensors") as file:
            self.optimizer.load_state({name: file.read(name) for name in file.names})
        patience = self.state.stopping
        self.checkpoints.set_newer_aside(resume.state.step)
        self.state = resume.state
        self.state.stopping.patience = patience.patience
        self.state.resumed_from.append(self.state.step)
        if self.scaler is not None and self.state.scaler is not None:
            self.scaler.load(self.state.scaler)
        return warnings
