"""How likely a model finds the rows of a set: loss, perplexity, accuracy, each with its error.

A mean over tokens of rows r with sums s_r over n_r tokens is m = Σ s_r / Σ n_r. Tokens of one row
are alike, so that its standard error is the one clustered by row,

    √( R / (R − 1) · Σ (s_r − m · n_r)² ) / Σ n_r,

R rows with any token: what a row adds beyond its share is what could have come out otherwise. A
number for each row, such as pass@k, is the case n_r = 1, where it is the usual s / √R.

Source: Cochran 1977, section 6.4 (ratio estimate); Miller 2024, "Adding Error Bars to Evals",
section 2.2, with the small-sample factor of Liang and Zeger's estimator (Stata's and R's CR1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batching, MicroBatch, micro_batches
from data.examples import Examples
from kernels.loss import chunk_rows_of
from kernels.operands import compute_dtype
from kernels.segments import uploaded
from models.layers import CausalLM
from train.loss import head_states
from train.precision import Precision
from train.process.memory import does_not_fit, within_memory


@dataclass(frozen=True)
class Estimate:
    """A mean and what it may be off by.

    Attributes:
        value: The mean.
        error: Its standard error, None of fewer than two rows.
        rows: R, the rows that it is a mean over.
    """

    value: float
    error: float | None
    rows: int


@dataclass(frozen=True)
class Scores:
    """What a model gave each example.

    Attributes:
        loss: (N,) sums over the example's targets (nats).
        correct: (N,) targets that were the likeliest token.
        targets: (N,) targets.
        rows: (N,) the row that each example comes from.
    """

    loss: np.ndarray
    correct: np.ndarray
    targets: np.ndarray
    rows: np.ndarray

    def estimates(self) -> dict[str, Estimate]:
        """Return `loss`, `perplexity` and `token_accuracy`.

        Perplexity is e to the loss, and its error e to the loss times the loss's (delta method).
        """
        loss = mean(self.loss, self.targets, self.rows)
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(loss.value))
        error = None if loss.error is None else perplexity * loss.error
        return {
            "loss": loss,
            "perplexity": replace(loss, value=perplexity, error=error),
            "token_accuracy": mean(self.correct, self.targets, self.rows),
        }


def mean(
    sums: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray,
    rows: Sequence[int] | np.ndarray,
) -> Estimate:
    """Return the mean Σ sums / Σ counts and its standard error clustered by row (see above).

    Args:
        sums: (N,) sums over tokens, or over whatever is counted.
        counts: (N,) how many each is a sum over.
        rows: (N,) the row that each belongs to.
    """
    _, which = np.unique(np.asarray(rows), return_inverse=True)
    by_row = np.bincount(which, weights=np.asarray(sums, dtype=np.float64))
    counted = np.bincount(which, weights=np.asarray(counts, dtype=np.float64))
    by_row, counted = by_row[counted > 0], counted[counted > 0]
    number, total = len(counted), counted.sum()
    if number == 0:
        return Estimate(math.nan, None, 0)
    value = by_row.sum() / total
    if number == 1:
        return Estimate(float(value), None, 1)
    squares = np.square(by_row - value * counted).sum()
    return Estimate(float(value), float(np.sqrt(number / (number - 1) * squares) / total), number)


def score(
    model: CausalLM,
    examples: Examples,
    batching: Batching,
    precision: Precision,
    tell: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Return what the model gives each example, without dropout; the longest come first.

    Each batch's end is told by the number of examples that are done.

    Raises:
        UserError: Memory does not suffice for a single example.
    """
    loss, correct = np.zeros(len(examples)), np.zeros(len(examples))
    order = np.argsort(-examples.lengths, kind="stable")
    done, size = 0, batching.micro_batch_size
    while done < len(order):
        some = order[done : done + size]
        (batch,) = micro_batches(examples, some, replace(batching, micro_batch_size=size))
        with precision.autocast():
            found = within_memory(
                partial(token_losses, model, batch, precision.device), precision.device
            )
        if found is None:
            if len(some) == 1:
                raise does_not_fit("evaluation", batch.num_tokens)
            size = len(some) // 2
            continue
        document = np.repeat(np.arange(len(some)), examples.num_targets[some])
        for sums, numbers in zip((loss, correct), found, strict=True):
            sums[some] = np.bincount(document, numbers.double().numpy(), minlength=len(some))
        done += len(some)
        tell(done)
    return Scores(loss, correct, examples.num_targets, examples.rows)


@torch.no_grad()
def token_losses(
    model: CausalLM, micro_batch: MicroBatch, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each target's own cross-entropy, and whether the model has it for the likeliest token.

    Returns:
        (S,) nats in fp32 (fp64 of an fp64 model), and (S,) bool, both on the host, in the order of
        the micro-batch's target rows. Of equally likely tokens the one with the lowest id counts.
    """
    hidden, targets = head_states(model, micro_batch, device, draw=None)
    dtype, head = compute_dtype(hidden), model.head_weight()
    rows, wanted = micro_batch.target_rows, targets[micro_batch.target_rows]
    losses, likeliest = [], []
    for some in torch.arange(len(rows)).split(chunk_rows_of(len(head), dtype, device)):
        states = hidden.index_select(0, uploaded(rows[some], device)).to(dtype)
        logits = F.linear(states, head.to(dtype))
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        target = uploaded(wanted[some], device)
        losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
        likeliest.append((logits.argmax(-1) == target).cpu())
    if not losses:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    return torch.cat(losses), torch.cat(likeliest)
