"""Cross-entropy of a linear head, without ever holding the logits of a whole micro-batch.

Legend: M token rows · S rows that have a target · H hidden size · V vocabulary · C chunk rows.

The logits of M rows are by far the largest tensor of a language model: 8192 rows of a vocabulary
of 151,936 take 5 GB in fp32. Here rows without a target are left out, the rest go through the head
C at a time, and the softmax of a chunk becomes, in place, the gradient with respect to its logits:
softmax - onehot. So the gradients of hidden states and weight are ready when the forward pass ends,
each logit is computed once, and the peak is one (C, V) buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpu.rounding import document_multiple
from kernels.operands import compute_dtype

# (logits of a chunk (C, V), targets (S ≤ C,), scale, None or weights (S,)) → (S,) losses, which are
# not weighted, and the scaled gradient (C, V), which is.
CrossEntropy = Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]

IGNORE = -100  # the label of a token that is not trained
_MOST_ROWS_CPU = 256  # the fastest of 64 … 1024 on two cores: a chunk stays near the caches
_MOST_ROWS = 4096
# What the logits of a chunk may take. The head is read once a chunk, so on a GPU a chunk of few
# rows would spend more time on reading it than on the product.
_LOGITS_BYTES = 256 * 2**20


def chunk_rows_of(vocabulary: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """Return C, how many rows' logits exist at once: by the memory they take, a multiple of 64.

    A function of sizes, type and device alone, never of what is free: a resumed run adds up in the
    same order.
    """
    most = _MOST_ROWS_CPU if torch.device(device).type == "cpu" else _MOST_ROWS
    rows = _LOGITS_BYTES // (vocabulary * dtype.itemsize)
    return max(64, min(most, rows // 64 * 64))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    gradient_scale: float = 1.0,
    chunk_rows: int | None = None,
    cross_entropy: CrossEntropy | None = None,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` against `targets`.

    The product runs in autocast's type where autocast is on, else in that of `hidden`; softmax,
    loss and the accumulation of the weight's gradient run in fp32 (fp64 for fp64 input). The
    gradient of a frozen weight is never computed.

    Args:
        hidden: (M, H) states after the final norm.
        weight: (V, H) the head.
        targets: (M,) int64 token ids, already shifted; `IGNORE` where nothing is trained.
        gradient_scale: what the caller multiplies the loss by before its backward pass. It decides
            nothing but the size at which half-precision gradients are rounded: fp16 ones have to be
            made at the size that the loss scaler watches over.
        chunk_rows: C, how many rows' logits exist at once; None takes `chunk_rows_of`.
        cross_entropy: what makes loss and gradient of a chunk; plain PyTorch where None.
        rows: (S,) int64, the rows that have a target, on the device of `hidden`. The host knows
            them before anything is computed; without them the device is asked, and waited for.
        weights: (S,) what the loss of each of these rows is multiplied by, in fp32 (fp64 for fp64
            input); 1 where None.

    Returns:
        Scalar sum over the targets; 0 where there are none, still connected to the graph.
    """
    differentiable = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(  # pyright: ignore[reportReturnType]  # apply is untyped
        hidden,
        weight,
        targets,
        (targets != IGNORE).nonzero().squeeze(1) if rows is None else rows,
        gradient_scale,
        chunk_rows,
        cross_entropy or _cross_entropy_,
        weights,
        differentiable and hidden.requires_grad,
        differentiable and weight.requires_grad,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        gradient_scale: float,
        chunk_rows: int | None,
        cross_entropy: CrossEntropy,
        weights: Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        chunk_rows = chunk_rows or chunk_rows_of(len(weight), dtype, hidden.device)
        spare = -len(rows) % document_multiple(hidden.device, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            loss, grad_hidden, grad_weight = _sum_over_chunks(
                hidden.index_select(0, F.pad(rows, (0, spare))).to(dtype),
                weight.to(dtype),
                targets.index_select(0, rows),
                gradient_scale,
                chunk_rows,
                cross_entropy,
                weights,
                needs_hidden,
                needs_weight,
            )
        ctx.save_for_backward(rows, grad_hidden, grad_weight)
        ctx.hidden_like = hidden.shape, hidden.dtype
        ctx.weight_dtype = weight.dtype
        ctx.gradient_scale = gradient_scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, grad_hidden, grad_weight = ctx.saved_tensors
        left = grads[0] / ctx.gradient_scale  # of the factor on the loss
        if grad_hidden is not None:
            shape, dtype = ctx.hidden_like
            scaled = (grad_hidden * left).to(dtype)
            grad_hidden = scaled.new_zeros(shape).index_copy_(0, rows, scaled)
        if grad_weight is not None:
            grad_weight = (grad_weight * left).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 8


def _sum_over_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradient_scale: float,
    chunk_rows: int,
    cross_entropy: CrossEntropy,
    weights: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (loss sum, scaled gradients by `hidden` (S, H) and by `weight` (V, H)).

    Rows of `hidden` behind the S of `targets` are there to repeat a shape: they count for nothing.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(targets), dtype=exact)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
    for start in range(0, len(targets), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = hidden[chunk] @ weight.t()
        some = None if weights is None else weights[chunk]
        losses[chunk], grad_logits = cross_entropy(logits, targets[chunk], gradient_scale, some)
        if grad_hidden is not None:
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
        if grad_weight is not None and grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad_logits.t(), hidden[chunk])
        elif grad_weight is not None:
            grad_weight += grad_logits.t() @ hidden[chunk]
    if grad_hidden is not None:
        grad_hidden = grad_hidden[: len(targets)]
    if weights is not None:
        losses *= weights
    return losses.sum(), grad_hidden, grad_weight


def _cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and its gradient by the logits, scaled and weighted, in their type.

    `logits` are overwritten; rows behind those of `targets` get a gradient of 0.
    """
    gradient = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted, index = gradient[: len(targets)], targets[:, None]
    target_logits = wanted.gather(1, index)
    largest = wanted.amax(1, keepdim=True)
    wanted.sub_(largest).exp_()
    total = wanted.sum(1, keepdim=True)
    losses = total.log() + largest - target_logits
    wanted.div_(total / scale)
    wanted.scatter_add_(1, index, torch.full_like(target_logits, -scale))
    if weights is not None:
        wanted.mul_(weights[:, None])
    gradient[len(targets) :] = 0
    return losses.squeeze(1), gradient.to(logits.dtype)
