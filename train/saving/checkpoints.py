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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from files.atomic import write_json
from files.errors import UserError
from files.faults import faultpoint
from files.folders import damage, replace_folder, sweep
from files.strict_json import read_json_object
from train.early_stopping import EarlyStopping
from train.text import size_text

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass
class TrainState:
    """All that a run is, beside its weights and its optimizer: what a resume continues from.

    Attributes:
        step: Optimizer steps done.
        tokens: Real tokens trained on, padding left out.
        targets: Tokens with a label trained on.
        seconds: Wall time in steps, evaluation and saving left out.
        stopping: Best evaluation and patience.
        loss_since_eval: Sum of token losses since the last evaluation (nats).
        targets_since_eval: Targets that sum belongs to.
        scaler: State of the fp16 loss scaler, None without one.
        skipped: Steps without an update, over the whole run.
        non_finite_in_a_row: Latest steps in a row whose loss or gradient was not finite.
        resumed_from: Steps at which the run was taken up again.
        peak_memory_bytes: Highest memory use seen, over all of the run's processes.
        micro_batch_divisor: What the configured size of micro-batches is divided by, a power of
            two: more than 1 since memory once did not suffice.
        recent_losses: Losses of the latest updates, what a spike is measured against
            (`train.spikes`).
    """

    stopping: EarlyStopping
    step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    loss_since_eval: float = 0.0
    targets_since_eval: int = 0
    scaler: dict[str, Any] | None = None
    skipped: int = 0
    non_finite_in_a_row: int = 0
    resumed_from: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0
    micro_batch_divisor: int = 1
    recent_losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state that `to_dict` gave.

        Raises:
            TypeError: A field is missing, unknown, or of another type.
        """
        state = cls(**{**values, "stopping": EarlyStopping(**values["stopping"])})
        _check_types(state.stopping)
        _check_types(state)
        if state.micro_batch_divisor < 1:
            raise TypeError(f"micro_batch_divisor is {state.micro_batch_divisor}")
        return state


@contextlib.contextmanager
def room_on_disk(what: str, folder: Path, expected_bytes: int, remedy: str) -> Iterator[None]:
    """Check that there is room before something is written in the block, and name what failed.

    Args:
        what: What is to be saved, for the message.
        folder: Where it will lie.
        expected_bytes: Its size.
        remedy: What the message ends with.

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


# What a field of these annotations may hold in JSON.
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "list[int]": (list,),
    "list[float]": (list,),
    "dict[str, Any] | None": (dict, type(None)),
    "EarlyStopping": (EarlyStopping,),
}


def _check_types(state: TrainState | EarlyStopping) -> None:
    for one in fields(state):
        value = getattr(state, one.name)
        allowed = _JSON_TYPES[str(one.type)]
        items = value if isinstance(value, list) else []
        item_type = float if one.type == "list[float]" else int
        if not isinstance(value, allowed) or any(type(item) is not item_type for item in items):
            raise TypeError(f"{one.name} is {value!r:.60}")
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            raise TypeError(f"{one.name} is {value!r:.60}")


class Checkpoints:
    """The checkpoints of one run: save, rotate, find."""

    def __init__(self, folder: Path, total_limit: int | None) -> None:
        """Sweep what an interrupted save left behind.

        Args:
            folder: The run's `checkpoints/`.
            total_limit: Checkpoints to keep; the newest and the best are kept beside the limit.
                None keeps all.
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
        state: Mapping[str, Any],
        identity: Mapping[str, Any],
        write_tensors_into: Callable[[Path], Mapping[str, str]],
        expected_bytes: int,
    ) -> Path:
        """Write the checkpoint of a state, then delete those beyond the limit.

        Args:
            state: `TrainState.to_dict()` of the step.
            identity: What a resume is checked against: configuration, data, versions.
            write_tensors_into: Writes the trained tensors and the optimizer's into a folder, and
                returns the sha256 of each file.
            expected_bytes: Size of the checkpoint, compared with the free space before anything is
                written.

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
                aside = self.folder / f"aside-{self.path(newer).name}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(newer).rename(aside)

    def newest_verified(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint whose every hash matches; others are set aside and named."""
        for step in reversed(self.steps()):
            problem = damage(self.path(step))
            if problem is None:
                return self.path(step)
            aside = self.folder / f"corrupt-{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
            say(f"{problem}; set aside as {aside.name}, looking for an older checkpoint")
        return None


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
