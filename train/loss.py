"""From a micro-batch to the sum of its token losses, for training and evaluation alike.

Shapes: M token rows of a micro-batch (pads included, where there are any).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import MicroBatch
from kernels.cpu.rounding import row_multiple
from kernels.loss import IGNORE
from kernels.operands import compute_dtype
from kernels.segments import Segments, uploaded
from models.layers import CausalLM


def loss_sum(
    model: CausalLM,  # the decoder; its head is applied to the supervised rows only
    micro_batch: MicroBatch,  # M token rows with shifted targets
    device: torch.device,  # where the model is
    # (seed, step) of the dropout draws; None in evaluation, which draws none.
    draw: tuple[int, int] | None,
    # What the sum is multiplied by before its backward pass, where fp16 needs to know
    # (`kernels.loss`).
    gradient_scale: float = 1.0,
    mean_weight: float | None = None,  # what its rows' weights are divided by; None: all are 1
) -> Tensor:
    """Return the sum over a micro-batch's targets of their (weighted) cross-entropy, in nats.

    It is a sum, not a mean, so that the micro-batches of a step add up to the step's loss whatever
    the cut.
    """
    hidden, targets = head_states(model, micro_batch, device, draw)
    weights = micro_batch.weights_over(mean_weight, hidden.dtype)
    return model.operations.linear_cross_entropy(
        hidden,
        model.head_weight(),  # of ranks that share it, whole by now
        uploaded(targets, device),
        gradient_scale=gradient_scale,
        rows=uploaded(micro_batch.target_rows, device),
        weights=None if weights is None else uploaded(weights, device),
    )


def head_states(
    model: CausalLM, micro_batch: MicroBatch, device: torch.device, draw: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Return what the head reads, (M, H), and on the host the targets, (M,), both with a tail."""
    rows, stream = len(micro_batch.input_ids), compute_dtype(model.model.norm.weight)
    segments = Segments.build(
        micro_batch.lengths,
        device=device,
        padded_length=micro_batch.padded_length,
        examples=micro_batch.examples,
        multiple=row_multiple(rows, device, stream),
        draw=draw,
    )
    input_ids = F.pad(micro_batch.input_ids, (0, segments.tail))
    targets = F.pad(micro_batch.targets, (0, segments.tail), value=IGNORE)
    return model.hidden_states(uploaded(input_ids, device), segments), targets


def exact_sum(losses: list[Tensor]) -> float:
    """Return the sum of scalars, made in fp64 on the host (not every device has fp64)."""
    return torch.stack(losses).cpu().double().sum().item() if losses else 0.0
