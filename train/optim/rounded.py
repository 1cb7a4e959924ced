"""Masters in bf16: AdamW and Adafactor that compute in fp32 and round the weights by chance.

With bf16 weights and gradients, a parameter takes 4 bytes in the place of 8, beside its state,
which stays fp32. Rounded to the nearest, an update below half a step of bf16 (2⁻⁹ of the weight and
less) would be lost, and most are: the rounding is by chance instead, right in the mean
(kernels/stochastic_rounding.py). The draw of an element follows from (seed, update, parameter, row,
column), of the whole parameter where ranks share it. Gradients of several micro-batches are added
up in bf16, which rounds each sum to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.stochastic_rounding import column_keys, round_to_bf16, row_keys
from train.optim.adafactor import EPSILON, Adafactor, Stack, clipped_rate
from train.optim.adamw import AdamW, adamw_update
from train.optim.buffers import Buffer, Update, block_elements
from train.optim.moments import Span

# Makes bf16 of fp32 rows (n, r, C), of which the first is that row of the parameters.
Round = Callable[[Tensor, int], Tensor]


def adamw_update_rounded(
    parameter: Tensor,  # (r, C) bf16 rows of masters, updated in place
    gradient: Tensor,  # (r, C) bf16; stays
    first: Tensor,  # (r, C) fp32 moments, updated in place
    second: Tensor,  # (r, C) fp32
    *,
    to_bf16: Callable[[Tensor], Tensor],
    **settings: Any,  # as of `adamw_update`
) -> None:
    """Update rows by `adamw_update` in fp32, and round the weights."""
    exact = parameter.float()
    adamw_update(exact, gradient.float(), first, second, **settings)
    parameter.copy_(to_bf16(exact))


def adafactor_update_rounded(
    parameter: Tensor,  # (n, R, C) bf16 masters of one shape, updated in place; vectors: C = 1
    gradient: Tensor,  # (n, R, C) bf16; stays
    *state: Tensor,  # fp32: of matrices (n, R) row and (n, C) column means, of vectors (n, R) v̂
    to_bf16: Round,
    beta2: float,
    learning_rate: float,
    weight_decay: float,
    gradient_factor: float = 1.0,
    epsilon: float = EPSILON,
    whole_rows: int | None = None,  # over all ranks; None: R
) -> Update:
    """Update matrices or vectors by Adafactor's rule in fp32, a block of rows at a time.

    The update is made three times from the gradient, which could not hold it: for the second
    moments, for its norm and for the weights.
    """
    count, rows, columns = gradient.shape
    whole = rows if whole_rows is None else whole_rows
    at_a_time = max(1, block_elements(gradient.device) // max(1, count * columns))
    blocks = [slice(first, first + at_a_time) for first in range(0, rows, at_a_time)]

    def exact(block: slice) -> Tensor:
        part = gradient[:, block].float()
        return part.mul_(gradient_factor) if gradient_factor != 1.0 else part

    row, *factored = state
    sums = gradient.new_zeros(count, columns, dtype=torch.float32)
    for block in blocks:
        squared = exact(block).square_()
        row[:, block].lerp_(squared.mean(dim=-1).add_(epsilon), 1.0 - beta2)
        if factored:
            sums.add_(squared.sum(dim=-2))
    # Three sums, as many of a vector as of a matrix.
    sums = yield sums if factored else sums.new_zeros(0)
    total = yield row.sum(dim=-1, keepdim=True) if factored else sums
    if factored:
        (column,) = factored
        column.lerp_(sums.div_(whole).add_(epsilon), 1.0 - beta2)
        row_factor, column_factor = (row / (total / whole)).rsqrt_(), column.rsqrt()
    else:
        row_factor, column_factor = row.rsqrt(), torch.ones_like(row[:, :1])

    def update(block: slice) -> Tensor:
        part = exact(block).mul_(row_factor[:, block].unsqueeze(-1))
        return part.mul_(column_factor.unsqueeze(-2))

    norms = [sums.new_zeros(count, 0)]
    norms += [torch.linalg.vector_norm(update(block), dim=-1) for block in blocks]
    norm = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1)
    rate = clipped_rate((yield norm.square()), whole * columns, learning_rate).view(-1, 1, 1)
    for block in blocks:
        weight = parameter[:, block].float()
        if weight_decay:
            weight.mul_(1.0 - weight_decay * learning_rate)
        parameter[:, block] = to_bf16(weight.addcmul_(update(block), rate, value=-1.0), block.start)


class _Rounded(Buffer):
    """Parameters in bf16, and how their elements are rounded."""

    master_dtypes = (torch.bfloat16,)
    seed: int
    steps: int

    def rounded(self, values: Tensor, names: tuple[str, ...], first: int) -> Tensor:
        """Return rows (n, r, C) of n parameters, from this process's row `first` on, in bf16."""
        device, (_, rows, columns) = values.device, values.shape
        begin = {} if self.sharing is None else self.sharing.first
        keys = [
            row_keys(self.seed, self.steps, name, begin.get(name, 0) + first, rows, device)
            for name in names
        ]
        return round_to_bf16(
            values, torch.stack(keys), torch.stack([column_keys(n, columns, device) for n in names])
        )


