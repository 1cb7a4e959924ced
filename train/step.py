"""One optimizer step: the loss of a set of examples, its gradient, and the update.

The step's batch is the unit of meaning: its loss is the sum of the token losses of all its
examples divided by the number of their targets. How the set is cut into micro-batches changes
speed and memory only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import MicroBatch
from models.layers import CausalLM
from train.loss import exact_sum, loss_sum
from train.optimizers import Adafactor, AdamW, clip_gradients
from train.precision import LossScaler, Precision


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: Token mean over the step's targets (nats): the number that was differentiated.
        grad_norm: Global L2 norm of the gradient before clipping.
        targets: Tokens with a label.
        tokens: Real tokens, padding left out.
        seconds: Wall time of the step.
        skipped: Why no weight was touched (`no targets`, `non-finite`), or None after an update.
    """

    loss: float
    grad_norm: float
    targets: int
    tokens: int
    seconds: float
    skipped: str | None = None


def train_step(
    model: CausalLM,
    optimizer: AdamW | Adafactor,
    batch: Sequence[MicroBatch],
    *,
    learning_rate: float,
    max_grad_norm: float,
    precision: Precision,
    scaler: LossScaler | None,
    device: torch.device,
    draw: tuple[int, int],
) -> StepResult:
    """Update the model's trainable parameters once, with the gradient of the whole batch.

    With a loss scaler (fp16), an overflow halves the scale and the same batch is done again: an
    attempt that overflowed is no step, so neither the schedule nor the data order moves. A loss or
    gradient that is not finite at all leaves weights, optimizer state and scale as they were, bit
    for bit, and is reported as skipped.

    Args:
        model: The decoder, in the state of step s - 1.
        optimizer: Owner of the trainable parameters.
        batch: The step's micro-batches, in order.
        learning_rate: The rate of this step.
        max_grad_norm: Bound of the global gradient norm; 0 clips nothing.
        precision: What to compute in.
        scaler: The loss scaler under fp16, else None.
        device: Where the model is.
        draw: (seed, step) of the dropout draws.
    """
    started = time.perf_counter()
    targets = sum(micro_batch.num_targets for micro_batch in batch)
    tokens = sum(micro_batch.num_tokens for micro_batch in batch)
    parameters = list(optimizer.parameters.values())

    def result(loss: float, norm: float, skipped: str | None = None) -> StepResult:
        for parameter in parameters:
            parameter.grad = None
        return StepResult(loss, norm, targets, tokens, time.perf_counter() - started, skipped)

    if targets == 0:
        return result(0.0, 0.0, "no targets")
    scaler_before = scaler.state() if scaler else {}
    while True:
        scale = scaler.scale if scaler else 1.0
        # The head's gradient is made in the forward pass: fp16 would round it before the scale.
        gradient_scale = scale / targets if scaler else 1.0
        losses: list[Tensor] = []
        for micro_batch in batch:
            with precision.autocast():
                loss = loss_sum(model, micro_batch, device, draw, gradient_scale)
            (loss * (scale / targets)).backward()
            losses.append(loss.detach())
        norm = clip_gradients(parameters, max_grad_norm, loss_scale=scale)
        overflowed = not math.isfinite(norm)
        if scaler is None:
            break
        scaler.update(overflowed)
        if not overflowed:
            break
        if scaler.scale < 1.0:
            # Nothing is left to gain: the gradient itself is not finite, whatever the scale.
            scaler.load(scaler_before)
            break
        for parameter in parameters:
            parameter.grad = None
    mean = exact_sum(losses) / targets
    if overflowed or not math.isfinite(mean):
        return result(mean, norm, "non-finite")
    optimizer.step(learning_rate)
    return result(mean, norm)
