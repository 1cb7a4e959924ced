"""What tests of Triton kernels share: tensors, and the comparison with fp64.

Kernels are interpreted on a CPU in fp32 and fp16, compiled on a GPU in bf16 too. Of each kernel one
shape is compared in the quick tests, the one whose edges lie inside tiles in every direction; the
others are `slow`.

Bounds. An operation that computes in fp32 and rounds its result once to a type of unit roundoff u
is within u of the exact value, relative to the largest term of its formula, and fp32's own error
over n terms is below n · 2⁻²⁴ of their sum of magnitudes: `bound` adds the two, with a factor of 4
for formulas of several steps. Outputs are filled with NaN before a kernel writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreted import DEVICE
from torch import Tensor

from kernels.dropout import module_id
from kernels.operands import Operands

ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [
    pytest.param(torch.float32, id="fp32", marks=ON_GPU),
    pytest.param(torch.float16, id="fp16", marks=ON_GPU),
    # The interpreter's bf16 products are wrong.
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


def slow(*values: Any, id: str | None = None) -> Any:
    """Return a case that the quick tests leave out."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let torch.empty fill what it returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a run in this process ends it
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def bound(dtype: torch.dtype, terms: int) -> float:
    return 4 * (torch.finfo(dtype).eps / 2 + terms * 2**-24)


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    exact: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    terms: int,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compare outputs, and gradients of every input, relative to the largest value of each."""
    dtype = inputs[0].dtype
    sides = []
    for run, kind in ((ours, None), (exact, torch.float64)):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [
            draw(*out.shape, dtype=dtype, seed=99 + i).to(out.dtype)
            for i, out in enumerate(outputs)
        ]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        sides.append([*outputs, *gradients])
    for number, (one, other) in enumerate(zip(*sides, strict=True)):
        assert one.isfinite().all(), number
        difference = (one.double() - other).abs().max().item()
        largest = max(other.abs().max().item(), 1e-3)
        assert difference <= bound(dtype, terms) * largest, (number, difference / largest)


def layers_of(
    rows: int, width: int, outputs: list[tuple[int, int, bool]], p: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Callable[..., list[Operands]]]:
    """Return x, the layers' tensors in a flat list, and what puts such a list into operands."""
    x = draw(rows, width, dtype=dtype)
    tensors: list[Tensor] = []
    for i, (features, rank, bias) in enumerate(outputs):
        tensors.append(draw(features, width, dtype=dtype, seed=10 * i + 1, scale=width**-0.5))
        if bias:
            tensors.append(draw(features, dtype=dtype, seed=10 * i + 2))
        if rank:
            tensors.append(draw(rank, width, dtype=dtype, seed=10 * i + 3, scale=width**-0.5))
            tensors.append(draw(features, rank, dtype=dtype, seed=10 * i + 4, scale=rank**-0.5))

    def operands(flat: list[Tensor]) -> list[Operands]:
        flat = list(flat)
        made = []
        for i, (_, rank, bias) in enumerate(outputs):
            weight = flat.pop(0)
            bias_tensor = flat.pop(0) if bias else None
            a, b = (flat.pop(0), flat.pop(0)) if rank else (None, None)
            made.append(Operands(weight, bias_tensor, a, b, 2.0, p, module_id(f"layer {i}")))
        return made

    return x, tensors, operands
