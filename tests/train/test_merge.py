"""`python -m train.merge`: the folder it writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Refused
from torch import nn
from transformers import AutoModelForCausalLM

from files.tensors import TensorFile, read_header, write_tensors
from lora import LoraConfig, inject, save_adapter
from models import build, load_model
from models.config import parse_config
from models.weights import initialise, save_model
from train.merge import checkpoint_dtype, main

DOCUMENT: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the folder of a small random bf16 model with a tokenizer beside it."""
    config = parse_config(DOCUMENT, "test")
    model = build(config, device="meta")
    initialise(model, 1, torch.bfloat16, initializer_range=0.2)
    save_model(model, tmp_path / "base", config=config)
    (tmp_path / "base" / "tokenizer.json").write_text('{"of": "base"}')
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"max_length": 9}')
    (tmp_path / "base" / "README.md").write_text("not copied")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return the folder of an adapter over that model."""
    model = load_model(base, dtype=torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=8, bias="lora_only"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    return tmp_path / "adapter"


def expected_weight(base: Path, adapter: Path, module: str) -> torch.Tensor:
    with (
        TensorFile(base / "model.safetensors") as weights,
        TensorFile(adapter / "adapter_model.safetensors") as factors,
    ):
        weight = weights.read(f"{module}.weight").float()
        a = factors.read(f"base_model.model.{module}.lora_A.weight")
        b = factors.read(f"base_model.model.{module}.lora_B.weight")
        return torch.addmm(weight, b, a, alpha=8 / 4).bfloat16()


def test_the_folder_is_a_model_in_the_dtype_of_the_checkpoint(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main([str(adapter), str(out)]) == 0
    assert "merged 14 layers" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "manifest.json",
    }
    header = read_header(out / "model.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {torch.bfloat16}
    assert header.tensors.keys() == read_header(base / "model.safetensors").tensors.keys()
    module = "model.layers.1.mlp.down_proj"
    with TensorFile(out / "model.safetensors") as file:
        assert torch.equal(file.read(f"{module}.weight"), expected_weight(base, adapter, module))


def test_another_program_s_config_beside_the_adapter_is_not_asked(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter.parent / "config.toml").write_text('title = "a site"\n[server]\nport = 3\n')
    assert main([str(adapter), str(tmp_path / "out")]) == 0
    assert "merged 14 layers" in capsys.readouterr().out


def test_transformers_loads_it_and_computes_what_the_adapted_model_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    main([str(adapter), str(tmp_path / "out")])
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "out")
    with torch.no_grad():
        expected = ours(tokens)
        # fp32: two orders of summation, 6e-8 an operation over some dozens of terms.
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (load_model(base)(tokens) - expected).abs().max() > 0.1 * expected.abs().max()


def make_run(adapter: Path, run: Path, *names: str) -> None:
    run.mkdir()
    (run / "config.toml").write_text("")
    for name in names:
        (run / name).mkdir()
        for path in adapter.iterdir():
            (run / name / path.name).write_bytes(path.read_bytes())
        (run / name / "tokenizer.json").write_text(json.dumps({"of": name}))
        (run / name / "prompt_format.json").write_text("{}")


@pytest.mark.parametrize(
    ("names", "taken"), [(("final", "best"), "final"), (("best",), "best"), (("final",), "final")]
)
def test_a_run_gives_its_final_else_its_best_with_the_tokenizer_beside_it(
    names: tuple[str, ...], taken: str, adapter: Path, tmp_path: Path
) -> None:
    make_run(adapter, tmp_path / "run", *names)
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": taken}
    assert (tmp_path / "out" / "prompt_format.json").exists()
    # Taken with tokenizer.json or not at all: two tokenizers' files must not be mixed.
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_base_overrules_the_name_in_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    moved = base.rename(tmp_path / "moved")
    message = refused(main, adapter, tmp_path / "out")
    assert str(base) in message
    assert "give it with --base FOLDER" in message
    assert not (tmp_path / "out").exists()
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(moved)]) == 0


def test_an_adapter_that_names_no_base_is_told_so(
    adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    assert "names no base model" in refused(main, adapter, tmp_path / "out")


def test_out_must_be_vacant(adapter: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not an empty folder" in refused(main, adapter, out)
    assert "is not an empty folder" in refused(main, adapter, out / "notes.txt")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert main([str(adapter), str(out)]) == 0  # an empty folder is vacant


def test_folders_that_are_no_adapter(base: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(main, tmp_path / "nowhere", out)
    assert "holds a model, not an adapter" in refused(main, base, out)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    assert "no final/ or best/ yet" in refused(main, run, out)
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    assert "was trained in full" in refused(main, run, out)
    assert not out.exists()


def test_a_diverged_adapter_writes_nothing(adapter: Path, tmp_path: Path, refused: Refused) -> None:
    path = adapter / "adapter_model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    nn.init.constant_(next(t for name, t in tensors.items() if "lora_B" in name), float("nan"))
    write_tensors(path, tensors)
    assert "is not finite" in refused(main, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_numbers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", {"norm": torch.ones(8)})
    write_tensors(
        tmp_path / "model-00002-of-00002.safetensors",
        {"weight": torch.ones(3, 4).half(), "ids": torch.arange(99)},
    )
    weight_map = {
        "norm": "model-00001-of-00002.safetensors",
        "weight": "model-00002-of-00002.safetensors",
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    write_tensors(tmp_path / "consolidated.safetensors", {"stray": torch.ones(999)})
    assert checkpoint_dtype(tmp_path) == torch.float16
