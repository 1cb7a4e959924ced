"""All that the benchmarks take from train/, in one place: only a process of Lathe's imports it."""

# ruff: noqa: F401  # most of it is for others to take from here

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import harness
from benchmarks.fixtures import ACCUMULATION, BATCH, MAX_LENGTH, MODELS, Fixture
from data.batch import Batching, MicroBatch, micro_batches
from data.examples import Example
from models.config import read_config
from train import finish, loop  # which `run` imports only when it begins
from train.assemble import set_up
from train.base_model import base_dtype, find_model, load_base, make_trainable
from train.batches import StepBatches
from train.config.load import load_config
from train.dataset import load_data
from train.loss import loss_sum
from train.memory import within_memory
from train.optim import build_optimizer
from train.plan.decide import decide, this_machine
from train.plan.steps import RunPlan, plan_run
from train.precision import Precision
from train.run import run
from train.saving.checkpoints import Checkpoints
from train.saving.folder import trained_tensors
from train.saving.saver import Saver
from train.state import EarlyStopping, StepResult, TrainState
from train.step import train_step


def configuration(
    fixture: Fixture, folder: Path, order: str, steps: int, settings: Mapping[str, Any]
) -> Any:
    """Return the configuration of a run of Lathe over rows in a fixed order."""
    method: dict[str, Any] = {"train.method": fixture.method}
    if fixture.method == "lora":
        method["lora.init_from"] = str(folder / "adapter")
        method["lora.lora_dropout"] = 0.0
    return load_config(
        overrides={
            "model.path": str(folder),
            **method,
            "data.train": str(folder / f"{order}.jsonl"),
            "data.max_length": MAX_LENGTH,
            "data.shuffle": False,
            "train.max_steps": steps,
            "train.per_device_train_batch_size": BATCH,
            "train.gradient_accumulation_steps": ACCUMULATION,
            "train.output_dir": str(folder / f"run-{time.time_ns()}"),
            "optimizer.name": fixture.optimizer,
            "schedule.name": "constant",
            "schedule.warmup_steps": 0,
            "checkpoint.steps": None,
            "log.tensorboard": False,
            "log.progress": False,
            **settings,
        }
    )


def run_lathe(
    folder: Path, model: str, settings: dict[str, Any], steps: int, order: str = "rows"
) -> dict[str, Any]:
    """Train with Lathe and return loss, seconds and tokens of each step."""
    imports = harness.resident_bytes()
    config = configuration(MODELS[model], folder, order, steps, settings)
    with (run(config) / "metrics.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["kind"] == "train"]
    figures = {name: [row[name] for row in rows] for name in ("loss", "seconds", "tokens")}
    return {**figures, "imports_bytes": imports}


def step(
    model: Any,
    optimizer: Any,
    batch: list[MicroBatch],
    precision: Precision,
    number: int,
    learning_rate: float = 2e-4,
) -> StepResult:
    """Do one step on a batch."""
    return train_step(
        model,
        optimizer,
        batch,
        learning_rate=learning_rate,
        max_grad_norm=1.0,
        precision=precision,
        scaler=None,
        draw=(42, number),
    )


class Documents:
    """Token ids as a set of examples: every token but the first is a target."""

    def __init__(self, ids: Iterable[Sequence[int] | np.ndarray]):
        self.ids = [np.asarray(row, dtype=np.int32) for row in ids]
        self.lengths = np.asarray([len(row) for row in self.ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return Example(index=index, input_ids=self.ids[index], labels=self.ids[index])


def cut(ids: list[list[int]], layout: str, tokens: int | None, max_length: int) -> list[MicroBatch]:
    """Return some documents in micro-batches of at most `tokens` tokens."""
    examples: Any = Documents(ids)
    settings = Batching(
        micro_batch_size=len(ids),
        micro_batch_tokens=tokens,
        layout=layout,
        max_length=max_length,
        pad_id=0,
    )
    return micro_batches(examples, range(len(ids)), settings)


class Assembled(NamedTuple):
    """A run's parts as `train.run` assembles them, for steps that are done one by one."""

    model: Any
    optimizer: Any
    precision: Precision
    plan: RunPlan
    batches: StepBatches

    def steps(self, first: int, count: int) -> Iterator[tuple[float, list[MicroBatch]]]:
        """Do some steps, and yield the seconds and the micro-batches of each."""
        for number in range(first, first + count):
            started = time.perf_counter()
            batch = self.batches.cut(*self.plan.batch(number))
            rate = self.plan.learning_rate(number)
            step(self.model, self.optimizer, batch, self.precision, number, rate)
            yield time.perf_counter() - started, batch


def assemble(config: Any) -> Assembled:
    """Do what comes before a run's first step."""
    machine = this_machine(config)
    config = decide(config, machine)
    device = set_up(config, machine)
    source = find_model(config, weights=True)
    data = load_data(config, source.folder, read_config(source.folder))
    plan = plan_run(config, len(data.train), num_valid=0)
    model = load_base(config, source, base_dtype(config), device)
    make_trainable(model, config)
    optimizer = build_optimizer(config.optimizer.name, model)
    precision = Precision(config.train.precision, device)
    return Assembled(model, optimizer, precision, plan, StepBatches.of(config, plan, data))
