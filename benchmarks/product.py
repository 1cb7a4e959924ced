"""All that the benchmarks take from train/, in one place: only a process of Lathe's imports it."""

# ruff: noqa: F401  # most of it is for others to take from here

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.fixtures import ACCUMULATION, BATCH, MAX_LENGTH, MODELS, Fixture
from data.batch import Batching, MicroBatch, micro_batches
from data.examples import Example
from models import build
from models.config import parse_config
from models.weights import initialise
from train import assemble, finish, loop  # which `run` imports only when it begins
from train.batches import StepBatches
from train.config.load import load_config
from train.inputs.base_model import base_dtype, make_trainable
from train.loss import loss_sum
from train.optim import build_optimizer
from train.plan.ledger import memory_ledger
from train.plan.steps import plan_run
from train.precision import Precision
from train.process.memory import within_memory
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
    adapter = {"lora.init_from": str(folder / "adapter"), "lora.lora_dropout": 0.0}
    return load_config(
        overrides={
            "model.path": str(folder),
            "train.method": fixture.method,
            **(adapter if fixture.method == "lora" else {}),
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
    return {**figures_of(run(config)), "imports_bytes": imports}


def figures_of(folder: Path) -> dict[str, Any]:
    """Return loss, seconds and tokens of each step of a run."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["kind"] == "train"]
    return {name: [row[name] for row in rows] for name in ("loss", "seconds", "tokens")}


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
