"""What a run computes in, and the loss scaler's sequences."""

import json

import pytest
import torch

from files.errors import UserError
from train.assemble import set_up
from train.config.load import load_config
from train.plan.decide import Machine
from train.precision import LossScaler, Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "scaled"),
    [
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
        ("fp32", torch.float32, False),
    ],
)
def test_matrix_products_are_made_in_the_compute_dtype(
    name: str, dtype: torch.dtype, scaled: bool
) -> None:
    precision = Precision(name, CPU)
    assert precision.compute_dtype == dtype
    assert precision.needs_loss_scaler is scaled
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with precision.autocast():
        assert torch.nn.functional.linear(x, weight).dtype == dtype
    assert torch.nn.functional.linear(x, weight).dtype == torch.float32


def test_auto_is_no_precision_by_itself() -> None:
    with pytest.raises(ValueError, match="'auto' is not one of"):
        Precision("auto", CPU)


def test_a_run_adds_the_parts_of_a_product_in_fp32() -> None:
    """A long product is split, and its parts could be added in half precision."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, True)
        set_up(load_config(overrides={"model.path": "any"}), Machine("cuda", None))
        assert not any(getattr(matmul, name) for name in names)
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def scales(scaler: LossScaler, overflows: list[bool]) -> list[float]:
    sequence = []
    for overflow in overflows:
        scaler.update(overflow)
        sequence.append(scaler.scale)
    return sequence


def test_it_starts_at_65536_and_halves_at_each_overflow() -> None:
    scaler = LossScaler()
    assert scaler.scale == 65536.0
    assert scales(scaler, [True, True, False, True]) == [32768.0, 16384.0, 16384.0, 8192.0]


def test_it_doubles_after_2000_good_steps_and_not_after_1999() -> None:
    scaler = LossScaler()
    sequence = scales(scaler, [False] * 4000)
    assert sequence[:1999] == [65536.0] * 1999
    assert sequence[1999:3999] == [131072.0] * 2000
    assert sequence[3999] == 262144.0


def test_an_overflow_starts_the_count_anew() -> None:
    scaler = LossScaler()
    scales(scaler, [False] * 1999)
    sequence = scales(scaler, [True] + [False] * 2000)
    assert sequence[:2000] == [32768.0] * 2000
    assert sequence[2000] == 65536.0


def test_the_scale_stays_finite_in_fp32() -> None:
    scaler = LossScaler()
    scaler.load({"scale": 2.0**127, "good_steps": 1999})
    scaler.update(False)
    assert scaler.scale == 2.0**127
    assert scaler.good_steps == 0


def test_the_sequence_is_that_of_torch() -> None:
    """`torch.amp.GradScaler` over the same overflows, with an interval of 7 for many changes."""
    generator = torch.Generator().manual_seed(1)
    overflows = (torch.rand(300, generator=generator) < 0.1).tolist()
    scaler = LossScaler()
    scaler.growth_interval = 7
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    oracle = torch.amp.GradScaler("cpu", growth_interval=7)
    oracle.scale(torch.zeros(()))  # makes its scale tensor
    for overflow in overflows:
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        oracle.unscale_(optimizer)
        oracle.step(optimizer)
        oracle.update()
        scaler.update(overflow)
        assert scaler.scale == oracle.get_scale()


def test_the_state_continues_through_json() -> None:
    whole, first, second = LossScaler(), LossScaler(), LossScaler()
    overflows = [False] * 500 + [True] + [False] * 2100
    expected = scales(whole, overflows)
    actual = scales(first, overflows[:1700])
    second.load(json.loads(json.dumps(first.state())))
    assert actual + scales(second, overflows[1700:]) == expected


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"scale": 65536.0},
        {"scale": 0.0, "good_steps": 0},
        {"scale": float("inf"), "good_steps": 0},
        {"scale": 65536.0, "good_steps": -1},
        {"scale": 65536.0, "good_steps": 2000},
        {"scale": 65536.0, "good_steps": 1.5},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(state: dict[str, float]) -> None:
    scaler = LossScaler()
    with pytest.raises(UserError, match="loss scaler state"):
        scaler.load(state)
    assert scaler.state() == {"scale": 65536.0, "good_steps": 0}
