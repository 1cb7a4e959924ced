"""A process that computes on a CPU: freed memory is kept, or given back; oneDNN keeps little."""

import os
import subprocess
import sys

import pytest

from kernels.cpu import process

# Takes 128 MiB and frees it; prints the MiB that stay resident.
ALLOCATE = """
import sys

import torch

from benchmarks.record import resident_bytes
from kernels.cpu.process import prepare_process

if sys.argv[1] == "kept":
    prepare_process()
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
