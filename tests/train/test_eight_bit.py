"""AdamW with moments in 8 bits against bitsandbytes' optimizer, and what it keeps."""

import math
from typing import Any

import pytest
import torch
from bitsandbytes.backends.cpu import ops as of_cpu
from bitsandbytes.optim.adamw import AdamW8bit as TheirAdamW8bit
from small import adapted, small_model
from torch.nn import Parameter

from files.errors import UserError
from kernels.blockwise import dequantise_blocks, dynamic_map
from train.config.load import load_config
from train.optim import buffers as flat
from train.optim import build_optimizer, embeddings
from train.optim.adamw import AdamW
from train.optim.buffers import Sharing
from train.optim.eight_bit import AdamW8bit
from train.plan.decide import Machine, decide, decide_sharding

# Whole blocks and a tail, one that is small and one that lies alone; two of a shape.
SHAPES = {
    "a.weight": (64, 80),
    "b.weight": (64, 80),
    "c.weight": (65, 79),
    "d.bias": (4095,),
    "e.weight": (9, 1000),
    "f.bias": (),
}
KINDS = ("exp_avg", "exp_avg_sq")


def parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def set_gradients(tensors: dict[str, Parameter], step: int) -> None:
    for index, parameter in enumerate(tensors.values()):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)


def moments(optimizer: AdamW8bit, name: str) -> list[torch.Tensor]:
    """Return both moments of a parameter as the numbers they stand for, flat."""
    state = optimizer.state_tensors()
    found = []
    for kind in KINDS:
        kept = state[f"{name}.{kind}"].view(-1)
        if kept.dtype == torch.uint8:
            largest = state[f"{name}.{kind}_largest"]
            padded = torch.nn.functional.pad(kept, (0, -len(kept) % 256)).view(1, -1, 256)
            kept = dequantise_blocks(padded, largest.view(1, -1), len(kept), kind == "exp_avg")[0]
        found.append(kept)
    return found


