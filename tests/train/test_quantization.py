"""Whole runs over a quantised base: plan, resume, generate, merge, and what is refused."""

import gc
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Refused, rows_of, trained_bits
from small import small_config, small_model

from files.errors import UserError
from files.tensors import TensorFile
from kernels.quantised import KINDS, QuantisedWeight
from lora import LoraConfig, inject, load_adapter, merge
from models import load_model
from models.quantised import dequantise
from models.weights import save_model
from train.config.load import load_config
from train.generation.loaded import load_run
from train.merge.__main__ import main as merge_command
from train.plan.decide import UNKNOWN, Machine, decide, decide_sharding
from train.plan.ledger import memory_ledger
from train.plan.sizes import model_sizes
from train.process.memory import allocated_bytes
from train.run import main


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = {"model.quantization": "nf4", "train.max_steps": 3, "checkpoint.steps": 1, **changes}
    return runs.settings(model, rows, output, **values)


@pytest.fixture(scope="module")
def folder(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run over nf4."""
    output = tmp_path_factory.mktemp("run") / "run"
    runs.train(settings(model_folder, rows_file, output))
    return output


# --- the run ---


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.lora_dropout": 0.1},
        {"model.quantization": "int8", "train.precision": "bf16"},
        {"model.gradient_checkpointing": True, "optimizer.name": "adafactor"},
    ],
    ids=str,
)
def test_a_run_that_is_taken_up_again_ends_in_the_same_bits(
    model_folder: Path, rows_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = settings(model_folder, rows_file, tmp_path / "whole", **changes)
    runs.train(values)
    stopped = {**values, "train.output_dir": str(tmp_path / "stopped")}
    assert runs.train(stopped, runs.signalled(2, signal.SIGTERM)).reason == "sigterm"
    assert runs.resume(tmp_path / "stopped").reason == "completed"
    assert trained_bits(tmp_path / "whole") == trained_bits(tmp_path / "stopped")


def test_recomputing_changes_no_bit(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        values = settings(model_folder, rows_file, tmp_path / name)
        runs.train({**values, "model.gradient_checkpointing": recompute})
    assert trained_bits(tmp_path / "kept") == trained_bits(tmp_path / "recomputed")


def test_a_run_says_what_its_base_is(folder: Path, model_folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    status = json.loads((folder / "status.json").read_text())
    assert plan["quantization"] == "nf4"
    assert plan["total_parameters"] == status["total_parameters"]
    assert plan["trainable_parameters"] == status["trainable_parameters"]
    losses = [row["loss"] for row in rows_of(folder, "train")]
    assert losses[-1] < losses[0]
    document = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == str(model_folder)
    with TensorFile(folder / "final" / "adapter_model.safetensors") as file:
        assert all(".lora_" in name for name in file.names)


def test_what_generates_is_what_was_trained(folder: Path, model_folder: Path) -> None:
    model = load_run(folder, torch.device("cpu"), torch.float32).model
    assert any(isinstance(module, QuantisedWeight) for module in model.modules())
    other = load_model(model_folder, quantization="nf4")
    load_adapter(other, folder / "final")
    ids = torch.arange(1, 20)[None]
    assert torch.equal(model(ids), other(ids))


def test_a_base_that_lies_quantised_is_trained_as_it_is(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    stored = tmp_path / "stored"
    base.save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stored / name).write_bytes((model_folder / name).read_bytes())
    asked = settings(model_folder, rows_file, tmp_path / "asked")
    runs.train(asked)
    runs.train({**asked, "model.path": str(stored), "model.quantization": None,
                "train.output_dir": str(tmp_path / "found")})  # fmt: skip
    hashes = [trained_bits(tmp_path / name) for name in ("asked", "found")]
    assert {k: v for k, v in hashes[0].items() if "config" not in k} == {
        k: v for k, v in hashes[1].items() if "config" not in k
    }
    written = load_config(file=tmp_path / "found" / "config.toml")
    assert written.model.quantization == "nf4"
    capsys.readouterr()
    for changes, told in (
        ({"model.quantization": "int8"}, "are nf4 already; use model.quantization=nf4"),
        ({"train.method": "full"}, "model.quantization=nf4 with train.method=full"),
    ):
        values = {**asked, "model.path": str(stored), "model.quantization": None, **changes}
        values["train.output_dir"] = str(tmp_path / "none")
        assert told in refused(main, *runs.arguments(values))
        assert told in refused(main, "--plan", *runs.arguments(values))
    out = tmp_path / "merged"
    assert merge_command([str(tmp_path / "found"), str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged = load_model(out)
    expected = load_model(stored)
    dequantise(expected)
    load_adapter(expected, tmp_path / "found" / "final")
    merge(expected)
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


# --- what it contradicts ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.method": "full"}, "quantised weights are frozen and cannot be trained"),
        ({"train.sharding": "shard"}, "every rank has the quantised weights whole"),
        ({"train.compile": True}, "that has never been tried together"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_go_with_it_is_refused(kind: str, changes: dict, told: str) -> None:
    config = load_config(overrides={"model.quantization": kind, **changes})
    with pytest.raises(UserError, match=told) as caught:
        decide(config, UNKNOWN)
    assert f"model.quantization={kind} with " in str(caught.value)
    assert "model.quantization=none" in str(caught.value)


def test_ranks_have_quantised_weights_whole() -> None:
    machine = Machine("cuda", 10)
    for kind, sharding in ((None, "shard"), ("nf4", "replicate")):
        config = load_config(overrides={"model.quantization": kind})
        assert decide_sharding(config, 100, machine, 2) == sharding


# --- merging ---


def test_merging_takes_the_original_weights_and_says_so(
    folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_command([str(folder), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "(float32, its original weights, not those in nf4 that it was trained over)" in said
    expected = load_model(model_folder)
    load_adapter(expected, folder / "final")
    merge(expected)
    merged = load_model(tmp_path / "merged")
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    out = tmp_path / "of quantised"
    assert merge_command([str(folder), str(out), "--quantization", "nf4"]) == 0
    assert "(float32, of its weights in nf4)" in capsys.readouterr().out
    ids = torch.arange(1, 20)[None]
    trained = load_run(folder, torch.device("cpu"), torch.float32).model
    torch.testing.assert_close(load_model(out)(ids), trained(ids), rtol=1e-4, atol=1e-4)


def test_folding_into_quantised_weights_is_refused(model_folder: Path) -> None:
    model = load_model(model_folder, quantization="int8")
    inject(model, LoraConfig(r=4, lora_alpha=8))
    with pytest.raises(UserError, match="its weight is int8, and would have to be quantised again"):
        merge(model)


# --- the plan ---


def test_ledger_of_quantised_weights() -> None:
    decoder = small_config("llama", hidden_size=64, intermediate_size=192)
    for kind, of_a_number, of_a_row in (("nf4", 0.5 + 1 / 64, 0), ("int8", 1, 4)):
        config = load_config(overrides={"model.quantization": kind})
        sizes = model_sizes(decoder, "lora", config.lora)
        ledger = memory_ledger(config, decoder, precision="bf16")
        linears = sum(a * b for a, b in sizes.linear_shapes)
        assert linears == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
        rows = sum(a for a, _ in sizes.linear_shapes)
        nested = 4 * len(sizes.linear_shapes) if kind == "nf4" else 0
        blocks = sum(4 * -(-a * b // 64 // 256) for a, b in sizes.linear_shapes) if nested else 0
        packed = linears * of_a_number + rows * of_a_row + nested + blocks
        assert ledger["weights"] == 2 * (sizes.base - linears) + packed + 2 * 64 * 192


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("nf4", "none"), ("int8", "none"), pytest.param("nf4", "layers", marks=pytest.mark.slow)],
)
def test_memory_that_was_planned_is_what_a_step_takes(
    folder: Path,  # an earlier run: what a process loads once is there
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    kind: str,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At its peak, which is where a dequantised weight is multiplied by, on a CPU in fp32."""
    model = small_model(
        "llama", vocab_size=257, hidden_size=768, intermediate_size=2048, num_hidden_layers=5
    )
    save_model(model, tmp_path / "model", config=model.config)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    del model
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((model_folder / name).read_bytes())
    gc.collect()
    before, dense, told = allocated_bytes(), QuantisedWeight.dense, [0]
    if before is None:
        pytest.skip("this libc does not tell memory")

    def noted(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
        out = dense(weight, dtype)
        told.append((allocated_bytes() or 0) - before)
        return out

    monkeypatch.setattr(QuantisedWeight, "dense", noted)
    values = settings(tmp_path / "model", rows_file, tmp_path / "run")
    values |= {"model.quantization": kind, "model.gradient_checkpointing": policy}
    runs.train({**values, "train.max_steps": 1})
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    planned, taken = plan["memory"]["total"], max(told)
    assert planned < 0.6 * whole
    assert abs(planned / taken - 1) < 0.1
