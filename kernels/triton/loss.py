"""Softmax cross-entropy of a chunk of logits in Triton: the loss, and the gradient in their place.

Legend: C rows of the chunk · S of them with a target · V vocabulary

One program a row reads it twice and writes it once, 3·V·c bytes of c each: first the maximum and
the sum of exponentials, carried along from block to block, then (softmax - onehot) · scale, times
the row's weight where there are weights, over the logits. Arithmetic is in fp32, logits stay in the
type of the product. Rows behind the S become 0.
"""

# Triton types a launch as a call of the kernel itself, which it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton.jit import kernel
from kernels.triton.launch import block_of, launch


@kernel("wanted")
def _cross_entropy(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    weights_ptr,
    wanted,
    vocabulary,
    scale,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kind = logits_ptr.dtype.element_ty
    base = logits_ptr + row * vocabulary
    if row < wanted:
        target = tl.load(targets_ptr + row)
        target_logit = tl.load(base + target).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(base + column, mask=column < vocabulary, other=-float("inf"))
            x = x.to(tl.float32)
            before = largest
            largest = tl.maximum(largest, tl.max(x, axis=0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
        tl.store(losses_ptr + row, tl.log(total) + largest - target_logit)
        factor = scale
        if WEIGHTED:
            factor *= tl.load(weights_ptr + row)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            x = tl.load(base + column, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - largest) / total - tl.where(column == target, 1.0, 0.0)
            tl.store(base + column, (gradient * factor).to(kind), mask=inside)
    else:
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), dtype=kind)
            tl.store(base + column, zeros, mask=column < vocabulary)


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and in place of `logits` the scaled gradient of the loss by them.

    Args:
        logits: (C, V), contiguous.
        targets: (S,) int64, S ≤ C; rows behind them get no loss and a gradient of 0.
        scale: factor of the gradient.
        weights: (S,) fp32, a further factor of each row's gradient; None: 1.

    Returns:
        (S,) fp32 losses, not weighted, and (C, V) gradient, `logits` itself.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    settings = launch("cross_entropy", logits.device)
    block = min(settings["BLOCK"], block_of(vocabulary))
    _cross_entropy[(rows,)](
        logits,
        targets,
        losses,
        weights,
        len(targets),
        vocabulary,
        scale,
        WEIGHTED=weights is not None,
        BLOCK=block,
        num_warps=min(settings["num_warps"], max(1, block // 512)),
    )
    return losses, logits
