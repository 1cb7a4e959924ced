"""Embedding and head trained whole beside adapters, against PEFT: tied and untied, both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn

from files.errors import UserError
from files.tensors import TensorFile, write_tensors
from kernels.segments import Segments
from lora import (
    LoraConfig,
    adapter_config,
    adapter_tensors,
    count_parameters,
    fill_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
)

Maker = Callable[..., Any]
PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
# Family (llama's head is its own, qwen2's is tied), what is named, what is trained whole.
CASES: dict[str, tuple[str, list[str], set[str]]] = {
    "embedding": ("llama", ["embed_tokens"], {EMBEDDING}),
    "head": ("llama", ["lm_head"], {HEAD}),
    "both": ("llama", ["embed_tokens", "lm_head"], {EMBEDDING, HEAD}),
    "tied": ("qwen2", ["embed_tokens"], {EMBEDDING, HEAD}),
    "tied, by the head": ("qwen2", ["lm_head"], {EMBEDDING, HEAD}),
    "tied, full name": ("starcoder2", ["model.embed_tokens", "lm_head"], {EMBEDDING, HEAD}),
}


def made(make_theirs: Maker, family: str) -> Any:
    """Return transformers' model of a family, whose head is tied but for llama's."""
    return make_theirs(family, tie_word_embeddings=family != "llama")


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft_and_here(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    family, named, whole = CASES[case]
    theirs = made(make_theirs, family)
    model, fresh = make_ours(theirs), make_ours(theirs)
    inject(model, LoraConfig(r=4, modules_to_save=named, bias="lora_only"))
    shake(model)
    expected = logits(model, tokens)
    save_adapter(model, tmp_path)
    with TensorFile(tmp_path / "adapter_model.safetensors") as file:
        assert {name for name in file.names if "lora" not in name and "bias" not in name} == whole
    peft = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    assert_same(logits(peft, tokens), expected)
    load_adapter(fresh, tmp_path)
    assert_same(logits(fresh, tokens), expected)
    names = [name for name, _ in make_ours(made(make_theirs, family)).named_parameters()]
    merge(fresh)
    assert [name for name, _ in fresh.named_parameters()] == names
    assert_same(logits(fresh, tokens), expected)


# PEFT ties what is named as the embedding alone.
@pytest.mark.parametrize("case", [case for case in CASES if case != "tied, by the head"])
def test_theirs_loads_here(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    family, named, _ = CASES[case]
    theirs = made(make_theirs, family)
    ours = make_ours(theirs)
    tied = family != "llama"
    config = PeftConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=named,
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(theirs, config)
    shake(peft)
    expected = logits(peft.eval(), tokens)
    peft.save_pretrained(str(tmp_path))
    load_adapter(ours, tmp_path, trainable=True)
    assert_same(logits(ours, tokens), expected)
    assert count_parameters(ours).trainable == peft.get_nb_trainable_parameters()[0]
    # Written again it is the same for PEFT.
    save_adapter(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(made(make_theirs, family), str(tmp_path / "again")).eval()
    assert_same(logits(again, tokens), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["embedding", "head", "both", "tied"])
def test_gradients_are_those_of_peft(
    case: str, checkpointing: bool, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    family, named, _ = CASES[case]
    theirs = made(make_theirs, family).double()
    model = make_ours(theirs).double()
    inject(model, LoraConfig(r=4, modules_to_save=named))
    tied = family != "llama"
    config = PeftConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=named,
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(theirs, config)
    trained = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    shake(peft)
    values = {name: p.detach() for name, p in trained.items()}
    if tied:
        values[HEAD] = values[EMBEDDING]
    fill_adapter(model, values)
    model.gradient_checkpointing = checkpointing
    peft(tokens, labels=tokens).loss.backward()
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1).flatten()
    hidden = model.hidden_states(tokens.flatten(), Segments.build([11, 11], device="cpu"))
    (model.operations.linear_cross_entropy(hidden, model.head_weight(), targets) / 20).backward()
    places = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    for name, parameter in trained.items():
        found, expected = places[adapter_tensors(model)[name].data_ptr()], parameter.grad
        assert found is not None
        assert expected is not None
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def test_masters_are_fp32_and_the_stream_is_not(
    make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    theirs = made(make_theirs, "llama")
    model, plain = make_ours(theirs).bfloat16(), make_ours(theirs).bfloat16()
    inject(model, LoraConfig(modules_to_save=["embed_tokens", "lm_head"]))
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.float32
    segments = Segments.build([11, 11], device="cpu")
    assert model.hidden_states(tokens.flatten(), segments).dtype == torch.bfloat16
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_pair_that_was_untied_is_refused(
    tmp_path: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    """PEFT's default: two copies, trained apart."""
    config = PeftConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft = get_peft_model(made(make_theirs, "qwen2"), config)
    shake(peft)
    peft.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"tied to its embedding, and the adapter holds two"):
        load_adapter(make_ours(made(make_theirs, "qwen2")), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names if name != HEAD}
    write_tensors(path, tensors)
    with pytest.raises(UserError, match=r"missing are .*lm_head.weight \(embedding and head are o"):
        load_adapter(make_ours(made(make_theirs, "qwen2")), tmp_path)


@pytest.mark.parametrize("name", ["norm", "q_proj", "embed_token"])
def test_nothing_else_is_trained_whole(name: str, make_theirs: Maker, make_ours: Maker) -> None:
    ours = make_ours(made(make_theirs, "llama"))
    with pytest.raises(UserError, match=f"lora.modules_to_save: '{name}' is no embedding and no"):
        inject(ours, LoraConfig(modules_to_save=[name]))
    assert all(parameter.requires_grad for parameter in ours.parameters())  # nothing was begun


def test_the_file_names_what_it_holds(tmp_path: Path, make_theirs: Maker, make_ours: Maker) -> None:
    for family, tied in (("llama", False), ("qwen2", True)):
        model = make_ours(made(make_theirs, family))
        inject(model, LoraConfig(modules_to_save=["lm_head"]))
        save_adapter(model, tmp_path / family)
        document = json.loads((tmp_path / family / "adapter_config.json").read_text())
        assert document["modules_to_save"] == (["embed_tokens", "lm_head"] if tied else ["lm_head"])
        assert document.get("ensure_weight_tying", False) is tied
        assert adapter_config(model).modules_to_save == ("lm_head",)
