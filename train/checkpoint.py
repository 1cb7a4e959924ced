"""Checkpoints: complete and verified, or not there.

A checkpoint is a folder `step-00000120` that holds the trained tensors
(`adapter_model.safetensors` or `model*.safetensors`), `optimizer.safetensors`, `state.json` and,
written last, `manifest.json` with the size and the sha256 of every file and of itself. It is
filled under a temporary name, synced to the disk and renamed: a name without a leading dot is a
complete checkpoint. Loading verifies every hash first.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from files.atomic import fsync_file, fsync_folder, sha256_file, write_json
from files.errors import UserError
from train.early_stopping import EarlyStopping

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

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state that `to_dict` gave."""
        return cls(**{**values, "stopping": EarlyStopping(**values["stopping"])})


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` anew: filled under a temporary name, synced, then put in place.

    A kill at any moment loses neither the old folder nor the new one: see `recover_folder`.
    """
    recover_folder(target)
    temporary, trash = _beside(target)
    for leftover in (temporary, trash):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for path in temporary.iterdir():
        fsync_file(path)
    fsync_folder(temporary)
    if target.exists():
        target.rename(trash)
    temporary.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put in place what a kill between the two renames of `replace_folder` left beside `target`.

    The old folder is renamed away only when the new one is whole, so the new one is taken.
    """
    temporary, trash = _beside(target)
    if target.exists() or not trash.is_dir():
        return
    (temporary if temporary.is_dir() else trash).rename(target)
    fsync_folder(target.parent)


def sweep(folder: Path) -> None:
    """Delete what a kill left half-written, or half-deleted, in a folder."""
    for prefix in (".tmp-", ".trash-"):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _beside(target: Path) -> tuple[Path, Path]:
    """Return where the new folder is filled, and where the old one waits to be deleted."""
    return target.parent / f".tmp-{target.name}", target.parent / f".trash-{target.name}"


def _manifest_hash(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and sha256 of every other file, and of this list itself."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / "manifest.json", {"files": files, "sha256": _manifest_hash(files)})


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, None where every file is what the manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _manifest_hash(files):
            return f"{folder}/manifest.json: its own sha256 does not match"
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{folder}: there is no manifest.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder}/manifest.json: not a manifest"
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if present != set(listed):
        differing = ", ".join(sorted(present ^ set(listed)))
        return f"{folder}: its files are not those of the manifest ({differing})"
    for name, (size, digest) in listed.items():
        path = folder / name
        if path.stat().st_size != size or sha256_file(path) != digest:
            return f"{path}: sha256 mismatch"
    return None


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
        state: TrainState,
        identity: dict[str, Any],
        write_tensors_into: Callable[[Path], None],
        expected_bytes: int,
    ) -> Path:
        """Write the checkpoint of `state.step`, then delete those beyond the limit.

        Args:
            state: The run's state.
            identity: What a resume is checked against: configuration, data, versions.
            write_tensors_into: Writes the trained tensors and the optimizer's into a folder.
            expected_bytes: Size of the checkpoint, compared with the free space before anything is
                written.

        Raises:
            UserError: The disk is full; the checkpoints there are untouched.
        """
        target = self.path(state.step)
        if target.exists() and damage(target) is None:
            return target
        newest = (
            f"the last good checkpoint is {self.path(self.steps()[-1])}"
            if self.steps()
            else "none is there"
        )

        def fill(folder: Path) -> None:
            write_tensors_into(folder)
            write_json(folder / "state.json", {"state": state.to_dict(), "identity": identity})
            write_manifest(folder)

        free = shutil.disk_usage(self.folder).free
        if free < expected_bytes:
            raise UserError(
                f"cannot save step {state.step}: it needs {expected_bytes / 1e9:.2f} GB and "
                f"{self.folder} has "
                f"{free / 1e9:.2f} GB free; {newest}; make room and continue with --resume"
            )
        try:
            replace_folder(target, fill)
        except OSError as error:
            shutil.rmtree(self.folder / f".tmp-{target.name}", ignore_errors=True)
            raise UserError(
                f"cannot save step {state.step} in {self.folder}: {error.strerror or error} (needs "
                f"{expected_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB were free); {newest}"
            ) from error
        self.rotate(state.stopping.best_step)
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
            shutil.rmtree(trash)

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
            say(f"{problem}; set aside as {aside.name}, falling back to an older checkpoint")
        return None


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Return the state and the identity that a verified checkpoint holds.

    Raises:
        UserError: state.json is of another version of Lathe.
    """
    try:
        document = json.loads((folder / "state.json").read_bytes())
        return TrainState.from_dict(document["state"]), document["identity"]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{folder}/state.json: not a state that this version can continue from ({error}); "
            "resume with the version of Lathe that wrote it (environment.json names it)"
        ) from error
