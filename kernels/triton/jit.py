"""How this folder's kernels are compiled: one binary whatever the rows, the same bits everywhere.

Triton makes a kernel anew for integers that are 1 or multiples of 16. For a width that is worth
having: rows that begin at multiples of 16 are read 16 bytes at a time. The number of rows changes
from micro-batch to micro-batch, and a compilation takes longer than a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton


class Kernel:
    """A kernel of Triton's, launched as those are: `kernel[grid](*arguments, **options)`.

    A product and the sum after it are contracted to one rounding. Versions of Triton differ in
    whether they do that by default, and it changes bits.
    """

    def __init__(self, function: Any):
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return what launches the kernel with that many programs."""
        return functools.partial(self._function[grid], enable_fp_fusion=True)


def kernel(*varying: str) -> Callable[[Callable[..., None]], Kernel]:
    """Make a function of Triton's language a kernel.

    Args:
        varying: Integer arguments that change from launch to launch: the kernel is not compiled
            anew for them. What depends on the rows of a micro-batch belongs here.
    """
    return lambda function: Kernel(triton.jit(do_not_specialize=list(varying))(function))
