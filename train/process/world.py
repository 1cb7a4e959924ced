"""Which of how many processes this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from files.errors import UserError
from train.process.command import command


@dataclass(frozen=True)
class World:
    """The processes of one run: this one's `rank` among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Return the world that torchrun describes in the environment, one process without it.

        Raises:
            UserError: torchrun started more than one rank; training over ranks is not built.
        """
        size = int(environment.get("WORLD_SIZE", "1"))
        if size > 1:
            raise UserError(
                f"torchrun started {size} ranks: this version trains in one process; run it with "
                f"`{command()}` (`--plan --ranks N` plans for more)"
            )
        return cls()
