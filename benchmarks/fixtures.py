"""The models and rows that the benchmarks train, and one training run with Lathe in a process.

Rows are functions of the Python standard library of at least 100 tokens, cut at 512: ragged, and
half of a row's 512 places are real on average (shorter rows would flatter whoever does not pad).
Models have random weights, which do not change speed.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
MAX_LENGTH, BATCH, ACCUMULATION, RANK = 512, 4, 2, 16
EXAMPLES_IN_STEP = BATCH * ACCUMULATION
SHORTEST_ROW = 100  # tokens
FP32_BOUND = 1e-3  # of the loss: rounding alone, which AdamW's division lets grow over the steps


@dataclass(frozen=True)
class Fixture:
    """A model to train: what differs from data/demo/base, how it is trained, and how often.

    Attributes:
        config: Keys of config.json over those of data/demo/base.
        method: `lora` or `full`.
        warm_up: Steps before the clock counts.
        steps: Steps that are timed.
        rounds: How often each side is measured.
    """

    config: Mapping[str, Any]
    method: str = "lora"
    warm_up: int = 4
    steps: int = 8
    rounds: int = 2

    @property
    def optimizer(self) -> str:
        """AdamW for adapters, Adafactor for full fine-tuning."""
        return "adafactor" if self.method == "full" else "adamw"

    @property
    def bf16_bound(self) -> float:
        """How far a step's loss may be from fp32's in bf16.

        Hidden states are normed, so a logit of these random heads is of size 0.02 √H. A rounding to
        8 significant bits changes a value by at most 2⁻⁹ of it; there are about 12 in a layer,
        forward, and as independent ones they add as their root. A row's loss moves at most twice as
        far as its logits. The mean over hundreds of rows is far inside, which is the room for what
        rounded gradients change in the steps before.
        """
        logit = 0.02 * self.config["hidden_size"] ** 0.5
        roundings = 12 * self.config["num_hidden_layers"]
        return 2 * logit * roundings**0.5 * 2**-9


_SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
MODELS = {
    # 0.2 M, 3.8 M and 27 M parameters in the style of StarCoder2, with 4,096 tokens
    "tiny": Fixture(
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2},
        warm_up=8,
        steps=16,
        rounds=3,
    ),
    "small": Fixture(_SMALL),
    "medium": Fixture(
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9},
        warm_up=1,
        steps=4,
    ),
    # Qwen2's style and vocabulary: the head is nine tenths of 43 M parameters
    "large-vocabulary": Fixture(
        {
            **_SMALL,
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "vocab_size": 151_936,
            "use_sliding_window": False,
        },
        warm_up=1,
        steps=2,
    ),
    "small-full": Fixture(_SMALL, method="full"),
}


def standard_library_functions() -> list[str]:
    """Return the source of the functions in the standard library's modules, in a fixed order."""
    functions = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                functions.append(textwrap.dedent(text) + "\n")
    random.Random(0).shuffle(functions)
    return functions


def ragged_rows(count: int) -> Iterator[tuple[str, int]]:
    """Yield `count` functions of at least `SHORTEST_ROW` tokens, and how many each has."""
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO / "base")
    found = 0
    for text in standard_library_functions():
        if found == count:
            return
        tokens = len(tokenizer.encode(text))
        if tokens >= SHORTEST_ROW:
            found += 1
            yield text, tokens
    if found < count:
        sys.exit(f"the standard library has {found} functions of {SHORTEST_ROW} tokens or more")


def write_rows(folder: Path, warm_up: int, steps: int) -> None:
    """Write rows.jsonl, and grouped.jsonl: the same rows, those that are timed sorted by length.

    Nobody shuffles: both files are orders. The stack sorts in chunks of at most 50 steps, longest
    first, and a run here is shorter than a chunk of a data set of any size.
    """
    rows = list(ragged_rows((warm_up + steps) * EXAMPLES_IN_STEP))
    first = warm_up * EXAMPLES_IN_STEP
    grouped = rows[:first] + sorted(rows[first:], key=lambda row: -min(row[1], MAX_LENGTH))
    for name, order in (("rows", rows), ("grouped", grouped)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text, _ in order)


