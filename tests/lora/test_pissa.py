"""PiSSA against PEFT: its start, and its files, which are for the base as everybody has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from small import small_config
from torch import nn

from files.errors import UserError
from lora import (
    LoraConfig,
    adapter_tensors,
    fill_adapter,
    inject,
    load_adapter,
    lora_layers,
    merge,
    pissa,
    save_adapter,
)
from models import build

Maker = Callable[..., Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "q_proj": 5}},
}
# PEFT cannot convert these.
OURS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "biases": {"bias": "lora_only"},
    "rslora, patterns": {"use_rslora": True, **OPTIONS["patterns"]},
}
COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


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
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_start_is_peft_s(make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor) -> None:
    theirs = make_theirs("qwen2")
    ours, before = make_ours(theirs), make_ours(theirs)
    inject(ours, LoraConfig(target_modules=TARGETS, **COMMON))
    assert_same(logits(ours, tokens), logits(before, tokens))
    get_peft_model(theirs, PeftConfig(target_modules=TARGETS, **COMMON))
    for name, layer in lora_layers(ours).items():
        other = theirs.get_submodule(name)
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        # A direction may have either sign in A and B; what it takes of the weight is one.
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, b @ a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)
        left = before.get_submodule(name).weight - 1.5 * b @ a
        torch.testing.assert_close(layer.weight, left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", OURS)
def test_a_trained_adapter_is_for_the_unchanged_base(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    theirs = make_theirs("qwen2")
    ours, fresh = make_ours(theirs), make_ours(theirs)
    inject(ours, LoraConfig(target_modules=TARGETS, **COMMON, **OURS[case]))
    shake(ours)
    save_adapter(ours, tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (document["r"], document["init_lora_weights"]) == (8, True)
    expected = logits(ours, tokens)
    read = load_adapter(fresh, tmp_path)
    assert read.init_lora_weights == "default"
    assert_same(logits(fresh, tokens), expected)
    peft = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    assert_same(logits(peft, tokens), expected)
    merge(ours)
    assert_same(logits(ours, tokens), expected)


@pytest.mark.parametrize("case", OPTIONS)
def test_what_peft_converts_is_read(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    ours = make_ours(make_theirs("qwen2"))
    options = {**COMMON, **OPTIONS[case]}
    peft = get_peft_model(make_theirs("qwen2"), PeftConfig(target_modules=TARGETS, **options))
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(str(tmp_path / "start"))
    peft.peft_config["default"].init_lora_weights = "pissa"
    shake(peft)
    expected = logits(peft.eval(), tokens)
    peft.save_pretrained(
        str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    load_adapter(ours, tmp_path / "end")
    assert_same(logits(ours, tokens), expected)


def test_a_file_holds_the_start_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, make_theirs: Maker, make_ours: Maker
) -> None:
    """Whatever a second SVD would give: the signs of its directions are nobody's promise."""
    theirs = make_theirs("llama")
    first, second = (make_ours(theirs).bfloat16() for _ in range(2))
    config = LoraConfig(target_modules=TARGETS, **COMMON)
    inject(first, config)
    shake(first)
    saved = {name: x.clone() for name, x in adapter_tensors(first).items()}
    start = {name.removeprefix("base_model.model."): x for name, x in saved.items()}
    monkeypatch.setattr(pissa, "principal_factors", lambda *_: pytest.fail("made anew"))
    inject(second, config, start=start)
    fill_adapter(second, saved)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_start_is_refused(make_theirs: Maker, make_ours: Maker) -> None:
    ours = make_ours(make_theirs("llama"))
    inject(ours, LoraConfig(target_modules=["q_proj"], **COMMON))
    tensors = {name: x.clone() for name, x in adapter_tensors(ours).items()}
    some = next(name for name in tensors if "lora_A" in name)
    tensors[some][-1, 0] += 1e-3
    before = {name: x.clone() for name, x in adapter_tensors(ours).items()}
    with pytest.raises(UserError, match="began as other principal directions"):
        fill_adapter(ours, tensors)
    assert all(torch.equal(x, before[name]) for name, x in adapter_tensors(ours).items())


def test_more_ranks_than_directions_are_refused(make_theirs: Maker, make_ours: Maker) -> None:
    ours = make_ours(make_theirs("llama"))
    with pytest.raises(UserError, match=r"the rank of .*q_proj is 33, .* has 32 principal direct"):
        inject(ours, LoraConfig(r=33, init_lora_weights="pissa", target_modules=["q_proj"]))
    plan = build(small_config("llama"), device="meta")
    with pytest.raises(UserError, match=r"the rank of .*q_proj is 33, .* has 32 principal direct"):
        inject(plan, LoraConfig(r=33, init_lora_weights="pissa", target_modules=["q_proj"]))


@pytest.mark.parametrize("given", [{"lora_alpha": 40000}, {"alpha_pattern": {"q_proj": 40000}}])
def test_a_scale_that_a_file_cannot_say_is_refused_before_the_run(given: dict[str, Any]) -> None:
    LoraConfig(**given)
    with pytest.raises(UserError, match=r"lora_alpha: 40000 must be at most 32752 under pissa"):
        LoraConfig(**given, init_lora_weights="pissa")


def test_magnitudes_of_principal_directions_are_refused() -> None:
    with pytest.raises(UserError, match=r"pissa with lora\.use_dora=true"):
        LoraConfig(init_lora_weights="pissa", use_dora=True)
