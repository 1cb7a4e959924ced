"""Segments: where rows stand, and which keys dropout draws from."""

import pytest
import torch

from kernels.segments import Segments


def test_documents_end_to_end():
    segments = Segments.build([3, 1, 2], device="cpu")
    assert segments.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert segments.positions.dtype == torch.int64
    assert segments.rows == (3, 1, 2)
    assert (segments.num_rows, segments.num_documents) == (6, 3)
    assert segments.dropout_rows is None
    assert segments.dropout_seed == 0


def test_padded_documents_take_equal_rows_and_pads_continue_counting():
    segments = Segments.build([3, 1], device="cpu", padded_length=4)
    assert segments.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert segments.lengths == (3, 1)
    assert segments.rows == (4, 4)
    assert segments.num_rows == 8


def test_offset_starts_positions_there():
    assert Segments.build([3], device="cpu", offset=5).positions.tolist() == [5, 6, 7]


def draws(**options):
    return Segments.build(**{"device": "cpu", "draw": (42, 5), **options})


def test_row_keys_belong_to_example_and_position_whatever_the_layout():
    together = draws(lengths=[3, 2], examples=[7, 11]).dropout_rows
    alone = [draws(lengths=[3], examples=[7]), draws(lengths=[2], examples=[11])]
    padded = draws(lengths=[3, 2], examples=[7, 11], padded_length=4).dropout_rows
    behind_cache = draws(lengths=[1], examples=[7], offset=2).dropout_rows
    assert together.dtype == torch.int32
    assert torch.equal(together, torch.cat([segments.dropout_rows for segments in alone]))
    assert torch.equal(padded[[0, 1, 2, 4, 5]], together)
    assert torch.equal(behind_cache, together[2:3])


@pytest.mark.parametrize(
    "change",
    [{"draw": (43, 5)}, {"draw": (42, 6)}, {"draw": (42 + 2**32, 5)}, {"examples": [8]}],
)
def test_every_part_of_the_key_matters(change):
    base = {"lengths": [64], "examples": [7]}
    ours, other = draws(**base), draws(**{**base, **change})
    assert not (ours.dropout_rows == other.dropout_rows).any()
    assert ours.dropout_seed != other.dropout_seed
    assert len(ours.dropout_rows.unique()) == 64


def test_a_large_example_index_and_seed_are_taken():
    segments = draws(lengths=[2], examples=[2**40], draw=(2**63, 2**33))
    assert segments.dropout_rows.shape == (2,)


def test_golden_keys():
    """Literal values: a change of the rule would silently change every run that is resumed."""
    segments = draws(lengths=[3, 2], examples=[7, 123456789])
    expected = [116311242, 1383410767, 817225236, 1616924822, 1113582855]
    assert segments.dropout_rows.tolist() == expected
    assert segments.dropout_seed == 1344897853


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one token"),
        ({"lengths": [2, 0]}, "at least one token"),
        ({"lengths": [5], "padded_length": 4}, "exceeds 4 rows"),
        ({"lengths": [5], "draw": (1, 1)}, "example index"),
        ({"lengths": [5], "draw": (1, 1), "examples": [1, 2]}, "example index"),
    ],
)
def test_bad_layouts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Segments.build(device="cpu", **options)
