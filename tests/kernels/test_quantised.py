"""Quantised weights against bitsandbytes' CPU back end: the same bytes, and the same numbers."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import quantised as module
from kernels.quantised import (
    QuantisedWeight,
    dequantise,
    quantised,
    quantised_shapes,
    scales,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd counts, blocks that are not full, fewer numbers than one block, rows across blocks; the last
# have more blocks of absmax than one, and more numbers than are made at a time.
SHAPES = ((64, 48), (300, 70), (7, 9), (1, 3), (5, 13), (3, 128), (700, 400))


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Return bitsandbytes.functional."""
    pytest.importorskip("bitsandbytes")
    return importlib.import_module("bitsandbytes.functional")


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.randn(shape, generator=generator)
    # Blocks of very different sizes, so that their absmax are spread.
    return (wide * torch.rand(shape[0], 1, generator=generator).pow(4)).to(dtype)


def told(oracle: Any, packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the numbers that bitsandbytes' bytes stand for, by its own tables.

    Its kernel for CPUs with AVX-512 takes other blocks' absmax where a row is a multiple of 16 and
    not of 64; elsewhere it must say the same.
    """
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1).long()
    absmax = oracle.dequantize_blockwise(state.absmax, state.state2) + state.offset
    count = state.shape.numel()
    values = (state.code[codes] * absmax.repeat_interleave(64)[: len(codes)])[:count]
    values = values.view(state.shape).to(state.dtype)
    if state.shape[-1] % 64 == 0:
        assert torch.equal(values, oracle.dequantize_4bit(packed, state))
    return values


def weight_of(value: torch.Tensor, kind: str) -> QuantisedWeight:
    return QuantisedWeight(
        kind, tuple(value.shape), value.dtype, quantised(value, kind), dequantise
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_has_the_bytes_of_bitsandbytes(
    oracle: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    value = drawn(shape, dtype)
    packed, state = oracle.quantize_4bit(
        value, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = weight_of(value, "nf4")
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.nested_absmax is not None
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert ours.nested_offset == state.offset
    for wanted in DTYPES:
        state.dtype = wanted
        assert torch.equal(dequantise(ours, wanted), told(oracle, packed, state))


def test_absmax_that_are_not_quantised_again_are_bitsandbytes_s(oracle: ModuleType) -> None:
    value = drawn((300, 128))
    packed, state = oracle.quantize_4bit(value, blocksize=64, quant_type="nf4")
    parts = {"packed": packed.view(-1), "absmax": state.absmax}
    weight = QuantisedWeight("nf4", (300, 128), torch.float32, parts, dequantise)
    assert scales(weight) is weight.absmax
    assert torch.equal(weight.dense(torch.float32), oracle.dequantize_4bit(packed, state))


def test_a_block_of_zeros_is_zeros_again(oracle: ModuleType) -> None:
    value = drawn((4, 80))
    value.view(-1)[64:128] = 0
    packed, state = oracle.quantize_4bit(
        value, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = weight_of(value, "nf4")
    assert torch.equal(ours.packed, packed.view(-1))
    assert (ours.packed[32:64] == 0x77).all()
    assert torch.equal(dequantise(ours, torch.float32), told(oracle, packed, state))
    assert dequantise(weight_of(torch.zeros(4, 80), "nf4"), torch.float32).abs().max() == 0


def test_a_tie_goes_down(oracle: ModuleType) -> None:
    table = module.nf4_map()
    value = torch.cat(((table[:-1] + table[1:]) / 2, torch.ones(49)))[None]
    ours = weight_of(value, "nf4")
    codes = torch.stack((ours.packed >> 4, ours.packed & 15), 1).view(-1)
    assert codes[:15].tolist() == list(range(15))
    packed, _ = oracle.quantize_4bit(value, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_has_the_bytes_of_bitsandbytes(
    oracle: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    value = drawn(shape, dtype)
    packed, absmax, _ = oracle.int8_vectorwise_quant(value.half())  # as its Int8Params do
    ours = weight_of(value, "int8")
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, absmax)
    exact = oracle.int8_vectorwise_dequant(packed, absmax)
    for wanted in DTYPES:
        assert torch.equal(dequantise(ours, wanted), exact.to(wanted))


def test_a_row_of_zeros_in_int8_is_zeros_again() -> None:
    value = drawn((4, 80))
    value[2] = 0
    ours = dequantise(weight_of(value, "int8"), torch.float32)
    assert ours[2].abs().max() == 0
    assert (ours - value).abs().max() <= value.abs().max() / 127


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.516), ("int8", 1.004)])
def test_bytes_of_a_number(kind: str, most: float) -> None:
    weight = weight_of(drawn((1024, 1024)), kind)
    assert weight.nbytes() / 2**20 <= most
    shapes = quantised_shapes((1024, 1024), kind)
    parts = dict(weight.named_buffers())
    assert shapes == {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}


def test_numbers_are_made_in_fp32_and_rounded_once() -> None:
    weight = weight_of(drawn((300, 70)), "nf4")
    exact = weight.dense(torch.float32)
    assert torch.equal(weight.dense(torch.bfloat16), exact.bfloat16())
    assert torch.equal(weight.dense(torch.float64), exact.double())


@pytest.mark.parametrize("kind", module.KINDS)
def test_pieces_do_not_change_the_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = drawn((37, 129))
    whole = weight_of(value, kind)
    dense = whole.dense(torch.float32)
    monkeypatch.setattr(module, "_piece", lambda _: 256)
    pieces = weight_of(value, kind)
    for one, other in zip(whole.buffers(), pieces.buffers(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pieces.dense(torch.float32), dense)


def test_a_model_that_is_turned_into_another_type_leaves_the_parts_as_they_are() -> None:
    holder = torch.nn.Module()
    holder.weight = weight_of(drawn((8, 64)), "nf4")
    kinds = [part.dtype for part in holder.buffers()]
    holder.to(torch.bfloat16)
    assert [part.dtype for part in holder.buffers()] == kinds
    holder.to("meta")
    assert all(part.is_meta for part in holder.buffers())
    assert holder.weight.dense(torch.float32).is_meta
