"""Adafactor: the update as a formula, and the optimizer that applies it to parameters of one shape.

t counts from 1, so that β₂ is 0 at the first step:

1. β₂ = 1 - t^-0.8; q = g² + 1e-30.
2. A vector: v̂ ← β₂v̂ + (1-β₂)q. A matrix keeps the means by row and by column instead, rows +
   columns floats of state in the place of rows x columns: R ← β₂R + (1-β₂)·mean(q, -1);
   C ← β₂C + (1-β₂)·mean(q, -2); v̂ = R⊗C / mean(R).
3. u = g/√v̂; u ← u / max(1, RMS(u)); θ ← θ - wd·lr·θ; θ ← θ - lr·u.

There is no first moment, and the learning rate is external. `torch.optim.Adafactor` is another
rule: it scales by the RMS of the parameter and decays first.

Where ranks share parameters, each has some of the rows (of the elements, of a vector). What steps 2
and 3 average over all rows is yielded as this process's sum, and the sum over all ranks comes back;
alone it is the same tensor.

Source: Shazeer & Stern 2018; transformers 5.23 `optimization.Adafactor` with
    `scale_parameter=False, relative_step=False`, which `optim="adafactor"` selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from train.optim.buffers import Optimizer, Sharing, Update, block_elements, in_step

EPSILON = 1e-30
DECAY_RATE = -0.8


def adafactor_update(
    parameter: Tensor,  # (n, ..., R, C) n masters of one shape, updated in place
    gradient: Tensor,  # (n, ..., R, C); ends as the update
    row: Tensor,  # (n, ..., R) running means of g² over the columns, updated in place
    column: Tensor,  # (n, ..., C) the same over the rows
    *,
    beta2: float,
    learning_rate: float,
    weight_decay: float,  # 0 where the parameters do not decay
    gradient_factor: float = 1.0,  # clipping's and the loss scale's
    epsilon: float = EPSILON,
    whole_rows: int | None = None,  # over all ranks; None: R
) -> Update:
    """Update matrices, a block of rows at a time.

    The second moments want the whole gradient, and the update's norm wants all second moments, so
    there are three passes over the rows.
    """
    rows, numel = gradient.shape[-2], gradient.numel()
    whole = rows if whole_rows is None else whole_rows
    at_a_time = max(1, block_elements(gradient.device) * rows // max(1, numel))
    blocks = [slice(first, first + at_a_time) for first in range(0, rows, at_a_time)]
    weights = [parameter[..., block, :] for block in blocks]
    gradients = [gradient[..., block, :] for block in blocks]

    scratch = gradient.new_empty(gradients[0].numel() if gradients else 0)
    sums = torch.zeros_like(column)
    for block, part in zip(blocks, gradients, strict=True):
        if gradient_factor != 1.0:
            part.mul_(gradient_factor)
        squared = torch.mul(part, part, out=scratch[: part.numel()].view(part.shape))
        row[..., block].lerp_(squared.mean(dim=-1).add_(epsilon), 1.0 - beta2)
        sums.add_(squared.sum(dim=-2))
    sums = yield sums
    column.lerp_(sums.div_(whole).add_(epsilon), 1.0 - beta2)
    total = yield row.sum(dim=-1, keepdim=True)
    row_factor = (row / (total / whole)).rsqrt_().unsqueeze(-1)
    column_factor = column.rsqrt().unsqueeze(-2)

    norms = [gradient.new_zeros(len(gradient), 0)]
    for block, part in zip(blocks, gradients, strict=True):
        part.mul_(row_factor[..., block, :]).mul_(column_factor)
        norms.append(torch.linalg.vector_norm(part, dim=-1).flatten(1))
    norm = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1)
    elements = whole * math.prod(gradient.shape[1:-2]) * gradient.shape[-1]
    rate = clipped_rate((yield norm.square()), elements, learning_rate)
    rate = rate.view(-1, *[1] * (gradient.ndim - 1))
    for weight, update in zip(weights, gradients, strict=True):
        if weight_decay:
            weight.mul_(1.0 - weight_decay * learning_rate)
        weight.addcmul_(update, rate, value=-1.0)


def adafactor_update_vectors(
    parameter: Tensor,  # (n, E) n masters of one length, updated in place
    gradient: Tensor,  # (n, E); ends as the update
    second: Tensor,  # (n, E) v̂, running mean of g², updated in place
    *,
    beta2: float,
    learning_rate: float,
    weight_decay: float,  # 0 where the parameters do not decay
    gradient_factor: float = 1.0,  # clipping's and the loss scale's
    epsilon: float = EPSILON,
    whole_rows: int | None = None,  # elements over all ranks; None: E
) -> Update:
    """Update vectors, whose second moments are kept in full."""
    if gradient_factor != 1.0:
        gradient.mul_(gradient_factor)
    squared = torch.square(gradient).add_(epsilon)
    second.lerp_(squared, 1.0 - beta2)
    update = gradient.mul_(torch.rsqrt(second, out=squared))
    norm = torch.linalg.vector_norm(update, dim=-1)
    # Three sums, as of a matrix.
    yield norm.new_zeros(0)
    yield norm.new_zeros(0)
    elements = update.shape[-1] if whole_rows is None else whole_rows
    rate = clipped_rate((yield norm.square()), elements, learning_rate)
    if weight_decay:
        parameter.mul_(1.0 - weight_decay * learning_rate)
    parameter.addcmul_(update, rate.unsqueeze(-1), value=-1.0)


def clipped_rate(squared_norm: Tensor, elements: int, learning_rate: float) -> Tensor:
    """Return lr / max(1, RMS) of updates, (n,), from the squares of their norms."""
    return learning_rate / (squared_norm.sqrt() / math.sqrt(elements)).clamp_(min=1.0)


@dataclass(frozen=True)
class Stack:
    """Parameters of one shape, stacked: n of them, or a lone one."""

    names: tuple[str, ...]
    weight: Tensor  # (n, *shape), a view of the parameters; at least one dimension beside n
    gradient: Tensor | None  # the same of the buffer's gradients; None for a lone parameter
    # (n, ...) `exp_avg_sq_row` and `exp_avg_sq_col` of matrices, `exp_avg_sq` of vectors.
    state: dict[str, Tensor]
    decayed: bool  # whether weight decay applies
    rate: float = 1.0  # what the learning rate is multiplied by


class Adafactor(Optimizer):
    """`adafactor_update` over a buffer; parameters of equal shape are updated together."""

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        *,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
        sharing: Sharing | None = None,
        rates: Mapping[str, float] | None = None,
        kernel: Callable[..., Update] | None = None,
    ) -> None:
        """Allocate the second moments, as zeros beside the parameters; arguments as `AdamW`.

        `kernel` is a backend's `adafactor_`, in the place of `adafactor_update` for fp32 matrices.
        """
        super().__init__(named_parameters, weight_decay, decayed, sharing, rates)
        self._kernel = kernel if self.weights.dtype == torch.float32 else None
        self._stacks = [*self._stacks_of_the_buffer()]
        for name, parameter in self.lone.items():
            weight = parameter.detach().unsqueeze(0)
            state = _second_moments(weight, self.state_dtype)
            rate = self.rates.get(name, 1.0)
            self._stacks.append(Stack((name,), weight, None, state, name in self.decayed, rate))

    def _stacks_of_the_buffer(self) -> Iterator[Stack]:
        """Yield the groups of equal shape, cut where they are longer than a block."""
        for group in self.groups:
            count = max(1, block_elements(self.weights.device) // max(1, group.shape.numel()))
            stacked = [group.stacked(self.weights), group.stacked(self.gradients)]
            if not group.shape:
                stacked = [tensor.unsqueeze(-1) for tensor in stacked]
            pieces = [tensor.split(count) for tensor in stacked]
            for first, weight, gradient in zip(
                range(0, len(group.names), count), *pieces, strict=True
            ):
                names = group.names[first : first + count]
                state = _second_moments(weight, self.state_dtype)
                yield Stack(names, weight, gradient, state, group.decayed, group.rate)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """Update every parameter once with `gradient_factor` times its gradient."""
        self.gather_gradients()
        self.steps += 1
        beta2 = 1.0 - self.steps**DECAY_RATE
        in_step(
            (self._update(stack, beta2, learning_rate, gradient_factor) for stack in self._stacks),
            self.sharing,
        )

    def _update(
        self, stack: Stack, beta2: float, learning_rate: float, gradient_factor: float
    ) -> Update:
        gradient = stack.gradient
        if gradient is None:
            (name,) = stack.names
            lone = self.parameters[name].grad
            assert lone is not None
            gradient = lone.unsqueeze(0)
        return self._rule(stack)(
            stack.weight,
            gradient,
            *stack.state.values(),
            beta2=beta2,
            learning_rate=learning_rate * stack.rate,
            weight_decay=self.weight_decay if stack.decayed else 0.0,
            gradient_factor=gradient_factor,
            epsilon=EPSILON,
            whole_rows=None if self.sharing is None else self.sharing.rows[stack.names[0]],
        )

    def _rule(self, stack: Stack) -> Callable[..., Update]:
        """Return what updates a stack."""
        weight = stack.weight
        if weight.ndim < 3:
            return adafactor_update_vectors
        takes = weight.ndim == 3 and weight.numel() and weight[0].is_contiguous()
        return self._kernel if self._kernel and takes else adafactor_update

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg_sq_row` and `_col`, or `.exp_avg_sq`; `steps`."""
        tensors = {"steps": torch.tensor(self.steps)}
        for stack in self._stacks:
            for kind, stacked in stack.state.items():
                for name, tensor in zip(stack.names, stacked.unbind(), strict=True):
                    scalar = self.parameters[name].ndim == 0
                    tensors[f"{name}.{kind}"] = tensor.view(()) if scalar else tensor
        return tensors


def _second_moments(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return zero state of stacked parameters: by row and column for matrices, else in full."""
    shape = weight.shape
    if weight.ndim < 3:
        return {"exp_avg_sq": weight.new_zeros(shape, dtype=dtype)}
    return {
        "exp_avg_sq_row": weight.new_zeros(shape[:-1], dtype=dtype),
        "exp_avg_sq_col": weight.new_zeros(shape[:-2] + shape[-1:], dtype=dtype),
    }
