"""What is saved: tensors, of which a rank may have some rows, and how files of them are written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from files.tensors import Rows, write_shares, write_tensors
from models.weights import Write
from train.optim.buffers import Optimizer
from train.process.world import timeout_seconds
from train.state import Run

Tensors = Mapping[str, Tensor | Rows]

_FILES = itertools.count()


def shared_parameters(run: Run) -> Tensors:
    """Return all weights of a model that is fully trained: of a shared one, this rank's rows."""
    sharing = run.optimizer.sharing
    if sharing is None:
        return {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    # Not the model's own: behind an evaluation those outside its layers are still gathered.
    return {
        name: Rows(sharing.local(source), sharing.first[name], tuple(source.shape))
        for name, source in sharing.sources.items()
    }


def optimizer_tensors(optimizer: Optimizer) -> Tensors:
    """Return the optimizer's state, live: of shared parameters, this rank's rows of it."""
    tensors: dict[str, Tensor | Rows] = {}
    for name, tensor in optimizer.state_tensors().items():
        rows = optimizer.state_rows(name)
        if rows is not None:
            tensor = Rows(tensor, rows[0], (rows[1], *tensor.shape[1:]))
        tensors[name] = tensor
    return tensors


def own_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of a whole optimizer's state what this rank has of it."""
    own = {}
    for name, tensor in tensors.items():
        rows = optimizer.state_rows(name)
        mine = optimizer.state_tensors()[name] if rows else tensor
        own[name] = tensor if rows is None else tensor[rows[0] : rows[0] + len(mine)]
    return own


def writer_of(run: Run) -> Write:
    """Return what writes a file of a run's tensors: this process alone, or all ranks together."""
    world = run.world
    if run.optimizer.sharing is None:
        return write_tensors

    def meet() -> None:
        # No collective may be under way that would miss a rank: this wait must.
        world.met(f"file-{next(_FILES)}", seconds=timeout_seconds())

    # Every rank writes the same files in the same order.
    return partial(write_shares, leads=world.first, meet=meet)


def copied(tensors: Tensors) -> Tensors:
    """Return copies in host memory."""
    return {
        name: Rows(x.tensor.to("cpu", copy=True), x.first, x.shape)
        if isinstance(x, Rows)
        else x.to("cpu", copy=True)
        for name, x in tensors.items()
    }


def num_bytes(tensors: Tensors) -> int:
    """Return the size of whole tensors."""
    return sum(x.numel() * x.dtype.itemsize for x in tensors.values())


def held_bytes(tensors: Tensors) -> int:
    """Return the size of what this rank has of them."""
    held = (x.tensor if isinstance(x, Rows) else x for x in tensors.values())
    return sum(x.numel() * x.dtype.itemsize for x in held)
