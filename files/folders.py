"""Folders that are whole and verified, or not there.

A folder is filled under a temporary name. `manifest.json`, with the size and the sha256 of every
file and of itself, is written last; all is synced to the disk and the folder is renamed. So a name
without a leading dot is a complete folder, and reading verifies every hash first.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from files.atomic import fsync_file, fsync_folder, sha256_file, write_text
from files.errors import UserError
from files.faults import faultpoint
from files.strict_json import read_json_object

MANIFEST = "manifest.json"
# What people read beside the files, and change: no manifest lists it, and it outlives its folder.
CARD = "README.md"


def replace_folder(
    target: Path, fill: Callable[[Path], Mapping[str, str]], *, step: int | None = None
) -> None:
    """Make the folder `target` anew: filled under a temporary name, synced, then put in place.

    A kill at any moment loses neither the old folder nor the new one: see `recover_folder`. An
    error leaves the old one, and nothing beside it.

    Args:
        target: The folder.
        fill: Writes the files into the folder it is given, and returns the sha256 of those whose
            hash it knows already; the others are read again.
        step: The step whose state the folder holds, for the manifest.
    """
    recover_folder(target)
    temporary, trash = _beside(target)
    for leftover in (temporary, trash):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        faultpoint("folder.made")
        hashes = fill(temporary)
        if (target / CARD).is_file():
            shutil.copyfile(target / CARD, temporary / CARD)
        faultpoint("folder.filled")
        _write_manifest(temporary, hashes, step)
        faultpoint("folder.manifested")
        for path in temporary.iterdir():
            fsync_file(path)
        fsync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    faultpoint("folder.synced")
    if target.exists():
        target.rename(trash)
        faultpoint("folder.aside")
    temporary.rename(target)
    faultpoint("folder.renamed")
    fsync_folder(target.parent)
    shutil.rmtree(trash, ignore_errors=True)
    faultpoint("folder.done")


def make_free_folder(parent: Path, name: str) -> Path:
    """Make `parent/NAME-<UTC time>` and return it; of two in the same second one ends in `-2`.

    Raises:
        UserError: It cannot be made.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (f"{name}-{stamp}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); choose another folder with "
                "train.output_dir"
            ) from None
        return folder
    raise AssertionError("numbers do not end")


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


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder, None where every file is what the manifest says."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder}: there is no {MANIFEST}"
    try:
        manifest = read_json_object(path)
        as_written = _text_of(manifest).encode()
        listed = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        own = manifest.pop("sha256")
    except UserError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{path}: not a manifest"
    if own != _hash_of(manifest) or as_written != path.read_bytes():
        return f"{path}: its own sha256 does not match"
    present = {file.name for file in folder.iterdir()} - {MANIFEST, CARD}
    if present != set(listed):
        differing = ", ".join(sorted(present ^ set(listed)))
        return f"{folder}: its files are not those of the manifest ({differing})"
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda name: _damage_of_file(folder / name, *listed[name]), listed)
        return next((problem for problem in problems if problem is not None), None)


def _damage_of_file(path: Path, size: int, digest: str) -> str | None:
    try:
        whole = path.stat().st_size == size and sha256_file(path) == digest
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if whole else f"{path}: sha256 mismatch"


def step_of(folder: Path) -> int | None:
    """Return the step that a verified folder's manifest names, None where it names none."""
    return read_json_object(folder / MANIFEST).get("step")


def _beside(target: Path) -> tuple[Path, Path]:
    """Return where the new folder is filled, and where the old one waits to be deleted."""
    return target.parent / f".tmp-{target.name}", target.parent / f".trash-{target.name}"


def _write_manifest(folder: Path, hashes: Mapping[str, str], step: int | None) -> None:
    manifest: dict[str, Any] = {
        "files": {
            path.name: {
                "size": path.stat().st_size,
                "sha256": hashes.get(path.name) or sha256_file(path),
            }
            for path in sorted(folder.iterdir())
            if path.name != CARD
        }
    }
    if step is not None:
        manifest["step"] = step
    write_text(folder / MANIFEST, _text_of({**manifest, "sha256": _hash_of(manifest)}))


def _text_of(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
