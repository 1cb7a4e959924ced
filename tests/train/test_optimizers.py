"""AdamW and Adafactor against torch, transformers and values by hand; clipping; state; decay."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.nn import Parameter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    Trainer,
)
from transformers.optimization import Adafactor as StackAdafactor

from files.errors import UserError
from files.tensors import TensorFile, write_tensors
from train.optim import buffers as flat
from train.optim import build_optimizer, decayed_parameters
from train.optim.adafactor import Adafactor
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer, clip_factor, decays

SHAPES = {
    "a.weight": (7, 5),
    "a.bias": (7,),
    "b.lora_A": (3, 11),
    "b.lora_B": (4, 3),
    "norm.weight": (9,),
    "stack": (2, 3, 4),
    "scalar": (),
    "c.lora_A": (3, 11),
    "c.bias": (7,),
    "d.lora_A": (3, 11),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(tensors: dict[str, Parameter], step: int) -> None:
    """Give each parameter the gradient that it has in this step, of very different sizes."""
    for index, parameter in enumerate(tensors.values()):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient * 10.0 ** (step % 3 - 2)).to(parameter.dtype)


def train(optimizer: Any, steps: range, rate: Callable[[int], float] = lambda s: 1e-2 / s) -> None:
    for step in steps:
        set_gradients(optimizer.parameters, step)
        optimizer.step(rate(step))


# fp64: a few roundings a step at 1e-16, relative to updates of the size of the rate. fp32: the same
# at 6e-8, over ten steps.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}


# Nothing here is longer than the first, so that all lie in the buffer; with the last, none does.
LONE = [1 << 20, 30, 0]
ENDINGS = ("", "_row", "_col")


def ways(*blocks: int) -> list[Any]:
    """Return (weight decay, elements of a block, length of a lone parameter): a few, the rest slow.

    The few: all in the buffer, none, and both in blocks that cut a parameter.
    """
    quick = {(0.1, 1 << 20, LONE[0]), (0.1, 1 << 20, 0), (0.0, blocks[0], 30), (0.1, blocks[0], 30)}
    return [
        pytest.param(
            *way, marks=() if way in quick else pytest.mark.slow, id="-".join(map(str, way))
        )
        for way in itertools.product((0.0, 0.1), (1 << 20, *blocks), LONE)
    ]


@pytest.mark.parametrize(("weight_decay", "block", "lone"), ways(40, 1))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_adamw_equals_torch(
    dtype: torch.dtype, weight_decay: float, block: int, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "_BLOCK_ELEMENTS_CPU", block)
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    ours, theirs = parameters(dtype), parameters(dtype)
    decayed = {"a.weight", "b.lora_A", "b.lora_B", "stack", "scalar", "c.lora_A", "d.lora_A"}
    optimizer = AdamW(ours, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs[n] for n in theirs if n in decayed], "weight_decay": weight_decay},
            {"params": [theirs[n] for n in theirs if n not in decayed], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in range(1, 11):
        set_gradients(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 1e-2 / step
        oracle.step()
    train(optimizer, range(1, 11))
    for name, parameter in ours.items():
        torch.testing.assert_close(
            parameter, theirs[name], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
        )
    state = optimizer.state_tensors()
    for name, parameter in theirs.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"{name}.{kind}"], oracle.state[parameter][kind], rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("lone", [1, 1 << 20])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_loraplus_has_the_rates_of_peft(
    name: str, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PEFT's own groups, decay and biases included, for as long as moments remember."""
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    config = LlamaConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16),
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
    )
    base = LlamaForCausalLM(config)
    # As many rows as columns: A and B of one shape must not be taken for each other.
    options = {"r": 16, "target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}
    theirs = get_peft_model(base, PeftConfig(**options, modules_to_save=["embed_tokens"]))
    rule = {
        "adamw": (torch.optim.AdamW, {"loraplus_weight_decay": 0.1}),
        "adafactor": (
            StackAdafactor,
            {
                "loraplus_weight_decay": 0.1,
                "scale_parameter": False,
                "relative_step": False,
            },
        ),
    }[name]
    oracle = create_loraplus_optimizer(theirs, rule[0], lr=1e-2, loraplus_lr_ratio=16.0, **rule[1])
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    names = {
        n: n.replace("lora_A.default.weight", "lora_A").replace("lora_B.default.weight", "lora_B")
        for n in trained
    }

    class Ours(nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            return iter(copies.items())

    copies = {names[n]: Parameter(p.detach().clone()) for n, p in trained.items()}
    optimizer = build_optimizer(name, Ours(), weight_decay=0.1, loraplus_lr_ratio=16.0)
    rates = {g["lr"] for g in oracle.param_groups if g["params"]}
    assert rates == {1e-2, 1e-2 * 16.0}
    for step in range(1, 5):
        set_gradients(trained, step)
        optimizer.clear_gradients()
        set_gradients(copies, step)
        oracle.step()
        optimizer.step(1e-2)
    for n, parameter in trained.items():
        torch.testing.assert_close(copies[names[n]], parameter, rtol=2e-6, atol=2e-6)


def test_adamw_by_hand() -> None:
    weight = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdamW({"w": weight}, betas=(0.9, 0.99), eps=1.0, weight_decay=0.5)
    weight.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    optimizer.step(0.1)
    # Decay first: 1 · (1 - 0.1·0.5) = 0.95. At t = 1 both corrections undo (1 - β): m̂ = g, √v̂ =
    # |g|; with ε = 1 the step is 0.1 · 3/(3 + 1).
    first = [0.95 - 0.1 * 3 / 4, -1.9 + 0.1 * 4 / 5]
    torch.testing.assert_close(weight.detach(), torch.tensor(first, dtype=torch.float64))
    weight.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optimizer.step(0.1)
    # m = 0.9·0.3 + 0.1·1 = 0.37, m̂ = 0.37/0.19; v = 0.99·0.09 + 0.01 = 0.0991, v̂ = 0.0991/0.0199.
    # Second: m = 0.9·-0.4 = -0.36, v = 0.99·0.16 = 0.1584, for a gradient of 0 still moves it.
    second = [
        first[0] * 0.95 - 0.1 * (0.37 / 0.19) / (math.sqrt(0.0991 / 0.0199) + 1),
        first[1] * 0.95 + 0.1 * (0.36 / 0.19) / (math.sqrt(0.1584 / 0.0199) + 1),
    ]
    torch.testing.assert_close(weight.detach(), torch.tensor(second, dtype=torch.float64))


@pytest.mark.parametrize(("weight_decay", "block", "lone"), ways(14, 1))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_adafactor_equals_the_stack(
    dtype: torch.dtype, weight_decay: float, block: int, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 14 hold some rows of a matrix; of 1, a row each."""
    monkeypatch.setattr(flat, "_BLOCK_ELEMENTS_CPU", block)
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    ours, theirs = parameters(dtype), parameters(dtype)
    decayed = {"a.weight", "b.lora_A", "b.lora_B", "stack", "scalar", "c.lora_A", "d.lora_A"}
    optimizer = Adafactor(ours, weight_decay=weight_decay)
    oracle = StackAdafactor(
        [
            {"params": [theirs[n] for n in theirs if n in decayed], "weight_decay": weight_decay},
            {"params": [theirs[n] for n in theirs if n not in decayed], "weight_decay": 0.0},
        ],
        lr=1.0,
        scale_parameter=False,
        relative_step=False,
    )
    for step in range(1, 11):
        set_gradients(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 1e-2 / step
        oracle.step()
    train(optimizer, range(1, 11))
    for name, parameter in ours.items():
        torch.testing.assert_close(
            parameter, theirs[name], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
        )
    state = optimizer.state_tensors()
    for name, parameter in theirs.items():
        for kind in oracle.state[parameter].keys() & {f"exp_avg_sq{end}" for end in ENDINGS}:
            expected = oracle.state[parameter][kind]
            torch.testing.assert_close(state.pop(f"{name}.{kind}"), expected, rtol=1e-5, atol=0)
    assert state.keys() == {"steps"}


def test_adafactor_by_hand() -> None:
    matrix = Parameter(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    vector = Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = Adafactor({"m": matrix, "v": vector}, weight_decay=0.5, decayed={"m"})
    matrix.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    vector.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step(0.1)
    # t = 1: β₂ = 0, so R and C are the means of g²: R = (2.5, 12.5), C = (5, 10), mean(R) = 7.5.
    # v̂ = R⊗C/7.5 = [[5/3, 10/3], [25/3, 50/3]]; u = g/√v̂.
    update = [
        [1 / math.sqrt(5 / 3), 2 / math.sqrt(10 / 3)],
        [3 / math.sqrt(25 / 3), 4 / math.sqrt(50 / 3)],
    ]
    # u² = 0.6, 1.2, 1.08, 0.96: their mean is 0.96, so RMS(u) < 1 and nothing is clipped.
    expected = [[1 - 0.1 * 0.5 - 0.1 * u for u in row] for row in update]
    torch.testing.assert_close(matrix.detach(), torch.tensor(expected, dtype=torch.float64))
    # A vector has v̂ = g², so u = 1 and the step is the learning rate; its name is not decayed.
    after_one = torch.tensor([0.9, 0.9], dtype=torch.float64)
    torch.testing.assert_close(vector.detach(), after_one)
    vector.grad = torch.tensor([6.0, 0.0], dtype=torch.float64)
    matrix.grad = torch.zeros(2, 2, dtype=torch.float64)
    optimizer.step(0.1)
    # t = 2: β₂ = 1 - 2^-0.8 = 0.42565; v̂ = β₂·9 + (1-β₂)·36, u = 6/√v̂ = 1.2234, and 0.
    beta2 = 1 - 2**-0.8
    u = 6 / math.sqrt(beta2 * 9 + (1 - beta2) * 36)
    # RMS(u) = u/√2 = 0.865 < 1: not clipped.
    torch.testing.assert_close(
        vector.detach(), after_one - torch.tensor([0.1 * u, 0.0], dtype=torch.float64)
    )


def test_adafactor_clips_an_update_whose_root_mean_square_exceeds_1() -> None:
    vector = Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Adafactor({"v": vector})
    for gradient in ([1.0, 1.0], [100.0, 100.0]):
        before = vector.detach().clone()
        vector.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step(0.1)
    # At t = 2, v̂ = 0.426·1 + 0.574·10⁴ and u = 100/√5744 = 1.32 in both places: RMS 1.32, so u =
    # 1.
    torch.testing.assert_close(before - vector.detach(), torch.full((2,), 0.1, dtype=torch.float64))


def test_adafactor_keeps_rows_and_columns_for_matrices_and_all_of_a_vector() -> None:
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in Adafactor(parameters()).state_tensors().items()
        if name.startswith(("a.", "stack"))
    }
    assert shapes == {
        "a.weight.exp_avg_sq_row": (7,),
        "a.weight.exp_avg_sq_col": (5,),
        "a.bias.exp_avg_sq": (7,),
        "stack.exp_avg_sq_row": (2, 3),
        "stack.exp_avg_sq_col": (2, 4),
    }


OPTIMIZERS: dict[str, Callable[[dict[str, Parameter]], Optimizer]] = {
    "adamw": lambda named: AdamW(named, weight_decay=0.1),
    "adafactor": lambda named: Adafactor(named, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = OPTIMIZERS[name](parameters())
    train(whole, range(1, 11))

    first = OPTIMIZERS[name](parameters())
    train(first, range(1, 6))
    write_tensors(tmp_path / "optimizer.safetensors", first.state_tensors())
    resumed = OPTIMIZERS[name](
        {name: Parameter(p.detach().clone()) for name, p in first.parameters.items()}
    )
    with TensorFile(tmp_path / "optimizer.safetensors") as file:
        resumed.load_state({name: file.read(name) for name in file.names})
    assert resumed.steps == 5
    train(resumed, range(6, 11))

    assert resumed.steps == whole.steps == 10
    for parameter_name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[parameter_name], parameter)
    for key, tensor in whole.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[key], tensor), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_does_not_fit_is_refused_whole(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters())
    train(optimizer, range(1, 3))
    before = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    given = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    missing = next(key for key in given if key.startswith("a.weight"))
    wrong = next(key for key in given if key.startswith("a.bias"))
    del given[missing]
    given["z.exp_avg"] = torch.zeros(1)
    given[wrong] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        optimizer.load_state(given)
    assert f"{missing} is missing" in str(error.value)
    assert "z.exp_avg is unexpected" in str(error.value)
    assert f"{wrong} has shape [3], not [7]" in str(error.value)
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stops_the_step_before_it_begins(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters())
    set_gradients(optimizer.parameters, 1)
    optimizer.parameters["norm.weight"].grad = None
    before = {key: p.detach().clone() for key, p in optimizer.parameters.items()}
    with pytest.raises(ValueError, match=r"1 of 10 trained parameters: norm\.weight"):
        optimizer.step(0.1)
    assert optimizer.steps == 0
    assert all(torch.equal(p, before[key]) for key, p in optimizer.parameters.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision_parameters_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^w is torch\.\w+: trained parameters are kept in"):
        OPTIMIZERS[name]({"w": Parameter(torch.zeros(2, dtype=dtype))})


def test_a_gradient_that_is_not_contiguous() -> None:
    ours, theirs = (Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW({"w": ours})
    oracle = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    gradient = torch.arange(12, dtype=torch.float64).view(4, 3).T
    ours.grad, theirs.grad = gradient, gradient.clone()
    optimizer.step(0.1)
    oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lone", LONE)
@pytest.mark.parametrize("max_norm", [0.3, 1e9, 0.0, -1.0])
def test_clipping_equals_torch_after_the_loss_scale_is_divided_out(
    name: str, max_norm: float, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step does to gradients that are too long, and multiplied, is what torch does first."""
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    loss_scale = 65536.0
    ours, theirs = (OPTIMIZERS[name](parameters(torch.float64)) for _ in range(2))
    for step in (2, 4):
        set_gradients(ours.parameters, step)
        set_gradients(theirs.parameters, step)
        for parameter in ours.parameters.values():
            assert parameter.grad is not None
            parameter.grad.mul_(loss_scale)
        bound = max_norm if max_norm > 0 else math.inf
        expected = nn.utils.clip_grad_norm_(list(theirs.parameters.values()), bound)
        norm = ours.gradient_norm() / loss_scale
        assert norm == pytest.approx(expected.item(), rel=1e-13)
        ours.step(0.1, clip_factor(norm, max_norm) / loss_scale)
        theirs.step(0.1)
    for key, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter, theirs.parameters[key], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("lone", LONE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_a_norm_that_is_not(
    value: float, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    optimizer = AdamW(parameters())
    set_gradients(optimizer.parameters, 2)
    optimizer.parameters["a.bias"].grad[3] = value  # type: ignore[index]
    assert not math.isfinite(optimizer.gradient_norm())


def tiny(family: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    return Starcoder2ForCausalLM(Starcoder2Config(**sizes))


def decayed_by_the_stack(model: nn.Module) -> set[str]:
    # The method reads nothing of the Trainer that it belongs to.
    names = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    return set(names) & {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_decay_groups_are_those_of_the_stack(family: str) -> None:
    model = tiny(family)
    assert decayed_parameters(model) == decayed_by_the_stack(model)
    adapted = get_peft_model(model, PeftConfig(target_modules="all-linear", bias="all"))
    assert decayed_parameters(adapted) == decayed_by_the_stack(adapted)
    assert any("lora_A" in name for name in decayed_parameters(adapted))


def test_a_layer_norm_is_not_decayed_whatever_its_name() -> None:
    model = nn.ModuleDict({"ln_f": nn.LayerNorm(3), "head": nn.Linear(3, 3)})
    assert decayed_parameters(model) == decayed_by_the_stack(model) == {"head.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A", True),
        ("model.layers.0.self_attn.q_proj.lora_B", True),
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.norm.weight", False),
        ("norm.weight", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("block.RMSNorm.weight", False),
        ("normalizer.weight", True),  # `norm` counts as a whole part of the name only
    ],
)
def test_which_names_decay(name: str, expected: bool) -> None:
    assert decays(name) is expected


def test_build_optimizer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model["a"].weight.requires_grad_(False)
    for name, kind in (("adamw", AdamW), ("paged_adamw", AdamW), ("adafactor", Adafactor)):
        optimizer = build_optimizer(name, model, weight_decay=0.1)
        assert type(optimizer) is kind
        assert list(optimizer.parameters) == ["a.bias", "norm.weight", "norm.bias"]
    with pytest.raises(UserError, match=r"optimizer.name: 'adamv' .*; did you mean 'adamw'\?"):
        build_optimizer("adamv", model)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="has no trainable parameter"):
        build_optimizer("adamw", model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_alone_shrinks_what_is_decayed_and_nothing_else(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters(torch.float64))
    before = {key: p.detach().clone() for key, p in optimizer.parameters.items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for key, parameter in optimizer.parameters.items():
        factor = 1 - 0.5 * 0.1 if decays(key) else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor, rtol=1e-14, atol=0)
