"""Masters in bf16: the fp32 update of the rule, rounded by chance; its settings and its memory."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small import small_model
from torch import Tensor, nn
from torch.nn import Parameter

from files.errors import UserError
from files.strict_json import read_json_object
from kernels.stochastic_rounding import column_keys, round_to_bf16, row_keys
from models.config import parse_config
from models.configs import shipped_config
from train.config.load import load_config
from train.inputs.known import NO_DATA
from train.optim import buffers as flat
from train.optim import build_optimizer
from train.optim.buffers import Optimizer, Sharing
from train.plan.decide import Machine, decide
from train.plan.document import plan_document
from train.plan.ledger import memory_ledger

SHAPES = {"a.weight": (24, 40), "b.weight": (24, 40), "c.weight": (7, 3), "a.bias": (24,)}
NAMES = ("adamw", "adafactor")
SEED = 5


def drawn(step: int, size: float = 1.0) -> dict[str, Tensor]:
    """Return bf16 values of every parameter."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (size * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in SHAPES.items()
    }


def build(name: str, values: Mapping[str, Tensor], **given: Any) -> Optimizer:
    model = nn.ParameterDict({key.replace(".", "_"): Parameter(v) for key, v in values.items()})
    return build_optimizer(name, model, weight_decay=0.1, **given)


