"""One optimizer step: the loss of a set of examples, its gradient, and the update.

The step's batch is the unit of meaning: its loss is the mean over the targets of all its examples,
each by its row's weight where rows have such (`data.weight_field`). How the set is cut into
micro-batches changes speed and memory only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from data.batch import MicroBatch
from files.faults import faultpoint
from models.layers import CausalLM
from train.inputs.sharding import NOTHING, missing
from train.loss import exact_sum, loss_sum
from train.optim.buffers import Optimizer, clip_factor
from train.precision import LossScaler, Precision
from train.process.memory import within_memory
from train.process.world import ALONE, World
from train.state import StepResult


def train_step(
    model: CausalLM,  # the decoder, in the state of step s - 1
    optimizer: Optimizer,  # owner of the trainable parameters
    batch: Sequence[MicroBatch],  # the step's micro-batches, in order: of this rank's part
    *,
    learning_rate: float,  # the rate of this step
    max_grad_norm: float,  # bound of the global gradient norm; 0 clips nothing
    precision: Precision,  # what to compute in, and where
    scaler: LossScaler | None,  # the loss scaler under fp16, else None
    draw: tuple[int, int],  # (seed, step) of the dropout draws
    # What the host does once the device has the gradient to compute: the one moment of a step at
    # which it would wait is the norm of the gradient.
    meanwhile: Callable[[], object] | None = None,
    # Called where a micro-batch holds the most memory: its activations are all there.
    at_most: Callable[[], object] | None = None,
    world: World = ALONE,  # the ranks that share the step
) -> StepResult:
    """Update the model's trainable parameters once, with the gradient of the whole batch.

    Of several ranks each brings a part of the batch, possibly none; sums over the ranks stand in
    for its own before anything is differentiated, decided or updated, so that all do the same.

    A loss or gradient that is not finite leaves weights, optimizer state and loss scale as they
    were, bit for bit, and is reported as skipped. So does a micro-batch that memory does not
    suffice for: the same step can then be done with smaller ones. Running out of memory in the
    update itself is not caught, for it cannot be undone.
    """
    started = time.perf_counter()
    own = [(part.num_targets, part.num_tokens, part.total_weight) for part in batch]
    *counts, weight = world.sums(*map(sum, zip((0, 0, 0.0), *own, strict=True)))
    targets, tokens = map(int, counts)

    def result(
        loss: float, norm: float, skipped: str | None = None, of: Sequence[MicroBatch] = batch
    ) -> StepResult:
        optimizer.clear_gradients()
        examples = tuple(index for micro_batch in of for index in micro_batch.examples)
        seconds = time.perf_counter() - started
        return StepResult(loss, learning_rate, norm, targets, tokens, seconds, skipped, examples)

    if targets == 0:
        return result(0.0, 0.0, "no targets")
    scaler_before = scaler.state() if scaler else {}
    handed_on = model, optimizer, batch, targets, precision, scaler, draw, meanwhile, at_most, world
    gradient = partial(_gradient, *handed_on, weight / targets)
    # Several ranks agree on what memory allows inside: what fails after that ends the run.
    computed = within_memory(gradient, precision.device) if world.size == 1 else gradient()
    losses, norm, scale = computed or ([], math.nan, 1.0)
    mean = world.sums(exact_sum(losses))[0] / targets if computed else math.nan
    if not (math.isfinite(norm) and math.isfinite(mean)):
        if scaler:
            scaler.load(scaler_before)
        if computed is None:
            return result(mean, norm, "out of memory")
        at_fault = [part for part, loss in zip(batch, losses, strict=True) if not loss.isfinite()]
        known = world.any(bool(at_fault))[0]
        return result(mean, norm, "non-finite", of=at_fault if known else batch)
    faultpoint("step.gradient")
    optimizer.step(learning_rate, clip_factor(norm, max_grad_norm) / scale)
    faultpoint("step.updated")
    return result(mean, norm)


def _gradient(
    model: CausalLM,
    optimizer: Optimizer,
    batch: Sequence[MicroBatch],
    targets: int,
    precision: Precision,
    scaler: LossScaler | None,
    draw: tuple[int, int],
    meanwhile: Callable[[], object] | None,
    at_most: Callable[[], object] | None,
    world: World,
    mean_weight: float,
) -> tuple[list[Tensor], float, float] | None:
    """Leave the gradient of the batch's token mean in the parameters, which have none.

    With a loss scaler (fp16), an overflow halves the scale and the same batch is done again: an
    attempt that overflowed is no step, so neither the schedule nor the data order moves. Below a
    scale of 1 nothing is left to gain: the gradient itself is not finite.

    Returns:
        The sum of the token losses of each micro-batch of this rank, the gradient's norm, and the
        loss scale that the gradient itself is still multiplied by; None where a rank ran out of
        memory.
    """

    def backward(scale: float) -> list[Tensor]:
        losses = []
        for micro_batch in [*batch, *[NOTHING] * missing(len(batch), world)]:
            faultpoint("step.micro_batch")
            with precision.autocast():
                # The head's gradient is made in the forward pass: fp16 would round it unscaled.
                gradient_scale = scale / targets if scaler else 1.0
                loss = loss_sum(
                    model, micro_batch, precision.device, draw, gradient_scale, mean_weight
                )
            if at_most is not None:
                at_most()
            (loss * (scale / targets)).backward()
            losses.append(loss.detach())
        return losses[: len(batch)]

    while True:
        scale = scaler.scale if scaler else 1.0
        # A shared model's passes are collectives: where one rank fails, none can do them again.
        losses = (
            backward(scale)
            if world.shards
            else within_memory(partial(backward, scale), precision.device)
        )
        if world.any(losses is None)[0] or losses is None:
            return None
        if world.size > 1 and optimizer.sharing is None:
            optimizer.add_gradients(world.sum_, none=not batch)
        if meanwhile is not None:
            meanwhile()
        norm = optimizer.gradient_norm() / scale
        if scaler is None:
            return losses, norm, scale
        scaler.update(not math.isfinite(norm))
        if math.isfinite(norm) or scaler.scale < 1.0:
            return losses, norm, scale
        optimizer.clear_gradients()
