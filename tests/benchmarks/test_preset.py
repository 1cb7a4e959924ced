"""The preset beside Trainer + PEFT without a GPU: both sides small, and what is made of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness, preset


@pytest.mark.slow
def test_both_sides_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert preset.compare(30, dry=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "loss within 0.0e+00"),
        ({"loss": [8.0, 7.5]}, "Lathe computed loss 8.0000 at step 2, not 7.5000 within 1.0e-03"),
        ({"tokens": [90, 71]}, "Lathe computed tokens [90, 70], not [90, 71]"),
    ],
)
def test_what_differs_is_told(
    changed: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = {"loss": [8.0, 8.0], "tokens": [90, 70], "seconds": [1.0, 1.0]}
    answers = {
        "preset:write": {"hidden": 32, "layers": 2},
        "preset:ours": figures,
        "preset:theirs": figures | changed,
    }
    monkeypatch.setattr(harness, "in_process", lambda work, *_, **__: answers[work])
    assert preset.compare(30, dry=True) == bool(changed)
    assert told in capsys.readouterr().out


def test_speed_and_memory_are_compared_on_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    monkeypatch.setattr(preset.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preset.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(harness, "append", lambda name, row: records.append((name, row["side"])))
    steps = preset.WARM_UP + 2
    ours = {"loss": [8.0] * steps, "tokens": [1000] * steps, "seconds": [9.0] * 5 + [0.1, 0.1]}
    theirs = ours | {"seconds": [9.0] * 5 + [0.4, 0.4], "peak_allocated": 4 * 2**30}
    answers = {
        "preset:write": {"hidden": 32, "layers": 2},
        "preset:ours": ours | {"peak_allocated": 2**30},
        "preset:theirs": theirs,
    }
    monkeypatch.setattr(harness, "in_process", lambda work, *_, **__: answers[work])
    assert preset.compare(steps, dry=False) == 0
    assert "4.00 × the speed, 0.25 × the memory" in capsys.readouterr().out
    assert records == [("preset", "ours"), ("preset", "theirs")]


def test_without_a_card_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preset.torch.cuda, "is_available", lambda: False)
    assert preset.compare(30, dry=False) == 2
    assert "--dry-run" in capsys.readouterr().out
