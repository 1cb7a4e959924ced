"""Named moments at which a test may strike: kill the process, fill the disk, run out of memory.

What a run does to the disk, and when, passes these points by name. In a run of its own nothing
listens, and a point costs one comparison. A test that listens can end the process at each of them,
or raise there what the system would raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Every name that the code passes; a test checks that a run reaches each one.
FAULT_POINTS = frozenset(
    {
        "file.created",  # a temporary file is there, empty
        "file.written",  # its bytes are with the operating system
        "file.synced",  # and on the disk
        "file.renamed",  # it has its name
        "tensors.part",  # one more tensor of a file is written
        "folder.made",  # a temporary folder is there, empty
        "folder.filled",  # its files are written, its manifest is not
        "folder.manifested",  # its manifest is written
        "folder.synced",  # it is on the disk
        "folder.aside",  # the old folder is renamed away
        "folder.renamed",  # the new one has its name
        "folder.done",  # the old one is deleted
        "rotation.renamed",  # a checkpoint too many has a trash name
        "rotation.deleted",  # and is gone
        "metrics.written",  # a row of metrics is with the operating system
        "step.micro_batch",  # a micro-batch is about to be computed
        "step.gradient",  # the gradient is there, no weight is touched
        "step.updated",  # the weights are updated
        "step.recorded",  # and the step stands in the metrics
        "evaluation.done",  # the valid set is evaluated, nothing is recorded
        "save.copied",  # what is to be saved is copied, the writing begins
        "save.begun",  # the writer thread has begun
        "save.done",  # and ended
        "run.ends",  # the loop is over, `final/` is not written
        "run.final",  # it is, the status does not say so
    }
)

_listener: Callable[[str], None] | None = None


def faultpoint(name: str) -> None:
    """Pass the point `name`, which must be one of `FAULT_POINTS`."""
    if _listener is not None:
        _listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with the name of every point passed in this block, whatever the thread."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None
