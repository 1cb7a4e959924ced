"""What a run works with, put together: `Run`, and how it comes to be."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.batch import Batching
from files.folders import recover_folder, sweep
from files.hub import ModelSource
from kernels.cpu.process import prepare_process
from models.layers import CausalLM
from train.batches import evaluation_batching
from train.config.schema import RunConfig
from train.inputs.base_model import base_dtype, find_model, load_base, make_trainable
from train.inputs.dataset import Data
from train.log.records import Records
from train.log.samples import Sample, samples_so_far
from train.optim import build_optimizer
from train.optim.buffers import Optimizer
from train.plan.decide import Machine
from train.plan.steps import RunPlan
from train.precision import LossScaler, Precision
from train.process.memory import MemoryUse
from train.saving.background import BackgroundWriter
from train.saving.checkpoints import Checkpoints
from train.saving.identity import identity_document
from train.saving.restore import restore, settle
from train.saving.resume import Resume
from train.saving.saver import Saver
from train.state import EarlyStopping, TrainState


@dataclass(frozen=True)
class Run:
    """Everything that a run works with.

    It has no methods: what is done with it stands where it is done, in `train.loop`.

    Attributes:
        config: What was asked, every `auto` decided.
        plan: When what happens.
        data: The rows.
        evaluation_batching: How evaluations are cut.
        source: Where the base model's files are.
        model: The decoder, its trainable parameters marked.
        optimizer: Their update rule.
        precision: What is computed in, and where.
        scaler: The loss scaler under fp16, else None.
        state: What a resume continues from; mutable, as the model and the optimizer are.
        samples: Completions shown in the report.
        memory: What the training takes.
        records: Where steps and evaluations are entered.
        saver: What writes checkpoints, `best/`, `final/` and the status.
        folder: Where all of it is kept.
    """

    config: RunConfig
    plan: RunPlan
    data: Data
    evaluation_batching: Batching
    source: ModelSource
    model: CausalLM
    optimizer: Optimizer
    precision: Precision
    scaler: LossScaler | None
    state: TrainState
    samples: list[Sample]
    memory: MemoryUse
    records: Records
    saver: Saver
    folder: Path


def set_up(config: RunConfig, machine: Machine) -> torch.device:
    """Set this process up for a run whose configuration is decided, and return its device."""
    assert machine.device is not None
    if machine.device == "cpu":
        prepare_process()
    if config.train.deterministic:
        # cuBLAS reads this once, when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device(machine.device)


def assemble(
    config: RunConfig,
    plan: RunPlan,
    data: Data,
    device: torch.device,
    folder: Path,
    resume: Resume | None,
) -> Run:
    """Load the model, build what trains it, and take up the checkpoint of `resume`.

    A resume that is refused changes nothing in `folder`. `config` has every `auto` decided.

    Raises:
        UserError: The weights cannot be had, or the checkpoint does not fit the configuration, the
            data or the base model.
    """
    source = find_model(config, weights=True)
    memory = MemoryUse(device)
    model = load_base(config, source, base_dtype(config), device)
    make_trainable(model, config)
    precision = Precision(config.train.precision, device)
    optimizer = build_optimizer(
        config.optimizer.name,
        model,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        operations=model.operations,
    )
    scaler = LossScaler() if precision.needs_loss_scaler else None
    for name in ("best", "final"):
        recover_folder(folder / name)
    sweep(folder)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.total_limit)
    # The base model's files are hashed once, as they are when training begins.
    identity = functools.cache(
        functools.partial(identity_document, config, data, source, model, device)
    )
    stop = config.eval
    state = TrainState(EarlyStopping(stop.early_stopping_patience, stop.early_stopping_threshold))
    warnings: list[str] = []
    if resume is not None and resume.state is not None:
        state, warnings = restore(resume, identity(), checkpoints, config, model, optimizer, scaler)
    samples = samples_so_far(folder) if state.step else []
    writer = BackgroundWriter()
    records = Records.of(
        config, plan, data, state, scaler, folder, device, busy=lambda: writer.busy
    )
    saver = Saver(
        config=config,
        plan=plan,
        data=data,
        source=source,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        state=state,
        samples=samples,
        memory=memory,
        folder=folder,
        checkpoints=checkpoints,
        identity=identity,
        sync=records.metrics.sync,
        writer=writer,
    )
    if resume is not None and resume.state is not None:
        # Not before: a resume that is refused changes nothing.
        warnings += settle(saver, resume)
    for warning in warnings:
        records.say(warning)
    # While the first steps are done.
    writer.submit(identity)
    return Run(
        config=config,
        plan=plan,
        data=data,
        evaluation_batching=evaluation_batching(config, data.tokenizer.pad_id),
        source=source,
        model=model,
        optimizer=optimizer,
        precision=precision,
        scaler=scaler,
        state=state,
        samples=samples,
        memory=memory,
        records=records,
        saver=saver,
        folder=folder,
    )


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
    """Close the records in the end; what breaks off with an error leaves a status that says so."""
    try:
        yield
    except BaseException as error:
        run.saver.writer.close()
        run.records.console.close()
        # On a full disk neither can be written, which must not stand before the error itself.
        with contextlib.suppress(OSError):
            run.records.metrics.close()
        with contextlib.suppress(OSError):
            run.saver.write_status("failed", "error", error=f"{type(error).__name__}: {error}")
        raise
    run.saver.writer.close()
    run.records.console.close()
    run.records.metrics.close()
