"""What was measured of Triton's kernels, and what follows from it: launches, and `auto`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from against_fp64 import layers_of
from interpreted import DEVICE

from files.errors import UserError
from kernels import linears as plain
from kernels import reference
from kernels.dispatch import operations

pytest.importorskip("triton")

from kernels.triton import elementwise, launch, linears


def test_launch_parameters_of_a_device_come_before_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device(DEVICE)
    before = launch.launch("low_rank", device)
    assert before == launch.DEFAULTS["low_rank"] or DEVICE == "cuda"
    found = {launch.capability(device): {"launch": {"low_rank": {"BLOCK_ROWS": 32}}}}
    monkeypatch.setattr(launch, "entries", lambda: found)
    assert launch.launch("low_rank", device) == {
        **launch.DEFAULTS["low_rank"],
        "BLOCK_ROWS": 32,
    }
    assert launch.launch("adamw", device) == launch.DEFAULTS["adamw"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "launch.json"),
        ("[]", "launch.json"),
        ('{"sm_90": []}', "must be an object with `launch` and `gains`"),
        ('{"sm_90": {"gain": []}}', "must be an object with `launch` and `gains`"),
        ('{"sm_90": {"gains": "linears"}}', "gains 'linears' must be a list of operations"),
        ('{"sm_90": {"launch": {"adam": {}}}}', "kernels among adamw, adafactor"),
        ('{"sm_90": {"launch": {"adamw": {"BLOCK": 512}}}}', "adamw must have BLOCK, num_warps"),
        (
            '{"sm_90": {"launch": {"adamw": {"BLOCK": 33, "num_warps": 4}}}}',
            "adamw.BLOCK is 33, but must be a power of two",
        ),
    ],
)
def test_a_damaged_file_of_what_was_measured_is_refused(
    content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "launch.json"
    path.write_text(content)
    monkeypatch.setattr(launch, "TUNED", path)
    with pytest.raises(UserError) as caught:
        launch.entries.__wrapped__()
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_was_measured_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"sm_90": {"gains": ["swiglu"], "launch": dict(launch.DEFAULTS)}}
    monkeypatch.setattr(launch, "TUNED", tmp_path / "launch.json")
    assert launch.entries.__wrapped__() == {}
    monkeypatch.setattr(launch, "entries", lambda: found)
    launch.write_entries()
    monkeypatch.undo()
    monkeypatch.setattr(launch, "TUNED", tmp_path / "launch.json")
    assert launch.entries.__wrapped__() == found


def test_an_unknown_operation_among_the_gains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    for name in ("swiglue", "name"):
        found = {launch.capability(device): {"gains": [name]}}
        monkeypatch.setattr(launch, "entries", lambda found=found: found)
        with pytest.raises(UserError, match=f"gains name {name}, which is no operation"):
            operations("auto", device)


@pytest.mark.parametrize("gains", [["linears"], ["linear_gelu"], ["linear_gelu", "linears"]])
def test_a_layer_before_gelu_goes_through_the_linears_that_were_chosen(
    gains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {launch.capability(torch.device(DEVICE)): {"gains": gains}}
    monkeypatch.setattr(launch, "entries", lambda: found)
    calls = []
    product = linears.low_rank_product
    monkeypatch.setattr(
        linears, "low_rank_product", lambda *given: calls.append(1) or product(*given)
    )
    x, tensors, operands = layers_of(9, 24, [(40, 4, True)], 0.0, torch.float32)
    operations("auto", DEVICE).linear_gelu(x, operands(tensors)[0])
    assert bool(calls) == ("linears" in gains)


def test_ranks_that_no_tile_holds_go_through_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(linears, "low_rank_product")
    x, tensors, operands = layers_of(9, 24, [(40, 129, False)], 0.0, torch.float32)
    exact = plain.linears(x.double(), operands([t.double() for t in tensors]))[0]
    ours = linears.linears(x, operands(tensors))[0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_auto_takes_what_gains_on_a_class_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    found = {launch.capability(device): {"gains": ["swiglu", "adamw_"]}}
    monkeypatch.setattr(launch, "entries", lambda: found)
    chosen = operations("auto", device)
    assert chosen.name == "reference, triton's swiglu, adamw_"
    assert chosen.swiglu is elementwise.swiglu
    assert chosen.adamw_ is not None
    assert chosen.rotary is reference.rotary
    monkeypatch.setattr(launch, "entries", lambda: {launch.capability(device): {"gains": []}})
    assert operations("auto", device).name == "reference"
