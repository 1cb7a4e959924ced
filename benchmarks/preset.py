"""A preset's own run beside Trainer + PEFT as the seeds ran it: thirty steps on a GPU.

    python -m benchmarks.preset [--steps 30]
    python -m benchmarks.preset --dry-run         on a CPU, small, nothing timed or recorded

Where `benchmarks.gpu` times the step, this is the product from its configuration on: the preset
starcoder2-3b-lora with its own dropouts, layout and micro-batches, at r = 16, over a base on disk.
Random weights stand in the place of the hub's, functions of ragged length in that of its data, and
the rate is constant. The peer pads to full length, recomputes, and has a base in bf16, with the
same adapter to begin from. Seconds of Lathe are those of the whole run's steps, logging included.

Tokens are the same at every step, and so is the loss of the first five, within what rounding does
and, since the two drop other elements, four times that. A dry run drops nothing, and rounds fp32.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.fixtures import (
    DEMO,
    FP32_BOUND,
    bf16_bound,
    disagreement,
    largest_difference,
    ragged_rows,
    speed,
)
from benchmarks.gpu import EXAMPLES, LENGTH, PEER_BATCH, SEEDS

PRESET, MODEL, RANK = "starcoder2-3b-lora", "bigcode/starcoder2-3b", 16
WARM_UP, STEPS = 5, 30
SECONDS = 190  # for each of three processes, so that all end within ten minutes
DRY_STEPS, DRY_LENGTH = 2, 48
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 4096, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_UNDROPPED = {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}


def write(folder: Path, steps: int, dry: bool) -> dict[str, Any]:
    """Write a base, an adapter and rows.jsonl; be a process of its own, for the card's memory."""
    from files.strict_json import read_json_object
    from lora import LoraConfig, inject, save_adapter
    from models import build
    from models.config import parse_config
    from models.configs import shipped_config
    from models.weights import initialise, save_model

    file = shipped_config(MODEL)
    assert file is not None
    raw = read_json_object(file) | {"torch_dtype": "float32" if dry else "bfloat16"}
    config = parse_config(raw | (_SMALL | _UNDROPPED if dry else {}), MODEL)
    model = build(config, device="meta")
    dtype, device = (torch.float32, "cpu") if dry else (torch.bfloat16, "cuda")
    initialise(model, 0, dtype, device, initializer_range=config.initializer_range)
    save_model(model, folder, config=config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base" / name, folder / name)
    inject(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0 if dry else 0.05))
    save_adapter(model, folder / "adapter", base_model=str(folder))
    texts = [text for text, _ in ragged_rows(40 if dry else 480)]
    count = steps * EXAMPLES
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for text in (texts * -(-count // len(texts)))[:count]:
            rows.write(json.dumps({"text": text}) + "\n")
    return {"layers": config.num_hidden_layers, "hidden": config.hidden_size}


def ours(folder: Path, steps: int, dry: bool) -> dict[str, Any]:
    """Train the preset with Lathe; return loss, seconds and tokens of each step."""
    from benchmarks import product

    overrides: dict[str, Any] = {
        "model.path": str(folder),
        "lora.init_from": str(folder / "adapter"),
        "lora.r": RANK,
        "lora.lora_alpha": 2 * RANK,
        "data.train": str(folder / "rows.jsonl"),
        "data.text_field": "text",
        "data.shuffle": False,
        "train.max_steps": steps,
        "train.output_dir": str(folder / "run"),
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "checkpoint.steps": None,
        "log.tensorboard": False,
        "log.progress": False,
    }
    if dry:
        overrides |= {"train.precision": "fp32", "data.max_length": DRY_LENGTH}
        overrides |= {"lora.lora_dropout": 0.0, "model.dropout": 0.0}
    figures = product.figures_of(product.run(product.load_config(PRESET, overrides=overrides)))
    return {**figures, "peak_allocated": _peak(dry)}


def theirs(folder: Path, steps: int, dry: bool) -> dict[str, Any]:
    """Train the same with Trainer + PEFT; return loss, seconds and tokens of each step."""
    import dataclasses

    from benchmarks import peer
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    side, length = SEEDS, LENGTH
    if dry:
        side, length = dataclasses.replace(side, precision="fp32"), DRY_LENGTH
    model = peer.loaded(folder, side, torch.device("cpu" if dry else "cuda"))
    turns, tokenizer = PromptFormat(text_field="text"), Tokenizer.load(folder)
    examples = peer.examples_of(folder / "rows.jsonl", tokenizer, turns, max_length=length)
    rows = [example.input_ids.tolist() for example in examples]
    figures = peer.train_with_trainer(model, rows, side, steps, PEER_BATCH, length)
    return {**figures, "peak_allocated": _peak(dry)}


def _peak(dry: bool) -> int:
    return 0 if dry else torch.cuda.max_memory_allocated()


def compare(steps: int, dry: bool) -> int:
    """Measure both sides, print and record them; return the exit code."""
    if dry:
        steps = DRY_STEPS
    elif not torch.cuda.is_available():
        print("a CUDA device is needed; --dry-run checks the comparison without one")
        return 2
    of_both = {"steps": steps, "dry": dry}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = harness.in_process("preset:write", folder, SECONDS, **of_both)
        sides = {}
        for who in ("ours", "theirs"):
            sides[who] = harness.in_process(f"preset:{who}", folder, SECONDS, **of_both)
            if not dry:
                sides[who] |= record(who, sides[who])
    bound = FP32_BOUND if dry else 4 * bf16_bound(size["hidden"], size["layers"])
    fault = disagreement(sides["ours"], sides["theirs"], {"loss": (bound, 0.0)}, WARM_UP)
    if fault is not None:
        print(f"{PRESET}: Lathe computed {fault}")
        return 1
    print(f"{PRESET}: loss within {largest_difference(sides['ours'], sides['theirs']):.1e}")
    if not dry:
        faster, smaller = (
            sides["ours"][figure] / sides["theirs"][figure]
            for figure in ("tokens_per_second", "peak_allocated")
        )
        print(f"Lathe over Trainer + PEFT: {faster:.2f} × the speed, {smaller:.2f} × the memory")
    return 0


def record(who: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Print and record what a side took; return its speed."""
    seconds, tokens = speed(figures, WARM_UP)
    row = {
        **{"preset": PRESET, "side": who, "device": torch.cuda.get_device_name()},
        **{"seconds_per_step": seconds, "tokens_per_second": tokens},
        "first_step_seconds": figures["seconds"][0],
        "peak_allocated": figures["peak_allocated"],
        "loss": figures["loss"],
    }
    harness.append("preset", row)
    peak = figures["peak_allocated"] / 2**30
    print(f"{who:<8} {seconds:7.3f} s a step  {tokens:9,.0f} tok/s  {peak:6.1f} GiB", flush=True)
    return {"tokens_per_second": tokens}


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dry-run", action="store_true", help="small, no GPU")
    options = parser.parse_args()
    sys.exit(compare(options.steps, options.dry_run))


if __name__ == "__main__":
    main()