class RoundedAdamW(_Rounded, AdamW):
    """`adamw_update_rounded` over parameters, one after the other."""

    def __init__(
        self, named_parameters: Mapping[str, Parameter], *, seed: int, **settings: Any
    ) -> None:
        """Allocate fp32 moments; the settings are those of `AdamW`, of which a kernel is no part.

        Raises:
            ValueError: A parameter is not in bf16, or has neither one dimension nor two.
        """
        _check_dimensions(named_parameters)
        super().__init__(named_parameters, **settings)
        self.seed = seed
        flat = zip(self.views(self._first), self.views(self._second), strict=True)
        self._all_moments = self._lone_moments | {
            name: (first, second) for (name, first), (_, second) in flat
        }

    def _spans(self) -> Iterator[Span]:
        for name, moments in self._all_moments.items():
            yield self._span(name, *moments, row=_columns(self.parameters[name]))

    def _update(self, span: Span, begin: int, tensors: tuple[Tensor, ...], **given: Any) -> None:
        def to_bf16(values: Tensor) -> Tensor:
            return self.rounded(values.unsqueeze(0), (span.name,), begin // span.row)[0]

        rows = [tensor.view(-1, span.row) for tensor in tensors]
        adamw_update_rounded(*rows, to_bf16=to_bf16, **given)


class RoundedAdafactor(_Rounded, Adafactor):
    """`adafactor_update_rounded` over a buffer; parameters of equal shape are updated together."""

    def __init__(
        self, named_parameters: Mapping[str, Parameter], *, seed: int, **settings: Any
    ) -> None:
        """Allocate fp32 second moments; the settings are those of `Adafactor`, without a kernel.

        Raises:
            ValueError: As `RoundedAdamW`.
        """
        _check_dimensions(named_parameters)
        super().__init__(named_parameters, **settings)
        self.seed = seed

    def _rule(self, stack: Stack) -> Callable[..., Update]:
        def to_bf16(values: Tensor, first: int) -> Tensor:
            return self.rounded(values, stack.names, first)

        def update(weight: Tensor, gradient: Tensor, *state: Tensor, **given: Any) -> Update:
            if weight.ndim == 2:
                weight, gradient = weight.unsqueeze(-1), gradient.unsqueeze(-1)
            return adafactor_update_rounded(weight, gradient, *state, to_bf16=to_bf16, **given)

        return update


def _columns(parameter: Parameter) -> int:
    return math.prod(parameter.shape[1:])


def _check_dimensions(parameters: Mapping[str, Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.ndim not in (1, 2):
            raise ValueError(f"{name} has {parameter.ndim} dimensions: rows and columns are needed")
