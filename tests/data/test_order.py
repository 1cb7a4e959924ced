"""The order of an epoch against the stack's samplers."""

import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from data.order import epoch_order


def lengths_of(num_examples: int, seed: int = 0) -> np.ndarray:
    """Few different lengths, so that ties are common."""
    return np.random.default_rng(seed).integers(1, 40, num_examples)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_shuffle_is_randperm_of_seed_plus_epoch(epoch):
    order = epoch_order(1000, seed=42, epoch=epoch)
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(42 + epoch))
    assert order.dtype == np.int64
    assert order.tolist() == expected.tolist()


def test_literal_order():
    """Written down once (torch 2.13): a change of generator or formula shows even if both move."""
    first, second = [2, 6, 1, 8, 4, 5, 0, 9, 3, 7], [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]
    assert epoch_order(10, seed=42, epoch=0).tolist() == first
    assert epoch_order(10, seed=42, epoch=1).tolist() == second
    assert epoch_order(10, seed=43, epoch=0).tolist() == second


def test_equals_accelerate():
    sampler = SeedableRandomSampler(range(97), data_seed=42)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert epoch_order(97, seed=42, epoch=epoch).tolist() == list(sampler)


def test_without_shuffle_the_order_is_that_of_the_data():
    assert epoch_order(5, seed=42, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(0, seed=42, epoch=0).tolist() == []


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    epoch_order(100, seed=1, epoch=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("num_examples", "group_size"),
    [(12480, 8), (1000, 8), (1003, 16), (64, 16), (63, 16), (7, 16), (1, 4), (5, 1)],
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_length_groups_equal_transformers(num_examples, group_size, epoch):
    lengths = lengths_of(num_examples)
    ours = epoch_order(num_examples, seed=42, epoch=epoch, lengths=lengths, group_size=group_size)
    generator = torch.Generator().manual_seed(42 + epoch)
    theirs = get_length_grouped_indices(lengths.tolist(), group_size, generator=generator)
    assert ours.tolist() == theirs
    assert sorted(ours.tolist()) == list(range(num_examples))


def test_seed_000_has_32_chunks_of_400_and_a_last_one_of_80():
    """12,480 examples in groups of 8: k = min(12480 // 32, 50) = 50 groups, chunks of 400."""
    lengths = np.random.default_rng(1).permutation(12480)
    ordered = lengths[epoch_order(12480, seed=42, epoch=0, lengths=lengths, group_size=8)]
    assert ordered[0] == 12479
    # Heads are left out: two of them have changed places.
    tails = [ordered[start + 1 : start + 400] for start in range(0, 12480, 400)]
    assert [len(tail) for tail in tails] == [399] * 31 + [79]
    assert all((np.diff(tail) < 0).all() for tail in tails)
    assert all(after[0] > before[-1] for before, after in itertools.pairwise(tails))


def test_groups_begin_from_the_data_without_shuffle():
    lengths = np.array([1, 3, 2, 9])
    order = epoch_order(4, seed=0, epoch=0, shuffle=False, lengths=lengths, group_size=4)
    assert order.tolist() == [3, 1, 2, 0]


def test_lengths_need_a_group_size_and_one_length_for_each():
    with pytest.raises(ValueError, match="group_size"):
        epoch_order(4, seed=0, epoch=0, lengths=np.ones(4))
    with pytest.raises(ValueError, match="one length for each"):
        epoch_order(4, seed=0, epoch=0, lengths=np.ones(5), group_size=2)
