"""One process trains; torchrun with more is refused until it is built."""

import pytest

from files.errors import UserError
from train.process.world import World


def test_one_process_without_torchrun_and_with_one_rank() -> None:
    assert World.from_environment({}) == World(0, 1)
    assert World.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == World(0, 1)


def test_more_ranks_are_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="torchrun started 4 ranks"):
        World.from_environment({"WORLD_SIZE": "4", "RANK": "2"})
