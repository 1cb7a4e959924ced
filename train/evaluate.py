"""The loss over a whole set: sum of token losses divided by targets, whatever the batch."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.batch import Batching, micro_batches
from data.examples import Examples
from models.layers import CausalLM
from train.evaluation.__main__ import main  # of `python -m train.evaluate`
from train.evaluation.likelihood import token_losses
from train.inputs.sharding import NOTHING, missing
from train.loss import exact_sum, loss_sum
from train.precision import Precision
from train.process.memory import does_not_fit, within_memory
from train.process.world import ALONE, World
from train.state import EvalResult


@torch.no_grad()
def evaluate(
    model: CausalLM,
    examples: Examples,
    batching: Batching,
    precision: Precision,
    world: World = ALONE,  # the ranks that share the set
    *,
    accuracy: bool = False,  # whether to count the likeliest tokens too
) -> EvalResult:
    """Return the token mean of the loss over `examples`, without dropout.

    Longest examples come first: the largest batch is met at once, and padded batches hold like
    lengths. Where memory does not suffice, batches of half the size are taken from there on.

    Raises:
        UserError: Memory does not suffice for a single example.
    """
    started = time.perf_counter()
    device = precision.device
    order = np.argsort(-examples.lengths, kind="stable")[world.rank :: world.size]
    losses: list[Tensor] = []
    targets, right, done, size = 0, 0, 0, batching.micro_batch_size
    spare = missing(-(-len(order) // size), world)
    while done < len(order):
        (micro_batch,) = micro_batches(
            examples, order[done : done + size], replace(batching, micro_batch_size=size)
        )
        with precision.autocast():
            compute = partial(loss_sum, model, micro_batch, device, draw=None)
            if accuracy:
                compute = partial(token_losses, model, micro_batch, device)
            # A shared model's passes are collectives: where one rank fails, none can do them again.
            loss = compute() if world.shards else within_memory(compute, device)
        if loss is None:
            if len(micro_batch.examples) == 1:
                raise does_not_fit("evaluation", micro_batch.num_tokens)
            size = len(micro_batch.examples) // 2
            continue
        if isinstance(loss, tuple):
            loss, likeliest = loss[0].sum(), loss[1]
            right += int(likeliest.sum())
        losses.append(loss)
        targets += micro_batch.num_targets
        done += size
    with precision.autocast():
        for _ in range(spare):
            loss_sum(model, NOTHING, device, draw=None)
    loss, targets, right = world.sums(exact_sum(losses), targets, right)
    size = min(world.gathered((size,)))
    return EvalResult(
        loss=loss / max(1, targets),
        targets=int(targets),
        seconds=time.perf_counter() - started,
        reduced_batch_size=size if size < batching.micro_batch_size else None,
        token_accuracy=right / max(1, targets) if accuracy else None,
    )


if __name__ == "__main__":
    sys.exit(main())
