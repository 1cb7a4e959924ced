"""What the names of data files say: of which configuration they are, and of which split.

As on the Hub, a folder is a configuration, and words in a name (`train-00000-of-00002.parquet`,
`test.jsonl`) tell the split. Everything here is names alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from data.packed import ending_of
from files.errors import UserError, counted, did_you_mean, listed, note

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "test": "test",
    "testing": "test",
}
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+.*")


def configurations(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the data set's configurations: folder → files. `data` and folders of a split are none.

    The files that lie in no such folder are the configuration `default`.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        folders = [
            part
            for part in PurePosixPath(name).parts[:-1]
            if part != "data" and part not in SPLIT_NAMES
        ]
        found.setdefault("/".join(folders) or "default", []).append(name)
    return found


def files_of_config(
    names: Sequence[str], config: str, spec: str, example: Callable[[str], str]
) -> list[str]:
    """Return the files of a configuration; `example` says how another one is asked for."""
    found = configurations(names)
    if not config and len(found) == 1:
        return next(iter(found.values()))
    if (config or "default") in found:
        return found[config or "default"]
    there = listed(sorted(found))
    if not config:
        raise UserError(
            f"{spec}: has several configurations ({there}); name one, as in "
            f"{example(sorted(found)[0])}"
        )
    raise UserError(
        f"{spec}: has no configuration '{config}' (it has: {there}){did_you_mean(config, found)}"
    )


def split_labels(name: str) -> tuple[str, set[str]]:
    """Return what a file's name says of its split: its own words, and the splits they mean.

    `python/train_sft-00000-of-00003.parquet` → `("train_sft", {"train"})`.
    """
    path = PurePosixPath(name)
    label = _SHARD_NUMBER.sub("", path.name[: len(path.name) - len(ending_of(name))])
    words = [*re.split(r"[^a-z0-9]+", label.lower()), *(part.lower() for part in path.parts[:-1])]
    return label, {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}


def note_left_out(names: Sequence[str], split: str, spec: str) -> None:
    """Tell which files a split does not have, if any."""
    if names:
        note(
            f"{spec}: {counted(len(names), 'data file')} left out of the split '{split}' by name, "
            f"such as {names[0]}; to read what was left out as well, name the files in a list"
        )


def canonical_split(split: str) -> str:
    """Return `train`, `valid` or `test` for their other spellings, and any other word as it is."""
    return SPLIT_NAMES.get(split.lower(), split)


def files_of_split(names: Sequence[str], split: str | None, spec: str) -> list[str]:
    """Return the files of `split`; where no name speaks of a split, all are training rows."""
    if split is None:
        return list(names)
    labels = {name: split_labels(name) for name in names}
    wanted = canonical_split(split)
    exact = [name for name in names if labels[name][0] == split]
    matching = exact or [name for name in names if wanted in labels[name][1]]
    if matching:
        ours = [{wanted}, set()] if wanted == "train" else [{wanted}]
        others = [name for name in names if labels[name][1] in ours and name not in matching]
        note_left_out(others, split, spec)
        return matching
    if wanted == "train" and not any(splits for _, splits in labels.values()):
        return list(names)
    found = sorted({"/".join(sorted(splits)) or label for label, splits in labels.values()})
    raise UserError(
        f"{spec}: has no files of the split '{split}' (it has: {listed(found)}); name the file, "
        "or leave the split out and use data.valid_fraction"
    )


def folder_of_config(config: str, names: Sequence[str]) -> str:
    """Return the folder that holds the configuration's files, of all its splits."""
    folder = PurePosixPath(configurations(names)[config][0]).parent
    while folder.name in SPLIT_NAMES:
        folder = folder.parent
    return folder.as_posix()
