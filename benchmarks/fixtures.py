"""The models and rows that the benchmarks train, and what is told of a training run.

Rows are functions of the Python standard library of at least 100 tokens, cut at 512: ragged, and
half of a row's 512 places are real on average (shorter rows would flatter whoever does not pad).
Models have random weights, which do not change speed.
"""

from __future__ import annotations

import ast
import json
import random
import shutil
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Fault

DEMO = ROOT / "data" / "demo"
MAX_LENGTH, BATCH, ACCUMULATION, RANK = 512, 4, 2, 16
EXAMPLES_IN_STEP = BATCH * ACCUMULATION
SHORTEST_ROW = 100  # tokens
FP32_BOUND = 1e-3  # of the loss: rounding alone, which AdamW's division lets grow over the steps
# Relative, of a gradient's norm in bf16: products rounded to 8 bits, some 12 in a layer, as
# independent ones over 32 layers √384 · 2⁻⁹; a norm is of millions of them, and far inside.
NORM_BOUND = 384**0.5 * 2**-9


@dataclass(frozen=True)
class Fixture:
    """A model to train: what differs from data/demo/base, how it is trained, and how often."""

    config: Mapping[str, Any]  # keys of config.json
    method: str = "lora"  # or `full`
    warm_up: int = 4  # steps before the clock counts
    steps: int = 8  # that are timed
    rounds: int = 2  # in which each side is measured

    @property
    def optimizer(self) -> str:
        """AdamW for adapters, Adafactor for full fine-tuning."""
        return "adafactor" if self.method == "full" else "adamw"


def bf16_bound(hidden_size: int, num_layers: int) -> float:
    """Return how far a step's loss may be from another side's where either computes in bf16.

    Hidden states are normed, so a logit of these random heads is of size 0.02 √H. A rounding to 8
    significant bits changes a value by at most 2⁻⁹ of it; there are about 12 in a layer, forward,
    and as independent ones they add as their root. A row's loss moves at most twice as far as its
    logits. The mean over hundreds of rows is far inside, which is the room for what rounded
    gradients change in the steps before.
    """
    return 2 * 0.02 * hidden_size**0.5 * (12 * num_layers) ** 0.5 * 2**-9


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
        raise Fault(f"the standard library has {found} functions of {SHORTEST_ROW} tokens or more")


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


def examples_of(
    path: Path,
    tokenizer: Any,
    prompt_format: Any,
    cache_root: Path | None = None,
    max_length: int = MAX_LENGTH,
) -> Any:
    """Return a file's rows as examples of at most `max_length` tokens."""
    from data.examples import load_examples

    return load_examples(
        str(path),
        split_column=None,
        split=None,
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        max_length=max_length,
        on_overflow="truncate",
        cache_root=cache_root,
    )


def disagreement(
    figures: Mapping[str, Any],
    reference: Mapping[str, Any],
    bounds: Mapping[str, tuple[float, float]],
    first: int | None = None,
    reordered: bool = False,
) -> str | None:
    """Return in words where the first steps of two runs differ in tokens or a figure, or None.

    `bounds` are absolute and relative, by the figure's name. `reordered`: later steps do the same
    tokens in another order.
    """
    ours, theirs = figures["tokens"], reference["tokens"]
    same = sum(ours) == sum(theirs) if reordered else ours == theirs
    if not same or ours[:first] != theirs[:first]:
        return f"tokens {ours}, not {theirs}"
    for name, (absolute, relative) in bounds.items():
        pairs = zip(figures[name][:first], reference[name][:first], strict=True)
        for step, (one, other) in enumerate(pairs, start=1):
            allowed = absolute + relative * other
            if not abs(one - other) <= allowed:
                return f"{name} {one:.4f} at step {step}, not {other:.4f} within {allowed:.1e}"
    return None


def largest_difference(figures: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the largest difference of the loss at any step."""
    return max(abs(a - b) for a, b in zip(figures["loss"], reference["loss"], strict=True))


def speed(figures: Mapping[str, Any], warm_up: int) -> tuple[float, float]:
    """Return seconds a step (mean) and real tokens a second over the timed steps."""
    seconds = figures["seconds"][warm_up:]
    return sum(seconds) / len(seconds), sum(figures["tokens"][warm_up:]) / sum(seconds)
