"""Lathe beside transformers Trainer + PEFT: the same model, rows, adapter, order and settings.

    python -m benchmarks.versus_peft [--models tiny small] [--rounds 3] [--steps 12]
    python -m benchmarks.versus_peft --table

Each measurement is a process of its own, so that peak memory (of the whole process) is its own too;
the sides take turns, and every round is a record. Before any figure is printed the losses of all
sides are compared: they compute the same thing, or the benchmark ends with an error. Real Python
functions (the demo's rows), at most 512 tokens, 4 × 2 examples a step, LoRA r = 16 on all linear
layers, fp32, no dropout, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
MODELS = {
    "tiny": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
}
# Each side: who computes, and how its batches are padded.
SIDES = {
    "peft, max_length": ("peft", "max_length"),
    "peft, longest": ("peft", "longest"),
    "lathe, max_length": ("lathe", "max_length"),
    "lathe, longest": ("lathe", "longest"),
    "lathe, unpadded": ("lathe", "unpadded"),
}
RATIOS = [
    ("lathe, max_length", "peft, max_length"),
    ("lathe, longest", "peft, longest"),
    ("lathe, unpadded", "peft, max_length"),
    ("lathe, unpadded", "peft, longest"),
]
# Steps that warm caches and allocators up before the clock counts.
WARM_UP = 2
MAX_LENGTH, BATCH, ACCUMULATION, RANK = 512, 4, 2, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]


def make_model(name: str, folder: Path) -> None:
    """Write a StarCoder2-style base with random weights, the demo's tokenizer, and an adapter."""
    import shutil

    import torch

    from lora import LoraConfig, inject, save_adapter
    from models import build
    from models.config import parse_config
    from models.weights import initialise, save_model

    document = json.loads((DEMO / "base" / "config.json").read_text())
    config = parse_config({**document, **MODELS[name], "torch_dtype": "float32"}, name)
    model = build(config, device="meta")
    initialise(model, 0, torch.float32, "cpu", initializer_range=config.initializer_range)
    save_model(model, folder, config=config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base" / file, folder / file)
    inject(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    save_adapter(model, folder / "adapter", base_model=str(folder))


def run_lathe(folder: Path, padding: str, steps: int) -> dict[str, Any]:
    """Train with Lathe and return losses, seconds and tokens of each step."""
    from train.config import load_config
    from train.run import run

    config = load_config(
        overrides={
            "model.path": str(folder),
            "lora.init_from": str(folder / "adapter"),
            "data.train": str(DEMO / "train.jsonl"),
            "data.text_field": "solution",
            "data.max_length": MAX_LENGTH,
            "data.batching": padding,
            "train.max_steps": steps,
            "train.precision": "fp32",
            "train.per_device_train_batch_size": BATCH,
            "train.gradient_accumulation_steps": ACCUMULATION,
            "train.output_dir": str(folder / f"run-{time.time_ns()}"),
            "model.gradient_checkpointing": False,
            "schedule.name": "constant",
            "schedule.warmup_steps": 0,
            "checkpoint.steps": None,
            "log.tensorboard": False,
            "log.progress": False,
        }
    )
    rows = [json.loads(line) for line in (run(config) / "metrics.jsonl").open()]
    return {name: [row[name] for row in rows] for name in ("loss", "seconds", "tokens")}


def run_peft(folder: Path, padding: str, steps: int) -> dict[str, Any]:
    """Train with transformers Trainer and PEFT and return the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    examples = load_examples(
        str(DEMO / "train.jsonl"),
        split_column=None,
        split=None,
        tokenizer=Tokenizer.load(folder),
        prompt_format=PromptFormat(text_field="solution"),
        max_length=MAX_LENGTH,
        on_overflow="truncate",
        cache_root=None,
    )
    rows = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
    tokens: list[int] = []

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in batch]
        tokens.append(sum(lengths))
        width = MAX_LENGTH if padding == "max_length" else max(lengths)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in batch])

        mask = [[1] * length + [0] * (width - length) for length in lengths]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(
        model=PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True),
        args=TrainingArguments(
            output_dir=str(folder / "peft"),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=42,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collate,  # type: ignore[arg-type]
        callbacks=[Clock()],
    )
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    real = [sum(tokens[i : i + ACCUMULATION]) for i in range(0, len(tokens), ACCUMULATION)]
    return {"loss": logged, "seconds": seconds, "tokens": real[:steps]}


def measure(side: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run one side in a process of its own and return its figures, peak memory included."""
    command = [sys.executable, "-m", "benchmarks.versus_peft", "--worker", side, str(folder)]
    environment = os.environ | {"LATHE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(side: str, folder: Path, steps: int) -> None:
    """Be one side: train, and print what was measured as the last line."""
    import resource

    who, padding = SIDES[side]
    figures = (run_lathe if who == "lathe" else run_peft)(folder, padding, steps)
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures))


def check_agreement(model: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """End the benchmark unless all sides computed the same losses.

    The stack logs four decimals; the losses are of order 5, so 1e-3 leaves room for that alone.
    """
    reference = measured["peft, max_length"][0]
    for side, rounds in measured.items():
        for figures in rounds:
            if figures["tokens"] != reference["tokens"]:
                sys.exit(f"{model}: {side} saw other tokens than peft, max_length")
            for step, (ours, theirs) in enumerate(
                zip(figures["loss"], reference["loss"], strict=True), start=1
            ):
                if abs(ours - theirs) > 1e-3:
                    sys.exit(f"{model}: {side}: loss {ours} at step {step}, {theirs} elsewhere")


def compare(model: str, rounds: int, steps: int) -> None:
    """Measure all sides in turns, append the records, print the table and the ratios."""
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        make_model(model, Path(name))
        for number in range(rounds):
            # Every other round goes backwards, so that a drift of the machine favours nobody.
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                measured[side].append(measure(side, Path(name), steps))
    check_agreement(model, measured)
    seconds = {
        side: [median(figures["seconds"][WARM_UP:]) for figures in of_rounds]
        for side, of_rounds in measured.items()
    }
    peaks = {s: median(figures["peak_bytes"] for figures in of) for s, of in measured.items()}
    tokens = median(measured["lathe, unpadded"][0]["tokens"][WARM_UP:])
    print(f"\n{model}: seconds a step (median of {rounds} rounds), real tokens/s, peak memory")
    for side in SIDES:
        middle = median(seconds[side])
        speed, memory = tokens / middle, peaks[side] / 2**20
        print(f"  {side:<20} {middle:8.3f} s  {speed:9,.0f} tok/s  {memory:7,.0f} MiB")
        record.append(
            "versus_peft",
            {
                "model": model,
                "side": side,
                "rounds": rounds,
                "steps": steps,
                "seconds_per_step": middle,
                "spread": [min(seconds[side]), max(seconds[side])],
                "tokens_per_second": tokens / middle,
                "peak_bytes": peaks[side],
            },
        )
    for ours, theirs in RATIOS:
        speed = median(seconds[theirs]) / median(seconds[ours])
        memory = peaks[ours] / peaks[theirs]
        print(f"  {ours} : {theirs}  {speed:.2f} × as fast, {memory:.2f} × memory")


def print_table() -> None:
    """Print the newest record of each model and side as the table that README quotes."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    with (record.RESULTS / "versus_peft.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            newest[row["model"], row["side"]] = row
    print("| model | side | seconds a step | real tokens/s | peak memory | speed | memory |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (model, side), row in newest.items():
        base = newest[model, "peft, max_length"]
        print(
            f"| {model} | {side} | {row['seconds_per_step']:.3f} | {row['tokens_per_second']:,.0f} "
            f"| {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {base['seconds_per_step'] / row['seconds_per_step']:.2f} × "
            f"| {row['peak_bytes'] / base['peak_bytes']:.2f} × |"
        )


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--table", action="store_true", help="print the records as a table")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], Path(options.worker[1]), options.steps)
        return
    if options.table:
        print_table()
        return
    for model in options.models:
        compare(model, options.rounds, options.steps)


if __name__ == "__main__":
    main()
