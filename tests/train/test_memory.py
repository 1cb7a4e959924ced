"""Memory of a process on a CPU: what is in use, not what is freed and kept."""

import pytest
import torch

from train.memory import allocated_bytes


@pytest.mark.skipif(allocated_bytes() is None, reason="this libc does not tell what is allocated")
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
