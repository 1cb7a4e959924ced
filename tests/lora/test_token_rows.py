"""Rows of the embedding trained beside adapters, against PEFT: tied and untied, both ways."""

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
from files.tensors import TensorFile
from kernels.segments import Segments
from lora import (
    LoraConfig,
    adapter_tensors,
    count_parameters,
    fill_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from models.layers import CausalLM

Maker = Callable[..., Any]
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
INDICES = [7, 3, 60]
FAMILIES = ("llama", "qwen2", "starcoder2")  # llama's head is its own, the others' are tied


def made(make_theirs: Maker, family: str) -> Any:
    """Return transformers' model of a family."""
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


@pytest.fixture
def tokens() -> torch.Tensor:
    """Return two rows of eleven tokens, trained ones among them more than once."""
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(3))
    ids[0, ::3], ids[1, 4] = 7, 60
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_loads_in_peft_and_here(
    family: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    theirs = made(make_theirs, family)
    model, fresh, plain = (make_ours(theirs) for _ in range(3))
    inject(model, LoraConfig(r=4, trainable_token_indices=INDICES, use_dora=True))
    assert_same(logits(model, tokens), logits(plain, tokens))
    shake(model)
    expected = logits(model, tokens)
    save_adapter(model, tmp_path)
    with TensorFile(tmp_path / "adapter_model.safetensors") as file:
        assert file.read(ROWS).shape == (3, 32)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["trainable_token_indices"] == INDICES
    names = [name for name, _ in plain.named_parameters()]
    peft = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    assert_same(logits(peft, tokens), expected)
    load_adapter(fresh, tmp_path)
    assert_same(logits(fresh, tokens), expected)
    merge(fresh)
    assert [name for name, _ in fresh.named_parameters()] == names
    assert_same(logits(fresh, tokens), expected)
    untouched = [i for i in range(61) if i not in INDICES]
    before, after = (x.model.embed_tokens.weight[untouched] for x in (plain, fresh))
    assert torch.equal(before, after)


@pytest.mark.parametrize("indices", [INDICES, {"embed_tokens": INDICES}], ids=["list", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_theirs_loads_here(
    family: str,
    indices: Any,
    tmp_path: Path,
    make_theirs: Maker,
    make_ours: Maker,
    tokens: torch.Tensor,
) -> None:
    theirs = made(make_theirs, family)
    ours = make_ours(theirs)
    config = PeftConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    peft = get_peft_model(theirs, config)
    shake(peft)
    expected = logits(peft.eval(), tokens)
    peft.save_pretrained(str(tmp_path))
    load_adapter(ours, tmp_path, trainable=True)
    assert_same(logits(ours, tokens), expected)
    count = count_parameters(ours)
    trained, all_parameters = peft.get_nb_trainable_parameters()
    assert count.trainable == trained
    assert count.base == all_parameters - trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_peft(
    family: str, checkpointing: bool, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    theirs = made(make_theirs, family).double()
    model: CausalLM = make_ours(theirs).double()
    inject(model, LoraConfig(r=4, trainable_token_indices=INDICES))
    config = PeftConfig(r=4, target_modules="all-linear", trainable_token_indices=INDICES)
    peft = get_peft_model(theirs, config)
    trained = {n.replace(".default", ""): p for n, p in peft.named_parameters() if p.requires_grad}
    shake(peft)
    fill_adapter(model, {name: p.detach() for name, p in trained.items()})
    model.gradient_checkpointing = checkpointing
    peft(tokens, labels=tokens).loss.backward()
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1).flatten()
    hidden = model.hidden_states(tokens.flatten(), Segments.build([11, 11], device="cpu"))
    (model.operations.linear_cross_entropy(hidden, model.head_weight(), targets) / 20).backward()
    places = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    for name, tensor in adapter_tensors(model).items():
        found, expected = places[tensor.data_ptr()], trained[name].grad
        assert found is not None
        assert expected is not None
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"trainable_token_indices": [61]},
            "61 is no row of model.embed_tokens, which has 0 to 60",
        ),
        ({"trainable_token_indices": [3, 3]}, "a row is given twice"),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            r"model.embed_tokens is trained whole \(lora.modules_to_save\)",
        ),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
            r"model.embed_tokens is trained whole \(lora.modules_to_save\)",
        ),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"trainable_token_indices": [True]}, "must be a list of token ids"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    options: dict[str, Any], words: str, make_theirs: Maker, make_ours: Maker
) -> None:
    ours = make_ours(made(make_theirs, "qwen2"))
    with pytest.raises(UserError, match=words):
        inject(ours, LoraConfig(**options))
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert isinstance(ours.model.embed_tokens, nn.Embedding)


def test_a_head_of_its_own_may_be_trained_whole_beside_rows(
    make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    ours = make_ours(made(make_theirs, "llama")).bfloat16()
    config = LoraConfig(trainable_token_indices=INDICES, modules_to_save=["lm_head"])
    inject(ours, config)
    rows = ours.model.embed_tokens.trainable_tokens_delta
    assert rows.dtype == ours.lm_head.weight.dtype == torch.float32
    assert ours.model.embed_tokens(tokens.flatten()).dtype == torch.bfloat16
    merge(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
