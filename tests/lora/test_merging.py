"""Folding an adapter into its base: what comes out, in which dtype, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from files.errors import UserError
from lora import LoraConfig, inject, load_adapter, lora_layers, merge, save_adapter
from models.layers import Linear
from models.weights import save_model

Maker = Callable[..., Any]


def shake(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_computes_what_the_adapted_one_did(
    family: str, bias: Any, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    model = make_ours(make_theirs(family)).double()
    names_before = [name for name, _ in model.named_parameters()]
    inject(model, LoraConfig(r=4, lora_alpha=8, bias=bias))
    shake(model)
    with torch.no_grad():
        adapted = model(tokens)
        merged_names = merge(model)
        merged = model(tokens)
    # fp64 rounds at 1e-16; rotary tables and norms are fp64 too, so only the order of sums differs.
    torch.testing.assert_close(merged, adapted, rtol=1e-10, atol=1e-10)
    assert [name for name, _ in model.named_parameters()] == names_before
    assert not lora_layers(model)
    assert all(type(model.get_submodule(name)) is Linear for name in merged_names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_sum_is_made_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    inject(model, LoraConfig(r=8, lora_alpha=16, bias="all"))
    shake(model, 0.05)
    layer = lora_layers(model)["0"]
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    bias = layer.bias.detach().clone()
    merge(model)
    plain = model[0]
    assert isinstance(plain, nn.Linear)
    assert plain.weight.dtype == plain.bias.dtype == dtype
    assert torch.equal(plain.bias, bias.to(dtype))
    # One rounding moves a number by at most half a unit in the last place, eps/2 of its size. To
    # that comes the fp32 sum of r + 1 = 9 terms, each rounded at 6e-8 of at most 3.
    half_unit = torch.finfo(dtype).eps / 2
    error = (plain.weight.double() - exact).abs()
    assert (error <= half_unit * exact.abs() + 9 * 6e-8 * 3).all()


def test_rounding_twice_would_be_seen_by_the_test_above() -> None:
    """The update rounded to bf16 before the sum, as the stack does it, breaks the bound."""
    torch.manual_seed(0)
    weight = nn.Linear(40, 30).bfloat16().weight.detach()
    update = torch.randn(30, 40) * 0.05
    twice = (weight + update.bfloat16()).double()
    exact = weight.double() + update.double()
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 9 * 6e-8 * 3
    assert ((twice - exact).abs() > bound).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_merged_weight_that_is_not_finite_is_refused(value: float) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4).half()})
    inject(model, LoraConfig(r=1))
    layer = lora_layers(model)["proj"]
    nn.init.ones_(layer.lora_A)
    nn.init.constant_(layer.lora_B, value)  # 1e6 is finite in fp32, not in fp16
    before = layer.weight.clone()
    with pytest.raises(UserError, match=r"^proj: the merged weight is not finite in torch.float16"):
        merge(model)
    assert torch.equal(layer.weight, before)


def test_a_tied_weight_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "lm_head": nn.Linear(4, 6, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    inject(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"lm_head: its weight is tied to embed\.weight"):
        merge(model)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="carries no adapter"):
        merge(nn.Linear(2, 2))


def test_after_merging_another_adapter_may_follow() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoraConfig())
    merge(model)
    assert inject(model, LoraConfig()) == ["0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_loads_in_transformers(
    family: str,
    tmp_path: Path,
    make_theirs: Maker,
    make_ours: Maker,
    tokens: torch.Tensor,
) -> None:
    model, fresh = (make_ours(make_theirs(family)) for _ in range(2))
    inject(model, LoraConfig(r=4, bias="lora_only"))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    merge(fresh)
    save_model(fresh, tmp_path / "model", config=fresh.config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens)
        # fp32: two orders of summation, 6e-8 an operation over some dozens of terms.
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
