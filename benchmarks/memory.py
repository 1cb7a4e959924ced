"""Planned against measured memory of a training step on a CPU: `python -m benchmarks.memory`.

What is measured is the most in use behind any of torch's operations in two steps of a model of
3 M parameters; what is planned is the ledger of `--plan` for the same step.
`tests/train/test_memory.py` holds the two to each other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from models.recompute import POLICIES
from train.process.memory import allocated_bytes

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXAMPLES, LENGTH = 8, 128
FULL = {"train.method": "full"}
# What is trained → model_type and settings.
CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "LoRA, fp32": ("llama", {"train.precision": "fp32"}),
    "LoRA": ("starcoder2", {}),
    "LoRA over nf4": ("llama", {"model.quantization": "nf4"}),
    "LoRA over int8": ("llama", {"model.quantization": "int8"}),
    "full, AdamW, fp32": ("llama", {**FULL, "train.precision": "fp32"}),
    "full, AdamW": ("qwen3", FULL),
    "full, AdamW in 8 bits": ("llama", {**FULL, "optimizer.name": "adamw_8bit"}),
    "full, Adafactor": ("llama", {**FULL, "optimizer.name": "adafactor"}),
    "full, AdamW, bf16 masters": ("llama", {**FULL, "train.masters": "bf16"}),
}


class Peak(TorchDispatchMode):
    """The most memory in use behind any of torch's operations."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and look."""
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, allocated_bytes() or 0)
        return out


def measured_and_planned(case: str, policy: str) -> tuple[int, dict[str, int]]:
    """Return the most that model, optimizer and two steps take, and the ledger of a step."""
    from benchmarks import product as lathe

    family, settings = CASES[case]
    tied = {"tie_word_embeddings": family != "llama"}
    decoder = lathe.parse_config({"model_type": family, **SIZES, **tied}, case)
    keys = {"data.max_length": LENGTH, "train.per_device_train_batch_size": EXAMPLES}
    keys |= {"train.precision": "bf16", "model.gradient_checkpointing": policy, "lora.r": 8}
    config = lathe.load_config(overrides={**keys, **settings})
    masters, name = config.train.masters, config.train.precision
    precision = lathe.Precision(name, torch.device("cpu"))
    kind, dtype = config.model.quantization, lathe.base_dtype(config)
    gc.collect()
    before = allocated_bytes() or 0
    model = lathe.build(decoder, device="meta")
    lathe.initialise(model, 1, dtype, initializer_range=0.02, quantization=kind)
    lathe.make_trainable(model, config)
    model.gradient_checkpointing = policy
    more = {"operations": model.operations, "rounding_seed": 1 if masters == "bf16" else None}
    optimizer = lathe.build_optimizer(config.optimizer.name, model, **more)
    ids = [[1 + (row + place) % 500 for place in range(LENGTH)] for row in range(EXAMPLES)]
    batch = lathe.cut(ids, "unpadded", None, LENGTH)
    given = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "precision": precision, "scaler": None}
    with Peak() as peak:
        for step in (1, 2):
            lathe.train_step(model, optimizer, batch, **given, draw=(1, step))
    lengths = [LENGTH] * EXAMPLES
    ledger = lathe.memory_ledger(
        config, decoder, precision=name, policy=policy, device="cpu", lengths=lengths
    )
    return peak.most - before, ledger


def table(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the records as a Markdown table: MiB measured, and the plan over it."""
    rows: dict[str, list[str]] = {}
    for row in records:
        told = f"{row['measured'] / 2**20:.1f} ({row['planned'] / row['measured']:.2f})"
        rows.setdefault(row["case"], [row["case"]]).append(told)
    return harness.table("|".join(["", *(f">{policy}" for policy in POLICIES)]), rows.values())


def main() -> None:
    """Measure every case, append its records, and print the table."""
    harness.parser(__doc__).parse_args()
    records = []
    for case in CASES:
        measured_and_planned(case, "none")  # libraries prepare their kernels
        for policy in POLICIES:
            measured, ledger = measured_and_planned(case, policy)
            figures = {"measured": measured, "planned": ledger["total"]}
            records.append({"case": case, "side": policy, **figures})
            harness.append("memory", records[-1])
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
