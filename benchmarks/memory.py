"""Planned against measured memory of a run on a CPU: every policy, quantisation and optimizer.

    python -m benchmarks.memory

Each case is a run of two steps of the demo in a process of its own: what its plan.json says of
model and training beside what its status.json measured. Records go to benchmarks/results.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness

POLICIES = ("none", "norms", "mlp", "layers", "offload")
FULL = {"train.method": "full", "optimizer.learning_rate": 1e-4}
GROUPS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA over nf4": {"model.quantization": "nf4"},
    "LoRA over int8": {"model.quantization": "int8"},
    "full, AdamW": FULL,
    "full, AdamW in 8 bits": {**FULL, "optimizer.name": "adamw_8bit"},
    "full, Adafactor": {**FULL, "optimizer.name": "adafactor"},
    "full, AdamW, bf16 masters": {**FULL, "train.masters": "bf16"},
}
SHORT = {
    "train.max_steps": 2,
    "train.precision": "bf16",
    "train.device": "cpu",
    "log.tensorboard": False,
    "log.progress": False,
    "eval.samples": 0,
    "eval.early_stopping_patience": None,
    "checkpoint.load_best_at_end": False,
    "data.valid": None,
    "data.test": None,
}


def run_of(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Do a run in this process and return what was planned and measured, in bytes."""
    from train.config.load import load_config
    from train.run import run

    place = {"train.output_dir": str(folder / "run")}
    with contextlib.redirect_stdout(io.StringIO()):
        done = run(load_config("demo", overrides={**SHORT, **settings, **place}))
    planned = json.loads((done / "plan.json").read_text(encoding="utf-8"))["memory"]["total"]
    status = json.loads((done / "status.json").read_text(encoding="utf-8"))
    return {"planned": planned, "measured": status["training_memory_bytes"]}


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the records as a Markdown table: measured MiB, and the plan over it."""
    rows = []
    for group in dict.fromkeys(row["case"] for row in records):
        cells = [group]
        for policy in POLICIES:
            found = [row for row in records if (row["case"], row["side"]) == (group, policy)]
            cells += [
                f"{row['measured'] / 2**20:,.0f} ({row['planned'] / row['measured']:.2f})"
                for row in found[-1:]
            ] or [""]
        rows.append(cells)
    return harness.table("|".join(["", *(f">{policy}" for policy in POLICIES)]), rows)


def main() -> None:
    """Measure every case, append its record, and print the table."""
    harness.parser(__doc__).parse_args()
    records = []
    for group, settings in GROUPS.items():
        for policy in POLICIES:
            with tempfile.TemporaryDirectory() as folder:
                asked = {**settings, "model.gradient_checkpointing": policy}
                figures = harness.in_process("memory:run_of", Path(folder), settings=asked)
            records.append({"case": group, "side": policy, **figures})
            harness.append("memory", records[-1])
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
