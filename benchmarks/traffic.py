"""What a training step moves and computes, by operation, and how long a card would need: predicted.

    python -m benchmarks.traffic [--preset NAME] [--card h200|h100|a100|4090] [--layers N]
                                 [--kernels reference|triton|auto] [--json] [key=value …]

The step is a run's own: its model at the preset's sizes, its adapters, its loss and its update,
walked through on tensors without storage as if they were on CUDA (`benchmarks.pretended`). Nothing
is computed and no card is asked. Every document has `data.max_length` tokens, all with a target.
Without a preset it is StarCoder2-3B, LoRA r = 16 on all linear layers, 24 × 1,024 tokens, bf16, no
dropout, no recomputing.

A launch takes as long as its products or its bytes, whichever is more, at what the card attains at
best (`train.plan.cards`) times an efficiency: `--products`, `--memory`; attention computes at
`--attention` times what a large product attains. Launches are taken to hide behind one another, and
the host behind the card. Every second and every token/s that is printed is a prediction. What a
library keeps to itself is not counted: flash attention's own buffers, a split product's parts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.counting import ATTENTION, KINDS, Counting, Launch
from benchmarks.pretended import pretended_cuda
from data.batch import MicroBatch
from files.errors import UserError
from kernels.dispatch import Operations, operations
from models import build
from models.config import DecoderConfig
from models.layers import CausalLM, set_dropout
from models.quantised import outline
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.base_model import base_dtype, make_trainable
from train.inputs.known import Unknown
from train.optim import build_optimizer
from train.plan.cards import CARDS, Card
from train.plan.decide import Machine, decide
from train.plan.ledger import find_decoder_config, micro_batch_tokens
from train.plan.steps import effective_batch_size
from train.precision import LossScaler, Precision
from train.process.command import run_command
from train.step import train_step

# Flash attention forward and backward, of what a large product attains: 350 of 790 TFLOP/s.
ATTENTION_SHARE = 350 / 790
PRODUCTS_EFFICIENCY, MEMORY_EFFICIENCY = 0.9, 0.8
_START = {
    "lora.r": 16,
    "lora.lora_dropout": 0.0,
    "model.dropout": 0.0,
    "train.precision": "bf16",
    "train.per_device_train_batch_size": 24,
    "train.effective_batch_size": 24,
}
_START_PRESET = "starcoder2-3b-lora"


@dataclass(frozen=True)
class Traffic:
    """What was counted of a step.

    Attributes:
        launches: Of one micro-batch, forward and backward.
        update: Launches once a step.
        saved_bytes: What the forward pass of a micro-batch keeps, weights left out.
        waits: (phase, operation) where the host waits for the card.
    """

    launches: list[Launch]
    update: list[Launch]
    saved_bytes: int
    waits: list[tuple[str, str]]


@dataclass(frozen=True)
class Speed:
    """What launches are taken to attain: operations and bytes a second."""

    products: float
    bandwidth: float
    attention: float

    def seconds(self, launch: Launch) -> float:
        """Predict how long a launch takes."""
        rate = self.attention if launch.kind == ATTENTION else self.products
        return max(launch.flops / rate, launch.bytes / self.bandwidth)


def count(config: RunConfig, decoder: DecoderConfig, card: Card) -> Traffic:
    """Walk through the second step of a run (in the first no gradient is added to another).

    Args:
        config: What is asked; its `auto`s are decided as on a machine with that card.
        decoder: The architecture.
        card: The card.
    """
    with pretended_cuda(card):
        config = decide(config, Machine("cuda", card.memory))
        batch = _micro_batch(config)
        rank = max(16, config.lora.r) if config.train.method == "lora" else 0
        counting = Counting(batch.lengths, decoder.window(0), 3 * rank)
        backend = operations(config.train.kernels, "cuda")
        backend = dataclasses.replace(
            backend,
            **{
                field.name: counting.labelled(field.name, getattr(backend, field.name))
                for field in dataclasses.fields(backend)
                if callable(getattr(backend, field.name)) and not field.name.endswith("_")
            },
        )
        model = _model(config, decoder, backend)
        precision = Precision(config.train.precision, torch.device("cuda", 0))
        with counting, counting.keeping(), _kernels_noted(counting):
            optimizer = build_optimizer(
                config.optimizer.name,
                model,
                betas=config.optimizer.betas,
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
                operations=backend,
            )
            for _ in range(2):
                counting.clear()
                train_step(
                    model,
                    optimizer,
                    [batch],
                    learning_rate=1e-4,
                    max_grad_norm=config.optimizer.max_grad_norm,
                    precision=precision,
                    scaler=LossScaler() if precision.needs_loss_scaler else None,
                    draw=(config.train.seed, 1),
                    at_most=functools.partial(setattr, counting, "phase", "backward"),
                    meanwhile=functools.partial(setattr, counting, "phase", "update"),
                )
        return Traffic(
            launches=[launch for launch in counting.launches if launch.phase != "update"],
            update=[launch for launch in counting.launches if launch.phase == "update"],
            saved_bytes=counting.kept_bytes(model.parameters()),
            waits=counting.waits,
        )


def _model(config: RunConfig, decoder: DecoderConfig, backend: Operations) -> CausalLM:
    """Return what `train.inputs.base_model` makes, without its weights."""
    model = build(decoder, operations=backend, attention=config.model.attention, device="meta")
    model.to(base_dtype(config))
    if config.model.quantization is not None:
        outline(model, config.model.quantization)
    if config.model.dropout is not None:
        set_dropout(model, config.model.dropout)
    policy = config.model.gradient_checkpointing
    model.gradient_checkpointing = "none" if policy == "auto" else policy
    make_trainable(model, config)
    return model


def _micro_batch(config: RunConfig) -> MicroBatch:
    """Return the largest micro-batch of documents of `data.max_length` tokens."""
    tokens, longest = micro_batch_tokens(config, None)
    documents = tokens // longest
    every = torch.arange(documents * longest)
    return MicroBatch(
        input_ids=torch.zeros_like(every),
        targets=torch.zeros_like(every),
        lengths=(longest,) * documents,
        padded_length=None,
        examples=tuple(range(documents)),
        target_rows=every[every % longest != longest - 1],
        num_tokens=documents * longest,
    )


@contextlib.contextmanager
def _kernels_noted(counting: Counting) -> Iterator[None]:
    """Let the launches of Triton's kernels be noted in the place of being done."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del grid, warmup
        counting.launched(kernel, *args, **options)

    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            for name, kind in (("jit", "JITFunction"), ("interpreter", "InterpretedFunction")):
                module = importlib.import_module(f"triton.runtime.{name}")
                stack.enter_context(mock.patch.object(getattr(module, kind), "run", run))
        yield


