"""A process that computes on a CPU: freed memory is kept, or given back; oneDNN keeps little."""

import os
import subprocess
import sys

import pytest

from kernels.cpu import process

# Takes 128 MiB and frees it, twice; prints the MiB that stay resident each time.
ALLOCATE = """
import os

import torch

from kernels.cpu.process import prepare_process


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


torch.ones(8)
before = resident()
torch.ones(2**25)
print(resident() - before)
prepare_process()
torch.ones(2**25)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_stays() -> None:
    command = [sys.executable, "-c", ALLOCATE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = map(float, done.stdout.split())
    assert given_back < 32
    assert kept > 96


def test_caches_of_onednn_are_bounded_unless_the_user_said_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    process.prepare_process()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
