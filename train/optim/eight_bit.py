"""AdamW whose moments are kept in 8 bits: the update, and the optimizer that applies it.

A moment takes a byte an element and 4 bytes a block of 256, in the place of 4 an element. It is
made fp32, updated and used by `adamw_update`, and rounded again (kernels/blockwise.py): what the
rounding loses is the whole difference from AdamW. Where moments take little room or are known to
suffer, they stay fp32: of parameters of fewer than 4096 elements, and of embeddings, of which most
rows meet no gradient in most steps.

Source: Dettmers et al. 2022 (arXiv 2110.02861); bitsandbytes 0.50.2 `AdamW8bit` with its
    `min_8bit_size`; transformers 5.23 `Trainer.create_optimizer` for the embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.blockwise import BLOCK, blocks_of, dequantise_blocks, quantise_blocks
from train.optim.adamw import adamw_update
from train.optim.buffers import Optimizer, block_elements

SMALLEST = 4096  # elements of a parameter whose moments are kept in 8 bits


def adamw_8bit_update(
    parameter: Tensor,  # (n, E) masters θ, updated in place
    gradient: Tensor,  # (n, E) g; ends as working memory
    first: Tensor,  # (n, B, 256) uint8 m, updated in place
    first_largest: Tensor,  # (n, B) of its blocks, updated in place
    second: Tensor,  # (n, B, 256) uint8 v, updated in place
    second_largest: Tensor,  # (n, B)
    **settings: Any,  # as of `adamw_update`
) -> None:
    """Update parameters as `adamw_update` does, by moments that are rounded to 8 bits behind it."""
    elements = parameter.shape[1]
    m = dequantise_blocks(first, first_largest, elements, signed=True)
    v = dequantise_blocks(second, second_largest, elements, signed=False)
    adamw_update(parameter, gradient, m, v, **settings)
    for moment, kept, largest, signed in (
        (m, first, first_largest, True),
        (v, second, second_largest, False),
    ):
        indices, of_blocks = quantise_blocks(moment, signed)
        kept.copy_(indices)
        largest.copy_(of_blocks)


@dataclass(frozen=True)
class _Stack:
    """Parameters of one shape, stacked: n of them, or a lone one."""

    names: tuple[str, ...]
    weight: Tensor  # (n, E), a view of the parameters
    gradient: Tensor | None  # the same of the buffer's gradients; None for a lone parameter
    # `exp_avg` and `exp_avg_sq`: (n, E), or in 8 bits (n, B, 256) and `…_largest` (n, B).
    state: dict[str, Tensor]
    decayed: bool  # whether weight decay applies
    rate: float  # what the learning rate is multiplied by

    def pieces(self, gradient: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield weight, gradient (n, E) and state in pieces of whole blocks, as views."""
        count, elements = self.weight.shape
        size = max(BLOCK, block_elements(gradient.device) // BLOCK * BLOCK)
        at_a_time = max(1, size // max(1, elements))
        for row in range(0, count, at_a_time):
            rows = slice(row, row + at_a_time)
            for begin in range(0, elements, size):
                some = slice(begin, begin + size)
                blocks = slice(begin // BLOCK, (begin + size) // BLOCK)
                of_state = some if len(self.state) == 2 else blocks
                yield (
                    self.weight[rows, some],
                    gradient[rows, some],
                    *(tensor[rows, of_state] for tensor in self.state.values()),
                )


class AdamW8bit(Optimizer):
    """`adamw_8bit_update` over a buffer; parameters of equal shape are updated together."""

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
        embeddings: Collection[str] = (),  # names of parameters whose moments stay fp32
        rates: Mapping[str, float] | None = None,  # as of `Buffer`
    ) -> None:
        """Allocate the moments, as zeros beside the parameters; other arguments as of `AdamW`."""
        super().__init__(named_parameters, weight_decay, decayed, None, rates)
        self.betas = betas
        self.eps = eps
        self._stacks: list[_Stack] = []
        for group in self.groups:
            stacked = [
                group.stacked(flat).reshape(len(group.names), group.shape.numel())
                for flat in (self.weights, self.gradients)
            ]
            begin = 0
            for is_embedding, some in itertools.groupby(group.names, lambda n: n in embeddings):
                names = tuple(some)
                weight, gradient = (tensor[begin : begin + len(names)] for tensor in stacked)
                begin += len(names)
                state = _moments(weight, is_embedding)
                kind = group.decayed, group.rate
                self._stacks.append(_Stack(names, weight, gradient, state, *kind))
        for name, parameter in self.lone.items():
            weight = parameter.detach().view(1, -1)
            state = _moments(weight, name in embeddings)
            kind = name in self.decayed, self.rates.get(name, 1.0)
            self._stacks.append(_Stack((name,), weight, None, state, *kind))

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """Update every parameter once with `gradient_factor` times its gradient."""
        self.gather_gradients()
        self.steps += 1
        for stack in self._stacks:
            gradient = stack.gradient
            if gradient is None:
                lone = self.parameters[stack.names[0]].grad
                assert lone is not None
                gradient = lone.reshape(1, -1)
            update = adamw_update if len(stack.state) == 2 else adamw_8bit_update
            for tensors in stack.pieces(gradient):
                update(
                    *tensors,
                    step=self.steps,
                    learning_rate=learning_rate * stack.rate,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay if stack.decayed else 0.0,
                    gradient_factor=gradient_factor,
                )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg` and `.exp_avg_sq`, those in 8 bits as indices.

        Of these also `.exp_avg_largest` and `.exp_avg_sq_largest`; and `steps`.
        """
        tensors = {"steps": torch.tensor(self.steps)}
        for stack in self._stacks:
            for kind, stacked in stack.state.items():
                for name, tensor in zip(stack.names, stacked.unbind(), strict=True):
                    if not kind.endswith("_largest"):
                        parameter = self.parameters[name]
                        tensor = tensor.view(-1)[: parameter.numel()].view(parameter.shape)
                    tensors[f"{name}.{kind}"] = tensor
        return tensors


def _moments(weight: Tensor, is_embedding: bool) -> dict[str, Tensor]:
    """Return zero moments of stacked parameters, in 8 bits where they are many."""
    count, elements = weight.shape
    if elements < SMALLEST or is_embedding:
        return {kind: weight.new_zeros(count, elements) for kind in ("exp_avg", "exp_avg_sq")}
    state = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        shape = count, blocks_of(elements)
        # Blocks of zeros, whatever the indices: their largest value is 0.
        state[kind] = weight.new_zeros(*shape, BLOCK, dtype=torch.uint8)
        state[f"{kind}_largest"] = weight.new_zeros(shape)
    return state
