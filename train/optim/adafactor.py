"""Adafactor, written out; parameters of equal shape are updated together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from train.optim.buffers import Optimizer

# Elements that are worked on at a time, and so the size of the update's working memory. On a CPU
# what a block touches stays in the shared cache, and shorter blocks (2^15 to 2^19 were tried) cost
# more in calls than they save; a GPU wants fewer launches.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Stack:
    """Parameters of one shape, stacked: n of them, or a lone one.

    Attributes:
        names: Their names.
        weight: (n, *shape), a view of the parameters; at least one dimension beside n.
        gradient: The same of the buffer's gradients; None for a lone parameter.
        state: (n, ...) `exp_avg_sq_row` and `exp_avg_sq_col` of matrices, `exp_avg_sq` of vectors.
        decayed: Whether weight decay applies.
    """

    names: tuple[str, ...]
    weight: Tensor
    gradient: Tensor | None
    state: dict[str, Tensor]
    decayed: bool


class Adafactor(Optimizer):
    """Adafactor as the stack configures it: external learning rate, no first moment.

    A matrix (or a stack of them) keeps the means of its squared gradient by row and by column
    instead of the whole: rows + columns floats of state in place of rows x columns. t counts from
    1, so that β₂ is 0 at the first step:

    1. β₂ = 1 - t^-0.8; q = g² + 1e-30.
    2. R ← β₂R + (1-β₂)·mean(q, -1); C ← β₂C + (1-β₂)·mean(q, -2); v̂ = R⊗C / mean(R).
       A vector: v̂ ← β₂v̂ + (1-β₂)q.
    3. u = g/√v̂; u ← u / max(1, RMS(u)); θ ← θ - wd·lr·θ; θ ← θ - lr·u.

    `torch.optim.Adafactor` is another rule: it scales by the RMS of the parameter and decays first.

    Source: Shazeer & Stern 2018; transformers 5.23 `optimization.Adafactor` with
        `scale_parameter=False, relative_step=False`, which `optim="adafactor"` selects.
    """

    epsilon = 1e-30
    decay_rate = -0.8

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        *,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Allocate the second moments, as zeros beside the parameters; arguments as `Optimizer`.

        `kernel` updates fp32 matrices in the place of `_update_matrices`: a backend's `adafactor_`.
        """
        super().__init__(named_parameters, weight_decay, decayed)
        self._kernel = kernel if self.weights.dtype == torch.float32 else None
        on_cpu = self.weights.device.type == "cpu"
        self._block = _BLOCK_ELEMENTS_CPU if on_cpu else _BLOCK_ELEMENTS
        self._stacks = [*self._stacks_of_the_buffer()]
        for name, parameter in self.lone.items():
            weight = parameter.detach().unsqueeze(0)
            state = _second_moments(weight)
            self._stacks.append(_Stack((name,), weight, None, state, name in self.decayed))
        # A row, or a whole vector, is never cut.
        longest = max(
            stack.weight.shape[-1] if stack.weight.ndim > 2 else stack.weight.numel()
            for stack in self._stacks
        )
        self._scratch = self.weights.new_empty(max(self._block, longest))

    def _stacks_of_the_buffer(self) -> Iterator[_Stack]:
        """Yield the groups of equal shape, cut where they are longer than a block."""
        for group in self.groups:
            count = max(1, self._block // max(1, group.shape.numel()))
            stacked = [group.stacked(self.weights), group.stacked(self.gradients)]
            if not group.shape:
                stacked = [tensor.unsqueeze(-1) for tensor in stacked]
            pieces = [tensor.split(count) for tensor in stacked]
            for first, weight, gradient in zip(
                range(0, len(group.names), count), *pieces, strict=True
            ):
                names = group.names[first : first + count]
                yield _Stack(names, weight, gradient, _second_moments(weight), group.decayed)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every parameter once with `gradient_scale` times its gradient."""
        self._gather_gradients()
        self.steps += 1
        beta2 = 1.0 - self.steps**self.decay_rate
        for stack in self._stacks:
            decay = self.weight_decay * learning_rate if stack.decayed else 0.0
            gradient = stack.gradient
            if gradient is None:
                (name,) = stack.names
                lone = self.parameters[name].grad
                assert lone is not None
                gradient = lone.unsqueeze(0)
            update = self._update_matrices if stack.weight.ndim > 2 else self._update_vectors
            update(stack, gradient, learning_rate, gradient_scale, beta2, decay)

    def _update_vectors(
        self,
        stack: _Stack,
        gradient: Tensor,
        learning_rate: float,
        gradient_scale: float,
        beta2: float,
        decay: float,
    ) -> None:
        """Update n vectors, whose second moments are kept in full."""
        if gradient_scale != 1.0:
            gradient.mul_(gradient_scale)
        squared = torch.mul(gradient, gradient, out=self._working_memory(gradient))
        second_moment = stack.state["exp_avg_sq"].lerp_(squared.add_(self.epsilon), 1.0 - beta2)
        update = gradient.mul_(torch.rsqrt(second_moment, out=squared))
        rate = _rate(torch.linalg.vector_norm(update, dim=-1), update[0].numel(), learning_rate)
        if decay:
            stack.weight.mul_(1.0 - decay)
        stack.weight.addcmul_(update, rate.unsqueeze(-1), value=-1.0)

    def _update_matrices(
        self,
        stack: _Stack,
        gradient: Tensor,
        learning_rate: float,
        gradient_scale: float,
        beta2: float,
        decay: float,
    ) -> None:
        """Update n matrices, a block of rows at a time.

        The second moments want the whole gradient, and the update's norm wants all second moments,
        so there are three passes over the rows. The update takes the gradient's place.
        """
        row, column = stack.state["exp_avg_sq_row"], stack.state["exp_avg_sq_col"]
        if self._kernel and gradient.ndim == 3 and stack.weight[0].is_contiguous():
            self._kernel(
                stack.weight,
                gradient,
                row,
                column,
                learning_rate=learning_rate,
                beta2=beta2,
                epsilon=self.epsilon,
                gradient_scale=gradient_scale,
                decay=1.0 - decay,
            )
            return
        rows = gradient.shape[-2]
        at_a_time = max(1, self._block * rows // max(1, gradient.numel()))
        blocks = [slice(first, first + at_a_time) for first in range(0, rows, at_a_time)]
        weights = [stack.weight[..., block, :] for block in blocks]
        gradients = [gradient[..., block, :] for block in blocks]

        sums = torch.zeros_like(column)
        for block, part in zip(blocks, gradients, strict=True):
            if gradient_scale != 1.0:
                part.mul_(gradient_scale)
            squared = torch.mul(part, part, out=self._working_memory(part))
            row[..., block].lerp_(squared.mean(dim=-1).add_(self.epsilon), 1.0 - beta2)
            sums.add_(squared.sum(dim=-2))
        column.lerp_(sums.div_(rows).add_(self.epsilon), 1.0 - beta2)
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        column_factor = column.rsqrt().unsqueeze(-2)

        norms = []
        for block, part in zip(blocks, gradients, strict=True):
            part.mul_(row_factor[..., block, :]).mul_(column_factor)
            norms.append(torch.linalg.vector_norm(part, dim=-1).flatten(1))
        norm = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1)
        rate = _rate(norm, gradient[0].numel(), learning_rate)
        rate = rate.view(-1, *[1] * (gradient.ndim - 1))
        for weight, update in zip(weights, gradients, strict=True):
            if decay:
                weight.mul_(1.0 - decay)
            weight.addcmul_(update, rate, value=-1.0)

    def _working_memory(self, like: Tensor) -> Tensor:
        """Return memory of a tensor's shape that the next call hands out again."""
        return self._scratch[: like.numel()].view(like.shape)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg_sq_row` and `_col`, or `.exp_avg_sq`; `steps`."""
        tensors = {"steps": torch.tensor(self.steps)}
        for stack in self._stacks:
            for kind, stacked in stack.state.items():
                for name, tensor in zip(stack.names, stacked.unbind(), strict=True):
                    scalar = self.parameters[name].ndim == 0
                    tensors[f"{name}.{kind}"] = tensor.view(()) if scalar else tensor
        return tensors


def _rate(norms: Tensor, elements: int, learning_rate: float) -> Tensor:
    """Return lr / max(1, RMS) of updates of these L2 norms."""
    return learning_rate / (norms / math.sqrt(elements)).clamp_(min=1.0)


def _second_moments(weight: Tensor) -> dict[str, Tensor]:
    """Return zero state of stacked parameters: by row and column for matrices, else in full."""
    if weight.ndim < 3:
        return {"exp_avg_sq": torch.zeros_like(weight, memory_format=torch.contiguous_format)}
    shape = weight.shape
    return {
        "exp_avg_sq_row": weight.new_zeros(shape[:-1]),
        "exp_avg_sq_col": weight.new_zeros(shape[:-2] + shape[-1:]),
    }
