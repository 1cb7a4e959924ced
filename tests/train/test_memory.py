"""Memory of a process on a CPU: what is in use, and what is freed: kept, or given back."""

import subprocess
import sys

import pytest
import torch

from train.memory import allocated_bytes

# Takes 128 MiB and frees it; prints the MiB that stay resident.
ALLOCATE = """
import sys

import torch

from benchmarks.record import resident_bytes
from train.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.ones(8)
before = resident_bytes()
torch.ones(2**25)
print((resident_bytes() - before) / 2**20)
"""


def stays(kept: str) -> float:
    command = [sys.executable, "-c", ALLOCATE, kept]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_stays() -> None:
    assert stays("given back") < 32
    assert stays("kept") > 96


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
