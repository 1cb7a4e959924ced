"""What the optimizers share: the trained parameters' places in memory, and their gradients.

Adapters are hundreds of small tensors, and an operation on each costs more than its arithmetic. So
small parameters are moved end to end into one buffer, of which they become views, and their
gradients into another: clearing them is one operation, so is their norm, and so is their sum over
ranks.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from files.errors import UserError

# Longer parameters stay where they are. For them an operation each is nothing, and moving them
# would take their size twice while it is done, and keep their gradient's memory between steps.
LONE_ELEMENTS = 1 << 20
# Every parameter in the buffer begins at a multiple of this many elements (64 bytes at fp32), as
# matrix products want it.
_ALIGNMENT = 16
# Length of the pieces whose norms are taken first. On a CPU torch adds the squares of one long
# vector one after another: the norm of 24 million numbers was wrong by 1.3e-3, in pieces by 1e-7.
_NORM_PIECE = 1 << 12

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(name: str) -> bool:
    """Return whether weight decay applies to a parameter of this name.

    It spares biases and norms; LoRA's A and B and the embeddings are decayed.

    Source: transformers 5.23 `Trainer.get_decay_parameter_names`.
    """
    return _NO_DECAY.search(name.lower()) is None


@dataclass(frozen=True)
class Group:
    """Parameters of one shape that lie side by side in the buffer.

    Attributes:
        names: The parameters' names, n of them.
        shape: The shape of each.
        decayed: Whether weight decay applies to them.
        first: Where the first begins.
        stride: From the beginning of one to that of the next.
    """

    names: tuple[str, ...]
    shape: torch.Size
    decayed: bool
    first: int
    stride: int

    @property
    def end(self) -> int:
        """Where the next group begins."""
        return self.first + len(self.names) * self.stride

    def stacked(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat tensor as a view, (n, *shape)."""
        pieces = flat[self.first : self.end].view(len(self.names), self.stride)
        return pieces[:, : self.shape.numel()].view(len(self.names), *self.shape)


class Optimizer(ABC):
    """The trained parameters, the small ones as views of one buffer, and a rule to update them.

    Attributes:
        parameters: What is trained, by name.
        steps: Updates made.
        weight_decay: Share of a weight that a learning rate of 1 would remove in a step.
        decayed: Names of the parameters that it applies to.
        groups: The small parameters in the order of the buffer: those that decay first.
        weights: The buffer, (n,).
        gradients: Their gradients, in the same places, (n,). From the first step on these are the
            parameters' `.grad`, which backward passes add to.
        lone: The parameters that are not in the buffer, by name.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        weight_decay: float,
        decayed: Collection[str] | None,
    ) -> None:
        """Move the small parameters into the buffer, in place: the objects stay the same.

        Args:
            named_parameters: What is trained, fp32 or fp64.
            weight_decay: Share of a weight that a learning rate of 1 would remove in a step.
            decayed: Names that weight decay applies to; None takes those for which `decays` holds.

        Raises:
            ValueError: A parameter is in half precision, which cannot hold small updates, or not
                all are of one type on one device.
        """
        self.parameters = dict(named_parameters)
        self.steps = 0
        _check_masters(self.parameters)
        self.weight_decay = weight_decay
        self.decayed = frozenset(
            name
            for name in self.parameters
            if (decays(name) if decayed is None else name in decayed)
        )
        self.lone = {n: p for n, p in self.parameters.items() if p.numel() > LONE_ELEMENTS}
        small = {n: p for n, p in self.parameters.items() if n not in self.lone}
        self.groups = _groups(small, self.decayed)
        elements = self.groups[-1].end if self.groups else 0
        like = next(iter(self.parameters.values())).detach()
        self.weights = like.new_zeros(math.ceil(elements / _NORM_PIECE) * _NORM_PIECE)
        self.gradients = torch.zeros_like(self.weights)
        self._gradient_views = dict(self._views(self.gradients))
        for name, view in self._views(self.weights):
            view.copy_(small[name].detach())
            small[name].data = view

    @abstractmethod
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every parameter once with `gradient_scale` times its gradient.

        What the gradients are afterwards is not defined: they serve as working memory. Nothing has
        been changed where an error is raised.

        Raises:
            ValueError: No gradient has ever reached a parameter, or a lone one has none now.
        """

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live, by names that begin with the parameters'; and `steps`."""

    def clear_gradients(self) -> None:
        """Forget all gradients: zeros in the buffer, None elsewhere."""
        self.gradients.zero_()
        for name, parameter in self.parameters.items():
            if parameter.grad is not self._gradient_views.get(name):
                parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the global L2 norm of the gradients. Waits for the device.

        Raises:
            ValueError: As `step`.
        """
        self._gather_gradients()
        pieces = [torch.linalg.vector_norm(self.gradients.view(-1, _NORM_PIECE), dim=1)]
        pieces += [
            torch.linalg.vector_norm(gradient, dim=-1).view(-1)
            for parameter in self.lone.values()
            if (gradient := parameter.grad) is not None
        ]
        return torch.linalg.vector_norm(torch.cat(pieces)).item()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_tensors` gave.

        Raises:
            UserError: Tensors are missing, unexpected, or of another shape; all of them are listed,
                and nothing has been changed.
        """
        own = self.state_tensors()
        faults = [f"{name} is missing" for name in own if name not in tensors]
        faults += [f"{name} is unexpected" for name in tensors if name not in own]
        faults += [
            f"{name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if faults:
            raise UserError(
                f"optimizer state does not fit the trained parameters: {'; '.join(faults)}"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"].item())

    def _views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each small parameter's name and its part of a flat tensor, in its shape."""
        for group in self.groups:
            yield from zip(group.names, group.stacked(flat).unbind(), strict=True)

    @torch.no_grad()
    def _gather_gradients(self) -> None:
        """Bring every small parameter's gradient into the buffer, where it is then added up.

        Up to the first step `.grad` is None and so tells which parameters took no part; the buffer
        could not, for its zeros look like gradients.
        """
        absent = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if absent:
            raise ValueError(
                f"no gradient reached {len(absent)} of {len(self.parameters)} trained parameters: "
                f"{', '.join(absent[:5])}"
            )
        for name, view in self._gradient_views.items():
            parameter = self.parameters[name]
            if parameter.grad is not None and parameter.grad is not view:
                parameter.grad = view.copy_(parameter.grad)


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what to multiply gradients of this global norm by so that `max_norm` bounds it.

    Args:
        norm: Their norm.
        max_norm: The bound; 0 or less clips nothing.

    Source: min(1, c / (n + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def _check_masters(parameters: Mapping[str, Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}: trained parameters are kept in float32, because "
                "half precision cannot hold small updates"
            )
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) != 1:
        raise ValueError(f"trained parameters are of one type on one device, not {kinds}")


def _groups(small: Mapping[str, Parameter], decayed: Collection[str]) -> list[Group]:
    """Lay the small parameters out: what decays first, equal shapes side by side."""
    members: dict[tuple[bool, torch.Size], list[str]] = {}
    for name, parameter in small.items():
        members.setdefault((name in decayed, parameter.shape), []).append(name)
    groups: list[Group] = []
    for (decaying, shape), names in sorted(members.items(), key=lambda member: not member[0][0]):
        stride = math.ceil(shape.numel() / _ALIGNMENT) * _ALIGNMENT
        first = groups[-1].end if groups else 0
        groups.append(Group(tuple(names), shape, decaying, first, stride))
    return groups
