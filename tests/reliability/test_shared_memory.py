"""What a rank of a shared model has and sends, measured over gloo beside what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import ended, start_ranks
from small import FAMILIES, SMALL, RaggedExamples
from torch import Tensor

from data.batch import Batching, micro_batches
from lora import draw_adapters
from models import build
from models.config import DecoderConfig, parse_config
from models.weights import initialise
from train.config.load import load_config
from train.inputs.base_model import base_dtype, make_trainable
from train.inputs.sharding import local_rows, place, share_weights, sharing_of
from train.optim import build_optimizer
from train.plan.ledger import memory_ledger, widths
from train.plan.sharing import Message, communication_bytes, messages_of_a_step
from train.plan.sizes import model_sizes
from train.precision import Precision
from train.process.world import World
from train.step import train_step

# Rows that two ranks cannot halve evenly (97), and layers that weigh as much as the embedding.
RAW = SMALL | FAMILIES["llama"] | {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 192}
LENGTHS = [5, 9, 7, 3]


class Sent:
    """Counts what the ranks' collectives carry, whole tensors, beside small numbers."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def noting(self, kind: str, *names: str) -> Any:
        # As FSDP2 of this torch calls it.
        name = next(name for name in names if hasattr(dist, name))
        honest = getattr(dist, name)

        def collective(*args: Any, **options: Any) -> Any:
            tensors = [x for x in [*args, *options.values()] if isinstance(x, Tensor)]
            size = max(x.numel() * x.element_size() for x in tensors)
            if size >= 1024:
                self.messages.append(Message(kind, size, 1))
            return honest(*args, **options)

        return mock.patch.object(dist, name, collective)


def within(measured: float, planned: float, what: str) -> None:
    assert measured == pytest.approx(planned, rel=0.05), what


@pytest.mark.parametrize("optimizer_name", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    ("method", "masters"), [("full", "fp32"), ("full", "bf16"), ("lora", "fp32")]
)
def test_a_rank_has_and_sends_what_the_plan_says(
    method: str, masters: str, optimizer_name: str, tmp_path: Path
) -> None:
    ranks = 2
    decoder = parse_config(RAW, "a test")
    config = load_config(
        overrides={
            "train.method": method,
            "train.masters": masters,
            "train.precision": "bf16",
            "train.effective_batch_size": 4,
            "train.per_device_train_batch_size": 1,
            "optimizer.name": optimizer_name,
            "model.dtype": "fp32",
            "lora.r": 8,
        }
    )

    def work(world: World) -> int:
        measured, sent = one_step(world, config, decoder)
        sizes = model_sizes(decoder, method, config.lora)
        ledger = memory_ledger(
            config, decoder, sizes, device="cpu", world_size=ranks, sharding="shard"
        )
        # A layer's lowered copies, which autocast makes, are not among the parameters.
        lowered = 2 * sizes.matmul if method == "lora" else 0
        within(measured["weights"], ledger["weights"] - lowered, "weights")
        for name in ("adapters", "gradients", "optimizer"):
            within(measured[name], ledger[name], name)
        widths_ = widths(config, "bf16")
        messages = messages_of_a_step(config, decoder, sizes, "shard", 2, widths_)
        within(communication_bytes(sent, ranks), communication_bytes(messages, ranks), "sent")
        for kind in ("all-gather", "reduce-scatter"):
            count = sum(message.times for message in messages if message.kind == kind)
            assert sum(message.kind == kind for message in sent) == count
        return 0

    log = tmp_path / "rank-0.txt"
    codes = ended(start_ranks(ranks, work, tmp_path))
    assert codes == [0, 0], log.read_text()


def one_step(world: World, config: Any, decoder: DecoderConfig) -> tuple[dict[str, int], Any]:
    """Return the bytes that lie on a rank after a step, and the messages of the step."""
    model = build(decoder, device="meta").to(base_dtype(config))
    make_trainable(model, config)
    precision = Precision("bf16", torch.device("cpu"))
    share_weights(model, world, precision)
    initialise(model, 3, torch.float32, precision.device, initializer_range=0.02, place=place)
    if config.train.method == "lora":
        draw_adapters(model, 3)
    optimizer = build_optimizer(
        config.optimizer.name,
        model,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        operations=model.operations,
        sharing=sharing_of(model, world),
        rounding_seed=3 if config.train.masters == "bf16" else None,
    )
    batching = Batching(
        micro_batch_size=1, micro_batch_tokens=None, layout="unpadded", max_length=16, pad_id=0
    )
    mine = [2 * world.rank, 2 * world.rank + 1]
    gradients: list[int] = []
    honest = optimizer.step

    def step(*args: float) -> None:
        gradients.append(sum(bytes_of(p.grad) for p in model.parameters() if p.grad is not None))
        honest(*args)

    sent = Sent()
    with (
        mock.patch.object(optimizer, "step", step),
        sent.noting("all-gather", "all_gather_single", "all_gather_into_tensor"),
        sent.noting("reduce-scatter", "reduce_scatter_single", "reduce_scatter_tensor"),
        sent.noting("all-reduce", "all_reduce"),
    ):
        result = train_step(
            model,
            optimizer,
            micro_batches(RaggedExamples(LENGTHS), mine, batching),
            learning_rate=1e-3,
            max_grad_norm=1.0,
            precision=precision,
            scaler=None,
            draw=(1, 1),
            world=world,
        )
    assert result.skipped is None
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    everything = sum(map(bytes_of, model.parameters()))
    return {
        "weights": everything - sum(map(bytes_of, adapters)),
        "adapters": sum(map(bytes_of, adapters)),
        "gradients": gradients[0],
        "optimizer": sum(
            map(bytes_of, (t for n, t in optimizer.state_tensors().items() if n != "steps"))
        ),
    }, sent.messages


def bytes_of(x: Tensor) -> int:
    return local_rows(x).numel() * x.element_size()
