"""What the benchmarks compute from what they measured; nothing here is timed."""

import pytest
from small import small_model

from benchmarks.fixtures import MODELS, disagreement, operations_of_step, speed
from benchmarks.peer import PeftSide, fastest
from benchmarks.training import group_of, ladder
from benchmarks.versus_peft import BEST, LATHE, SEEDS, ratios_table, summary
from lora import LoraConfig, inject

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
    bounds = [MODELS[name].bf16_bound for name in ("tiny", "small", "medium")]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(2 * 0.02 * 32**0.5 * 24**0.5 / 512)
    assert bounds[-1] < 0.02


def test_a_compiled_run_is_the_best_only_by_more_than_noise() -> None:
    plain, compiled = PeftSide("longest"), PeftSide("longest", compiled=True)
    assert fastest([(100.0, plain), (104.0, compiled)]) == plain
    assert fastest([(100.0, plain), (106.0, compiled)]) == compiled


def test_a_summary_holds_medians_and_spread() -> None:
    names = ("seconds_per_step", "first_step_seconds", "peak_bytes", "imports_bytes")
    rows = [{**dict.fromkeys(names, speed), "tokens_per_second": speed} for speed in (5, 1, 2)]
    made = summary(rows)
    assert (made["tokens_per_second"], made["peak_bytes"], made["rounds"]) == (2, 2, 3)
    assert made["spread"] == [1, 5]


def test_ratios_are_of_speed_and_of_memory() -> None:
    figures = {LATHE: (600.0, 40), SEEDS: (100.0, 100), BEST: (300.0, 50)}
    records = [
        {"model": "small", "side": s, "settings": "", "tokens_per_second": f, "peak_bytes": b}
        for s, (f, b) in figures.items()
    ]
    assert ratios_table(records)[2:] == ["| small | 6.00 × | 2.00 × | 0.40 × | 0.80 × |"]
    assert len(ratios_table(records[:2])) == 2


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::addmm", "GEMM"),
        ("aten::mm", "GEMM"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::exp_", "cross-entropy"),
        ("aten::native_layer_norm_backward", "norm"),
        ("aten::gelu_backward", "activation"),
        ("aten::_fused_adamw_", "optimizer and clipping"),
        ("aten::linalg_vector_norm", "optimizer and clipping"),
        ("aten::copy_", "copies and casts"),
        ("aten::add_", "elementwise"),
        ("aten::view", "other"),
    ],
)
def test_operators_are_grouped_by_name(operator: str, group: str) -> None:
    assert group_of(operator) == group


def test_arithmetic_of_a_step() -> None:
    model = small_model("starcoder2")
    config = model.config
    inject(model, LoraConfig(r=2))
    width = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (2 * hidden * width + 2 * hidden * kv + 2 * hidden * inner)
    adapters = layers * 2 * (2 * (hidden + width) + 2 * (hidden + kv) + 2 * (hidden + inner))
    count = operations_of_step(model, [3, 5], targets=6, full=False)
    assert count["linear layers"] == 4 * weights * 8
    assert count["adapters"] == 6 * adapters * 8
    assert count["attention"] == 6 * (9 + 25) * width * layers
    assert count["head"] == 4 * hidden * config.vocab_size * 6
    full = operations_of_step(model, [3, 5], targets=6, full=True)
    assert full["linear layers"] == 6 * weights * 8


def test_the_ladder_adds_a_switch_a_row() -> None:
    rows = list(ladder().values())
    assert rows[0]["data.batching"] == "max_length"
    assert rows[4]["data.batching"] == "unpadded" and rows[4]["train.precision"] == "auto"
    assert all(row.items() >= {"train.precision": "auto"}.items() for row in rows[4:])
