"""Which layers are adapted, how adapters start, what is trained, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from small import FAMILIES
from torch import nn

from files.errors import UserError
from kernels.segments import Segments
from lora import LoraConfig, LoraLinear, count_parameters, inject, lora_layers
from models import build
from models.config import parse_config

Maker = Callable[..., Any]

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STARCODER2_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]


def adapted_by_peft(theirs: Any, **options: Any) -> set[str]:
    model = get_peft_model(theirs, PeftConfig(task_type="CAUSAL_LM", **options))
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["layers.1.self_attn.q_proj", "o_proj"],
        r".*layers\.0\..*_proj",
        "model.layers.1.self_attn.k_proj",
    ],
    ids=str,
)
def test_targets_are_those_of_peft(
    family: str, targets: Any, make_theirs: Maker, make_ours: Maker
) -> None:
    theirs = make_theirs(family)
    names = inject(make_ours(theirs), LoraConfig(target_modules=targets))
    assert set(names) == adapted_by_peft(theirs, target_modules=targets)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_the_head_out(tied: bool, make_theirs: Maker, make_ours: Maker) -> None:
    names = inject(make_ours(make_theirs("llama", tie_word_embeddings=tied)), LoraConfig())
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)


def test_a_list_matches_whole_parts_of_a_name_and_a_string_the_whole_name() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert inject(model, LoraConfig(target_modules=["proj"])) == ["proj"]  # not q_proj
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert inject(model, LoraConfig(target_modules="q_p.*")) == ["q_proj"]


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], r".*q_proj|lm_head"])
def test_a_tied_head_is_no_module_and_yet_refused(
    targets: Any, make_theirs: Maker, make_ours: Maker
) -> None:
    model = make_ours(make_theirs("llama", tie_word_embeddings=True))
    with pytest.raises(UserError, match="'lm_head' is the output head of Llama"):
        inject(model, LoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], "'q_porj' matched no Linear in Llama; did you mean 'q_proj'?"),
        (["q_proj", "v_porj"], "'v_porj' matched no Linear in Llama; did you mean 'v_proj'?"),
        (["embed_tokens"], "'model.embed_tokens' is an embedding of Llama"),
        (["q_proj", "model.embed_tokens"], "'model.embed_tokens' is an embedding of Llama"),
        (r".*(q_proj|embed_tokens)", "'model.embed_tokens' is an embedding of Llama"),
        (r".*q_proj|lm_head", "'lm_head' is the output head of Llama"),
        ("q_proj", "the regular expression 'q_proj' matched no Linear in Llama"),
        (["lm_head"], "'lm_head' is the output head of Llama"),
        (["q_proj", "lm_head"], "'lm_head' is the output head of Llama"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named(
    targets: Any, message: str, make_theirs: Maker, make_ours: Maker
) -> None:
    model = make_ours(make_theirs("llama", tie_word_embeddings=False))
    with pytest.raises(UserError) as error:
        inject(model, LoraConfig(target_modules=targets))
    assert str(error.value).startswith(f"lora.target_modules: {message}")
    if "matched no" not in message:
        assert "leave it out, use 'all-linear', or train every weight" in str(error.value)
    assert not lora_layers(model), "nothing may be changed when a target is refused"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "lora.r: 0 must be"),
        ({"r": -1}, "lora.r: -1 must be"),
        ({"r": 2.0}, "lora.r: 2.0 must be"),
        ({"r": True}, "lora.r: True must be"),
        ({"lora_alpha": 0}, "lora.lora_alpha: 0 must be"),
        ({"lora_alpha": math.inf}, "lora.lora_alpha: inf must be"),
        ({"lora_dropout": 1.0}, "lora.lora_dropout: 1.0 must be"),
        ({"lora_dropout": -0.1}, "lora.lora_dropout: -0.1 must be"),
        ({"target_modules": []}, "lora.target_modules: [] must be"),
        ({"target_modules": [3]}, "lora.target_modules: [3] must be"),
        ({"target_modules": "q_(proj"}, "lora.target_modules: 'q_(proj' is no regular expression"),
        ({"use_rslora": "yes"}, "lora.use_rslora: 'yes' must be"),
        ({"bias": "lora"}, "lora.bias: 'lora' must be one of none, lora_only, all; did you mean"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj: 0 must be"),
        ({"alpha_pattern": {"q_proj": -1}}, "lora.alpha_pattern.q_proj: -1 must be"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        LoraConfig(**values)
    assert str(error.value).startswith(message)


def test_scale() -> None:
    assert LoraConfig(r=8, lora_alpha=32).scale("x") == 4.0
    # 32 / sqrt(16)
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scale("x") == 8.0
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 2, "layers.0.*k_proj": 4},
        alpha_pattern={"v_proj": 64},
    )
    assert config.scale("model.layers.0.self_attn.q_proj") == 16 / 2
    assert config.scale("model.layers.0.self_attn.k_proj") == 16 / 4
    assert config.scale("model.layers.1.self_attn.k_proj") == 16 / 8
    assert config.scale("model.layers.1.self_attn.v_proj") == 64 / 8


def test_the_model_computes_what_it_did(
    make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    model = make_ours(make_theirs("qwen2"))
    before = model(tokens)
    inject(model, LoraConfig())
    assert torch.equal(model(tokens), before)  # B = 0 adds exact zeros


def test_weight_and_bias_stay_the_same_objects_under_the_same_names(
    make_theirs: Maker, make_ours: Maker
) -> None:
    model = make_ours(make_theirs("starcoder2"))
    before = dict(model.named_parameters())
    names = inject(model, LoraConfig(r=3))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() - before.keys() == {
        f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B")
    }


def test_a_starts_uniform_within_one_over_root_k_and_b_at_zero() -> None:
    model = nn.Sequential(nn.Linear(400, 30))
    inject(model, LoraConfig(r=50))
    layer = lora_layers(model)["0"]
    bound = 400**-0.5
    assert layer.lora_A.shape == (50, 400)
    assert layer.lora_B.shape == (30, 50)
    assert layer.lora_A.abs().max() <= bound
    # 20,000 draws: their mean has a standard deviation of bound/sqrt(3·20000) = 0.0041 bound, and
    # their root mean square one of about 0.0032 times itself; five of each is allowed.
    assert abs(layer.lora_A.mean()) < 0.021 * bound
    root_mean_square = layer.lora_A.square().mean().sqrt().item()
    assert root_mean_square == pytest.approx(bound / math.sqrt(3), rel=0.016)
    assert not layer.lora_B.any()


def test_each_a_is_a_function_of_seed_and_name_alone() -> None:
    def factor(names: list[str], name: str, seed: int, targets: Any = "all-linear") -> torch.Tensor:
        torch.manual_seed(len(names))  # the global generator must play no part
        model = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
        inject(model, LoraConfig(r=2, target_modules=targets), seed=seed)
        return lora_layers(model)[name].lora_A.detach()

    first = factor(["a", "b"], "b", 42)
    assert torch.equal(first, factor(["c", "b", "a"], "b", 42))
    assert torch.equal(first, factor(["a", "b"], "b", 42, targets=["b"]))
    assert not torch.equal(first, factor(["a", "b"], "a", 42))
    assert not torch.equal(first, factor(["a", "b"], "b", 43))


@pytest.mark.parametrize(
    ("base", "factor"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_factors_are_fp32_over_any_narrower_base(base: torch.dtype, factor: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(base)
    inject(model, LoraConfig(bias="all"))
    layer = lora_layers(model)["0"]
    assert layer.weight.dtype == base
    assert layer.lora_A.dtype == layer.lora_B.dtype == factor
    assert layer.bias.dtype == factor, "a trained bias needs a master copy as well"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "starcoder2"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_what_is_trained_is_what_peft_trains(
    family: str, bias: Any, make_theirs: Maker, make_ours: Maker
) -> None:
    theirs = make_theirs(family)
    model = make_ours(theirs)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias=bias))
    peft = get_peft_model(theirs, PeftConfig(r=4, target_modules=["q_proj", "o_proj"], bias=bias))
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".default.weight", "")
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def test_freeze_false_leaves_the_base_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoraConfig(), freeze=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoraConfig())
    with pytest.raises(UserError, match="carries an adapter already"):
        inject(model, LoraConfig())


def test_seed_001_counts_on_the_meta_device() -> None:
    """Qwen2.5-Coder-1.5B at r = 32: 36,929,536 trained numbers, 2.34 % of all with the adapters."""
    config = parse_config(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        "test",
    )
    model = build(config, device="meta")
    inject(model, LoraConfig(r=32))
    assert all(parameter.is_meta for parameter in model.parameters())
    count = count_parameters(model)
    assert (count.trainable, count.base) == (36_929_536, 1_543_714_304)
    assert count.total == count.base + count.trainable
    assert round(count.percent_of_total, 2) == 2.34
    assert round(count.percent_of_base, 2) == 2.39


def test_dropout_draws_are_keyed_by_the_module(make_theirs: Maker, make_ours: Maker) -> None:
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig(lora_dropout=0.5))
    layers = list(lora_layers(model).values())
    assert len({layer.operands().module for layer in layers}) == len(layers)
    assert {layer.operands().dropout for layer in layers} == {0.5}


def test_adapter_dropout_reaches_the_model(
    make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig(lora_dropout=0.5))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)

    def hidden(draw: tuple[int, int] | None) -> torch.Tensor:
        segments = Segments.build([11, 11], device="cpu", examples=[0, 1], draw=draw)
        return model.hidden_states(tokens.flatten(), segments)

    assert torch.equal(hidden((1, 1)), hidden((1, 1)))
    assert not torch.allclose(hidden((1, 1)), hidden((1, 2)))
    assert not torch.allclose(hidden((1, 1)), hidden(None))
    # Between train() and eval() nothing differs: only the segments say whether to drop.
    model.eval()
    assert not torch.allclose(hidden((1, 1)), hidden(None))


def test_forward_in_a_network_that_is_not_ours() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inject(model, LoraConfig(r=2, lora_alpha=6))
    first = model[0]
    assert isinstance(first, LoraLinear)
    nn.init.normal_(first.lora_B)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    weight = first.weight + 3.0 * first.lora_B @ first.lora_A  # scale = 6 / 2
    torch.testing.assert_close(first(x), x @ weight.T + first.bias, rtol=1e-12, atol=1e-12)
    assert model(x).shape == (4, 7, 3)


def test_forward_drops_in_training_mode_alone() -> None:
    model = nn.Sequential(nn.Linear(50, 4))
    inject(model, LoraConfig(lora_dropout=0.5))
    nn.init.ones_(lora_layers(model)["0"].lora_B)
    x = torch.randn(3, 50)
    assert not torch.equal(model.train()(x), model.eval()(x))
    assert torch.equal(model.eval()(x), model.eval()(x))
