"""Memory of a process on a CPU: what is in use, not what is freed and kept; and as predicted."""

import gc
from collections.abc import Sequence

import pytest
import torch

from benchmarks.memory import CASES, measured_and_planned
from models.recompute import POLICIES
from train.process.memory import MemoryUse, allocated_bytes

told = pytest.mark.skipif(allocated_bytes() is None, reason="this libc does not tell memory")


@told
def test_what_is_allocated_is_counted_and_what_is_freed_is_not() -> None:
    before = allocated_bytes()
    block = torch.ones(2**24)
    with_block = allocated_bytes()
    del block
    after = allocated_bytes()
    assert before is not None
    assert with_block is not None
    assert after is not None
    assert 2**26 <= with_block - before < 2**26 + 2**20
    assert abs(after - before) < 2**20


@told
def test_what_an_earlier_run_left_does_not_hide_what_this_one_takes() -> None:
    """A run in the same process leaves circles; they are freed before, not in the midst of it."""
    circle: list[object] = [torch.ones(2**24)]
    circle.append(circle)
    gc.disable()
    try:
        del circle
        use = MemoryUse(torch.device("cpu"))
    finally:
        gc.enable()
    taken = torch.ones(2**22)
    gc.collect()
    use.observe()
    assert use.training is not None
    assert taken.nbytes <= use.training < taken.nbytes + 2**20


# --- what the plan predicts ---


# Every policy, and of each kind of model one. What the others add, which are slow tests, is in the
# ledgers of these, or in test_quantization.
QUICK = {
    "LoRA, fp32": ("none", "mlp"),
    "LoRA over nf4": ("norms",),
    "full, AdamW": ("layers", "offload"),
}


def check(case: str, policies: Sequence[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other by spinning, minutes beside other tests
    try:
        measured_and_planned(case, "none")  # libraries prepare their kernels
        for policy in policies:
            measured, ledger = measured_and_planned(case, policy)
            assert ledger["total"] == pytest.approx(measured, rel=0.1), (policy, ledger)
    finally:
        torch.set_num_threads(threads)


@told
@pytest.mark.parametrize("case", QUICK)
def test_the_peak_is_as_predicted(case: str) -> None:
    check(case, QUICK[case])


@told
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_as_predicted_under_every_policy(case: str) -> None:
    assert {one for policies in QUICK.values() for one in policies} == set(POLICIES)
    check(case, POLICIES)
