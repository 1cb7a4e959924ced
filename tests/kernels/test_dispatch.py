"""The choice of a backend."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from interpreted import TRITON

import kernels.triton
from files.errors import UserError
from kernels import attention as anywhere
from kernels import linears, loss, quantised
from kernels import reference as plain
from kernels.cpu import attention
from kernels.dispatch import operations
from kernels.triton import launch


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
            "dequantise": quantised,
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


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_auto_takes_triton_on_a_card_that_no_record_tells_of(monkeypatch):
    # Nothing is known of a card that is not there: a plan for one counts with a new one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operations("auto", "cuda").name == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "reference")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, is_=capability: is_)
        assert operations("auto", "cuda").name == expected
        assert operations("reference", "cuda").name == "reference"
    assert operations("auto", "mps").name == "reference"


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_records_of_a_card_decide_what_auto_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for entry, expected in (
        ({"launch": {}}, "triton"),  # tuned, and not compared yet
        ({"gains": []}, "reference"),
        ({"gains": ["swiglu"]}, "reference, triton's swiglu"),
    ):
        monkeypatch.setattr(launch, "entries", lambda entry=entry: {"sm_80": entry})
        assert operations("auto", "cuda").name == expected


def test_auto_is_the_reference_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert operations("auto", "cuda").name == "reference"


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match=r"'refrence'.*auto, reference, triton.*'reference'"):
        operations("refrence", "cpu")
