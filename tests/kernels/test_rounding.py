"""Rounded sizes: the rule, and what a tail is. That it changes nothing: test_accumulation."""

import pytest
import torch

from kernels.cpu.rounding import document_multiple, row_multiple
from kernels.segments import Segments

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "multiple"), [(1, 64), (63, 64), (1023, 64), (1024, 128), (2047, 128), (2048, 256)]
)
def test_rows_in_bf16_on_a_cpu_are_rounded_to_an_eighth_of_a_power_of_two(
    rows: int, multiple: int
) -> None:
    assert row_multiple(rows, "cpu", BF16) == multiple


def test_at_most_an_eighth_is_wasted_and_few_sizes_are_left() -> None:
    rounded = {rows: rows + -rows % row_multiple(rows, "cpu", BF16) for rows in range(512, 8193)}
    assert all(rows <= size <= rows * 9 / 8 for rows, size in rounded.items())
    assert len(set(rounded.values())) == 4 * 8 + 1


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("mps", BF16)]
)
def test_nothing_else_is_rounded(device: str, dtype: torch.dtype) -> None:
    assert row_multiple(1000, device, dtype) == 1
    assert document_multiple(device, dtype) == 1


def test_rows_on_cuda_fill_their_last_tile() -> None:
    for dtype in (BF16, torch.float16, torch.float32):
        assert {row_multiple(rows, "cuda", dtype) for rows in (1, 1000, 24_571)} == {128}
        assert document_multiple("cuda", dtype) == 1


def test_a_tail_is_no_document() -> None:
    segments = Segments.build([3, 2], device="cpu", multiple=8, examples=[4, 5], draw=(42, 1))
    assert segments.rows == (3, 2)
    assert (segments.tail, segments.num_rows, segments.num_documents) == (3, 8, 2)
    assert len(segments.positions) == 8
    plain = Segments.build([3, 2], device="cpu", examples=[4, 5], draw=(42, 1))
    assert plain.tail == 0
    assert segments.positions[:5].equal(plain.positions)
    assert segments.dropout_rows is not None
    assert plain.dropout_rows is not None
    assert segments.dropout_rows[:5].equal(plain.dropout_rows)
    assert segments.dropout_seed == plain.dropout_seed
