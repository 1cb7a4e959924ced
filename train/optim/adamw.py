"""AdamW: the update as a formula, and the optimizer that applies it to a buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from train.optim.buffers import Optimizer, Sharing
from train.optim.moments import Moments, Span


def adamw_update(
    parameter: Tensor,  # (n,) masters θ, updated in place
    gradient: Tensor,  # (n,) g; ends as working memory
    first: Tensor,  # (n,) m, running mean of g, updated in place
    second: Tensor,  # (n,) v, running mean of g², updated in place
    *,
    step: int,  # t, from 1
    learning_rate: float,
    betas: tuple[float, float],  # what of m and of v is left after a step
    eps: float,
    weight_decay: float,  # 0 where the parameter does not decay
    gradient_factor: float = 1.0,  # clipping's and the loss scale's
) -> None:
    """Update parameters by Adam with decoupled weight decay, element by element.

    m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; then, with m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ),
    θ ← θ(1 - lr·wd) - lr·m̂/(√v̂ + ε).

    The bias corrections are scalars, and with numerator and denominator multiplied by √(1-β₂ᵗ) they
    need no pass over memory: m̂/(√v̂ + ε) is m/(√v + ε√(1-β₂ᵗ)) times √(1-β₂ᵗ)/(1-β₁ᵗ).

    Source: Loshchilov & Hutter 2019; `torch.optim.AdamW`, equal to rounding.
    """
    beta1, beta2 = betas
    correction = math.sqrt(1.0 - beta2**step)
    if gradient_factor != 1.0:
        gradient.mul_(gradient_factor)
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = torch.sqrt(second, out=gradient).add_(eps * correction)
    if weight_decay:
        parameter.mul_(1.0 - learning_rate * weight_decay)
    parameter.addcdiv_(first, root, value=-learning_rate * correction / (1.0 - beta1**step))


class AdamW(Optimizer):
    """`adamw_update` over a buffer, in as few calls as there are kinds of parameters."""

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],  # what is trained, fp32 or fp64
        *,
        betas: tuple[float, float] = (0.9, 0.999),  # decay rates of the two moments
        eps: float = 1e-8,  # added to the root of the second moment
        # Share of a weight that a learning rate of 1 would remove in a step.
        weight_decay: float = 0.0,
        # Names that weight decay applies to; None takes those for which `decays` holds.
        decayed: Collection[str] | None = None,
        sharing: Sharing | None = None,  # as of `Buffer`
        rates: Mapping[str, float] | None = None,  # as of `Buffer`
        # A backend's `adamw_`, in the place of `adamw_update` for fp32 parameters.
        kernel: Callable[..., None] | None = None,
        moments: Moments | None = None,  # where the moments lie; None: beside the parameters
    ) -> None:
        """Allocate the moments, as zeros.

        Raises:
            ValueError: As `Buffer`.
        """
        super().__init__(named_parameters, weight_decay, decayed, sharing, rates)
        self._kernel = kernel if self.weights.dtype == torch.float32 else None
        self.betas = betas
        self.eps = eps
        self._moments = moments or Moments()
        self._first, self._second = self._zeros(self.weights), self._zeros(self.weights)
        self._lone_moments = {
            name: (self._zeros(parameter), self._zeros(parameter))
            for name, parameter in self.lone.items()
        }

    def _zeros(self, like: Tensor) -> Tensor:
        return self._moments.zeros(like, self.state_dtype)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """Update every parameter once with `gradient_factor` times its gradient."""
        self.gather_gradients()
        self.steps += 1
        whole = self._kernel is not None
        for span, begin, tensors in self._moments.pieces(self._spans(), whole=whole):
            self._update(
                span,
                begin,
                tensors,
                step=self.steps,
                learning_rate=learning_rate * span.rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=span.weight_decay,
                gradient_factor=gradient_factor,
            )

    def _update(self, span: Span, begin: int, tensors: tuple[Tensor, ...], **given: Any) -> None:
        """Update a piece of a span, which begins there."""
        (self._kernel or adamw_update)(*tensors, **given)

    def _spans(self) -> Iterator[Span]:
        """Yield the buffer, what is updated alike in one piece, and the long parameters."""
        flat = self.weights, self.gradients, self._first, self._second
        kinds = [[*same] for _, same in groupby(self.groups, lambda g: (g.decayed, g.rate))]
        for number, same in enumerate(kinds, start=1):
            first, last = same[0], same[-1]
            # The last one takes the zeros behind it along.
            end = last.end if number < len(kinds) else len(self.weights)
            some = tuple(tensor[first.first : end] for tensor in flat)
            yield Span(some, self.weight_decay if first.decayed else 0.0, rate=first.rate)
        for name in self.lone:
            yield self._span(name, *self._lone_moments[name])

    def _span(self, name: str, first: Tensor, second: Tensor, row: int = 1) -> Span:
        """Return a parameter and its moments, which have its shape; pieces are whole rows."""
        parameter = self.parameters[name]
        gradient = parameter.grad
        assert gradient is not None
        flat = parameter.view(-1), gradient.reshape(-1), first.view(-1), second.view(-1)
        decay, rate = self.weight_decay if name in self.decayed else 0.0, self.rates.get(name, 1.0)
        return Span(flat, decay, name, row, rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg` and `<name>.exp_avg_sq`; `steps`."""
        self._moments.settle()
        tensors = {"steps": torch.tensor(self.steps)}
        for kind, flat in (("exp_avg", self._first), ("exp_avg_sq", self._second)):
            tensors |= {f"{name}.{kind}": view for name, view in self.views(flat)}
        for name, (first, second) in self._lone_moments.items():
            tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = first, second
        return tensors
