"""What merging changed: an adapted model and its merged one on the same rows.

Both are computed in fp32, whatever their weights are stored in, so that what differs is what the
merge has rounded. Hidden states of the first are kept, not its logits, which are made again a few
rows at a time.

Legend: M token rows · H hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batching, MicroBatch, micro_batches
from data.examples import Examples
from kernels.loss import chunk_rows_of
from models.layers import CausalLM, LayerNorm, RMSNorm
from train.loss import head_states

# Tokens after which no further row is taken: a forward pass or two of the largest models on a CPU.
MOST_TOKENS = 2048
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Outputs:
    """What a model makes of rows: (M, H) hidden states of each in fp32, and the head, (V, H)."""

    hidden: list[Tensor]
    head: Tensor


@dataclass(frozen=True)
class Receipt:
    """How far a merged model is from the adapted one, over `tokens` of `rows`.

    Attributes:
        rows: Rows of data that both were given.
        tokens: Tokens of these, the next of each predicted by both.
        targets: Tokens that the loss is over.
        largest_logit_difference: The largest of all |merged − adapted|.
        largest_logit: The largest |adapted|, beside which that stands.
        top_1_agreement: Share of the tokens of which both have the same for the likeliest next.
        adapted_loss: Nats per target of the adapted model.
        merged_loss: The same of the merged one.
        loss_difference: Merged less adapted.
    """

    rows: int
    tokens: int
    targets: int
    largest_logit_difference: float
    largest_logit: float
    top_1_agreement: float
    adapted_loss: float
    merged_loss: float
    loss_difference: float


def rows_to_compare(examples: Examples) -> list[MicroBatch]:
    """Return whole rows, evenly spread over the set, of at most `MOST_TOKENS` (or one row)."""
    many = max(1, MOST_TOKENS // max(1, round(float(examples.lengths.mean()))))
    spread = np.unique(np.linspace(0, len(examples) - 1, min(many, len(examples))).round())
    chosen: list[int] = []
    left = MOST_TOKENS
    for position in spread.astype(int).tolist():
        length = int(examples.lengths[position])
        if length <= left or not chosen:
            chosen.append(position)
            left -= length
    cut = Batching(micro_batch_size=1, layout="unpadded", max_length=1, pad_id=0)
    return micro_batches(examples, chosen, cut)


@torch.no_grad()
def outputs(model: CausalLM, batches: Sequence[MicroBatch]) -> Outputs:
    """Return what a model on the host makes of the rows; it is left as it was."""
    with _in_fp32(model):
        hidden = [
            head_states(model, batch, _HOST, draw=None)[0][: batch.num_tokens] for batch in batches
        ]
        # The tensor as it is now: a merge may put another in its place.
        return Outputs(hidden, model.head_weight().detach())


@torch.no_grad()
def receipt(adapted: Outputs, merged: Outputs, batches: Sequence[MicroBatch]) -> Receipt:
    """Compare what both models make of the same rows."""
    heads = adapted.head.float(), merged.head.float()
    difference, largest, agreed, tokens = 0.0, 0.0, 0, 0
    losses = torch.zeros(2, dtype=torch.float64)
    for batch, *both in zip(batches, adapted.hidden, merged.hidden, strict=True):
        rows = chunk_rows_of(len(heads[0]), torch.float32, _HOST)
        for some in torch.arange(batch.num_tokens).split(rows):
            one, other = (
                F.linear(hidden[some], head) for hidden, head in zip(both, heads, strict=True)
            )
            difference = max(difference, float((other - one).abs().max()))
            largest = max(largest, float(one.abs().max()))
            agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
            wanted = batch.targets[some]
            for which, logits in enumerate((one, other)):
                losses[which] += F.cross_entropy(logits.double(), wanted, reduction="sum").double()
        tokens += batch.num_tokens
    targets = sum(batch.num_targets for batch in batches)
    adapted_loss, merged_loss = (losses / max(1, targets)).tolist()
    return Receipt(
        rows=len(batches),
        tokens=tokens,
        targets=targets,
        largest_logit_difference=difference,
        largest_logit=largest,
        top_1_agreement=agreed / tokens,
        adapted_loss=adapted_loss,
        merged_loss=merged_loss,
        loss_difference=merged_loss - adapted_loss,
    )


@contextmanager
def _in_fp32(model: CausalLM) -> Iterator[None]:
    """Have a model compute in fp32: layers follow the norms, and weights where they are read."""
    kept: list[tuple[torch.nn.Parameter, Tensor]] = []
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            kept += [(p, p.data) for p in module.parameters(recurse=False)]
    for parameter, data in kept:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
