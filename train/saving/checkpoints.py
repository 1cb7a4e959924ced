"""Checkpoints: complete and verified, or not there.

A checkpoint is a folder `step-00000120` that holds the trained tensors
(`adapter_model.safetensors` or `model*.safetensors`), `optimizer.safetensors`, `state.json` and
`manifest.json`. How it comes to be whole is told in `files/folders.py`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from files.atomic import write_json
from files.errors import UserError
from files.faults import faultpoint
from files.folders import damage, replace_folder, sweep
from files.strict_json import read_json_object
from train.state import TrainState
from train.text import size_text

STEP_FOLDER = re.compile(r"step-(\d{8})")


@contextlib.contextmanager
def room_on_disk(what: str, folder: Path, expected_bytes: int, remedy: str) -> Iterator[None]:
    """Check that there is room before something is written in the block, and name what failed.

    The message ends with `remedy`.

    Raises:
        UserError: There is no room, or the disk refuses.
    """
    free = shutil.disk_usage(folder).free
    sizes = f"it needs {size_text(expected_bytes)}, {folder} has {size_text(free)} free"
    if free < expected_bytes:
        raise UserError(f"cannot save {what}: {sizes}; {remedy}")
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot save {what}: {reason} ({sizes}); {remedy}") from error


class Checkpoints:
    """The checkpoints of one run: save, rotate, find."""

    def __init__(self, folder: Path, total_limit: int | None) -> None:
        """Sweep what an interrupted save left behind.

        Of more than `total_limit` the newest and the best are kept all the same; None keeps all.
        """
        self.folder = folder
        self.total_limit = total_limit
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint at `step`."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        names = (STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def save(
        self,
        state: Mapping[str, Any],  # `TrainState.to_dict()` of the step
        # What a resume is checked against: configuration, data, versions.
        identity: Mapping[str, Any],
        # Writes the trained tensors and the optimizer's into a folder, and returns the sha256 of
        # each file.
        write_tensors_into: Callable[[Path], Mapping[str, str]],
        # Size of the checkpoint, compared with the free space before anything is written.
        expected_bytes: int,
    ) -> Path:
        """Write the checkpoint of a state, then delete those beyond the limit.

        Raises:
            UserError: The disk is full; the checkpoints there are untouched.
        """
        step = state["step"]
        target = self.path(step)
        if target.exists() and damage(target) is None:
            return target

        def fill(folder: Path) -> Mapping[str, str]:
            hashes = write_tensors_into(folder)
            write_json(folder / "state.json", {"state": state, "identity": identity})
            return hashes

        steps = self.steps()
        good = f"the last good one is {self.path(steps[-1])}" if steps else "there is none yet"
        remedy = f"{good}; make room and continue with --resume"
        with room_on_disk(f"step {step}", self.folder, expected_bytes, remedy):
            replace_folder(target, fill, step=step)
        self.rotate(state["stopping"]["best_step"])
        return target

    def rotate(self, best_step: int | None) -> None:
        """Delete the oldest checkpoints beyond the limit, never the newest nor the best one."""
        steps = self.steps()
        if self.total_limit is None or not steps:
            return
        kept = {steps[-1], *({best_step} & set(steps))}
        for step in reversed(steps):
            if len(kept) >= self.total_limit:
                break
            kept.add(step)
        for step in set(steps) - kept:
            trash = self.folder / f".trash-{self.path(step).name}"
            self.path(step).rename(trash)
            faultpoint("rotation.renamed")
            shutil.rmtree(trash)
            faultpoint("rotation.deleted")

    def set_newer_aside(self, step: int) -> None:
        """Rename the checkpoints after `step`, from which the run goes on another time."""
        for newer in self.steps():
            if newer > step:
                set_aside(self.path(newer), "aside")

    def newest_verified(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint whose every hash matches; others are set aside and named."""
        for step in reversed(self.steps()):
            problem = damage(self.path(step))
            if problem is None:
                return self.path(step)
            aside = set_aside(self.path(step), "corrupt")
            say(f"{problem}; set aside as {aside.name}, looking for an older checkpoint")
        return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder to `WHY-NAME`, in the place of an earlier one of that name; return it."""
    aside = folder.with_name(f"{why}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Return the state and the identity that a verified checkpoint holds.

    Raises:
        UserError: state.json is damaged, or of another version of Lathe.
    """
    try:
        document = read_json_object(folder / "state.json")
        identity = document["identity"]
        if not isinstance(identity, dict):
            raise TypeError("identity is no object")
        return TrainState.from_dict(document["state"]), identity
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/state.json: not a state that this version can continue from ({error}); "
            "resume with the version of Lathe that wrote it (environment.json names it)"
        ) from error
