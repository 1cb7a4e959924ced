"""The order of an epoch's examples: a pure function of (seed, epoch), so it is never saved."""

from __future__ import annotations

import numpy as np

from data.mixture import Mixture

# Groups sorted together at most: enough to find like lengths, few enough to stay random.
_MAX_GROUPS_IN_CHUNK = 50


def epoch_order(
    num_examples: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    mixture: Mixture | None = None,
    lengths: np.ndarray | None = None,
    group_size: int | None = None,
) -> np.ndarray:
    """Return the indices 0 … num_examples - 1 in the order of an epoch.

    With `mixture` they are what that draws: some indices more than once, others not at all.

    With `lengths`, chunks of k groups of `group_size` are each sorted from long to short, where
    k = min(num_examples // (4 * group_size), 50), at least 1; then the longest example of all
    changes places with the very first, so that a lack of memory shows in the first step.

    Args:
        num_examples: How many examples there are.
        seed: The run's seed.
        epoch: 0-based.
        shuffle: False: begin from the order of the data.
        mixture: The sources of the examples, and the share of each; None: all examples once.
        lengths: (num_examples,) tokens of each example, to group by length.
        group_size: Examples of a step; needed with `lengths`.

    Returns:
        (num_examples,) int64.

    Raises:
        ValueError: `lengths` without `group_size`, or of another size.

    Source: the permutation is that of accelerate 1.15 `SeedableRandomSampler`; the groups are those
    of transformers 5.23 `get_length_grouped_indices`, drawn from (seed, epoch) alone.
    """
    if shuffle:
        import torch  # not above: who looks at rows alone does without

        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num_examples, generator=generator).numpy()
    else:
        order = np.arange(num_examples, dtype=np.int64) if mixture is None else mixture.spread()
    if mixture is not None:
        order = mixture.drawn(seed=seed, epoch=epoch, shuffle=shuffle)[order]
    if lengths is None or num_examples == 0:
        return order
    if group_size is None or len(lengths) != num_examples:
        raise ValueError("grouping by length needs group_size and one length for each example")
    groups_in_chunk = max(1, min(num_examples // (4 * group_size), _MAX_GROUPS_IN_CHUNK))
    chunk_size = groups_in_chunk * group_size
    chunks = [order[start : start + chunk_size] for start in range(0, num_examples, chunk_size)]
    grouped = np.concatenate(
        [chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks]
    )
    heads = np.arange(0, num_examples, chunk_size)
    longest = heads[np.argmax(lengths[grouped[heads]])]
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def balanced_shares(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return which of a step's examples each rank takes: as many as the others, of like length.

    Of 25 examples over 6 ranks one takes 5 and the others 4. The longest is given first, each to
    the rank with the fewest tokens that has room for one more. The order of the step is kept
    within a rank.

    Args:
        lengths: (n,) tokens of each example of the step.
        ranks: Among how many they are shared.

    Returns:
        For each rank the positions of its examples in the step, ascending.
    """
    share, rest = divmod(len(lengths), ranks)
    room = [share + (rank < rest) for rank in range(ranks)]
    tokens, mine = [0] * ranks, [[] for _ in range(ranks)]
    for position in np.argsort(-lengths, kind="stable").tolist():
        rank = min((r for r in range(ranks) if len(mine[r]) < room[r]), key=lambda r: tokens[r])
        tokens[rank] += int(lengths[position])
        mine[rank].append(position)
    return [np.array(sorted(positions), dtype=np.int64) for positions in mine]
