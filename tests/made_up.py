"""Folders of runs that never were: what the report and its relatives are tested on."""

import json
import math
import random
from pathlib import Path
from typing import Any

from train.plan.schedule import learning_rate_factor

CONFIG = """preset = "demo"
[model]
path = "data/demo/base"
[train]
method = "lora"
run_name = "none"
[optimizer]
learning_rate = 0.0002
max_grad_norm = 1.0
[schedule]
name = "cosine"
min_lr_ratio = 0.0
[eval]
early_stopping_threshold = 0.0
[data]
max_length = 512
"""


def make_run(
    folder: Path,
    *,
    steps: int = 120,
    total_steps: int = 120,
    valid: dict[int, float] | None = None,
    state: str = "finished",
    reason: str = "completed",
    valid_targets: int = 40_000,
    grad_norm: float = 0.4,
    **status: Any,
) -> Path:
    """Write the folder of a run of 40 steps an epoch, as the loop leaves it."""
    folder.mkdir(parents=True)
    draw = random.Random(7)
    warmup = total_steps // 20
    rows: list[dict[str, Any]] = []
    valid = {0: 2.0, 40: 1.5, 80: 1.2, 120: 1.195} if valid is None else valid
    for step in range(steps + 1):
        if step:
            rate = 2e-4 * learning_rate_factor(
                "cosine", step - 1, warmup_steps=warmup, total_steps=total_steps, min_lr_ratio=0.0
            )
            rows.append(
                {
                    "kind": "train",
                    "step": step,
                    "epoch": step / 40,
                    "loss": 1.1 + 0.9 * math.exp(-step / 40) + draw.gauss(0, 0.05),
                    "learning_rate": rate,
                    "grad_norm": grad_norm * draw.uniform(0.8, 1.2),
                    "targets": draw.randint(900, 1100),
                    "tokens": draw.randint(1900, 2100),
                    "seconds": draw.uniform(0.4, 0.6),
                }
            )
        if step in valid:
            so_far = [loss for other, loss in valid.items() if other < step]
            rows.append(
                {
                    "kind": "eval",
                    "step": step,
                    "split": "valid",
                    "loss": valid[step],
                    "targets": valid_targets,
                    "best": all(valid[step] < loss for loss in so_far),
                    "train_loss": 1.25 if step else None,
                    "seconds": 1.5,
                }
            )
    (folder / "config.toml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {
        "num_examples": 320,
        "effective_batch_size": 8,
        "steps_per_epoch": 40,
        "total_steps": total_steps,
        "warmup_steps": warmup,
        "eval_steps": [40, 80, 120],
        "save_steps": [40, 80, 120],
        "trainable_parameters": 1000,
        "total_parameters": 50_000,
        "memory": {"total": 2**28},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "environment.json").write_text(
        json.dumps({"device": "cpu", "versions": {"torch": "2.13"}})
    )
    document = {
        "state": state,
        "reason": reason,
        "step": steps,
        "total_steps": total_steps,
        "seconds": 71.0,
        "tokens": 240_000,
        "peak_memory_bytes": 3 * 2**27,
        "memory_before_bytes": 2**27,
        "training_memory_bytes": 240 * 2**20,
        "trainable_parameters": 1000,
        "total_parameters": 50_000,
        **status,
    }
    (folder / "status.json").write_text(json.dumps(document))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
