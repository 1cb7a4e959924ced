"""Early stopping: any gain moves the best, only a sufficient one resets the patience."""

import math

from train.state import EarlyStopping


def failures_after(stopping: EarlyStopping, losses: list[float]) -> list[int]:
    counts = []
    for step, loss in enumerate(losses, start=1):
        stopping.observe(step, loss)
        counts.append(stopping.failures)
    return counts


def test_stops_when_patience_is_used_up_and_keeps_the_best() -> None:
    stopping = EarlyStopping(patience=2)
    assert failures_after(stopping, [3.0, 2.0, 2.5, 2.4]) == [0, 0, 1, 2]
    assert stopping.should_stop
    assert (stopping.best_step, stopping.best_loss) == (2, 2.0)


def test_an_equal_loss_is_no_improvement() -> None:
    stopping = EarlyStopping(patience=9)
    assert failures_after(stopping, [2.0, 2.0, 2.0]) == [0, 1, 2]
    assert stopping.best_step == 1
    assert not stopping.observe(4, 2.0)


def test_small_gains_move_the_best_but_do_not_reset_patience() -> None:
    stopping = EarlyStopping(patience=3, threshold=0.1)
    # 2.0 → 1.95 gains 0.05 ≤ 0.1; 1.95 → 1.86 gains 0.09 ≤ 0.1; 1.86 → 1.7 gains 0.16 > 0.1.
    assert failures_after(stopping, [2.0, 1.95, 1.86, 1.7]) == [0, 1, 2, 0]
    assert stopping.best_step == 4
    assert not stopping.should_stop


def test_a_loss_that_is_not_finite_is_a_failure_and_never_the_best() -> None:
    stopping = EarlyStopping(patience=2)
    assert failures_after(stopping, [math.nan, math.inf]) == [1, 2]
    assert stopping.best_step is None
    assert stopping.should_stop


def test_without_patience_it_never_stops() -> None:
    stopping = EarlyStopping(patience=None)
    failures_after(stopping, [1.0] + [2.0] * 50)
    assert not stopping.should_stop
    assert stopping.best_step == 1
