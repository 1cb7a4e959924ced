"""Before a run trusts kernels on a card that no record tells of, it compares them itself."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import DEVICE, TRITON
from runs import arguments, settings, signalled, train
from torch import Tensor

from files.errors import UserError
from kernels import reference
from kernels.dispatch import Operations, operations
from kernels.dropout import Draw
from kernels.operands import Made
from kernels.triton import launch
from train import kernel_check
from train.config.load import load_config
from train.config.schema import RunConfig
from train.run import execute, main
from train.saving.resume import find_run

CPU = torch.device("cpu")
PLAIN = operations("reference", "cpu")
KERNELS = [field.name for field in dataclasses.fields(Operations)]
KERNELS = [name for name in KERNELS if name not in ("name", "attention")]


def planted(**wrong: Any) -> Operations:
    return dataclasses.replace(PLAIN, name="planted", **wrong)


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_every_operation_of_triton_is_checked() -> None:
    assert kernel_check.replaced(operations("triton", DEVICE), torch.device(DEVICE)) == KERNELS
    assert kernel_check.replaced(PLAIN, CPU) == []


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.skipif(DEVICE == "cuda", reason="interprets")
@pytest.mark.parametrize("name", KERNELS)
def test_triton_s_kernels_agree(name: str) -> None:
    ours = operations("triton", "cpu")
    assert kernel_check.disagreement(ours, name, CPU, torch.float16) is None


def without_the_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Made:
    return reference.layer_norm(x, weight, torch.zeros_like(bias) * bias, eps)


def with_half_a_gradient(gate: Tensor, up: Tensor) -> Made:
    return reference.swiglu(gate, up.detach() / 2 + up / 2)


def without_dropout(x: Tensor, layers: Any, segments: Any) -> list[Tensor]:
    return PLAIN.linears(x, [layer._replace(dropout=0.0) for layer in layers], segments)


def without_decay(*tensors: Tensor, weight_decay: float, **options: Any) -> None:
    from train.optim.adamw import adamw_update

    adamw_update(*tensors, weight_decay=0.0, **options)


def of_no_number(x: Tensor, weight: Tensor, eps: float) -> Made:
    made = reference.rms_norm(x, weight, eps)
    return made._replace(made=made.value * float("nan"))


def without_drawing(x: Tensor, change: Tensor, draw: Draw | None = None) -> Tensor:
    return reference.add(x, change)


def dropping_the_norm_alone(x: Tensor, change: Tensor, *norm: Any) -> tuple[Tensor, Made]:
    return reference.add(x, change), reference.add_rms_norm(x, change, *norm)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wrong",
    [
        {"layer_norm": without_the_bias},
        {"swiglu": with_half_a_gradient},
        {"linears": without_dropout},
        {"adamw_": without_decay},
        {"rms_norm": of_no_number},
        {"add": without_drawing},
        {"add_rms_norm": dropping_the_norm_alone},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_kernel_that_is_wrong_differs(wrong: dict[str, Any], dtype: torch.dtype) -> None:
    (name,) = wrong
    fault = kernel_check.disagreement(planted(**wrong), name, CPU, dtype)
    assert fault is not None
    assert "differs from the reference" in fault
    assert kernel_check.disagreement(PLAIN, name, CPU, dtype) is None


def test_a_kernel_that_does_not_compile_does_not_run() -> None:
    def no_compiler(*_: Any) -> Tensor:
        raise RuntimeError("ptxas: not for this card\nand a long dump")

    fault = kernel_check.disagreement(planted(swiglu=no_compiler), "swiglu", CPU, torch.float32)
    assert fault == "does not run (RuntimeError: ptxas: not for this card)"


def test_records_and_other_devices_need_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(overrides={"train.precision": "fp32"})
    monkeypatch.delattr(kernel_check, "disagreement")
    assert kernel_check.vouch(config, CPU, None) is None
    monkeypatch.setattr(launch, "decided", lambda device: True)
    assert kernel_check.vouch(config, torch.device("cuda"), None) is None
    monkeypatch.setattr(launch, "decided", lambda device: False)
    reference_alone = dataclasses.replace(
        config, train=dataclasses.replace(config.train, kernels="reference")
    )
    assert kernel_check.vouch(reference_alone, torch.device("cuda"), None) is None


def as_on_a_new_card(monkeypatch: pytest.MonkeyPatch, ours: Operations) -> None:
    """Let a run on the CPU check `ours`, as a run on a card checks what it takes there."""

    def vouch(config: RunConfig, device: torch.device, folder: Path | None) -> Any:
        return kernel_check.checked(config, ours, device, folder)

    monkeypatch.setattr(kernel_check, "vouch", vouch)


def test_a_wrong_kernel_ends_the_run_in_one_sentence(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_on_a_new_card(monkeypatch, planted(swiglu=with_half_a_gradient))
    values = settings(model_folder, rows_file, tmp_path / "run")
    assert main(arguments(values)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train.kernels=auto: Triton's swiglu differs from the reference by" in told
    assert told.endswith("use train.kernels=reference")
    assert not (tmp_path / "run").exists()


def test_the_outcome_is_recorded_and_a_resume_reuses_it(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def swiglu(gate: Tensor, up: Tensor) -> Made:
        calls.append(1)
        return reference.swiglu(gate, up)

    as_on_a_new_card(monkeypatch, planted(swiglu=swiglu))
    folder = tmp_path / "run"
    values = settings(model_folder, rows_file, folder, **{"train.max_steps": 3})
    train(values, signalled(2, signal.SIGTERM))
    recorded = json.loads((folder / "environment.json").read_text())["kernels_checked"]
    assert recorded["operations"] == ["swiglu"]
    assert recorded["precision"] == "fp32"
    assert len(calls) == 1
    execute(*find_run(folder, {}))
    assert len(calls) == 1
    assert json.loads((folder / "environment.json").read_text())["kernels_checked"] == recorded

    # Another card, another version: what was found there says nothing here.
    config = load_config(file=folder / "config.toml")
    monkeypatch.setattr(kernel_check, "device_name", lambda device: "another")
    kernel_check.checked(config, planted(swiglu=swiglu), CPU, folder)
    assert len(calls) == 2
    (folder / "environment.json").write_text("{")
    kernel_check.checked(config, planted(swiglu=swiglu), CPU, folder)
    assert len(calls) == 3
    with pytest.raises(UserError, match="Triton's swiglu"):
        kernel_check.checked(config, planted(swiglu=with_half_a_gradient), CPU, folder)
