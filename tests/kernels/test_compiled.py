"""Every Triton kernel compiles for cards that are not here, and stays within what they offer."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interpreted import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
CARDS = ("sm_80", "sm_89", "sm_90")


def compiled(*arguments: str) -> Any:
    """Return what `tests.kernels.compiled` found, in a process that interprets nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", "--json", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launched() -> dict[str, Any]:
    """What steps launch, and the binaries of those few that have every kernel once."""
    return compiled("--launches", "--few")


def check(binaries: list[dict[str, Any]], card: str) -> None:
    """A product without tensor cores is a fault of its own."""
    assert not [binary for binary in binaries if binary["faults"]]
    # On its tensor cores, by the instruction that is the card's own where it has one.
    used = {binary["tensor_cores"] for binary in binaries if binary["products"]}
    assert "wgmma" in used if card == "sm_90" else used <= {"mma"}


@pytest.mark.parametrize("card", CARDS)
def test_kernels_are_within_the_limits_of_a_card(launched: dict[str, Any], card: str) -> None:
    there = [binary for binary in launched["binaries"] if binary["card"] == card]
    assert len(there) > 20
    check(there, card)


def test_between_them_the_cards_have_every_kernel(launched: dict[str, Any]) -> None:
    found = launched["binaries"]
    assert sorted({binary["kernel"] for binary in found}) == launched["kernels"]
    assert {binary["precision"] for binary in found} == {"bf16", "fp16"}


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_is_within_the_limits_of_a_card(card: str) -> None:
    binaries = compiled("--card", card)
    assert {binary["card"] for binary in binaries} == {card}
    assert {binary["precision"] for binary in binaries} == {"bf16", "fp16"}
    assert len(binaries) > 25
    check(binaries, card)
    made_once(binaries, 4)


def made_once(binaries: list[dict[str, Any]], at_least: int) -> None:
    found = [b for b in binaries if b["kernel"].startswith("activations.")]
    assert len(found) >= at_least
    for binary in found:
        assert binary["exponentials"] * binary["threads"] == binary["tile"], binary


def test_an_activation_is_made_once_an_element(launched: dict[str, Any]) -> None:
    """A chain between two products is easily made for the registers of either."""
    made_once(launched["binaries"], 4)


def test_no_kernel_is_left_out(launched: dict[str, Any]) -> None:
    assert launched["launched"] == launched["kernels"]


def test_contraction_is_not_left_to_the_version_of_triton(launched: dict[str, Any]) -> None:
    assert all(launched["contracted"])


def test_rows_never_compile_a_kernel_anew(launched: dict[str, Any]) -> None:
    by_rows = launched["by_rows"]
    assert list(by_rows) == ["24576", "24571", "24496", "2"]
    assert len(by_rows["24576"]) > 20
    for rows, keys in by_rows.items():
        assert keys == by_rows["24576"], rows


def test_adapters_in_fp32_are_left_to_the_plain_form(launched: dict[str, Any]) -> None:
    assert "norms._forward" in launched["in_fp32"]
    assert not [name for name in launched["in_fp32"] if name.startswith("adapters.")]


@pytest.mark.slow
def test_every_kernel_is_within_the_limits_at_the_sizes_of_all_presets() -> None:
    binaries = compiled("--all")
    assert len(binaries) > 500
    assert not [binary for binary in binaries if binary["faults"]]


def test_the_limits() -> None:
    from benchmarks.absent_card import CARDS, Binary

    good = Binary(
        registers=128,
        stack=16,
        spills=0,
        shared=99 * 1024,
        threads=512,
        products=True,
        tensor_cores="mma",
    )
    card = CARDS["sm_89"]
    assert good.faults(card, half=True) == []
    for change, told in (
        ({"stack": 17}, "a stack of 17 bytes a thread"),
        ({"spills": 1}, "1 loads and stores of local memory"),
        ({"shared": 99 * 1024 + 1}, "101377 bytes of shared memory, of 101376"),
        ({"registers": 129}, "129 registers in each of 512 threads"),
        ({"tensor_cores": None}, "products without tensor cores"),
    ):
        assert dataclasses.replace(good, **change).faults(card, half=True) == [told]
    assert dataclasses.replace(good, tensor_cores=None).faults(card, half=False) == []
    assert dataclasses.replace(good, shared=163 * 1024).faults(CARDS["sm_80"], half=True) == []
    assert dataclasses.replace(good, shared=227 * 1024).faults(CARDS["sm_90"], half=True) == []
