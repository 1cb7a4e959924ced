"""The learning-rate schedules as literal values, step by step, with the reason for each.

Steps count from 0: value number s is the factor of the update made after s others. These tests were
seen red under: a step too early or too late (s + 1 for s), the decay's length taken as T instead of
T - w, floor in place of ceil for the warm-up, and a cosine that is not clamped past its end.
"""

import math

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from files.errors import UserError
from train.plan.schedule import learning_rate_factor, warmup_step_count

LINEAR = [
    (0, 0.0),  # the first update has rate 0 whenever there is a warm-up
    (1, 0.5),  # one of two warm-up steps done
    (2, 1.0),  # the peak stands at s = w, not at w - 1
    (3, 0.75),  # one of the T - w = 4 steps of the decay done
    (4, 0.5),  # half of the decay
    (5, 0.25),  # the last update of the run: T - 1, so it is not yet 0
    (6, 0.0),  # T: where the line ends, which no update uses
    (7, 0.0),  # past the end it stays there, never negative
]
COSINE = [
    (0, 0.0),  # as above
    (1, 0.5),  # the warm-up is a line for every schedule
    (2, 1.0),  # (1 + cos 0) / 2
    (3, 0.8535533905932737),  # (1 + cos 45°) / 2 = (2 + √2) / 4
    (4, 0.5),  # (1 + cos 90°) / 2
    (5, 0.14644660940672627),  # (1 + cos 135°) / 2 = (2 - √2) / 4, the last update
    (6, 0.0),  # (1 + cos 180°) / 2
    (7, 0.0),  # the bare formula would rise again: (1 + cos 225°) / 2 = 0.146
    (10, 0.0),  # and be back at the peak here
]
CONSTANT = [
    (0, 0.0),  # the first of two warm-up steps
    (1, 0.5),  # the second
    (2, 1.0),  # the peak
    (3, 1.0),  # and no decay
    (5, 1.0),  # to the last update
    (7, 1.0),  # and beyond
]


