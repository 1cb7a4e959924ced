"""The choice of a backend."""

import dataclasses
import sys

import pytest
from interpreted import TRITON

import kernels.triton
from files.errors import UserError
from kernels import attention as anywhere
from kernels import linears, loss
from kernels import reference as plain
from kernels.cpu import attention
from kernels.dispatch import operations


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reference_is_what_there_is(backend):
    chosen = operations(backend, "cpu")
    assert chosen.name == "reference"
    for field in dataclasses.fields(chosen):
        if field.name == "name":
            continue
        if field.name in ("adamw_", "adafactor_"):  # the optimizers' own
            assert getattr(chosen, field.name) is None
            continue
        homes = {
            "attention": attention,
            "linear_cross_entropy": loss,
            "linears": linears,
            "linear_gelu": linears,
        }
        home = homes.get(field.name, plain)
        assert getattr(chosen, field.name) is getattr(home, field.name)


def test_attention_in_blocks_is_a_cpu_s_alone():
    gpu = operations("reference", "cuda")
    assert gpu.attention is anywhere.attention
    assert gpu == dataclasses.replace(operations("reference"), attention=anywhere.attention)


def test_triton_says_what_to_use_instead(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"run on CUDA, not on cpu; use train\.kernels=auto"):
        operations("triton", "cpu")
    monkeypatch.setitem(sys.modules, "kernels.triton.norms", None)
    monkeypatch.delattr(kernels.triton, "norms", raising=False)
    with pytest.raises(UserError, match=r"cannot be imported .* or use train\.kernels=auto"):
        operations("triton", "cuda")


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_triton_has_every_operation():
    chosen = operations("triton", "cuda")
    assert chosen.name == "triton"
    reference = operations("reference", "cuda")
    names = [field.name for field in dataclasses.fields(chosen)]
    same = {name for name in names if getattr(chosen, name) is getattr(reference, name)}
    assert same == {"attention"}


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match=r"'refrence'.*auto, reference, triton.*'reference'"):
        operations("refrence", "cpu")
