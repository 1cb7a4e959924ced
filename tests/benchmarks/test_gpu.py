"""The GPU benchmark without a GPU: every row at small shapes, and what is made of its figures."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import pytest
import torch
from interpreted import DEVICE, TRITON

from benchmarks import gpu, harness, versus_peft
from benchmarks.gpu import OurSide, Row, Work

WORK = Work("bigcode/starcoder2-3b", 16)
ROW = Row("E1 ours", WORK, OurSide())
needs_interpreter = pytest.mark.skipif(
    not TRITON or DEVICE == "cuda", reason="needs Triton's interpreter: triton, and no GPU"
)


# Of the others each takes half a minute: E6 has a gate, a row of ours and one of the peer's.
ROWS = [
    name if name == "E6" else pytest.param(name, marks=pytest.mark.slow)
    for name in versus_peft.GPU_ROWS
]


@needs_interpreter
@pytest.mark.parametrize("name", ROWS)
def test_every_row_computes_what_the_reference_does(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert versus_peft.run_on_gpu([name], 0.0, dry=True) == 0, capsys.readouterr().out


def test_every_row_belongs_to_a_command() -> None:
    names = [row.name for row in gpu.rows()]
    assert len(set(names)) == len(names)
    asked = set(versus_peft.GPU_ROWS)
    assert {name.split()[0] for name in names} == asked


def test_the_gate_sees_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.gate_fault(gpu.gate(WORK, dry=True)) is None
    inject = gpu.inject

    def scaled(model: Any, config: Any) -> Any:
        return inject(model, dataclasses.replace(config, lora_alpha=1.01 * config.lora_alpha))

    monkeypatch.setattr(gpu, "inject", scaled)
    fault = gpu.gate_fault(gpu.gate(WORK, dry=True))
    assert fault is not None
    assert "kernels=reference: gradients" in fault


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"tokens": [10, 12]}, "tokens [10, 12], not [10, 11]"),
        ({"tokens": [11, 10]}, "tokens [11, 10], not [10, 11]"),
        ({"loss": [2.0, 2.2]}, "loss 2.2000 at step 2, not 2.1000 within"),
        ({"loss": [2.0, float("nan")]}, "loss nan at step 2"),
        ({"norm": [1.0, 1.2]}, "norm 1.2000 at step 2, not 1.1000 within"),
    ],
)
def test_a_row_that_computed_something_else_is_named(
    changed: dict[str, Any], told: str | None
) -> None:
    reference = {"tokens": [10, 11], "loss": [2.0, 2.1], "norm": [1.0, 1.1]}
    fault = versus_peft.wrong(ROW, {**reference, **changed}, reference, dry=False)
    assert (fault is None) if told is None else told in (fault or "")


def test_a_gate_or_reference_that_fails_is_told_in_every_row_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = Row("E1 seeds", WORK, gpu.SEEDS)
    every = [ROW, peer]
    steps = gpu.WARM_UP + gpu.TIMED
    right = {
        "seconds": [1.0] * steps,
        "tokens": [100] * steps,
        "loss": [2.0] * steps,
        "norm": [1.0] * steps,
        "peak_allocated": 7,
        "start_up": 3.0,
    }
    monkeypatch.setattr(gpu, "token_rows", lambda *_: [])
    monkeypatch.setattr(gpu, "arithmetic", lambda *_: 1e12 * gpu.TIMED)
    green = {"gate": {"reference": 1e-6}}

    def told(gate: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> list[Any]:
        answers = {"gate": lambda _: gate, "row": lambda number: (ours, theirs)[number]}
        return [
            versus_peft.measured(row, every, number, lambda task, n: answers[task](n))
            for number, row in enumerate(every)
        ]

    assert all(found["tokens_per_second"] == 100.0 for found in told(green, right, right))
    red = told({"gate": {"reference": 1e-6, "triton": 1e-2}}, right, right)
    assert [found["error"].split(":")[0] for found in red] == ["gate", "gate"]
    late = told({"error": "gate: more than 150 s"}, right, right)
    assert late[0] == {"error": "gate: gate: more than 150 s"}
    lost = told(green, {"error": "out of memory"}, right)
    assert lost[0] == {"error": "out of memory"}
    assert lost[1] == {"error": "nothing to compare with: E1 ours: out of memory"}
    other = told(green, right, {**right, "norm": [2.0] * steps})
    assert "tokens_per_second" in other[0]
    assert other[1]["error"].startswith("norm 2.0000 at step 1, not 1.0000")


def test_figures_leave_out_what_warms_up() -> None:
    steps = gpu.WARM_UP + gpu.TIMED
    figures = {
        "seconds": [9.0] * gpu.WARM_UP + [0.5] * gpu.TIMED,
        "tokens": [1] * gpu.WARM_UP + [1000] * gpu.TIMED,
        "loss": [2.0] * steps,
        "peak_allocated": 7,
        "start_up": 3.0,
    }
    found = versus_peft.figures_of(ROW, figures, figures, 2e12)
    assert (found["tokens_per_second"], found["seconds_per_step"]) == (2000.0, 0.5)
    assert found["tflops"] == 4.0
    assert (found["first_step_seconds"], found["loss_difference"]) == (9.0, 0.0)


def test_arithmetic_counts_four_a_frozen_weight_and_six_a_trained_one() -> None:
    lengths = [[1] * 5, [1] * 7]
    model = gpu.build(gpu.decoder_of(WORK, True), device="meta")
    linear = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    head = model.config.hidden_size * model.config.vocab_size
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    attention = 6 * (25 + 49) * width * layers
    full = gpu.arithmetic(Work(WORK.model, 0), lengths, dry=True)
    assert full == 6 * linear * 12 + 6 * head * 10 + attention
    adapted = gpu.arithmetic(WORK, lengths, dry=True)
    factors = 16 * sum(
        sum(p.shape) for n, p in model.model.layers.named_parameters() if p.ndim == 2
    )
    assert adapted == 4 * linear * 12 + 6 * factors * 12 + 4 * head * 10 + attention


def test_without_a_gpu_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert versus_peft.run_on_gpu(["E1"], 1.0) == 2
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(("minutes", "recorded"), [(7.0, True), (0.05, False)])
def test_a_row_that_the_command_has_no_time_for_is_left_out_and_a_slow_one_recorded(
    minutes: float,
    recorded: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]

    def process(work: str, folder: Any, limit: float, task: str, number: int) -> dict[str, Any]:
        if task == "rates":
            return {"copy_gb_s": 1.0, "gemm_tflops": 1.0, "device": "a card"}
        if task == "gate":
            now[0] += 10.0
            return {"gate": {"reference": 0.0}}
        now[0] += limit
        raise subprocess.TimeoutExpired("row", limit)

    rows: list[dict[str, Any]] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(versus_peft.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(harness, "in_process", process)
    monkeypatch.setattr(harness, "append", lambda name, row: rows.append(row))
    monkeypatch.setattr(gpu, "rows", lambda: [ROW])
    assert versus_peft.run_on_gpu(["E1"], minutes) == (1 if recorded else 0)
    assert [row["error"] for row in rows] == (["row: more than 150 s"] if recorded else [])
    assert ("1 rows left out" in capsys.readouterr().out) != recorded


def test_the_table_names_the_card() -> None:
    row = {
        "device": "a card",
        "row": "E1 ours",
        "work": WORK.text,
        "who": "lathe",
        "side": "unpadded",
        "gemm_tflops": 800.0,
        "tokens_per_second": 36_000.0,
        "tflops": 480.0,
        "peak_bytes": 2**35,
        "first_step_seconds": 4.0,
    }
    lines = versus_peft.gpu_table([row, {**row, "row": "E1 seeds", "error": "out of memory"}])
    assert lines[0] == "a card: bf16 products 800 TFLOP/s; shares are of it."
    assert lines[-2].endswith("| lathe: unpadded | 36,000 | 480 (60%) | 32.0 GiB | 4.0 s |")
    assert "out of memory" in lines[-1]
