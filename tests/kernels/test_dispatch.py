"""The choice of a backend."""

import dataclasses

import pytest

from files.errors import UserError
from kernels import attention, linears, loss, reference
from kernels.dispatch import operations


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reference_is_what_there_is(backend):
    chosen = operations(backend, "cpu")
    assert chosen.name == "reference"
    for field in dataclasses.fields(chosen):
        if field.name != "name":
            homes = {"attention": attention, "linear_cross_entropy": loss, "linears": linears}
            home = homes.get(field.name, reference)
            assert getattr(chosen, field.name) is getattr(home, field.name)


def test_triton_says_what_to_use_instead():
    with pytest.raises(UserError, match=r"no Triton kernels for cuda; use train\.kernels=auto"):
        operations("triton", "cuda")


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match=r"'refrence'.*auto, reference, triton.*'reference'"):
        operations("refrence", "cpu")
