"""Triton's AdamW and Adafactor against fp64."""

from __future__ import annotations

import pytest
import torch
from against_fp64 import ON_GPU, bound, draw, poisoned  # noqa: F401
from interpreted import DEVICE

from kernels.dispatch import operations
from train.optim import buffers, build_optimizer

pytest.importorskip("triton")

# Equal matrices and a vector in a buffer of several blocks; beside it a lone matrix; odd edges.
PARAMETERS = {"a": (3, 700), "b": (3, 700), "m": (37, 130), "v_bias": (9,)}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    ("factor", "big"),
    [
        pytest.param(0.3, (71, 300), marks=ON_GPU),
        pytest.param(1.0, (71, 300), marks=[pytest.mark.slow, *ON_GPU]),
        pytest.param(0.3, (1030, 1030), marks=[pytest.mark.slow, *ON_GPU]),
    ],
)
def test_updates(
    name: str, factor: float, big: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps with masters in fp32 and in fp64."""
    monkeypatch.setattr(buffers, "LONE_ELEMENTS", 10_000)
    shapes = {**PARAMETERS, "big": big}
    sides = []
    for kind, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        model = torch.nn.ParameterDict(
            {
                key: torch.nn.Parameter(draw(*shape, dtype=torch.float32, seed=i).to(kind))
                for i, (key, shape) in enumerate(shapes.items())
            }
        )
        optimizer = build_optimizer(
            name, model, weight_decay=0.1, operations=operations(backend, DEVICE)
        )
        assert (optimizer._kernel is not None) == (backend == "triton")  # type: ignore
        assert list(optimizer.lone) == ["big"]
        for step in range(3):
            for i, parameter in enumerate(model.values()):
                gradient = draw(*parameter.shape, dtype=torch.float32, seed=100 * step + i)
                gradient[..., 0] = 0  # a column whose mean square is epsilon alone, and a row
                gradient[0] = 0
                parameter.grad = gradient.to(kind)
            optimizer.step(0.1, factor)
            optimizer.clear_gradients()
        sides.append({**dict(model.items()), **optimizer.state_tensors()})
    ours, exact = sides
    assert ours.keys() == exact.keys()
    # Every number comes of three steps of some ten operations, and of a mean over 1,030 or a norm
    # over a million at most, whose parts torch adds pairwise.
    for key, value in ours.items():
        largest = exact[key].abs().max().item()
        difference = (value.double() - exact[key]).abs().max().item()
        assert difference <= bound(torch.float32, 64) * largest, (key, difference / largest)


@pytest.mark.parametrize("name", [pytest.param("adafactor", marks=ON_GPU)])
def test_a_turned_matrix_is_updated_as_one_that_lies_straight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "LONE_ELEMENTS", 10_000)
    sides = []
    for turned in (False, True):
        weight = draw(71, 301, dtype=torch.float32)
        if turned:
            weight = weight.t().contiguous().t()
        model = torch.nn.ParameterDict({"w": torch.nn.Parameter(weight)})
        optimizer = build_optimizer(name, model, operations=operations("triton", DEVICE))
        model["w"].grad = draw(71, 301, dtype=torch.float32, seed=7)
        optimizer.step(0.1)
        sides.append(model["w"].detach())
    torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-6)