def with_layers(decoder: DecoderConfig, layers: int) -> DecoderConfig:
    """Return the architecture with its first layers alone."""
    return dataclasses.replace(
        decoder, num_hidden_layers=layers, layer_types=decoder.layer_types[:layers]
    )


@dataclass(frozen=True)
class Total:
    """Sums over launches."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, launches: Iterable[Launch], speed: Speed) -> Total:
        """Add launches up."""
        every = list(launches)
        return cls(
            len(every),
            sum(launch.bytes for launch in every),
            sum(launch.flops for launch in every),
            sum(map(speed.seconds, every)),
        )

    def plus(self, other: Total, times: int = 1) -> Total:
        """Return this and `times` another."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Total(*(a + times * b for a, b in zip(mine, others, strict=True)))

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "launches": self.launches,
            "bytes": self.bytes,
            "flops": self.flops,
            "predicted_seconds": self.seconds,
        }


def report(config: RunConfig, decoder: DecoderConfig, card: Card, speed: Speed) -> dict[str, Any]:
    """Count a step and a layer of it, and predict what both take on a card."""
    layers = decoder.num_hidden_layers
    counted = {n: count(config, with_layers(decoder, n), card) for n in sorted({2, 3, layers})}
    step, two, three = (counted[n] for n in (layers, 2, 3))
    batch = _micro_batch(config)
    tokens = effective_batch_size(config, 1) * config.data.max_length
    times = math.ceil(tokens / batch.num_tokens)
    kinds: dict[str, dict[str, Total]] = {}
    for kind in KINDS:
        forth_and_back, update, of_two, of_three = (
            Total.of((launch for launch in launches if launch.kind == kind), speed)
            for launches in (step.launches, step.update, two.launches, three.launches)
        )
        kinds[kind] = {
            "layer": of_three.plus(of_two, -1),
            "step": update.plus(forth_and_back, times),
        }
    layer, whole = (
        functools.reduce(Total.plus, (of[part] for of in kinds.values()))
        for part in ("layer", "step")
    )
    return {
        "predicted": True,
        "card": card.name,
        "model": config.model.path,
        "tokens": tokens,
        "micro_batches": times,
        **whole.document(),
        "saved_bytes": step.saved_bytes,
        "predicted_tokens_per_second": tokens / whole.seconds,
        "layer": {
            **layer.document(),
            "saved_bytes": three.saved_bytes - two.saved_bytes,
        },
        "by_operation": {
            kind: {part: total.document() for part, total in of.items()}
            for kind, of in kinds.items()
        },
        "waits": [list(wait) for wait in step.waits],
    }


