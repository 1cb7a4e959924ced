"""Every `auto` becomes a value in one place: what is planned is what runs, for every preset."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import TRITON
from small import FAMILIES, SMALL

import train.loop as loop_module
import train.saving.checkpoints as checkpoint_module
from files.errors import UserError
from kernels import attention as attention_module
from kernels.cpu import attention as cpu_attention
from models.config import parse_config
from models.recompute import POLICIES
from train.config.layers import preset_names
from train.config.load import load_config
from train.inputs.dataset import load_data
from train.plan.decide import (
    UNKNOWN,
    Machine,
    attention_kernels,
    decide,
    decide_attention,
    decide_device,
    decide_kernels,
    decide_micro_batch_tokens,
    decide_precision,
    decide_recomputing,
    machine_elsewhere,
    machine_to_plan_for,
    possible_policies,
    this_machine,
)
from train.plan.ledger import micro_batch_tokens
from train.process.room import available_memory
from train.run import execute
from train.survey import print_plan

ON_A_CPU_ALONE = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(),
    reason="speaks of a machine without an accelerator",
)


# --- precision ---


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_a_precision_that_is_named_is_taken(name: str, device: str | None) -> None:
    assert decide_precision(name, device) == name


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),  # ARM64
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
    ids=str,
)
def test_auto_on_a_cpu_goes_by_its_instructions(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert decide_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_cuda_does_not_count_emulation(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert decide_precision("auto", "cuda") == expected


def test_auto_elsewhere_is_fp32_and_of_no_device_stays() -> None:
    assert decide_precision("auto", "mps") == "fp32"
    assert decide_precision("auto", None) == "auto"


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(UserError, match=r"train.precision: 'bf61' .*; did you mean 'bf16'\?"):
        decide_precision("bf61", "cpu")


# --- device and machine ---


@ON_A_CPU_ALONE
def test_devices() -> None:
    assert decide_device("auto") == decide_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"train.device={name}: .* sees no such device here"):
            decide_device(name)
        with pytest.raises(UserError, match=f"train.device={name}"):
            machine_to_plan_for(load_config(overrides={"device": name}))


@ON_A_CPU_ALONE
def test_a_machine_without_an_accelerator_plans_for_one_unless_the_cpu_is_named() -> None:
    assert machine_to_plan_for(load_config()) is UNKNOWN
    on_cpu = load_config(overrides={"train.device": "cpu"})
    alone, of_four = machine_to_plan_for(on_cpu), machine_to_plan_for(on_cpu, 4)
    assert alone.device == of_four.device == "cpu"
    if alone.memory is not None and of_four.memory is not None:  # what is free moves meanwhile
        assert of_four.memory == pytest.approx(alone.memory / 4, rel=0.2)
    assert this_machine(load_config()).device == "cpu"


@pytest.mark.parametrize(
    ("gpu", "memory", "expected"),
    [
        ("4090", None, Machine("cuda", 24 * 10**9, (8, 9), "4090")),
        ("A100 40GB", None, Machine("cuda", 40 * 10**9, (8, 0), "a100-40gb")),
        (None, 10**10, Machine("cuda", 10**10, (8, 0))),
        ("h100", 10**10, Machine("cuda", 10**10, (9, 0), "h100")),
    ],
)
def test_a_gpu_that_is_planned_for_need_not_be_here(
    gpu: str | None, memory: int | None, expected: Machine
) -> None:
    machine = machine_elsewhere(load_config(), gpu, memory)
    assert machine == expected
    assert decide_precision("auto", machine.device, machine.capability) == "bf16"
    assert decide_precision("auto", machine.device, (7, 5)) == "fp32"
    assert decide_kernels("auto", machine.device, machine.capability) == "triton"
    assert decide_kernels("reference", machine.device, machine.capability) == "reference"
    assert decide_kernels("auto", machine.device, (7, 5)) == "reference"


def test_a_gpu_that_is_not_known_or_not_meant_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu 4080: .*4090.*--memory"):
        machine_elsewhere(load_config(), "4080", None)
    on_cpu = load_config(overrides={"train.device": "cpu"})
    with pytest.raises(UserError, match=r"--memory plans for a CUDA card, and train.device=cpu"):
        machine_elsewhere(on_cpu, None, 10**10)


def test_this_machine_has_memory() -> None:
    memory = available_memory("cpu")
    assert memory is None or memory > 2**20


# --- the rest ---


@pytest.mark.parametrize(("asked", "expected"), [({}, None), ({"micro_batch_tokens": 100}, 100)])
def test_tokens_of_a_micro_batch(asked: dict[str, Any], expected: int | None) -> None:
    assert decide_micro_batch_tokens(load_config(overrides=asked)) == expected


def test_automatic_tokens_are_those_of_the_padded_micro_batch() -> None:
    keys = {"micro_batch_tokens": "auto", "per_device_train_batch_size": 4, "max_length": 1024}
    config = load_config(overrides=keys)
    assert decide_micro_batch_tokens(config) == 4096
    for machine in (UNKNOWN, Machine("cpu", None)):
        decided = decide(config, machine)
        assert decided.train.micro_batch_tokens == 4096
        assert decide(decided, machine) == decided


def test_recomputing_only_where_memory_needs_it() -> None:
    config = load_config()
    needed = {"none": 100, "norms": 80, "mlp": 60, "layers": 40, "offload": 40}
    for memory, policy in (
        (100, "none"),
        (99, "norms"),
        (79, "mlp"),
        (59, "layers"),
        (39, "layers"),
    ):
        assert decide_recomputing(config, needed, Machine("cuda", memory))[0] == policy
    sent = needed | {"offload": 20}
    assert decide_recomputing(config, sent, Machine("cuda", 39))[0] == "offload"
    assert decide_recomputing(config, sent, Machine("cuda", 10))[0] == "offload"
    assert decide_recomputing(config, needed, Machine("mps", None))[0] == "none"
    assert decide_recomputing(config, needed, UNKNOWN) == (None, "auto: no device is known yet")
    assert decide_recomputing(config, None, Machine("cpu", 99))[0] is None
    for setting in needed:
        chosen = load_config(overrides={"gradient_checkpointing": setting})
        assert decide_recomputing(chosen, needed, UNKNOWN) == (setting, "as set")


def test_where_layers_are_compiled_they_are_kept_or_computed_again_whole() -> None:
    asked = load_config(overrides={"train.compile": True})
    assert possible_policies(asked, "cuda") == ("none", "layers")
    assert possible_policies(load_config(), "cuda") == POLICIES
    assert possible_policies(load_config(), None) == POLICIES
    assert possible_policies(load_config(), "cpu") == POLICIES[:-1]
    for policy in ("norms", "mlp", "offload"):
        config = load_config(overrides={"train.compile": True, "gradient_checkpointing": policy})
        with pytest.raises(UserError, match=f"gradient_checkpointing={policy}: compiled layers"):
            decide(config, Machine("cpu", None))


@ON_A_CPU_ALONE
def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert decide_kernels("auto", "cpu") == "reference"
    assert decide_kernels("auto", None) is None
    assert decide_kernels("reference", None) == "reference"
    with pytest.raises(UserError, match="run on CUDA"):
        decide_kernels("triton", "cpu")


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_compiled_layers_do_not_go_through_triton_s_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = Machine("cuda", None)
    asked = {"train.compile": True, "train.precision": "bf16"}
    for kernels in ("auto", "triton"):
        config = load_config(overrides={**asked, "train.kernels": kernels})
        with pytest.raises(
            UserError, match=r"use train\.compile=false or train\.kernels=reference"
        ):
            decide(config, cuda)
    decide(load_config(overrides={**asked, "train.kernels": "reference"}), cuda)
    decide(load_config(overrides=asked), Machine("cpu", None))
    decide(load_config(overrides={"train.precision": "bf16"}), cuda)


@pytest.mark.parametrize(
    ("asked", "dropout", "device", "longest", "expected"),
    [
        ("auto", 0.0, "cpu", 1024, "blocks"),
        ("auto", 0.0, "cpu", 1025, "fused"),
        ("auto", 0.0, "cuda", 100, "fused"),
        ("auto", 0.1, "cuda", 100, "fused"),
        ("auto", 0.1, "cpu", 100, "written out"),
        ("auto", 0.1, None, 100, "fused"),
        ("eager", 0.0, "cuda", 100, "written out"),
    ],
)
def test_attention(
    asked: str, dropout: float, device: str | None, longest: int, expected: str
) -> None:
    config = load_config(overrides={"attention": asked})
    raw = {**SMALL, **FAMILIES["starcoder2"], "attention_dropout": dropout}
    assert decide_attention(config, parse_config(raw, "test"), device, longest) == expected


def test_records_name_the_kernels_of_attention() -> None:
    """Here a CPU's, beside the blocks that are ours; a GPU's are those of its own rule."""
    config = parse_config({**SMALL, **FAMILIES["mistral"]}, "test")
    assert attention_kernels(config, "cpu", "fp32", 9, 0.0, "auto") == "sdpa, flash_attention"
    assert attention_kernels(config, "cpu", "fp32", 9, 0.0, "eager") == "written out"
    assert attention_kernels(config, "cpu", "fp32", 9, 0.1, "sdpa") == "written out"


# --- the plan and the run ---

FAMILY_OF = {"codellama": "llama", "llama2": "llama", "qwen2.5": "qwen2"}
# A document's row holds all the columns that some preset reads.
ROW_FIELDS = ("text", "content", "input", "solution", "output")
# What differs between two moments of one machine.
OF_THE_MOMENT = ("available_memory", "gradient_checkpointing_because")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    random = np.random.default_rng(3)
    with path.open("w") as file:
        for number in range(90):
            row: dict[str, Any] = {
                name: "".join(map(chr, random.integers(97, 110, random.integers(4, 24))))
                for name in ROW_FIELDS
            }
            row["split"] = "valid" if number % 9 == 0 else "train"
            file.write(json.dumps(row) + "\n")
    return path


def small_settings(name: str, model: Path, rows: Path, output: Path) -> dict[str, Any]:
    """Return what makes a preset a run of seconds: a small model of its family, and few rows."""
    config = load_config(name)
    settings: dict[str, Any] = {
        "model.path": str(model),
        "model.random_init": True,
        "data.train": str(rows),
        "data.valid": None,
        "data.test": None,
        "data.valid_fraction": 0.0 if config.data.split_column else 0.1,
        "data.max_length": 200,
        "train.device": "cpu",
        "train.max_steps": 5,
        "train.output_dir": str(output),
        "log.tensorboard": False,
        "log.progress": False,
        "eval.samples": 0,
    }
    if isinstance(config.eval.steps, int):
        settings["eval.steps"] = 2
    if isinstance(config.checkpoint.steps, int):
        settings["checkpoint.steps"] = 2
    return settings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """Return a folder of each family: config.json and a tokenizer, no weights."""
    folders = {}
    for family, keys in FAMILIES.items():
        folder = folders[family] = tmp_path_factory.mktemp(family)
        raw = {**SMALL, **keys, "vocab_size": 257, "max_position_embeddings": 512}
        if family == "starcoder2":
            raw["attention_dropout"] = 0.1
        (folder / "config.json").write_text(json.dumps(raw))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((model_folder / file).read_bytes())
    return folders


@dataclass
class Ran:
    """What a run did, seen where it did it."""

    saved: list[int] = field(default_factory=list)
    micro_batches: list[list[int]] = field(default_factory=list)  # rows of each, by step
    examples: list[int] = field(default_factory=list)
    attention: set[str] = field(default_factory=set)
    model: Any = None
    optimizer: Any = None
    precision: Any = None


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    seen = Ran()
    step, save = loop_module.train_step, checkpoint_module.Checkpoints.save

    def watched_step(model: Any, optimizer: Any, batch: Any, **named: Any) -> Any:
        seen.model, seen.optimizer, seen.precision = model, optimizer, named["precision"]
        seen.micro_batches.append([len(part.input_ids) for part in batch])
        seen.examples.append(sum(len(part.examples) for part in batch))
        with monkeypatch.context() as patch:
            paths = {"_fused": "fused", "_written_out": "written out", "_blocks": "blocks"}
            for name, path in paths.items():
                module = cpu_attention if path == "blocks" else attention_module
                plain = getattr(module, name)

                def watched(*values: Any, _plain: Any = plain, _path: str = path) -> Any:
                    seen.attention.add(_path)
                    return _plain(*values)

                patch.setattr(module, name, watched)
            return step(model, optimizer, batch, **named)

    def watched_save(self: Any, state: Any, *arguments: Any, **keys: Any) -> Any:
        seen.saved.append(state["step"])
        return save(self, state, *arguments, **keys)

    monkeypatch.setattr(loop_module, "train_step", watched_step)
    monkeypatch.setattr(checkpoint_module.Checkpoints, "save", watched_save)
    return seen


BY_TOKENS = {"micro_batch_tokens": "auto"}
# Of each family one, of demo's and of each column's kind one; the other presets are slow.
QUICK = {"codellama-7b", "default", "demo", "qwen2.5-coder-1.5b", "starcoder2-3b"}
CASES = [
    pytest.param(name, {}, marks=[] if name in QUICK else pytest.mark.slow)
    for name in preset_names()
] + [(name, BY_TOKENS) for name in ("demo", "llama2-7b")]


@pytest.mark.parametrize(("name", "more"), CASES, ids=str)
def test_what_is_planned_is_what_runs(
    name: str,
    more: dict[str, Any],
    models: dict[str, Path],
    rows: Path,
    ran: Ran,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family = FAMILY_OF.get(name.split("-")[0], "starcoder2")
    settings = small_settings(name, models[family], rows, tmp_path / "run")
    config = load_config(name, overrides={**settings, **more})
    print_plan(config, as_json=True)
    planned = json.loads(capsys.readouterr().out)
    folder = execute(config).folder

    written = json.loads((folder / "plan.json").read_text())
    assert planned.keys() == written.keys()
    for key in planned.keys() - set(OF_THE_MOMENT):
        assert planned[key] == written[key], key

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    status = json.loads((folder / "status.json").read_text())
    early = status["reason"] == "early_stopping"
    last = status["step"]
    assert early or last == planned["total_steps"]
    assert [line["step"] for line in steps] == list(range(1, last + 1))
    valid = [line["step"] for line in lines if line.get("split") == "valid" and line["step"]]
    assert valid == [step for step in planned["eval_steps"] if step <= last]
    assert ran.saved == [step for step in planned["save_steps"] if step < last] + [last]
    for step, rate in planned["learning_rates"].items():
        assert early or steps[int(step) - 1]["learning_rate"] == rate
    warm = [line["learning_rate"] for line in steps[: planned["warmup_steps"] + 1]]
    assert warm == sorted(set(warm))
    assert steps[planned["steps_per_epoch"] - 1 :][:1] == [
        line for line in steps if line["epoch"] == 1
    ]

    batch = planned["effective_batch_size"]
    full = [count for count in ran.examples if count == batch]
    assert full
    assert max(ran.examples) == batch
    most = max(map(max, ran.micro_batches))
    data = load_data(config, Path(models[family]), None)
    bound, longest = micro_batch_tokens(config, data.train.lengths.tolist())
    assert longest == data.train.counts.longest
    assert most <= bound
    if more:
        assert planned["micro_batches_per_step"] is None
        assert most <= planned["micro_batch_tokens"]
    else:
        assert planned["micro_batch_tokens"] is None
        counts = [len(parts) for parts in ran.micro_batches]
        assert max(counts) == planned["micro_batches_per_step"]

    assert planned["device"] == ran.precision.device.type
    assert planned["precision"] == ran.precision.name
    assert planned["kernels"] == ran.model.operations.name
    assert planned["gradient_checkpointing"] == ran.model.gradient_checkpointing
    assert {planned["attention"]} == ran.attention
    assert planned["trainable_parameters"] == status["trainable_parameters"]
    assert planned["total_parameters"] == status["total_parameters"]
    weights = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in ran.model.named_parameters()
        if ".lora_" not in name
    )
    lowered = planned["memory"]["weights"] - weights
    assert lowered >= 0  # copies that autocast makes
    assert planned["memory"]["adapters"] + weights == sum(
        parameter.numel() * parameter.element_size() for parameter in ran.model.parameters()
    )
    state = sum(
        tensor.numel() * tensor.element_size() for tensor in ran.optimizer.state_tensors().values()
    )
    assert planned["memory"]["optimizer"] == pytest.approx(state, rel=0.01)

    environment = json.loads((folder / "environment.json").read_text())
    for key in ("device", "precision", "kernels", "attention", "gradient_checkpointing"):
        assert environment[key] == planned[key], key
