"""Tensors that are not the decoder's: each kind is named, with what to do about it.

The folders are written by the libraries that such folders come from, or hold the names that they
write; the remedies that name transformers or PEFT are tried.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from files.errors import UserError
from models import load_model

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def add(folder: Path, *names: str, dtype: torch.dtype = torch.float32) -> None:
    extra = {name: torch.ones(3).to(dtype) for name in names}
    rewrite(folder, lambda tensors: {**tensors, **extra})


LAYER = "model.layers.1.self_attn.q_proj"
KINDS = {
    "TRL's value head": (
        ["v_head.summary.weight", "v_head.summary.bias"],
        ["v_head.summary.bias, v_head.summary.weight", "value head", "AutoModelForCausalLM"],
    ),
    "a value head in the model": (["model.value_head.weight"], ["value head"]),
    "a classifier": (["score.weight"], ["classifier's head", "the model that it was made from"]),
    "an old classifier": (["classifier.out_proj.weight"], ["classifier's head"]),
    "an adapter": (
        [f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"],
        ["was not merged", "merge_and_unload", "lora.init_from"],
    ),
    "an embedding's adapter": (["model.embed_tokens.lora_embedding_A"], ["was not merged"]),
    "a trained copy": (["lm_head.modules_to_save.default.weight"], ["was not merged"]),
    "bitsandbytes, 4 bits": (
        [f"{LAYER}.weight.absmax", f"{LAYER}.weight.quant_state.bitsandbytes__nf4"],
        ["parts of quantised weights", "quantization_config", "original"],
    ),
    "bitsandbytes, 8 bits": ([f"{LAYER}.SCB", f"{LAYER}.weight_format"], ["quantised"]),
    "GPTQ": (
        [f"{LAYER}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")],
        ["quantised"],
    ),
    "fp8": ([f"{LAYER}.weight_scale_inv", f"{LAYER}.input_scale"], ["quantised"]),
    "compressed-tensors": ([f"{LAYER}.weight_packed", f"{LAYER}.weight_shape"], ["quantised"]),
    "layers for further tokens": (
        ["model.layers.2.eh_proj.weight", "model.layers.10.shared_head.norm.weight"],
        ["layers beyond num_hidden_layers = 2", "config.json"],
    ),
    "a wrapper's": (["module.model.norm.weight"], ["wrapper", "save the wrapped model itself"]),
    "torch.compile's": (["_orig_mod.model.norm.weight"], ["wrapper"]),
    "a model in a model": (["model.language_model.norm.weight"], ["wrapper"]),
    "Meta's": (
        ["tok_embeddings.weight", "layers.0.attention.wq.weight", "output.weight"],
        ["original release", "Hugging Face layout"],
    ),
    "a layer that no one counts": (
        [f"model.layers.{'9' * 5000}.x"],
        ["no part of the decoder", "AutoModelForCausalLM"],
    ),
    "anything": (["visual.patch.weight"], ["visual.patch.weight", "no part of the decoder"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_named_with_its_remedy(kind: str, folder: Path) -> None:
    names, parts = KINDS[kind]
    add(folder, *names)
    message = refusal(folder)
    for part in ("unexpected are", *parts):
        assert part in message
    assert message.count("unexpected are") == 1


def test_kinds_come_together_and_long_lists_are_cut(folder: Path) -> None:
    add(folder, "v_head.summary.weight", *(f"extra.{number:03}" for number in range(100)))
    message = refusal(folder)
    assert "v_head.summary.weight (a value head" in message
    assert "extra.000, extra.001" in message
    assert "extra.019 and 80 more (no part of the decoder" in message


@pytest.mark.parametrize("names", [["v_head.summary.weight"], ["model.layers.2.eh_proj.weight"]])
def test_saving_it_with_transformers_leaves_them_out(names: list[str], folder: Path) -> None:
    expected = load_model(folder)
    add(folder, *names)
    refusal(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "clean")
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(folder.parent / "clean")(tokens), expected(tokens))


def test_what_the_libraries_write_themselves(tmp_path: Path) -> None:
    config = LlamaConfig(**{**CONFIG.to_dict(), "num_labels": 2, "pad_token_id": 0})
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(tmp_path / "classifier")
    message = refusal(tmp_path / "classifier")
    assert "unexpected are score.weight (a classifier's head" in message

    LlamaModel(CONFIG).save_pretrained(tmp_path / "bare")
    message = refusal(tmp_path / "bare")
    assert "saved without its head" in message
    assert "norm.weight" in message

    base = LlamaForCausalLM(CONFIG)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    base.save_pretrained(tmp_path / "unmerged")
    assert "was not merged" in refusal(tmp_path / "unmerged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_model(tmp_path / "merged")


def test_weights_in_eight_bits_floating_point_are_named(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: {**tensors, f"{LAYER}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)},
    )
    message = refusal(folder)
    assert f"tensor '{LAYER}.weight' has dtype 'F8_E4M3', which is not read" in message
    assert "use the model's original ones" in message


def test_the_buffers_of_old_checkpoints_are_let_pass(folder: Path) -> None:
    expected = load_model(folder)
    add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(folder)(tokens), expected(tokens))


def test_a_config_of_fewer_layers_than_the_weights_is_told_from_it(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1}))
    message = refusal(folder)
    assert "of layers beyond num_hidden_layers = 1: give config.json the right number" in message
