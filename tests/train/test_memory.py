"""Freed memory on a CPU: kept, or given back to the system."""

import subprocess
import sys

import pytest

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
