"""Triton's kernels for a card that is not there: their real launches, compiled and looked into.

The wheels of Triton bring the whole compiler, so all that is missing without a card are its driver
and memory. Inside `absent_card` the host code of `kernels/triton/` runs unchanged on tensors of the
meta device: the driver is a stub that names the card's architecture, and each launch is handed to a
callback in the place of a launch. Types, divisibility, tiles and warps are those of the real one,
and no signature is written by hand. `Launch.key` says which binary would run, `Launch.compile`
makes it, `look_into` says what it takes of a multiprocessor.

Nothing of this says how fast a kernel is. It needs `TRITON_INTERPRET` unset when triton is
imported, so a process of its own beside tests; give it a `TRITON_CACHE_DIR` of its own as well.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.triton import launch as parameters
from train.plan import cards
from train.plan.cards import Card

# One of each architecture that is compiled for; what a program may take is the same for all of it.
CARDS = {cards.CARDS[name].architecture: cards.CARDS[name] for name in ("a100", "4090", "h200")}
REGISTERS = 65_536  # of a multiprocessor, on all of them


@dataclass(frozen=True)
class Launch:
    """One launch that the host code asked for.

    Attributes:
        card: Where it would run.
        kernel: The function.
        grid: How many programs, in up to three directions.
        arguments: As the host code gave them, by position.
        options: By name: what is known when it is compiled, warps and stages among it.
    """

    card: Card
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's module and name: `norms._forward`."""
        return f"{self.kernel.module.rsplit('.', 1)[-1]}.{self.kernel.fn.__name__}"

    def key(self) -> str:
        """Return what tells the binary of this launch from the kernel's others; compile nothing."""
        keys: list[str] = []
        binaries = self.kernel.device_caches

        def seen(*, key: str, **_: Any) -> bool:
            keys.append(key)
            return True  # as if it were made elsewhere

        with (
            mock.patch.object(knobs.runtime, "jit_cache_hook", seen),
            # What is compiled already would be found without asking.
            mock.patch.object(
                self.kernel, "device_caches", type(binaries)(self.kernel.create_binder)
            ),
        ):
            self._warm_up()
        return f"{self.name} {keys[0]}"

    def compile(self) -> Any:
        """Return Triton's compiled kernel, the same object for every launch that shares it."""
        return self._warm_up()

    def _warm_up(self) -> Any:
        capability = int(self.card.architecture.removeprefix("sm_"))
        stub = SimpleNamespace(
            get_current_device=lambda: capability,  # binaries are kept by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
        with mock.patch.object(driver, "_active", stub):
            return _RUN(self.kernel, *self.arguments, grid=self.grid, warmup=True, **self.options)


_RUN = JITFunction.run
_CAST = (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)


@contextmanager
def absent_card(
    card: Card, see: Callable[[Launch], object], autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Let launches on meta tensors be those on `card`, and hand each to `see`.

    Args:
        card: Whose launch parameters and target count.
        see: Called with every launch, in order, inside the context.
        autocast: The type that products are computed in; None: autocast is off. On meta torch has
            none: of its own operations linear layers and attention are cast here.
    """

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        see(Launch(card, kernel, tuple(grid), arguments, options))

    types = [autocast]
    real = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    @contextmanager
    def entered(device: str, *, enabled: bool = True, **options: Any) -> Iterator[None]:
        if device != "meta":
            with real[0](device, enabled=enabled, **options):
                yield
            return
        types.append(autocast if enabled else None)
        yield
        types.pop()

    def is_enabled(device: str) -> bool:
        return types[-1] is not None if device == "meta" else real[1](device)

    def dtype_of(device: str) -> torch.dtype | None:
        return types[-1] if device == "meta" else real[2](device)

    class Casting(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            if types[-1] is not None and function in _CAST:
                arguments = [x if x is None else x.to(types[-1]) for x in arguments]
            return function(*arguments, **(options or {}))

    with (
        Casting(),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(parameters, "capability", lambda device: card.architecture),
        mock.patch.object(parameters, "multiprocessors", lambda device: card.multiprocessors),
        mock.patch.object(torch, "autocast", entered),
        mock.patch.object(torch, "is_autocast_enabled", is_enabled),
        mock.patch.object(torch, "get_autocast_dtype", dtype_of),
    ):
        yield


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes.

    Attributes:
        registers: A thread's.
        stack: Bytes of a thread.
        spills: Instructions that load from or store to local memory.
        shared: Bytes of shared memory.
        threads: Of a program.
        products: Whether it multiplies matrices (`tl.dot`).
        tensor_cores: `wgmma`, `mma` or None.
        exponentials: Instructions that take a power of two.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    products: bool
    tensor_cores: str | None
    exponentials: int = 0

    def faults(self, card: Card, half: bool) -> list[str]:
        """Return which limits of `card` are broken; `half`: the products are of half precision."""
        found = []
        if self.stack > 16:
            found.append(f"a stack of {self.stack} bytes a thread")
        if self.spills:
            found.append(f"{self.spills} loads and stores of local memory")
        if self.shared > card.shared_bytes:
            found.append(f"{self.shared} bytes of shared memory, of {card.shared_bytes}")
        if self.registers * self.threads > REGISTERS:
            found.append(f"{self.registers} registers in each of {self.threads} threads")
        if half and self.products and self.tensor_cores is None:
            found.append("products without tensor cores")
        return found


def look_into(compiled: Any) -> Binary:
    """Return what a compiled kernel takes, by Triton's own cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        told = _told_by(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", told)}
        # Disassembling takes as long as compiling, and without a stack there is no local memory.
        code = _told_by(knobs.nvidia.nvdisasm.path, "-c", str(path)) if used["STACK"] else ""
    ptx = compiled.asm["ptx"]
    cores = [name for name, text in (("wgmma", "wgmma.mma"), ("mma", "mma.sync")) if text in ptx]
    return Binary(
        registers=used["REG"],
        stack=used["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        products="tt.dot" in compiled.asm["ttir"],
        tensor_cores=cores[0] if cores else None,
        exponentials=ptx.count("ex2.approx"),
    )


def _told_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
