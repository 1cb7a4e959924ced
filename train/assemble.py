"""What a run works with, put together."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from files.folders import recover_folder, sweep
from kernels.cpu.process import prepare_process
from kernels.pinned import CudaBoundary
from train.batches import evaluation_batching
from train.config.schema import RunConfig
from train.healing import do_less, is_single, kept_policy
from train.inputs.agreement import agree_on_weights
from train.inputs.base_model import base_dtype, load_base, load_shared, make_trainable
from train.inputs.dataset import Data
from train.inputs.model_files import find_model
from train.inputs.sharding import sharing_of
from train.inputs.streaming import stream_layers
from train.log.records import Records
from train.log.samples import samples_so_far
from train.optim import build_optimizer
from train.optim.paged import PagedMoments
from train.plan.decide import Machine
from train.plan.steps import RunPlan
from train.precision import LossScaler, Precision
from train.process.memory import OF_A_RANK, MemoryUse
from train.process.world import ALONE, World
from train.saving.checkpoints import Checkpoints
from train.saving.identity import identity_document
from train.saving.restore import restore, settle
from train.saving.resume import Resume, ran_out_of_memory
from train.saving.saver import BackgroundWriter, Saver
from train.state import EarlyStopping, Run, TrainState

PAGED = "optimizer.name=paged_adamw", "optimizer.name=adafactor"  # what pins, and what would not


def set_up(config: RunConfig, machine: Machine) -> torch.device:
    """Set this process up for a run whose configuration is decided, and return its device."""
    assert machine.device is not None
    if machine.device == "cpu":
        prepare_process()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in fp32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if config.train.deterministic:
        # cuBLAS reads this once, when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Every tensor that is about to be written would be filled with NaN before: for tests.
        filling = torch.utils.deterministic
        filling.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return torch.device(machine.device)


def assemble(
    config: RunConfig,
    plan: RunPlan,
    data: Data,
    device: torch.device,
    folder: Path,
    resume: Resume | None,
    world: World = ALONE,
    *,
    paging: bool = False,
) -> tuple[Run, Records, Saver]:
    """Load the model, build what trains it, and take up the checkpoint of `resume`.

    A resume that is refused changes nothing in `folder`. `config` has every `auto` decided;
    `paging` says that the optimizer's moments are to lie in host memory.

    Returns:
        What the run works with, where steps and evaluations are entered, and what writes
        checkpoints, `best/`, `final/` and the status.

    Raises:
        UserError: The weights cannot be had, or the checkpoint does not fit the configuration, the
            data or the base model.
    """
    source = world.first_on_node("weights", lambda: find_model(config, weights=True))
    agree_on_weights(config, source, world)
    memory = MemoryUse(device)
    precision = Precision(config.train.precision, device)
    if world.shards:
        model = load_shared(config, source, precision, world)
    else:
        streams = config.model.stream_layers == "true"
        model = load_base(config, source, base_dtype(config), device, on_host=streams)
        make_trainable(model, config, world, resume.checkpoint if resume is not None else None)
        if streams:
            stream_layers(model, device)
    optimizer = build_optimizer(
        config.optimizer.name,
        model,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        loraplus_lr_ratio=config.optimizer.loraplus_lr_ratio,
        operations=model.operations,
        sharing=sharing_of(model, world) if world.shards else None,
        rounding_seed=config.train.seed if config.train.masters == "bf16" else None,
        moments=PagedMoments(CudaBoundary(device, *PAGED)) if paging else None,
    )
    if world.first:
        for name in ("best", "final"):
            recover_folder(folder / name)
        sweep(folder)
    state = resume.state if resume is not None else None
    taken_up = state is not None
    if state is None:
        stop = config.eval
        state = TrainState(
            EarlyStopping(stop.early_stopping_patience, stop.early_stopping_threshold)
        )
    model.gradient_checkpointing = kept_policy(config.model.gradient_checkpointing, state)
    ran_out = resume and world.told("memory", lambda: str(ran_out_of_memory(folder))) == "True"
    run = Run(
        config=config,
        plan=plan,
        data=data,
        evaluation_batching=evaluation_batching(config, data.tokenizer.pad_id),
        source=source,
        model=model,
        optimizer=optimizer,
        precision=precision,
        scaler=LossScaler() if precision.needs_loss_scaler else None,
        state=state,
        samples=samples_so_far(folder) if taken_up else [],
        memory=memory,
        folder=folder,
        world=world,
    )
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.total_limit)
    # The base model's files are hashed once, as they are when training begins.
    identity = functools.cache(functools.partial(identity_document, run))
    warnings = restore(run, resume, identity, checkpoints) if resume and taken_up else []
    writer = BackgroundWriter()
    records = Records(run, busy=lambda: writer.busy)
    saver = Saver(run, checkpoints, identity, records.sync, writer)
    if resume and taken_up:
        # Not before: a resume that is refused changes nothing.
        warnings += settle(saver, resume)
    if ran_out and (how := do_less(run, single=is_single(run))):
        warnings.append(f"a rank ran out of memory before: all goes on with {how}")
    for warning in warnings:
        records.say(warning)
    if world.first:  # while the first steps are done
        writer.submit(identity)
    return run, records, saver


@contextlib.contextmanager
def closing(records: Records, saver: Saver) -> Iterator[None]:
    """Close the records in the end; what breaks off with an error leaves a status that says so."""
    try:
        with saver.run.world.together(of_others=True):
            yield
    except BaseException as error:
        saver.writer.close()
        # On a full disk neither can be written, which must not stand before the error itself.
        with contextlib.suppress(OSError):
            records.close()
        with contextlib.suppress(OSError):
            reason = "out_of_memory" if OF_A_RANK in str(error) else "error"
            saver.write_status("failed", reason, error=f"{type(error).__name__}: {error}")
        raise
    saver.writer.close()
    records.close()
