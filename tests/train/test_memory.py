"""Freed memory on a CPU: kept, or given back and faulted in again each time."""

import subprocess
import sys

import pytest

# Takes 128 MiB and frees it, ten times; prints the page faults of the last five.
ALLOCATE = """
import resource
import sys

import torch

from train.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for number in range(10):
    if number == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> int:
    command = [sys.executable, "-c", ALLOCATE, kept]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_not_faulted_in_again() -> None:
    pages = 5 * 2**25 * 4 // 4096
    assert faults("given back") > pages / 2
    assert faults("kept") < pages / 100
