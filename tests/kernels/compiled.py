"""Compile the Triton kernels of whole steps for cards that are not here, and say what they take.

    python -m tests.kernels.compiled [--all | --card NAME | --few] [--launches] [--json]

A step is that of a model of one layer on the meta device: forward, loss, backward and update, by
the code that a run goes through. Two models of odd sizes have every kernel in most of its variants,
on every card or the one named. With `--few` every kernel is compiled once, for one card or another:
what `test_compiled.py` does each time. With `--all` models have the sizes of all presets, adapted
with dropout and without and trained in full, in both half precisions: some minutes. With
`--launches` one JSON object says what is launched, too.

It exits with 1 where a kernel breaks a limit of `benchmarks.absent_card`. For another version of
Triton, in a folder of its own: pip install --no-deps --target FOLDER triton==3.6.0, then
PYTHONPATH=FOLDER:. python -m tests.kernels.compiled --all
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton

import torch
import triton

import kernels.triton
from benchmarks.absent_card import CARDS, Launch, absent_card, look_into
from kernels.dispatch import operations
from kernels.quantised import KINDS
from kernels.segments import Segments
from kernels.triton.jit import Kernel
from lora import LoraConfig, inject
from models import build
from models.config import parse_config
from models.configs import shipped_config
from models.quantised import outline
from train.config.layers import preset_names
from train.config.presets import read_preset
from train.optim import build_optimizer
from train.plan.cards import Card

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step whose kernels are compiled.

    Attributes:
        model: Keys of config.json.
        dtype: What is computed in.
        rank: The adapters', 0: every weight is trained, in fp32 under autocast to `dtype`.
        dropout: The adapters'.
        lengths: Tokens of the documents.
        optimizer: Its name.
        quantization: What the linear layers' weights are in.
    """

    model: dict[str, Any]
    dtype: str
    rank: int
    dropout: float
    lengths: tuple[int, ...]
    optimizer: str = "adamw"
    quantization: str | None = None


def launches(step: Step, card: Card) -> list[Launch]:
    """Return what one step on `card` launches, in order."""
    found: list[Launch] = []
    dtype = DTYPES[step.dtype]
    trained = torch.float32 if step.rank == 0 else dtype
    with absent_card(card, found.append, autocast=dtype if step.rank == 0 else None):
        backend = operations("triton", "cuda")
        config = parse_config({**step.model, "num_hidden_layers": 1}, "compiled")
        model = build(config, device="meta", operations=backend).to(trained)
        if step.quantization is not None:
            outline(model, step.quantization)
        if step.rank:
            inject(model, LoraConfig(r=step.rank, lora_alpha=16, lora_dropout=step.dropout))
        segments = Segments.build(
            step.lengths, device="meta", examples=range(len(step.lengths)), draw=(42, 1)
        )
        rows = sum(step.lengths)
        hidden = model.hidden_states(torch.empty(rows, dtype=torch.int64, device="meta"), segments)
        wanted = torch.empty(rows - len(step.lengths), dtype=torch.int64, device="meta")
        targets = torch.empty(rows, dtype=torch.int64, device="meta")
        # Rows with weights have a kernel of their own; one of the steps has such.
        weights = torch.empty(len(wanted), device="meta") if step.rank == 0 else None
        loss = backend.linear_cross_entropy(
            hidden, model.head_weight(), targets, rows=wanted, weights=weights
        )
        loss.backward()
        build_optimizer(step.optimizer, model, weight_decay=0.1, operations=backend).step(1e-3)
    return found


def all_kernels() -> dict[str, Kernel]:
    """Return every kernel of `kernels/triton/`, by its module and name."""
    found = {}
    for module in pkgutil.iter_modules(kernels.triton.__path__, "kernels.triton."):
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, Kernel):
                found[f"{module.name.rsplit('.', 1)[-1]}.{name}"] = value
    return found


_ODD = {
    "hidden_size": 1040,  # 13 heads of 80: nothing is a power of two
    "intermediate_size": 2096,
    "num_attention_heads": 13,
    "num_key_value_heads": 1,
    "vocab_size": 5003,
    "max_position_embeddings": 1024,
}
_DROPS = {"residual_dropout": 0.1, "embedding_dropout": 0.1}
_STARCODER2 = {"model_type": "starcoder2", "use_bias": True, "tie_word_embeddings": True, **_ODD}
_QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": False, **_ODD}
_RAGGED = (611, 402, 90)


