"""Mixtures of sources: shares to the example, and all of a source once before any of it twice."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.mixture import Mixture, largest_remainders
from data.order import epoch_order
from files.errors import UserError

# Rows of each source, and weights: a small one often, a large one seldom, one alone, equal ones.
CASES = [
    ((3, 20), (0.7, 0.3)),
    ((40, 7, 5), (1, 1, 2)),
    ((1, 9), (9, 1)),
    ((6,), (2.5,)),
    ((4, 4, 4), (1, 1, 1)),
]


def mixture(sizes: tuple[int, ...], weights: tuple[float, ...]) -> Mixture:
    """Return the mixture of sources whose rows make one example each."""
    return Mixture.of(loaded(sizes), [f"s{number}" for number in range(len(sizes))], weights)


def loaded(sizes: tuple[int, ...], kept: list[int] | None = None) -> Any:
    rows = np.arange(sum(sizes)) if kept is None else np.array(kept)

    class Loaded(SimpleNamespace):
        def __len__(self) -> int:
            return len(rows)

    lengths = 10 + rows % 7
    return Loaded(rows=rows, source_rows=sizes, lengths=lengths, num_targets=lengths - 1)


@pytest.mark.parametrize(
    ("total", "weights", "places"),
    [
        # The example of the Hare quota in textbooks on apportionment: 10 seats, 100,000 votes.
        (10, (47_000, 16_000, 15_800, 12_000, 6_100, 3_100), (5, 2, 1, 1, 1, 0)),
        (10, (0.7, 0.3), (7, 3)),
        (10, (70, 30), (7, 3)),
        (10, (1, 1, 1), (4, 3, 3)),
        (11, (1, 1, 1), (4, 4, 3)),
        (7, (0.5, 0.25, 0.25), (3, 2, 2)),
        (100, (0.001, 1.0), (0, 100)),
        # Equal remainders, of 1.5 and 8.5, by the decimals as they are written.
        (10, (0.15, 0.85), (2, 8)),
        (10**15 + 1, (0.1, 0.2, 0.7), (10**14, 2 * 10**14, 7 * 10**14 + 1)),
        (5, (1e300, 1e-300), (5, 0)),
        (0, (1, 2), (0, 0)),
    ],
)
def test_places_are_shared_out_by_largest_remainders(
    total: int, weights: tuple[float, ...], places: tuple[int, ...]
) -> None:
    assert largest_remainders(total, weights) == places


@pytest.mark.parametrize(("sizes", "weights"), CASES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_the_shares_to_the_example(
    sizes: tuple[int, ...], weights: tuple[float, ...], shuffle: bool
) -> None:
    mixed, total = mixture(sizes, weights), sum(sizes)
    for epoch in range(5):
        order = epoch_order(total, seed=3, epoch=epoch, shuffle=shuffle, mixture=mixed)
        assert order.dtype == np.int64 and len(order) == total
        for own, places, weight in zip(mixed.members, mixed.places, weights, strict=True):
            assert int(np.isin(order, own).sum()) == places
            share = total * Fraction(repr(weight)) / sum(Fraction(repr(w)) for w in weights)
            assert abs(places - share) < 1


@pytest.mark.parametrize(("sizes", "weights"), CASES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_all_of_a_source_comes_once_before_any_of_it_comes_twice(
    sizes: tuple[int, ...], weights: tuple[float, ...], shuffle: bool
) -> None:
    mixed = mixture(sizes, weights)
    epochs = [mixed.drawn(seed=5, epoch=epoch, shuffle=shuffle) for epoch in range(12)]
    starts = np.cumsum([0, *mixed.places])
    for source, own in enumerate(mixed.members):
        drawn = np.concatenate([one[starts[source] : starts[source + 1]] for one in epochs])
        rounds = [drawn[at : at + len(own)] for at in range(0, len(drawn), len(own))]
        assert all(sorted(one) == own.tolist() for one in rounds[:-1])
        assert len(set(rounds[-1].tolist())) == len(rounds[-1])
        if shuffle and len(own) > 5:
            assert len({tuple(one) for one in rounds[:-1]}) == len(rounds) - 1


def test_an_epoch_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order(23, seed=seed, epoch=epoch, mixture=mixture((3, 20), (7, 3))).tolist()

    state = torch.get_rng_state()
    first, later = order(1, 0), order(1, 4)
    assert order(1, 4) == later and order(1, 0) == first
    assert len({tuple(one) for one in (first, later, order(2, 0), order(1, 1))}) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_the_places_are_shuffled_as_without_a_mixture() -> None:
    mixed = mixture((6, 4), (1, 3))
    drawn = mixed.drawn(seed=42, epoch=1, shuffle=True)
    plain = torch.randperm(10, generator=torch.Generator().manual_seed(42 + 1))
    assert epoch_order(10, seed=42, epoch=1, mixture=mixed).tolist() == drawn[plain].tolist()


LITERAL = [[2, 1, 5, 9, 6, 8, 7, 6, 8, 9], [0, 3, 4, 7, 6, 9, 8, 7, 7, 6]]


def test_literal_draws() -> None:
    """Philox's words are numpy's promise (NEP 19): written down once, they stay."""
    mixed = mixture((6, 4), (1, 3))
    assert mixed.places == (3, 7)  # 2.5 and 7.5: of equal remainders the first has the place
    assert mixed.drawn(seed=42, epoch=0, shuffle=True).tolist() == LITERAL[0]
    assert mixed.drawn(seed=42, epoch=1, shuffle=True).tolist() == LITERAL[1]


def test_sources_of_one_size_are_permuted_each_in_its_own_way() -> None:
    drawn = mixture((50, 50), (1, 1)).drawn(seed=0, epoch=0, shuffle=True)
    assert drawn[:50].tolist() != (drawn[50:] - 50).tolist()


def test_without_shuffling_sources_keep_their_order_and_are_spread_evenly() -> None:
    mixed = mixture((2, 4), (1, 1))

    def order(epoch: int) -> list[int]:
        return epoch_order(6, seed=9, epoch=epoch, shuffle=False, mixture=mixed).tolist()

    assert order(0) == [0, 2, 1, 3, 0, 4]
    assert order(1) == [1, 5, 0, 2, 1, 3]  # goes on where the first epoch ended
    thrice = mixture((1, 3), (3, 1))
    assert epoch_order(4, seed=9, epoch=0, shuffle=False, mixture=thrice).tolist() == [0, 0, 1, 0]


def test_groups_of_like_length_hold_what_is_drawn() -> None:
    mixed = mixture((30, 70), (7, 3))
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    order = epoch_order(100, seed=1, epoch=2, lengths=lengths, group_size=4, mixture=mixed)
    assert sorted(order) == sorted(mixed.drawn(seed=1, epoch=2, shuffle=True))
    chunks = [lengths[order[at + 1 : at + 24]] for at in range(0, 100, 24)]  # heads change places
    assert all((np.diff(chunk) <= 0).all() for chunk in chunks)


def test_a_source_is_its_rows_whichever_of_them_are_left() -> None:
    """Rows 0 to 2, none, and 3 to 8: some are dropped, some make two examples."""
    examples = loaded((3, 0, 6), [0, 2, 2, 3, 5, 8, 8])
    with pytest.raises(UserError, match=r"data\.weights: b has no example to draw"):
        Mixture.of(examples, "abc", (1, 1, 1))
    mixed = Mixture.of(loaded((3, 6), [0, 2, 2, 3, 5, 8, 8]), "ac", (1, 1))
    assert [own.tolist() for own in mixed.members] == [[0, 1, 2], [3, 4, 5, 6]]


def test_a_source_without_a_place_is_refused() -> None:
    with pytest.raises(UserError, match=r"the weight 0\.01 gives s0 no place among the 10 examp"):
        mixture((5, 5), (0.01, 1))


def test_what_is_known_of_sources() -> None:
    examples = loaded((3, 6), [0, 2, 2, 3, 5, 8, 8])
    mixed = Mixture.of(examples, "ac", (5, 2))
    first, second = mixed.sources(examples)
    assert (first.name, first.weight, first.places) == ("a", 5, 5)
    assert (first.rows, first.examples, first.targets) == (2, 3, 9 + 11 + 11)
    assert (second.rows, second.examples, second.places) == (3, 4, 2)


def test_lengths_of_an_epoch_are_spread_over_those_of_each_source() -> None:
    lengths = np.array([5, 1, 3, 30, 10, 50, 20, 40])  # 1 3 5, and 10 20 30 40 50
    mixed = mixture((3, 5), (6, 2))
    assert mixed.lengths(lengths).tolist() == [1, 1, 3, 3, 5, 5, 20, 50]


def test_the_hash_tells_where_a_source_ends_and_what_its_share_is() -> None:
    one, other = mixture((3, 5), (1, 1)), mixture((4, 4), (1, 1))
    assert one.places == other.places
    shares = mixture((3, 5), (1, 3))
    assert len({m.fingerprint(of) for m in (one, other, shares) for of in "ab"}) == 6
