"""The kernel benchmarks without a GPU: every case compared, and what is made of the records."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from interpreted import DEVICE, TRITON

from benchmarks import kernels, tune
from benchmarks.case import LATHE, Case, Room, Side
from benchmarks.case import TRITON as TRITON_SIDE
from benchmarks.kernel_cases import FIELDS, PARTS, cases
from kernels.dispatch import Operations
from kernels.triton import launch as triton_launch

interpreted = pytest.mark.skipif(
    not TRITON or DEVICE == "cuda", reason="needs Triton's interpreter: triton, and no GPU"
)


def room() -> Room:
    return Room(torch.device("cpu"), torch.float32, dry=True)


@interpreted
@pytest.mark.parametrize("part", PARTS)
def test_every_side_of_a_part_s_first_case_agrees_with_fp64(part: str) -> None:
    case = next(make for name, make in cases() if name == part)(room())
    assert {name: kernels.attempt(case, name, room(), {}) for name in case.sides} == dict.fromkeys(
        case.sides
    )


@interpreted
@pytest.mark.slow
def test_every_side_of_every_case_agrees_with_fp64(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.run(PARTS, 0.0, dry=True) == 0
    printed = capsys.readouterr().out
    assert printed.count(TRITON_SIDE) == len([part for part, _ in cases() if part != "attention"])
    assert set(PARTS) == {part for part, _ in cases()}


@interpreted
@pytest.mark.parametrize("kernel", triton_launch.DEFAULTS)
def test_every_candidate_computes_what_the_defaults_do(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = list(tune.candidates(kernel))
    assert few[0] == triton_launch.DEFAULTS[kernel]
    entries: dict[str, Any] = {}
    monkeypatch.setattr(triton_launch, "entries", lambda: entries)
    monkeypatch.setattr(tune, "candidates", lambda _: iter([few[0], few[-1]]))
    best, tried = tune.tune(kernel, room(), None)
    assert best == few[0]
    assert [set(row) for row in tried] == [{*few[0], "ms"}] * 2  # type: ignore[arg-type]
    assert entries == {"cpu": {"launch": {}}}


@interpreted
def test_a_tuning_that_runs_out_of_time_decides_nothing() -> None:
    assert tune.tune("adamw", room(), None, deadline=0.0) == (None, [])


def test_the_loss_is_tried_with_the_warps_that_it_will_run_with() -> None:
    tried = list(tune.candidates("cross_entropy"))
    assert all(512 * settings["num_warps"] <= settings["BLOCK"] for settings in tried)
    assert len({tuple(settings.values()) for settings in tried}) == len(tried)


def case_of(result: torch.Tensor) -> Case:
    return Case(
        part="double",
        text="two numbers",
        sides={
            LATHE: lambda p: Side(lambda: {"y": result}, None),
            "right": lambda p: Side(lambda: {"y": torch.tensor([2.0, 4.0])}, None),
            "absent": lambda p: Side(lambda: {"z": result}, None),
        },
        exact=lambda p: {"y": torch.tensor([2.0, 4.0], dtype=torch.float64)},
        passes=("forward",),
        floor="right",
    )


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (torch.tensor([2.0, 4.0]), None),
        (torch.tensor([2.0, 4.1]), "y is 2.2e-02 from fp64, 1.0e-05 is allowed"),
        (torch.tensor([2.0, torch.nan]), "y is inf from fp64, 1.0e-05 is allowed"),
    ],
)
def test_a_side_whose_check_is_red_is_not_timed(
    result: torch.Tensor,
    fault: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = case_of(result)
    timed, rows = [], []

    def measure(case: Case, names: list[str], flush: torch.Tensor) -> dict[str, Any]:
        timed.extend(names)
        figures = {"ms": 1.0, "p20": 0.9, "p80": 1.1}
        return {name: {"forward": dict(figures)} for name in names}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels.harness, "append", lambda name, row: rows.append(row))
    rates = {"copy_gb_s": 1.0, "gemm_tflops": 1.0}
    assert kernels.compare(case, room(), rates, result) == (fault is None)
    assert timed == ([LATHE] if fault is None else []) + ["right"]
    by_side = {row["side"]: row for row in rows}
    assert by_side[LATHE].get("error") == fault
    assert "nothing in common" in by_side["absent"]["error"]
    assert by_side["right"]["forward"]["to_floor"] == 1.0
    printed = capsys.readouterr().out
    assert fault is None or f"not timed: {fault}" in printed


def row_of(case: str, side: str, full: float | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "capability": "sm_90",
        "device": "a card",
        "part": "swiglu",
        "case": case,
        "side": side,
        "copy_gb_s": 1000.0,
        "gemm_tflops": 100.0,
    }
    if full is not None:
        row["full"] = {"ms": full, "gb_s": 500.0, "tflops": 0.0, "to_floor": 1.5}
        row["forward"] = {**row["full"], "ms": 0.1 * full}
    return row | more


Times = list[tuple[float | None, float | None]]


@pytest.mark.parametrize(
    ("rows", "changed", "gains"),
    [
        ([(1.0, 0.5), (1.0, 0.9)], {}, ["swiglu"]),
        ([(1.0, 0.5), (1.0, 0.99)], {}, []),  # within the noise in one case
        ([(1.0, 0.5), (1.0, None)], {}, []),  # not timed in one case
        ([(1.0, 0.5), (None, 0.5)], {}, []),  # nothing to compare with in one case
        ([(1.0, 0.5), (1.0, 0.5)], {"error": "misaligned address"}, []),  # failed after a round
        ([(1.0, 0.5), (1.0, 0.5)], {"full": None}, []),  # the backward pass alone failed
        ([(1.0, 0.5)], {}, []),  # cut off after the first case
    ],
)
def test_auto_takes_what_is_faster_in_every_case(
    rows: Times, changed: dict[str, Any], gains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cases", lambda: [("swiglu", None)] * 2)
    records = [row_of("first", TRITON_SIDE, 9.0)]  # an older record does not count
    for name, (reference, ours) in zip(("first", "second"), rows, strict=False):
        records += [row_of(name, LATHE, reference), row_of(name, TRITON_SIDE, ours)]
    records[-1] = {k: v for k, v in {**records[-1], **changed}.items() if v is not None}
    if "error" not in changed:
        for row in records:
            if "full" not in row and row["side"] == LATHE:
                row["error"] = "wrong"
    assert kernels.gains(records) == {"sm_90": gains}


def test_a_kernel_gains_on_all_cards_of_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cases", lambda: [("swiglu", None)])
    one = [row_of("first", LATHE, 1.0), row_of("first", TRITON_SIDE, 0.5)]
    assert kernels.gains(one) == {"sm_90": ["swiglu"]}
    other = [{**one[0], "device": "another"}, {**one[0], "device": "another", "side": TRITON_SIDE}]
    assert kernels.gains([*one, *other]) == {"sm_90": []}


@pytest.mark.parametrize("side", [LATHE, "right"])
def test_a_failure_of_ours_while_it_is_timed_shows_in_the_exit_code(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(torch.tensor([2.0, 4.0]))

    def measure(case: Case, names: list[str], flush: torch.Tensor) -> dict[str, Any]:
        return {name: {"error": "misaligned address"} if name == side else {} for name in names}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels.harness, "append", lambda name, row: None)
    rates = {"copy_gb_s": 1.0, "gemm_tflops": 1.0}
    assert kernels.compare(case, room(), rates, torch.zeros(1)) == (side != LATHE)


def test_the_table_names_card_and_shares_and_says_what_was_not_timed() -> None:
    lines = kernels.table(
        [row_of("first", LATHE, 1.0), row_of("first", TRITON_SIDE, None, error="y differs")]
    )
    assert lines[0].startswith("a card (sm_90): a copy 1,000 GB/s")
    assert (
        lines[-2]
        == "| swiglu | first | lathe, reference | 0.1000 | 1.0000 | 1.500 | 500 (50%) |  |"
    )
    assert lines[-1] == "| swiglu | first | lathe, triton | y differs |  |  |  |  |"


def test_every_part_decides_on_operations_that_there_are() -> None:
    names = {field.name for field in dataclasses.fields(Operations)}
    assert set().union(*FIELDS.values()) <= names
    assert set(PARTS) - set(FIELDS) == {"attention"}


@interpreted
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("adamw", {"betas": (0.1, 0.2)}),
        ("adamw", {"step": 1}),
        ("adamw", {"eps": 1.0}),
        ("adamw", {"learning_rate": 1.004e-2}),
        ("adamw", {"gradient_factor": 1.0}),
        ("adafactor", {"beta2": 0.0}),
        ("adafactor", {"epsilon": 1.0}),
        ("adafactor", {"gradient_factor": 1.0}),
        ("adafactor", {"weight_decay": 0.0}),
    ],
)
def test_a_wrong_update_is_seen(
    name: str, broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.triton import updates as triton_updates

    update = getattr(triton_updates, f"{name}_")
    wrong = functools.partial(update)
    monkeypatch.setattr(
        triton_updates, f"{name}_", lambda *given, **named: wrong(*given, **{**named, **broken})
    )
    case = next(make for part, make in cases() if part == name)(room())
    fault = kernels.check(case, TRITON_SIDE, room(), {})
    assert fault is not None
    assert "from fp64" in fault
