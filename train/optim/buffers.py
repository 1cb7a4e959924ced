"""Where trained parameters and their gradients lie in memory; no rule of an update is known here.

Adapters are hundreds of small tensors, and an operation on each costs more than its arithmetic. So
small parameters are moved end to end into one buffer, of which they become views, and their
gradients into another: clearing them is one operation, so is their norm, and so is their sum over
ranks.

A process may hold parameters whole or, where ranks share them, some rows of each (`Sharing`). What
is summed over rows or over parameters is then summed over the ranks.
"""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from files.errors import UserError

# Adds a tensor up over ranks; the same shape comes back.
Reduce = Callable[[Tensor], Tensor]
# An update that yields what is to be summed over the ranks, and is sent the sum.
Update = Generator[Tensor, Tensor, None]

# Longer parameters stay where they are. For them an operation each is nothing, and moving them
# would take their size twice while it is done, and keep their gradient's memory between steps.
LONE_ELEMENTS = 1 << 20
# Every parameter in the buffer begins at a multiple of this many elements (64 bytes at fp32), as
# matrix products want it.
_ALIGNMENT = 16
# Length of the pieces whose norms are taken first. On a CPU torch adds the squares of one long
# vector one after another: the norm of 24 million numbers was wrong by 1.3e-3, in pieces by 1e-7.
_NORM_PIECE = 1 << 12
# Elements that an update works on at a time. On a CPU what a block touches stays in the shared
# cache, and shorter blocks (2^15 to 2^19 were tried) cost more in calls than they save; a GPU wants
# fewer launches.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a run share the trained parameters: each has some rows of every one.

    Attributes:
        reduce: Adds a tensor up over the ranks.
        rows: Name → rows of the whole parameter (elements, of a vector).
        first: Name → the first of this rank's rows.
        sources: Name → the parameter that the model has, whose rows and gradient's rows these are,
            where it is another object.
        local: Returns this process's rows of a source or of its gradient, as a view.
    """

    reduce: Reduce
    rows: Mapping[str, int]
    first: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, Parameter] = field(default_factory=dict)
    local: Callable[[Tensor], Tensor] = torch.Tensor.detach


def in_step(updates: Iterable[Update], sharing: Sharing | None) -> None:
    """Carry updates out: one by one, or on shared parameters together, a sum of each in one piece.

    All updates yield equally often.
    """
    if sharing is None:
        for update in updates:
            with contextlib.suppress(StopIteration):
                total = next(update)
                while True:
                    total = update.send(total)
        return
    running = list(updates)
    wanted = [next(update, None) for update in running]
    while sums := [x for x in wanted if x is not None]:
        flat = sharing.reduce(torch.cat([x.reshape(-1) for x in sums]))
        totals = [
            total.view_as(x)
            for total, x in zip(flat.split([x.numel() for x in sums]), sums, strict=True)
        ]
        wanted = []
        for update, total in zip(running, totals, strict=True):
            try:
                wanted.append(update.send(total))
            except StopIteration:
                wanted.append(None)


def block_elements(device: torch.device) -> int:
    """Return how many elements an update works on at a time."""
    return _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS


@dataclass(frozen=True)
class Group:
    """Parameters of one shape that lie side by side in the buffer."""

    names: tuple[str, ...]  # the parameters' names, n of them
    shape: torch.Size  # the shape of each
    decayed: bool  # whether they are among those that lie first
    rate: float  # what the learning rate is multiplied by for them
    first: int  # where the first begins
    stride: int  # from the beginning of one to that of the next

    @property
    def end(self) -> int:
        """Where the next group begins."""
        return self.first + len(self.names) * self.stride

    def stacked(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat tensor as a view, (n, *shape)."""
        pieces = flat[self.first : self.end].view(len(self.names), self.stride)
        return pieces[:, : self.shape.numel()].view(len(self.names), *self.shape)