@pytest.fixture
def _nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes' optimizer round to the nearest value.

    Its CPU kernel does so for fp64 alone, and for fp32 looks values up in a table that is too
    coarse for small ones (a v of 2e-7 of the largest becomes 1.5e-5 of it).
    """

    def to_nearest(x: Any, code: Any, largest: Any, out: Any, blocksize: int) -> None:
        indices, of_blocks = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, blocksize)
        out.copy_(indices)
        largest.copy_(of_blocks)

    monkeypatch.setattr(of_cpu, "_quant_blockwise_fp32_direct", to_nearest)


@pytest.mark.usefixtures("_nearest")
@pytest.mark.parametrize(("block", "lone"), [(1 << 20, 1 << 20), (600, 8000), (1, 0)])
def test_steps_are_those_of_bitsandbytes(
    block: int, lone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "_BLOCK_ELEMENTS_CPU", block)
    monkeypatch.setattr(flat, "LONE_ELEMENTS", lone)
    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = AdamW8bit(ours, **settings, weight_decay=0.1, decayed=list(ours))
    oracle = TheirAdamW8bit(theirs.values(), **settings, weight_decay=0.1)
    for step in range(1, 9):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        rate = 1e-2 / step
        oracle.param_groups[0]["lr"] = rate
        optimizer.step(rate)
        oracle.step()
        for name, parameter in ours.items():
            state = oracle.state[theirs[name]]
            assert (state["state1"].dtype == torch.uint8) == (parameter.numel() >= 4096)
            # Where a moment lies between two values but for a rounding of fp32, they may part,
            # and then the next update differs by the distance of the values.
            apart = (parameter - theirs[name]).abs() > 2e-6
            assert apart.sum() <= 2e-3 * parameter.numel(), (step, name)
            torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=0.1 * rate)
            if parameter.numel() < 4096:
                continue
            for kind, mine in zip((1, 2), KINDS, strict=True):
                kept = optimizer.state_tensors()[f"{name}.{mine}"]
                away = (kept.int() - state[f"state{kind}"].int()).abs()
                assert away.max() <= 1, (step, name, mine)
                assert away.count_nonzero() <= 2e-3 * parameter.numel(), (step, name, mine)
                torch.testing.assert_close(
                    optimizer.state_tensors()[f"{name}.{mine}_largest"],
                    state[f"absmax{kind}"],
                    rtol=1e-5,
                    atol=0,
                )


def test_the_first_step_is_adamw_s() -> None:
    """It begins at zero, and uses the moments before they are rounded."""
    ours, exact = parameters(), parameters()
    for tensors, kind in ((ours, AdamW8bit), (exact, AdamW)):
        set_gradients(tensors, 1)
        kind(tensors, weight_decay=0.1).step(1e-2, 0.5)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, exact[name], rtol=1e-6, atol=1e-7)


def test_moments_are_within_half_a_step_of_the_map() -> None:
    ours, exact = parameters(), parameters()
    optimizer, oracle = AdamW8bit(ours), AdamW(exact)
    for tensors, one in ((ours, optimizer), (exact, oracle)):
        set_gradients(tensors, 1)
        one.step(1e-2)
    name = "a.weight"
    for kind, found in zip(KINDS, moments(optimizer, name), strict=True):
        values = dynamic_map(kind == "exp_avg")
        wanted = oracle.state_tensors()[f"{name}.{kind}"].view(-1)
        largest = wanted.view(-1, 256).abs().amax(1).repeat_interleave(256)
        half = values.diff().max() / 2
        assert ((found - wanted).abs() <= half * largest * 1.001).all()


def test_small_parameters_and_embeddings_keep_fp32_moments() -> None:
    model = small_model("qwen2", vocab_size=512, hidden_size=128)
    tied = embeddings(model)
    assert tied == {"model.embed_tokens.weight"}
    state = build_optimizer("adamw_8bit", model).state_tensors()
    for name, parameter in model.named_parameters():
        eight = parameter.numel() >= 4096 and name not in tied
        assert state[f"{name}.exp_avg"].dtype == (torch.uint8 if eight else torch.float32)
        assert state[f"{name}.exp_avg"].shape == parameter.shape
        largest = state.get(f"{name}.exp_avg_sq_largest")
        assert (largest is not None) == eight
        assert largest is None or largest.shape == (math.ceil(parameter.numel() / 256),)


def test_a_state_that_is_saved_and_loaded_goes_on_bit_for_bit() -> None:
    whole, halves = parameters(), parameters()
    first = AdamW8bit(whole)
    for step in range(1, 5):
        set_gradients(whole, step)
        first.step(1e-2)
    second = AdamW8bit(halves)
    for step in range(1, 3):
        set_gradients(halves, step)
        second.step(1e-2)
    saved = {name: tensor.clone() for name, tensor in second.state_tensors().items()}
    third = AdamW8bit({name: Parameter(p.detach().clone()) for name, p in halves.items()})
    third.load_state(saved)
    for step in range(3, 5):
        set_gradients(third.parameters, step)
        third.step(1e-2)
    for name, parameter in whole.items():
        assert torch.equal(parameter, third.parameters[name])
    for name, tensor in first.state_tensors().items():
        assert torch.equal(tensor, third.state_tensors()[name])


def test_shared_rows_are_refused_and_never_chosen() -> None:
    full = {"train.method": "full", "optimizer.name": "adamw_8bit"}
    machine = Machine("cpu", 10)
    config = load_config(overrides={**full, "train.sharding": "shard"})
    with pytest.raises(UserError, match="blocks of 256 would be cut"):
        decide(config, machine)
    assert decide_sharding(load_config(overrides=full), 20, machine, 2) == "replicate"
    with pytest.raises(ValueError, match="shared rows would cut its blocks"):
        build_optimizer("adamw_8bit", adapted(), sharing=Sharing(lambda x: x, {}))
