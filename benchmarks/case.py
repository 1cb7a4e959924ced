"""What a case of `benchmarks.kernels` is: one operation at one shape, its sides, its exact result.

A side is anything that computes the operation, or as a floor less than it; `exact` is what the
reference, which the tests hold to literal formulas, or a literal formula gives in fp64. A name in a
side's results that `exact` has is checked before the side is timed. In a dry room the shapes are
small, and odd where they can be.

Bytes and operations are the fewest that the operation can do with: each tensor read or written once
a pass, 2·M·K·N operations a product. All sides of a case are credited with them, the floors too, so
what a side does beyond them shows as a lower rate, and what a floor leaves out as a higher one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Operations, operations

Results = dict[str, Tensor]
Run = Callable[..., Tensor | Sequence[Tensor]]
LATHE, TRITON = "lathe, reference", "lathe, triton"
COMPILED = "torch.compile"


def triton(name: str) -> Any:
    """Return a module of Triton's kernels: only who runs one needs triton."""
    return importlib.import_module(f"kernels.triton.{name}")


@dataclass(frozen=True)
class Side:
    """One way to compute a case: the forward pass, and both passes with all gradients."""

    forward: Callable[[], Results]
    full: Callable[[], Results] | None  # None where there is no backward pass
    # Its dropout is drawn by a generator of its own: only what it computes at p = 0 is compared.
    checked_without_dropout: bool = False
    compared: bool = True  # not where it computes less than the operation

    def results(self) -> Results:
        """Return what both passes give; without a backward pass, what the forward pass does."""
        return (self.full or self.forward)()


@dataclass(frozen=True)
class Case:
    """One operation at one shape; sides and exact results are made from the dropout's p."""

    part: str
    text: str
    sides: dict[str, Callable[[float], Side]]
    exact: Callable[[float], Results]
    p: float = 0.0
    gigabytes: tuple[float, float] = (0.0, 0.0)  # (forward, both passes) at least
    teraflops: tuple[float, float] = (0.0, 0.0)  # of operations, in 10¹²
    floor: str = LATHE  # the side whose time the others are compared with
    passes: tuple[str, ...] = ("forward", "full")
    graph: bool = True  # whether a CUDA graph is timed; else the host's launches count too


@dataclass
class Room:
    """Where cases are built: the device, the type, and whether shapes are small ones."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed the generator that every tensor is drawn from."""
        self.generator = torch.Generator(self.device).manual_seed(0)

    def size(self, size: int) -> int:
        """Return a width of the real models, or a small one that is odd where it can be."""
        return size if not self.dry else size // 128 + 5

    def rows(self, rows: int) -> int:
        """Return a number of token rows."""
        return rows if not self.dry else rows // 512 + 1

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers, rounded to the type."""
        made = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return made.to(dtype or self.dtype)

    def compile(self, function: Run) -> Run:
        """Return the compiled function; a dry run only traces it."""
        torch._dynamo.reset()
        return torch.compile(function, backend="eager" if self.dry else "inductor", dynamic=False)

    def operations(self, side: str) -> Operations:
        """Return the operations of one of our sides."""
        return operations("triton" if side == TRITON else "reference", self.device)


@dataclass(frozen=True)
class Problem:
    """Inputs by name, the names of those that are differentiated by, and the outputs' gradients."""

    leaves: dict[str, Tensor]
    needed: Sequence[str]
    upstream: Sequence[Tensor]

    def side(self, run: Run) -> Side:
        """Return the side that calls `run` with the leaves by name, and differentiates."""
        inputs = {n: x.detach().requires_grad_(n in self.needed) for n, x in self.leaves.items()}

        def forward() -> Results:
            outputs = run(**inputs)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            return {f"y{i}": y for i, y in enumerate(outputs)}

        def full() -> Results:
            outputs = forward()
            ys = list(outputs.values())
            upstream = [u.to(y.dtype) for u, y in zip(self.upstream, ys, strict=True)]
            gradients = torch.autograd.grad(ys, [inputs[name] for name in self.needed], upstream)
            named = {f"d {n}": g for n, g in zip(self.needed, gradients, strict=True)}
            return outputs | named

        return Side(forward, full)

    def makes(self, run: Run) -> Callable[[float], Side]:
        """Return what makes the side of an operation without dropout."""
        return lambda _: self.side(run)

    def exact(self, run: Run) -> Results:
        """Return what `run` gives for the same numbers in fp64; whole numbers stay as they are."""
        exact = {n: x.double() if x.is_floating_point() else x for n, x in self.leaves.items()}
        return Problem(exact, self.needed, self.upstream).side(run).results()