class Buffer:
    """The trained parameters, the small ones as views of one flat tensor, and their gradients.

    Attributes:
        parameters: What is trained, by name; of shared ones, this process's rows.
        decayed: Names of the parameters that weight decay applies to.
        rates: Name → what the learning rate is multiplied by for a parameter, where it is not 1.
        groups: The small parameters in the order of the buffer: those that decay first.
        weights: The buffer, (n,).
        gradients: Their gradients, in the same places, (n,). From the first step on these are the
            parameters' `.grad`, which backward passes add to.
        lone: The parameters that are not in the buffer, by name.
        sharing: How ranks share the parameters; None where each is whole.
        state_dtype: What an update computes in, and keeps its state in.
    """

    # What masters may be stored in. Rules that round by chance have other ones.
    master_dtypes = (torch.float32, torch.float64)

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        decayed: Collection[str],
        sharing: Sharing | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Move the small parameters into the buffer, in place: the objects stay the same.

        Shared parameters, views of the model's, stay where they are.

        Raises:
            ValueError: A parameter is in half precision, which cannot hold small updates, or not
                all are of one type on one device.
        """
        self.parameters = dict(named_parameters)
        _check_masters(self.parameters, self.master_dtypes)
        self.decayed = frozenset(name for name in self.parameters if name in decayed)
        self.rates = dict(rates or {})
        self.sharing = sharing
        self.sources = {} if sharing is None else sharing.sources
        self.lone = {
            name: parameter
            for name, parameter in self.parameters.items()
            if sharing is not None or parameter.numel() > LONE_ELEMENTS
        }
        small = {n: p for n, p in self.parameters.items() if n not in self.lone}
        self.groups = _groups(small, self.decayed, self.rates)
        elements = self.groups[-1].end if self.groups else 0
        like = next(iter(self.parameters.values())).detach()
        self.state_dtype = torch.promote_types(like.dtype, torch.float32)
        self.weights = like.new_zeros(math.ceil(elements / _NORM_PIECE) * _NORM_PIECE)
        self.gradients = torch.zeros_like(self.weights)
        self._gradient_views = dict(self.views(self.gradients))
        for name, view in self.views(self.weights):
            view.copy_(small[name].detach())
            small[name].data = view

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each small parameter's name and its part of a flat tensor, in its shape."""
        for group in self.groups:
            yield from zip(group.names, group.stacked(flat).unbind(), strict=True)

    def clear_gradients(self) -> None:
        """Forget all gradients: zeros in the buffer, None elsewhere."""
        self.gradients.zero_()
        for name, parameter in self.parameters.items():
            if parameter.grad is not self._gradient_views.get(name):
                parameter.grad = None
        for source in self.sources.values():
            source.grad = None

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Bring every small parameter's gradient into the buffer, where it is then added up.

        Up to the first step `.grad` is None and so tells which parameters took no part; the buffer
        could not, for its zeros look like gradients.

        Raises:
            ValueError: No gradient has ever reached a parameter, or a lone one has none now.
        """
        for name, source in self.sources.items():
            assert self.sharing is not None
            self.parameters[name].grad = (
                None if source.grad is None else self.sharing.local(source.grad)
            )
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

    @torch.no_grad()
    def add_gradients(self, add: Reduce, *, none: bool = False) -> None:
        """Add the gradients of replicas up, the buffer's in one piece.

        Args:
            add: Sums a tensor over the replicas, in place.
            none: This replica has nothing to add: zeros stand for its gradients.

        Raises:
            ValueError: As `gather_gradients`.
        """
        if none:
            for name, parameter in self.parameters.items():
                view = self._gradient_views.get(name)
                parameter.grad = torch.zeros_like(parameter) if view is None else view
        self.gather_gradients()
        add(self.gradients)
        for parameter in self.lone.values():
            assert parameter.grad is not None
            add(parameter.grad)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the global L2 norm of the gradients. Waits for the device.

        Raises:
            ValueError: As `gather_gradients`.
        """
        self.gather_gradients()
        norm_of, dtype = torch.linalg.vector_norm, self.state_dtype
        pieces = [norm_of(self.gradients.view(-1, _NORM_PIECE), dim=1, dtype=dtype)]
        pieces += [
            norm_of(gradient, dim=-1, dtype=dtype).view(-1)
            for parameter in self.lone.values()
            if (gradient := parameter.grad) is not None
        ]
        norm = torch.linalg.vector_norm(torch.cat(pieces))
        # On the host, which has fp64 whatever the device: it holds any fp32's square exactly.
        square = norm.cpu().double().square()
        return math.sqrt((square if self.sharing is None else self.sharing.reduce(square)).item())


_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(name: str) -> bool:
    """Return whether weight decay applies to a parameter of this name.

    It spares biases and norms; LoRA's A and B and the embeddings are decayed.

    Source: transformers 5.23 `Trainer.get_decay_parameter_names`.
    """
    return _NO_DECAY.search(name.lower()) is None


class Optimizer(Buffer, ABC):
    """A buffer and a rule that updates it.

    Attributes:
        steps: Updates made.
        weight_decay: Share of a weight that a learning rate of 1 would remove in a step.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        weight_decay: float,
        decayed: Collection[str] | None,
        sharing: Sharing | None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Begin at step 0; where `decayed` is None, what `decays` holds for decays."""
        if decayed is None:
            decayed = [name for name in named_parameters if decays(name)]
        super().__init__(named_parameters, decayed, sharing, rates)
        self.weight_decay = weight_decay
        self.steps = 0

    @abstractmethod
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """Update every parameter once with `gradient_factor` times its gradient.

        What the gradients are afterwards is not defined: they serve as working memory. Nothing has
        been changed where an error is raised.

        Raises:
            ValueError: As `gather_gradients`.
        """

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live, by names that begin with the parameters'; and `steps`."""

    def state_rows(self, name: str) -> tuple[int, int] | None:
        """Return of a state tensor the first row that is this rank's, and how many the whole has.

        None where the tensor is whole on every rank.
        """
        parameter, _, kind = name.rpartition(".")
        if self.sharing is None or not parameter or kind == "exp_avg_sq_col":
            return None
        return self.sharing.first[parameter], self.sharing.rows[parameter]

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


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what to multiply gradients of this global norm by so that `max_norm` bounds it.

    A bound of 0 or less clips nothing.

    Source: min(1, c / (n + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def _check_masters(parameters: Mapping[str, Parameter], dtypes: Collection[torch.dtype]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in dtypes:
            raise ValueError(
                f"{name} is {parameter.dtype}: trained parameters are kept in float32, because "
                "half precision cannot hold small updates, or in bfloat16 by a rule that rounds "
                "them by chance (train.masters)"
            )
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) != 1:
        raise ValueError(f"trained parameters are of one type on one device, not {kinds}")


def _groups(
    small: Mapping[str, Parameter], decayed: Collection[str], rates: Mapping[str, float]
) -> list[Group]:
    """Lay the small parameters out: what decays first, then by rate, equal shapes side by side."""
    members: dict[tuple[bool, float, torch.Size], list[str]] = {}
    for name, parameter in small.items():
        kind = (name not in decayed, rates.get(name, 1.0), parameter.shape)
        members.setdefault(kind, []).append(name)
    groups: list[Group] = []
    for (spared, rate, shape), names in sorted(members.items(), key=lambda member: member[0][:2]):
        stride = math.ceil(shape.numel() / _ALIGNMENT) * _ALIGNMENT
        first = groups[-1].end if groups else 0
        groups.append(Group(tuple(names), shape, not spared, rate, first, stride))
    return groups