def odd_steps() -> Iterator[tuple[str, Step]]:
    """Yield (card, step): both half precisions on every card; on one large ranks, all weights."""
    for card in CARDS:
        yield card, Step(_STARCODER2 | _DROPS, "bf16", 12, 0.1, _RAGGED)
        yield card, Step(_QWEN2, "fp16", 12, 0.0, _RAGGED)
    yield "sm_89", Step(_QWEN2, "bf16", 128, 0.0, _RAGGED)
    yield "sm_80", Step(_QWEN2, "bf16", 0, 0.0, _RAGGED, "adafactor")
    for card, kind in itertools.product(CARDS, KINDS):
        yield card, Step(_QWEN2, "bf16", 12, 0.0, _RAGGED, quantization=kind)
    yield "sm_80", Step(_STARCODER2, "bf16", 0, 0.0, _RAGGED)


def few_steps() -> Iterator[tuple[str, Step]]:
    """Yield (card, step): every kernel for a card, both half precisions."""
    yield "sm_89", Step(_STARCODER2 | _DROPS, "bf16", 12, 0.1, _RAGGED)
    for kind in (None, *KINDS):
        yield "sm_90", Step(_QWEN2, "fp16", 12, 0.0, _RAGGED, quantization=kind)
    yield "sm_80", Step(_QWEN2, "bf16", 0, 0.0, _RAGGED, "adafactor")
    yield "sm_80", Step(_STARCODER2, "bf16", 0, 0.0, _RAGGED)


def steps_of_presets() -> Iterator[tuple[str, Step]]:
    """Yield (card, step) for the architectures of all presets."""
    presets = map(read_preset, preset_names())
    paths = {shipped_config(preset.config.model.path or "") for preset in presets} - {None}
    for path in sorted(path for path in paths if path):
        model = json.loads(path.read_text(encoding="utf-8"))
        lengths = (1024,) * 7 + (1000,)
        for card in CARDS:
            for dtype in ("bf16", "fp16"):
                for rank in (8, 32, 64, 128):
                    for dropout in (0.0, 0.05):
                        yield card, Step(model, dtype, rank, dropout, lengths)
                yield card, Step(model, dtype, 0, 0.0, lengths, "adafactor")


def compiled(steps: Iterator[tuple[str, Step]]) -> Iterator[dict[str, Any]]:
    """Yield what each binary takes, once, and the limits that it breaks."""
    seen = set()
    for name, step in steps:
        card = CARDS[name]
        for launch in launches(step, card):
            if (name, launch.key()) in seen:
                continue
            seen.add((name, launch.key()))
            binary = look_into(launch.compile())
            yield {
                "card": name,
                "precision": step.dtype,
                "kernel": launch.name,
                "tile": launch.options.get("BLOCK_ROWS", 1)
                * launch.options.get("BLOCK_COLUMNS", 1),
                **dataclasses.asdict(binary),
                "faults": binary.faults(card, half=step.dtype != "fp32"),
            }


def keys_by_rows() -> dict[str, list[str]]:
    """Return the binaries of a step for several numbers of rows, full and ragged, down to two."""
    found = {}
    for lengths in ((1024,) * 24, (1024,) * 23 + (1019,), (1021,) * 23 + (1013,), (2,)):
        keys: set[str] = set()
        for step in (
            Step(_STARCODER2 | _DROPS, "bf16", 12, 0.1, lengths),
            Step(_QWEN2, "bf16", 12, 0.1, lengths),
            Step(_QWEN2, "bf16", 0, 0.0, lengths),
        ):
            keys |= {launch.key() for launch in launches(step, CARDS["sm_80"])}
        found[str(sum(lengths))] = sorted(keys)
    return found


def launched() -> dict[str, Any]:
    """Return what is known of launches without compiling them."""
    fp32 = launches(Step(_QWEN2, "fp32", 12, 0.1, _RAGGED), CARDS["sm_80"])
    half = [launch for name, step in odd_steps() for launch in launches(step, CARDS[name])]
    return {
        "kernels": sorted(all_kernels()),
        "launched": sorted({launch.name for launch in half}),
        "contracted": [launch.options.get("enable_fp_fusion") for launch in half],
        "by_rows": keys_by_rows(),
        "in_fp32": sorted({launch.name for launch in fp32}),
    }


def main(arguments: list[str]) -> int:
    """Print a table, or one JSON object."""
    if "--all" in arguments:
        steps = steps_of_presets()
    else:
        steps = few_steps() if "--few" in arguments else odd_steps()
    if "--card" in arguments:
        card = arguments[arguments.index("--card") + 1]
        steps = (pair for pair in steps if pair[0] == card)
    binaries = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for binary in compiled(steps):
            binaries.append(binary)
            if not {"--json", "--launches"}.intersection(arguments):
                print(*binary.values(), flush=True)
    faults = sum(bool(binary["faults"]) for binary in binaries)
    if "--launches" in arguments:
        print(json.dumps({**launched(), "binaries": binaries}))
    elif "--json" in arguments:
        print(json.dumps(binaries))
    else:
        print(f"Triton {triton.__version__}: {len(binaries)} binaries, {faults} beyond a limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
