"""What the benchmarks compute from what they measured; nothing here is timed."""

import pytest

from benchmarks import harness
from benchmarks.fixtures import MODELS, bf16_bound, disagreement, speed
from benchmarks.peer import BEST, PeftSide
from benchmarks.versus_peft import LATHE, PEFT_BEST, PEFT_SEEDS, ratios_table, summary

RUN = {"loss": [8.0, 7.5, 7.0], "tokens": [100, 300, 100], "seconds": [9.0, 2.0, 2.0]}


def test_speed_is_of_all_timed_steps_together() -> None:
    assert speed(RUN, warm_up=1) == (2.0, 100.0)


def test_runs_that_differ_are_named() -> None:
    def told(bound: float, **changed: list[float]) -> str:
        return disagreement({**RUN, **changed}, RUN, {"loss": (bound, 0.0)}) or ""

    assert not told(0.0)
    assert not told(0.01, loss=[8.0, 7.5, 7.002])
    assert "step 3" in told(0.001, loss=[8.0, 7.5, 7.002])
    assert "nan at step 2" in told(1.0, loss=[8.0, float("nan"), 7.0])
    assert "tokens" in told(1.0, tokens=[100, 300, 101])


def test_the_bound_of_bf16_grows_with_width_and_depth() -> None:
    bounds = [bf16_bound(32, 2), bf16_bound(256, 4), bf16_bound(512, 9)]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(2 * 0.02 * 32**0.5 * 24**0.5 / 512)
    assert bounds[-1] < 0.02


def test_the_peer_s_best_is_the_fastest_that_was_tried() -> None:
    """Compiled only where it gives 5 % more: less is noise, and its first step takes a minute."""
    tried: dict[str, list[tuple[float, PeftSide]]] = {}
    for row in harness.read("versus_peft_pilot"):
        side = PeftSide(**row["side"])
        rate = row["tokens_per_second"] / (1.05 if side.compiled else 1)
        tried.setdefault(row["model"], []).append((rate, side))
    best = {model: max(sides, key=lambda pair: pair[0])[1] for model, sides in tried.items()}
    assert best == BEST
    assert best.keys() == MODELS.keys()


def test_a_summary_holds_medians_and_spread() -> None:
    names = ("seconds_per_step", "first_step_seconds", "peak_bytes", "imports_bytes")
    rows = [{**dict.fromkeys(names, speed), "tokens_per_second": speed} for speed in (5, 1, 2)]
    made = summary(rows)
    assert (made["tokens_per_second"], made["peak_bytes"], made["rounds"]) == (2, 2, 3)
    assert made["spread"] == [1, 5]


def test_ratios_are_of_speed_and_of_memory() -> None:
    figures = {LATHE: (600.0, 40), PEFT_SEEDS: (100.0, 100), PEFT_BEST: (300.0, 50)}
    records = [
        {"model": "small", "side": s, "settings": "", "tokens_per_second": f, "peak_bytes": b}
        for s, (f, b) in figures.items()
    ]
    assert ratios_table(records)[2:] == ["| small | 6.00 × | 2.00 × | 0.40 × | 0.80 × |"]
    assert len(ratios_table(records[:2])) == 2