def set_gradients(optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        optimizer.parameters[name.replace(".", "_")].grad = gradient.clone()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("block", "lone"), [(1 << 20, 1 << 20), (100, 30), (1, 0)])
def test_an_update_is_the_fp32_one_rounded_by_the_rule(
    name: str, block: int, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step from the same weights, moments that went on in fp32, and gradients of bf16."""
    monkeypatch.setattr(flat, "_BLOCK_ELEMENTS_CPU", block)
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    optimizer = build(name, drawn(0), rounding_seed=SEED)
    exact = build(name, {key: value.float() for key, value in drawn(0).items()})
    for step in range(1, 6):
        gradients = drawn(step, 10.0 ** (step - 3))
        set_gradients(optimizer, gradients)
        set_gradients(exact, {key: value.float() for key, value in gradients.items()})
        with torch.no_grad():
            for key, parameter in exact.parameters.items():
                parameter.copy_(optimizer.parameters[key])
        assert optimizer.gradient_norm() == pytest.approx(exact.gradient_norm(), rel=1e-5)
        optimizer.step(1e-2, 0.7)
        exact.step(1e-2, 0.7)
        for key, parameter in exact.parameters.items():
            values = parameter.detach().view(len(parameter), -1)
            keys = (
                row_keys(SEED, step, key, 0, len(values), values.device),
                column_keys(key, values.shape[1], values.device),
            )
            found = optimizer.parameters[key].detach()
            wanted = round_to_bf16(values, *keys).view(parameter.shape)
            # The same but where fp32's own roundings decide: a few in 2^16.
            apart = found != wanted
            assert apart.sum() <= 0.005 * found.numel(), (step, key)
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-30)
        for key, tensor in exact.state_tensors().items():
            kept = optimizer.state_tensors()[key]
            assert kept.dtype == tensor.dtype
            torch.testing.assert_close(kept, tensor, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_updates_far_below_half_a_step_of_bf16_add_up(name: str) -> None:
    """200 steps of 1e-4 at weights of 1, where bf16 has steps of 2^-8 below and 2^-7 above."""
    weight = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    model = nn.ParameterDict({"w": weight})
    optimizer = build_optimizer(name, model, rounding_seed=SEED)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-4)
    lost = 1 - weight.detach().float()
    assert lost.mean().item() == pytest.approx(0.02, rel=0.05)


class Ranks:
    """A sum over two threads."""

    def __init__(self) -> None:
        self.given: dict[int, Tensor] = {}
        self.arrived, self.read = (threading.Barrier(2, timeout=60) for _ in range(2))

    def reduce(self, x: Tensor) -> Tensor:
        self.given[threading.get_ident()] = x
        self.arrived.wait()
        total = torch.stack([*self.given.values()]).sum(0)
        self.read.wait()
        return total


@pytest.mark.parametrize("name", NAMES)
def test_shared_rows_are_rounded_as_the_whole(name: str) -> None:
    def trained(rank: int | None, sharing: Sharing | None) -> dict[str, Tensor]:
        def part(x: Tensor) -> Tensor:
            return x if rank is None else x.tensor_split([-(-2 * len(x) // 3)])[rank]

        start = {key: part(value).clone() for key, value in drawn(0).items()}
        optimizer = build(name, start, rounding_seed=SEED, sharing=sharing)
        for step in range(1, 4):
            set_gradients(optimizer, {key: part(v) for key, v in drawn(step).items()})
            optimizer.step(1e-2)
        return {key: p.detach() for key, p in optimizer.parameters.items()}

    ranks, names = Ranks(), {key: key.replace(".", "_") for key in SHAPES}
    rows = {names[key]: shape[0] for key, shape in SHAPES.items()}
    begins = [dict.fromkeys(rows, 0), {key: -(-2 * n // 3) for key, n in rows.items()}]

    def half(rank: int) -> dict[str, Tensor]:
        return trained(rank, Sharing(ranks.reduce, rows, begins[rank]))

    whole = trained(None, None)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(half, range(2))
    for key, value in whole.items():
        found = torch.cat([first[key], second[key]])
        if name == "adamw":
            assert torch.equal(found, value)
        else:  # sums over rows, added up in another order
            assert (found != value).sum() <= 0.005 * value.numel()


def test_bf16_parameters_without_the_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds them by chance"):
        build("adamw", drawn(0))
    with pytest.raises(ValueError, match=r"a is torch\.float32"):
        build_optimizer(
            "adamw", nn.ParameterDict({"a": Parameter(torch.ones(2, 2))}), rounding_seed=1
        )
    cube = nn.ParameterDict({"a": Parameter(torch.ones(2, 2, 2, dtype=torch.bfloat16))})
    for name in NAMES:
        with pytest.raises(ValueError, match="rows and columns are needed"):
            build_optimizer(name, cube, rounding_seed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.method": "lora"}, "adapters are small and keep fp32 masters"),
        ({"train.precision": "fp32"}, "train.masters=bf16 with train.precision=fp32"),
        ({"train.precision": "fp16"}, "train.masters=bf16 with train.precision=fp16"),
        ({"optimizer.name": "adamw_8bit"}, "train.masters=bf16 with optimizer.name=adamw_8bit"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    usual = {"train.method": "full", "train.masters": "bf16", "train.precision": "bf16"}
    machine = Machine("cpu", None)
    decide(load_config(overrides=usual), machine)
    with pytest.raises(UserError, match=words):
        decide(load_config(overrides={**usual, **changes}), machine)


def test_starcoder2_15b_with_bf16_masters_and_adafactor_takes_64_gb() -> None:
    path = shipped_config("bigcode/starcoder2-15b")
    assert path is not None
    decoder = parse_config(read_json_object(path), str(path))
    config = load_config("starcoder2-15b", overrides={"train.masters": "bf16"})
    ledger = memory_ledger(config, decoder, device="cuda", policy="layers")
    parameters = 15_957_889_024
    assert ledger["weights"] == ledger["gradients"] == 2 * parameters
    assert sum(ledger[name] for name in ("weights", "gradients", "optimizer")) <= 64e9
    fp32 = load_config("starcoder2-15b")
    ledger = memory_ledger(fp32, decoder, device="cuda", policy="layers")
    assert ledger["gradients"] == 4 * parameters


@pytest.mark.parametrize(("accumulated", "said"), [(3, 1), (1, 0)])
def test_the_plan_says_that_sums_of_gradients_are_rounded(accumulated: int, said: int) -> None:
    config = load_config(
        overrides={
            "train.method": "full",
            "train.masters": "bf16",
            "train.gradient_accumulation_steps": accumulated,
        }
    )
    document = plan_document(config, NO_DATA, small_model("llama").config)
    words = f"those of {accumulated} micro-batches are added up in it"
    assert sum(words in warning for warning in document["warnings"]) == said


def test_gradients_and_weights_of_a_model_in_bf16_are_what_the_ledger_counts() -> None:
    model = small_model("llama", torch.bfloat16)
    config = load_config(overrides={"train.method": "full", "train.masters": "bf16"})
    ledger = memory_ledger(config, model.config, precision="bf16", device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.arange(16).view(1, 16)).float().sum().backward()
    tensors = list(model.parameters())
    assert ledger["weights"] == sum(p.nbytes for p in tensors)
    assert ledger["gradients"] == sum(p.grad.nbytes for p in tensors if p.grad is not None)