def write_base(fixture: Fixture, folder: Path) -> int:
    """Write a base model with the demo's tokenizer, and an adapter; return its parameters."""
    import torch

    from lora import LoraConfig, inject, save_adapter
    from models import build
    from models.config import parse_config
    from models.weights import initialise, save_model

    document = json.loads((DEMO / "base" / "config.json").read_text(encoding="utf-8"))
    config = parse_config({**document, **fixture.config, "torch_dtype": "float32"}, "benchmark")
    model = build(config, device="meta")
    initialise(model, 0, torch.float32, "cpu", initializer_range=config.initializer_range)
    save_model(model, folder, config=config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base" / file, folder / file)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inject(model, LoraConfig(r=RANK, lora_alpha=2 * RANK))
    save_adapter(model, folder / "adapter", base_model=str(folder))
    return parameters


@dataclass(frozen=True)
class LatheSide:
    """A run of Lathe: what differs from its defaults."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    grouped: bool = False

    @property
    def order(self) -> str:
        """The file of rows that it trains on."""
        return "grouped" if self.grouped else "rows"

    @property
    def text(self) -> str:
        """The settings in one line."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{settings or 'defaults'}{', grouped by length' if self.grouped else ''}"


def run_configuration(
    fixture: Fixture, folder: Path, order: str, steps: int, settings: Mapping[str, Any]
) -> Any:
    """Return the configuration of a run of Lathe over rows in a fixed order."""
    from train.config.load import load_config

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


def run_lathe(fixture: Fixture, side: LatheSide, folder: Path, steps: int) -> dict[str, Any]:
    """Train with Lathe and return loss, seconds and tokens of each step."""
    # What `run` imports only when it begins, so that the figure below is that of all imports.
    from train import finish, loop  # noqa: F401
    from train.run import run

    imports = record.resident_bytes()
    config = run_configuration(fixture, folder, side.order, steps, side.settings)
    with (run(config) / "metrics.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["kind"] == "train"]
    figures = {name: [row[name] for row in rows] for name in ("loss", "seconds", "tokens")}
    return {**figures, "imports_bytes": imports}


def child(module: str, arguments: Sequence[str], folder: Path, limit: float) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON object that it prints last.

    Raises:
        subprocess.TimeoutExpired: It takes more than `limit` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"LATHE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )
    if done.returncode != 0:
        raise ChildError(f"python -m {module} {' '.join(arguments)}: {done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


class ChildError(Exception):
    """A measured process failed; its output is the message."""


def answer(figures: Mapping[str, Any]) -> None:
    """Print what this process measured as its last line, its peak memory and threads included."""
    import torch

    threads = torch.get_num_threads()
    print(json.dumps({**figures, "peak_bytes": record.peak_bytes(), "threads": threads}))


def disagreement(
    figures: Mapping[str, Any], reference: Mapping[str, Any], bound: float
) -> str | None:
    """Return in words where two runs over the same rows differ in tokens or loss, or None."""
    if figures["tokens"] != reference["tokens"]:
        return f"other tokens: {figures['tokens']}, not {reference['tokens']}"
    for step, (one, other) in enumerate(
        zip(figures["loss"], reference["loss"], strict=True), start=1
    ):
        if not abs(one - other) <= bound:
            return f"loss {one:.5f} at step {step}, not {other:.5f} within {bound:.1e}"
    return None


def largest_difference(figures: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the largest difference of the loss at any step."""
    return max(abs(a - b) for a, b in zip(figures["loss"], reference["loss"], strict=True))


def speed(figures: Mapping[str, Any], warm_up: int) -> tuple[float, float]:
    """Return seconds a step (mean) and real tokens a second over the timed steps."""
    seconds = figures["seconds"][warm_up:]
    return sum(seconds) / len(seconds), sum(figures["tokens"][warm_up:]) / sum(seconds)


def operations_of_step(
    model: Any, lengths: Sequence[int], targets: int, *, full: bool
) -> dict[str, float]:
    """Return the arithmetic of one step (additions and multiplications), by part.

    Shapes: T tokens of a document, W query heads × head dimension, S rows with a target, N elements
    of the layers' weights. Forward is 2 N a token; a backward pass takes 2 N for the input and, for
    what is trained, 2 N for the weight. Causal attention is 2 T² W forward (two products, half of
    each) and twice that backward.

    Args:
        model: The decoder with its adapters.
        lengths: Tokens of each document.
        targets: S.
        full: Whether every weight is trained.
    """
    config = model.config
    frozen = adapters = 0
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() != 2:
            continue
        if "lora_" in name:
            adapters += parameter.numel()
        else:
            frozen += parameter.numel()
    tokens = sum(lengths)
    width = config.num_attention_heads * config.head_dim
    pairs = sum(length**2 for length in lengths)
    head = config.hidden_size * config.vocab_size
    return {
        "linear layers": (6.0 if full else 4.0) * frozen * tokens,
        "adapters": 6.0 * adapters * tokens,
        "attention": 3 * 2.0 * pairs * width * config.num_hidden_layers,
        "head": (6.0 if full else 4.0) * head * targets,
    }
