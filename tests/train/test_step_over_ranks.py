"""One batch over any number of ranks: one loss and one gradient.

The ranks are threads here, which add up in shared memory: the arithmetic of a step is what is
tested, and that all ranks decide alike. Real processes and gloo: tests/reliability/test_ranks.py.

In fp64 two orders of summation of n terms differ by about n·2⁻⁵³ relative at most, and by about
√n·2⁻⁵³ as a rule: below 1e-15 for sums of 25 examples' losses and gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from small import RaggedExamples, adapted, small_model
from steps import FP32, batching, gradient_step
from torch import Tensor

from data.batch import MicroBatch, micro_batches
from data.order import balanced_shares
from files.faults import listening
from models.layers import CausalLM
from train import step
from train.evaluate import evaluate
from train.plan.steps import rank_shares
from train.precision import LossScaler
from train.process.world import World
from train.state import StepResult

# 25 examples, as the seed of StarCoder2-15B has them.
LENGTHS = "3 40 7 22 15 2 31 9 17 5 48 12 26 8 33 4 19 28 11 6 37 14 23 10 44"
EXAMPLES = RaggedExamples([int(length) for length in LENGTHS.split()])
BATCHING = batching(2)


class Together:
    """What the threads meet at: a sum in the order of the ranks, the same for all."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def sum_(self, rank: int, x: Tensor) -> None:
        self.parts[rank] = x.clone()
        self.barrier.wait()
        total = torch.zeros_like(x)
        for part in self.parts:
            assert part.shape == x.shape, "collectives have the same shape on every rank"
            total += part
        self.barrier.wait()
        x.copy_(total)


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    together: Together = dataclasses.field(default_factory=lambda: Together(1))

    def sum_(self, x: Tensor) -> Tensor:
        self.together.sum_(self.rank, x)
        return x


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Return what each rank's thread returns."""
    together = Together(size)
    with ThreadPoolExecutor(size) as threads:
        worlds = [ThreadWorld(rank, size, together=together) for rank in range(size)]
        return list(threads.map(work, worlds))


def model_of(method: str, dropout: float) -> CausalLM:
    rates = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), dropout)
    if method == "lora":
        return adapted(dropout, **rates)
    return small_model("starcoder2", torch.float64, **rates).requires_grad_(True)


def share_of(world: World, indices: list[int]) -> list[MicroBatch]:
    if world.size > 1:
        mine = balanced_shares(EXAMPLES.lengths[indices], world.size)[world.rank]
        indices = [indices[number] for number in mine]
    return micro_batches(EXAMPLES, indices, BATCHING)


def one_step(
    world: World,
    method: str = "lora",
    dropout: float = 0.0,
    examples: int = 25,
    scaler: LossScaler | None = None,
) -> tuple[StepResult, dict[str, Tensor]]:
    batch = share_of(world, list(range(examples)))
    model = model_of(method, dropout)
    return gradient_step(model, batch, max_grad_norm=0.5, scaler=scaler, world=world)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_batch_has_one_loss_and_one_gradient_over_any_number_of_ranks(
    method: str, dropout: float
) -> None:
    alone, gradient = one_step(World(), method, dropout)
    whole = torch.cat([g.flatten() for g in gradient.values()]).norm()
    for size in (2, 3, 6):
        ranks = on_ranks(size, lambda world: one_step(world, method, dropout))
        for result, other in ranks:
            assert result.loss == pytest.approx(alone.loss, rel=1e-15)
            assert result.grad_norm == pytest.approx(alone.grad_norm, rel=1e-15)
            assert (result.targets, result.tokens) == (alone.targets, alone.tokens)
            difference = torch.cat([(g - other[n]).flatten() for n, g in gradient.items()]).norm()
            assert difference <= 1e-15 * whole
        first = ranks[0][1]
        assert all(torch.equal(other[n], g) for _, other in ranks for n, g in first.items())


def test_a_rank_without_examples_takes_part() -> None:
    alone, gradient = one_step(World(), examples=2)
    for result, other in on_ranks(3, lambda world: one_step(world, examples=2)):
        assert result.loss == pytest.approx(alone.loss, rel=1e-15)
        for name, expected in gradient.items():
            torch.testing.assert_close(other[name], expected, rtol=1e-13, atol=1e-16)


def test_shares_are_as_many_examples_as_the_plan_says_and_like_in_tokens() -> None:
    for ranks in (1, 2, 3, 4, 6, 30):
        shares = balanced_shares(EXAMPLES.lengths, ranks)
        assert [len(share) for share in shares] == list(rank_shares(25, ranks))
        assert sorted(np.concatenate(shares)) == list(range(25))
        assert all((np.diff(share) > 0).all() for share in shares)
    tokens = [EXAMPLES.lengths[share].sum() for share in balanced_shares(EXAMPLES.lengths, 6)]
    plain = [part.sum() for part in np.array_split(EXAMPLES.lengths, 6)]
    assert max(tokens) - min(tokens) <= 10 < max(plain) - min(plain)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = step.loss_sum

    def loss_sum(model: CausalLM, micro_batch: MicroBatch, *rest: Any) -> Tensor:
        loss = honest(model, micro_batch, *rest)
        return loss * torch.nan if 7 in micro_batch.examples else loss

    monkeypatch.setattr(step, "loss_sum", loss_sum)
    for size in (1, 2, 6):
        ranks = on_ranks(size, one_step)
        assert {result.skipped for result, _ in ranks} == {"non-finite"}
        assert not any(seen for _, seen in ranks)
        at_fault = [result.examples for result, _ in ranks if result.examples]
        assert len(at_fault) == 1, "the other ranks' examples are not at fault"
        assert 7 in at_fault[0]


def test_memory_that_does_not_suffice_on_one_rank_stops_the_step_on_all() -> None:
    passed = itertools.count()

    def fault(name: str) -> None:
        if name == "step.micro_batch" and next(passed) == 4:
            raise torch.OutOfMemoryError("out of memory")

    with listening(fault):
        ranks = on_ranks(3, one_step)
    assert {result.skipped for result, _ in ranks} == {"out of memory"}
    assert not any(seen for _, seen in ranks)


def test_an_overflow_on_one_rank_halves_the_scale_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Example 7's loss overflows once the scale is above 2^14."""
    scalers = [LossScaler() for _ in range(3)]

    def work(world: World) -> tuple[StepResult, dict[str, Tensor]]:
        return one_step(world, scaler=scalers[world.rank])

    honest = step.loss_sum

    def loss_sum(
        model: CausalLM, part: MicroBatch, device: Any, draw: Any, scale: float, *rest: float
    ) -> Tensor:
        loss = honest(model, part, device, draw, scale, *rest)
        targets = sum(EXAMPLES.num_targets)
        return loss * torch.inf if 7 in part.examples and scale * targets > 2**14 else loss

    monkeypatch.setattr(step, "loss_sum", loss_sum)
    alone = one_step(World())[0]
    for result, _ in on_ranks(3, work):
        assert result.skipped is None
        assert result.loss == pytest.approx(alone.loss, rel=1e-14)
    assert {scaler.scale for scaler in scalers} == {2.0**14}


def test_an_evaluation_over_ranks_is_the_token_mean_of_the_whole_set() -> None:
    model = model_of("lora", 0.0)
    alone = evaluate(model, EXAMPLES, BATCHING, FP32)
    for size in (2, 3, 30):
        for result in on_ranks(
            size, lambda world: evaluate(model, EXAMPLES, BATCHING, FP32, world)
        ):
            assert result.loss == pytest.approx(alone.loss, rel=1e-14)
            assert result.targets == alone.targets
            assert result.reduced_batch_size is None
