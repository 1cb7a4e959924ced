"""The loss over a whole set: sum of token losses divided by targets, whatever the batch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batch import micro_batches
from data.examples import Examples
from models.layers import CausalLM
from train.loss import exact_sum, loss_sum
from train.precision import Precision


@dataclass(frozen=True)
class EvalResult:
    """Token mean of the loss over a set (nats per target), its targets and the seconds it took."""

    loss: float
    targets: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: CausalLM,
    examples: Examples,
    *,
    precision: Precision,
    device: torch.device,
    batch_size: int,
    batching: str,
    max_length: int,
    pad_id: int,
) -> EvalResult:
    """Return the token mean of the loss over `examples`, without dropout.

    Longest examples come first: the largest batch is met at once, and padded batches hold like
    lengths.

    Args:
        model: The decoder to judge.
        examples: The set.
        precision: What to compute in.
        device: Where the model is.
        batch_size: Examples in a forward pass; it changes speed and memory, never the result.
        batching: `unpadded`, `longest` or `max_length`.
        max_length: Rows of a document under `max_length`.
        pad_id: Token that fills padded rows.
    """
    started = time.perf_counter()
    order = np.argsort(-examples.lengths, kind="stable")
    losses: list[Tensor] = []
    targets = 0
    for start in range(0, len(order), batch_size):
        (micro_batch,) = micro_batches(
            examples,
            order[start : start + batch_size],
            micro_batch_size=batch_size,
            micro_batch_tokens=None,
            batching=batching,
            max_length=max_length,
            pad_id=pad_id,
        )
        with precision.autocast():
            losses.append(loss_sum(model, micro_batch, device, draw=None))
        targets += micro_batch.num_targets
    loss = exact_sum(losses) / max(1, targets)
    return EvalResult(loss, targets, time.perf_counter() - started)
