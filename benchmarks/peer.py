"""The peer: transformers Trainer, over a model that PEFT has wrapped or a whole one.

Its process imports nothing of Lathe's before its imports are measured, and then the tokenizer.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.fixtures import BATCH, MAX_LENGTH, MODELS, examples_of


@dataclass(frozen=True)
class PeftSide:
    """A run of Trainer + PEFT; `precision`, `optimizer` and what follows are Trainer's switches."""

    # `max_length`, `longest`, or `flattened`: a micro-batch end to end in one row, with position
    # ids that start anew, as DataCollatorWithFlattening makes it.
    batching: str
    grouped: bool = False  # rows in length-grouped order
    precision: str = "fp32"  # or `bf16`: autocast; `bf16 weights`: over a base stored in bf16, too
    optimizer: str = "adamw_torch"
    compiled: bool = False
    checkpointing: bool = False
    half_adapters: bool = False  # adapters in bf16 as well, where PEFT keeps them in fp32 by itself
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


_PADDED = PeftSide("longest", True, "bf16 weights", "adamw_torch_fused")
# The fastest of eight settings that were tried on two cores of an AMD EPYC, whose records are
# results/versus_peft_pilot.jsonl: longest or flattened, fp32, bf16 or a base in bf16, compiled.
BEST = {
    "tiny": dataclasses.replace(_PADDED, precision="fp32", compiled=True),
    "small": _PADDED,
    "medium": dataclasses.replace(_PADDED, compiled=True),
    "large-vocabulary": dataclasses.replace(_PADDED, compiled=True),
    "small-full": PeftSide("longest", True, "bf16", "adafactor"),
}


def run_peft(folder: Path, model: str, side: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train with transformers Trainer and PEFT and return loss, seconds and tokens of each step."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401  # counted as an import

    imports = harness.resident_bytes()

    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    settings, turns = PeftSide(**side), PromptFormat(text_field="text")
    examples = examples_of(folder / f"{settings.order}.jsonl", Tokenizer.load(folder), turns)
    dtype = torch.bfloat16 if settings.precision == "bf16 weights" else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if MODELS[model].method == "lora":
        base = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    rows = [example.input_ids.tolist() for example in examples]
    figures = train_with_trainer(base, rows, settings, steps, BATCH, MAX_LENGTH)
    return {**figures, "imports_bytes": imports}


def loaded(folder: Path, side: PeftSide, device: torch.device) -> Any:
    """Return a base and its adapter, from a folder that has both."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    half = side.precision == "bf16 weights"
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if half else torch.float32, attn_implementation="sdpa"
    )
    base.config.use_cache = False
    model: Any = PeftModel.from_pretrained(
        base,
        str(folder / "adapter"),
        is_trainable=True,
        autocast_adapter_dtype=not side.half_adapters,
    )
    if side.checkpointing:
        model.enable_input_require_grads()
    return model.to(device)


def untrained(
    raw: Mapping[str, Any], rank: int, dropout: float, side: PeftSide, device: Any
) -> Any:
    """Return a model of the architecture of a config.json, wrapped by PEFT where it has a rank."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.for_model(**{k: value for k, value in raw.items() if k != "torch_dtype"})
    theirs.use_cache = False
    half = side.precision == "bf16 weights" and device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            theirs, dtype=dtype, attn_implementation="sdpa"
        )
    if rank:
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        adapters_in_fp32 = not (side.half_adapters and device.type == "cuda")
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=adapters_in_fp32)
        if side.checkpointing:
            model.enable_input_require_grads()
    return model


def train_with_trainer(
    model: Any,
    rows: list[list[int]],
    side: PeftSide,
    steps: int,
    batch: int,
    max_length: int,
    **more: Any,
) -> dict[str, Any]:
    """Train a model of transformers, all tokens being targets.

    Returns loss, gradient norm before clipping, seconds and real tokens of each step. `rows` are
    token ids in the order of training, as many for each step, `max_length` is what that batching
    pads to, and `more` are further arguments of TrainingArguments.
    """
    from transformers import (
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    on_cpu = model.device.type == "cpu"
    accumulation = len(rows) // steps // batch
    tokens: list[int] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        documents = [row["input_ids"] for row in examples]
        lengths = [len(document) for document in documents]
        tokens.append(sum(lengths))
        if side.batching == "flattened":
            return DataCollatorWithFlattening()(examples)
        width = max_length if side.batching == "max_length" else max(lengths)

        def padded(filler: int) -> torch.Tensor:
            return torch.tensor([ids + [filler] * (width - len(ids)) for ids in documents])

        ids, labels = padded(0), padded(-100)
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}

    seconds: list[float] = []

    def now() -> float:
        if not on_cpu:
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
            output_dir=tempfile.gettempdir(),  # where nothing is saved
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
            use_cpu=on_cpu,
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