def text(document: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        f"{document['model']}, {document['tokens']:,} tokens a step in {document['micro_batches']} "
        f"micro-batches, {document['card']}: counted on meta; every time is PREDICTED",
        "",
        f"{'':22}{'a layer of a micro-batch':>34}{'a step':>36}",
        f"{'':22}{'launches':>10}{'GB':>10}{'µs':>14}{'launches':>14}{'GB':>10}{'ms':>12}",
    ]
    rows = [*document["by_operation"].items()]
    rows.append(("all", {"layer": document["layer"], "step": document}))
    for kind, parts in rows:
        layer, step = parts["layer"], parts["step"]
        if step["launches"]:
            lines.append(
                f"{kind:22}{layer['launches']:10,}{layer['bytes'] / 1e9:10.2f}"
                f"{layer['predicted_seconds'] * 1e6:14,.0f}{step['launches']:14,}"
                f"{step['bytes'] / 1e9:10,.1f}{step['predicted_seconds'] * 1e3:12,.1f}"
            )
    lines += [
        "",
        f"kept for the backward pass: {document['saved_bytes'] / 2**30:.1f} GiB, "
        f"{document['layer']['saved_bytes'] / 2**30:.2f} GiB a layer",
        f"products: {document['flops'] / 1e12:,.0f} TFLOP a step",
        f"predicted: {document['predicted_tokens_per_second']:,.0f} tokens/s",
    ]
    waits = Counter(f"{operation} ({phase})" for phase, operation in document["waits"])
    lines.append(
        "the host waits for the card: "
        + (", ".join(f"{count} × {wait}" for wait, count in waits.items()) or "never")
    )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", help="as in train.run")
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--kernels", choices=("auto", "reference", "triton"))
    parser.add_argument("--layers", type=int, help="of the model, in the place of all")
    parser.add_argument("--products", type=float, default=PRODUCTS_EFFICIENCY, help="efficiency")
    parser.add_argument("--memory", type=float, default=MEMORY_EFFICIENCY, help="efficiency")
    parser.add_argument("--attention", type=float, default=ATTENTION_SHARE, help="share")
    parser.add_argument("--launches", action="store_true", help="list those of a layer instead")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in train.run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit code."""
    return run_command(lambda: _answer(_arguments(argv)))


def _answer(asked: argparse.Namespace) -> int:
    overrides: dict[str, Any] = {} if asked.preset else dict(_START)
    if asked.kernels:
        overrides["train.kernels"] = asked.kernels
    overrides |= dict(setting.split("=", 1) for setting in asked.settings)
    card = CARDS[asked.card]
    speed = Speed(
        products=card.flops * asked.products,
        bandwidth=card.bandwidth * asked.memory,
        attention=card.flops * asked.attention,
    )
    config = load_config(asked.preset or _START_PRESET, overrides=overrides)
    decoder = find_decoder_config(config)
    if isinstance(decoder, Unknown):
        raise UserError(f"the model's sizes are not known: {decoder.because}")
    if asked.layers:
        decoder = with_layers(decoder, asked.layers)
    if asked.launches:
        print(_listed(config, decoder, card))
        return 0
    document = report(config, decoder, card, speed)
    print(json.dumps(document) if asked.json else text(document))
    return 0


def _listed(config: RunConfig, decoder: DecoderConfig, card: Card) -> str:
    """Return the launches of a layer: those of three layers that two do not have."""
    two, three = (Counter(count(config, with_layers(decoder, n), card).launches) for n in (2, 3))
    return "\n".join(
        f"{times:4} × {x.phase:8} {x.kind:20} {x.name:45}{x.bytes / 1e6:10,.1f} MB"
        f"{x.flops / 1e9:10,.1f} GFLOP"
        for x, times in (three - two).items()
    )


if __name__ == "__main__":
    sys.exit(main())
