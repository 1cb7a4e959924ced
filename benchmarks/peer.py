"""The peer: transformers Trainer, over a model that PEFT has wrapped or a whole one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PeftSide:
    """A run of Trainer + PEFT.

    Attributes:
        batching: `max_length`, `longest`, or `flattened`: a micro-batch end to end in one row, with
            position ids that start anew, as DataCollatorWithFlattening makes it.
        grouped: Rows in length-grouped order.
        precision: `fp32`, `bf16` (autocast over fp32 weights) or `bf16 weights` (autocast over a
            frozen base that is stored in bf16).
        optimizer: Trainer's `optim`.
        compiled: Trainer's `torch_compile`.
        checkpointing: Trainer's `gradient_checkpointing`.
        half_adapters: Adapters in bf16 as well, where PEFT keeps them in fp32 by itself.
        liger: Trainer's `use_liger_kernel`.
    """

    batching: str
    grouped: bool = False
    precision: str = "fp32"
    optimizer: str = "adamw_torch"
    compiled: bool = False
    checkpointing: bool = False
    half_adapters: bool = False
    liger: bool = False

    @property
    def order(self) -> str:
        """The file of rows that it trains on."""
        return "grouped" if self.grouped else "rows"

    @property
    def text(self) -> str:
        """The settings in one line."""
        parts = [self.batching, "grouped by length" if self.grouped else "", self.precision]
        parts += [self.optimizer, "torch.compile" if self.compiled else ""]
        parts += ["gradient checkpointing" if self.checkpointing else ""]
        parts += ["adapters in bf16" if self.half_adapters else "", "Liger" if self.liger else ""]
        return ", ".join(part for part in parts if part)


def train_with_trainer(
    model: Any,
    rows: list[list[int]],
    side: PeftSide,
    *,
    steps: int,
    batch: int,
    accumulation: int,
    max_length: int,
    folder: Path,
    use_cpu: bool,
    **more: Any,
) -> dict[str, Any]:
    """Train a model of transformers, all tokens being targets.

    Returns loss, gradient norm before clipping, seconds and real tokens of each step.

    Args:
        model: The model, wrapped by PEFT where adapters are trained.
        rows: Token ids of each example, in the order of training.
        side: The settings.
        steps: Optimizer steps.
        batch: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        max_length: What `max_length` pads to.
        folder: Where Trainer may write.
        use_cpu: As in TrainingArguments.
        more: Further arguments of it.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens: list[int] = []

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        documents = [row["input_ids"] for row in examples]
        lengths = [len(document) for document in documents]
        tokens.append(sum(lengths))
        if side.batching == "flattened":
            # The first label of a document would be predicted from the document before it.
            labels = [label for document in documents for label in (-100, *document[1:])]
            return {
                "input_ids": torch.tensor([[i for document in documents for i in document]]),
                "labels": torch.tensor([labels]),
                "position_ids": torch.tensor([[i for n in lengths for i in range(n)]]),
            }
        width = max_length if side.batching == "max_length" else max(lengths)

        def padded(filler: int) -> torch.Tensor:
            return torch.tensor([ids + [filler] * (width - len(ids)) for ids in documents])

        mask = [[1] * length + [0] * (width - length) for length in lengths]
        return {
            "input_ids": padded(0),
            "labels": padded(-100),
            "attention_mask": torch.tensor(mask),
        }

    seconds: list[float] = []

    def now() -> float:
        if not use_cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += now()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "peft"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim=side.optimizer,
            bf16=side.precision != "fp32",
            torch_compile=side.compiled,
            gradient_checkpointing=side.checkpointing,
            use_liger_kernel=side.liger,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=use_cpu,
            seed=42,
            disable_tqdm=True,
            remove_unused_columns=False,
            **more,
        ),
        train_dataset=[{"input_ids": row} for row in rows],  # type: ignore[arg-type]
        data_collator=collate,  # type: ignore[arg-type]
        callbacks=[Clock()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    loss, norm = ([float(row[name]) for row in logged] for name in ("loss", "grad_norm"))
    real = [sum(tokens[i : i + accumulation]) for i in range(0, len(tokens), accumulation)]
    return {"loss": loss, "norm": norm, "seconds": seconds, "tokens": real[:steps]}