@pytest.mark.parametrize(
    ("name", "table"), [("linear", LINEAR), ("cosine", COSINE), ("constant", CONSTANT)]
)
def test_two_warm_up_steps_of_six(name: str, table: list[tuple[int, float]]) -> None:
    for step, expected in table:
        actual = learning_rate_factor(name, step, warmup_steps=2, total_steps=6)
        # 1e-15: two roundings of a number below 1.
        assert actual == pytest.approx(expected, abs=1e-15), f"{name} at step {step}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),  # quarters of T = 4, from the peak on
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]),  # 0°, 45° … 180°
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_without_warm_up_the_first_update_has_the_peak(name: str, expected: list[float]) -> None:
    actual = [learning_rate_factor(name, s, warmup_steps=0, total_steps=4) for s in range(5)]
    assert actual == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 0.1 + 0.9 · falling; the warm-up still begins at 0 and reaches 1
        ("linear", [0.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("cosine", [0.0, 1.0, 0.8681980515339464, 0.55, 0.23180194846605364, 0.1, 0.1]),
        ("constant", [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_floor_under_the_decay(name: str, expected: list[float]) -> None:
    actual = [
        learning_rate_factor(name, step, warmup_steps=1, total_steps=5, min_lr_ratio=0.1)
        for step in range(7)
    ]
    assert actual == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
def test_runs_that_are_all_warm_up(name: str) -> None:
    def factors(warmup_steps: int, total_steps: int) -> list[float]:
        return [
            learning_rate_factor(name, s, warmup_steps=warmup_steps, total_steps=total_steps)
            for s in range(total_steps)
        ]

    assert factors(4, 4) == [0.0, 0.25, 0.5, 0.75]  # the peak would stand at s = 4 = T
    assert factors(4, 2) == [0.0, 0.25]  # cut short by the end of the run
    assert factors(1, 1) == [0.0]  # a single step, spent on the warm-up


@pytest.mark.parametrize(
    ("total_steps", "ratio", "expected", "reason"),
    [
        (3120, 0.05, 156, "seed 000: 156 exactly"),
        (4680, 0.05, 234, "seed 000 with three epochs: 234 exactly"),
        (852, 0.03, 26, "seed 001: 25.56 rounds up; the document's ~25 is the floor"),
        (512, 0.03, 16, "seed 004: 15.36 rounds up"),
        (100, 0.07, 8, "float64: 100 · 0.07 = 7.000000000000001, as the stack computes it"),
        (10, 0.0, 0, "no warm-up"),
        (1, 0.05, 1, "any ratio above 0 takes at least a step"),
        (10, 1.0, 10, "all of it"),
    ],
)
def test_the_length_of_the_warm_up(
    total_steps: int, ratio: float, expected: int, reason: str
) -> None:
    assert warmup_step_count(total_steps, warmup_ratio=ratio) == expected, reason


def test_warm_up_steps_overrule_the_ratio() -> None:
    assert warmup_step_count(2499, warmup_ratio=0.05, warmup_steps=50) == 50
    assert warmup_step_count(2499, warmup_ratio=0.05, warmup_steps=0) == 0


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 7), (3, 20), (1, 2), (5, 5)])
def test_every_step_equals_the_stack(name: str, warmup_steps: int, total_steps: int) -> None:
    stack_name = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(stack_name, optimizer, warmup_steps, total_steps)
    for step in range(total_steps + 1):  # past the end the stack's cosine is not clamped
        actual = learning_rate_factor(
            name, step, warmup_steps=warmup_steps, total_steps=total_steps
        )
        assert actual == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_floor_equals_the_stack() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 3, 20, min_lr_rate=0.2)
    for step in range(21):
        actual = learning_rate_factor(
            "cosine", step, warmup_steps=3, total_steps=20, min_lr_ratio=0.2
        )
        assert actual == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_warm_up_stable_decay_by_literal_values() -> None:
    """12 steps, 2 of warm-up, a third of them falling: 4, by a half cosine to 0.2."""
    half = 0.2 + 0.8 * 0.5
    quarter = 0.8 * (0.5 + math.sqrt(0.125))
    expected = [0, 0.5, *[1.0] * 7, 0.2 + quarter, half, 0.2 + 0.8 - quarter, 0.2, 0.2]
    options = {"warmup_steps": 2, "total_steps": 12, "min_lr_ratio": 0.2, "decay_ratio": 1 / 3}
    found = [learning_rate_factor("wsd", step, **options) for step in range(14)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("total", "ratio", "decay"), [(40, 0.25, 10), (70, 0.1, 7), (9, 0.01, 1)])
def test_warm_up_stable_decay_equals_the_stack(total: int, ratio: float, decay: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_wsd_schedule(optimizer, 3, decay, total)
    for step in range(total + 1):
        actual = learning_rate_factor(
            "wsd", step, warmup_steps=3, total_steps=total, decay_ratio=ratio
        )
        assert actual == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_decay_longer_than_what_the_warm_up_leaves_begins_behind_it() -> None:
    options = {"warmup_steps": 6, "total_steps": 10, "decay_ratio": 0.9}
    found = [learning_rate_factor("wsd", step, **options) for step in range(11)]
    cosine = {"warmup_steps": 6, "total_steps": 10}
    assert found == [learning_rate_factor("cosine", step, **cosine) for step in range(11)]


def test_the_cosine_is_continuous_where_it_begins_and_ends() -> None:
    near_peak = learning_rate_factor("cosine", 1001, warmup_steps=1000, total_steps=2000)
    assert near_peak == pytest.approx(1 - (math.pi / 1000) ** 2 / 4, abs=1e-11)  # 1 - x²/4


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match=r"schedule.name: 'cosin' .*; did you mean 'cosine'\?"):
        learning_rate_factor("cosin", 0, warmup_steps=0, total_steps=1)
