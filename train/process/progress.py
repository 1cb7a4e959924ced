"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from files.errors import counted

# What a log that is followed bears, and what says that nothing hangs.
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(total: int, noun: str) -> Iterator[Callable[[int], None]]:
    """Yield what is to be told how many of the `total` are done, and says so on standard error."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit=f" {noun}s", leave=False) as bar:

            def advance(done: int) -> None:
                bar.update(done - bar.n)

            yield advance
        return
    said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{done:,} of {counted(total, noun)} done", file=sys.stderr, flush=True)

    yield tell
