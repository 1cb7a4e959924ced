"""Which files of a data set's folder are of a split, as its README's `configs` say."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data.splits import canonical_split
from files.errors import UserError, listed
from files.hub import read_card


def files_of_card(
    folder: Path, names: Sequence[str], split: str | None, spec: str
) -> list[str] | None:
    """Return the files that the README's `configs` give to a split; None where it gives none.

    Args:
        folder: The data set.
        names: Its files of rows, as POSIX paths below it.
        split: The split to choose; None takes all.
        spec: What messages call the folder.

    Raises:
        UserError: There are several configurations and no default, or files are named that are not
            there.
    """
    card = folder / "README.md"
    configs = (read_card(card) if card.is_file() else {}).get("configs")
    configs = [
        config
        for config in (configs if isinstance(configs, list) else [])
        if isinstance(config, dict) and config.get("data_files")
    ]
    if not configs:
        return None
    chosen = next(
        (c for c in configs if c.get("default") is True or c.get("config_name") == "default"), None
    )
    if chosen is None and len(configs) > 1:
        files = [name for part in _patterns(configs[0], card).values() for name in part]
        raise UserError(
            f"{spec}: README.md names several configurations "
            f"({listed([str(config.get('config_name')) for config in configs])}); pass the files "
            f"of one, as in {os.path.join(glob.escape(spec), files[0])}"
        )
    patterns = _patterns(chosen or configs[0], card)
    wanted = {
        name
        for name in patterns
        if split in (None, name) or canonical_split(name) == canonical_split(split or "")
    }
    if split in wanted:
        wanted = {split}
    if not wanted:
        raise UserError(
            f"{spec}: README.md names no files of the split '{split}' (it has: "
            f"{listed(sorted(patterns))}); name the file, or leave the split out and use "
            "data.valid_fraction"
        )
    files: list[str] = []
    for pattern in (pattern for name in sorted(wanted) for pattern in patterns[name]):
        there = glob.glob(pattern, root_dir=folder, recursive=True)
        found = sorted({PurePosixPath(Path(name)).as_posix() for name in there} & {*names})
        if not found:
            raise UserError(
                f"{spec}: README.md gives the split '{split or 'train'}' the files '{pattern}', of "
                "which none is here; fetch them, or name the files to read"
            )
        files += found
    return list(dict.fromkeys(files))


def _patterns(config: Mapping[str, Any], card: Path) -> dict[str, list[str]]:
    """Return split → globs of one configuration of a README."""
    given = config["data_files"]
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("split"): entry.get("path") for entry in given}
    if not isinstance(given, dict):
        given = {"train": given}
    patterns = {
        split: [paths] if isinstance(paths, str) else paths for split, paths in given.items()
    }
    for split, paths in patterns.items():
        whole = isinstance(split, str) and isinstance(paths, list) and paths
        if not whole or not all(isinstance(path, str) for path in paths):
            raise UserError(
                f"{card}: its data_files are not understood (they are a path, or a list of split "
                "and path); name the files to read"
            )
    return patterns
