"""A folder or a Hugging Face repository in, local files and the commit they come from out.

A model is a folder of this machine, used as it is, or a repository of the Hub, of which only the
files that a decoder needs are fetched (`files/fetch.py`): safetensors weights, configuration,
tokenizer; and its card and licence. Pickle files are never fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.atomic import sha256_file
from files.errors import UserError, no_such_folder, shown
from files.fetch import FOLDER_REMEDY, SHARD, fetch
from files.strict_json import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_NO_MODEL = ("adapter_model.safetensors", "optimizer.safetensors")
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt)")
# Configuration, tokenizer and chat template; merges.txt and vocab.txt are old tokenizers' files;
# card and licence are for the card of what is trained.
_SMALL = re.compile(
    r".+\.(json|jinja)|tokenizer\.model|merges\.txt|vocab\.txt|README\.md|LICEN[CS]E(\.txt|\.md)?"
)
# Chat templates with names of their own, where transformers 5 keeps them.
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
# A repository id: `owner/name`, or the bare `name` of the Hub's oldest models.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model's files on this machine, and where they come from.

    Attributes:
        folder: holds config.json, tokenizer files and, where asked for, safetensors weights.
        repository: the Hub's `owner/name`; None for a folder.
        commit: the 40 hexadecimal digits of the commit; None for a folder.
    """

    folder: Path
    repository: str | None
    commit: str | None


@dataclass(frozen=True)
class DatasetSource:
    """A data set's chosen files on this machine.

    Attributes:
        folder: the snapshot that the names are relative to.
        names: the chosen files, in the order of the choice.
        repository: the Hub's `owner/name`.
        commit: the 40 hexadecimal digits of the commit.
    """

    folder: Path
    names: tuple[str, ...]
    repository: str
    commit: str


def resolve_model(
    path: str | Path, revision: str | None = None, *, weights: bool = True
) -> ModelSource:
    """Return the local files of the model at `path`, fetching them from the Hub where need be.

    Args:
        path: a folder, or a repository id. What starts with `.`, `/` or `~`, or is there, is a
            folder.
        revision: branch, tag or commit of a repository (None: its default branch). A folder has
            none.
        weights: whether the weights are needed; without them only the small files are fetched.

    Raises:
        UserError: the folder is missing; the repository cannot be reached and is not in the cache,
            is unknown, private or gated, or lacks the revision; there is no config.json; the
            weights are missing or exist as pickle only; a file arrived damaged.
    """
    folder, where = Path(path).expanduser(), f"model.path={str(path)!r}"
    if _is_local(str(path), folder):
        if not folder.is_dir():
            raise _missing_folder(path, folder)
        names = os.listdir(folder)
        _choose_small_files(names, where)
        if weights:
            choose_weights(names, where, read_index(folder) if INDEX_FILE in names else None)
        return ModelSource(folder, None, None)

    def choose(names: Sequence[str]) -> list[str]:
        small = _choose_small_files(names, where)
        if not weights:
            return small
        if INDEX_FILE in names:
            return [*small, INDEX_FILE]
        return [*small, *choose_weights(names, where, None)]

    folder, commit, names = fetch(str(path), "model", revision, choose)
    if INDEX_FILE in names:
        index = read_index(folder)

        def choose_by_index(names: Sequence[str]) -> list[str]:
            return [*choose(names), *choose_weights(names, where, index)]

        folder, commit, names = fetch(str(path), "model", commit, choose_by_index)
    return ModelSource(folder, str(path), commit)


def resolve_config(path: str | Path, revision: str | None = None) -> Path:
    """Return a folder with the model's config.json and tokenizer files, leaving weights aside.

    Raises as `resolve_model`, weights apart.
    """
    return resolve_model(path, revision, weights=False).folder


def resolve_dataset(
    repository: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    revision: str | None = None,
) -> DatasetSource:
    """Return the files of the Hub's data set that `choose` picks, fetching what the cache lacks.

    Args:
        repository: `owner/name`.
        choose: gets the repository's file names, returns those to fetch; raises UserError where
            none fits.
        revision: branch, tag or commit; None is the default branch.

    Raises:
        UserError: as `resolve_model`, and whatever `choose` raises.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(
            f"hub:{repository}: not the name of a data set on the Hub, which is owner/name; "
            f"{FOLDER_REMEDY['dataset']}"
        )
    folder, commit, names = fetch(repository, "dataset", revision, choose)
    return DatasetSource(folder, tuple(names), repository, commit)


def read_card(path: Path) -> dict[str, Any]:
    """Return the YAML header of a repository's README.md; empty where it has none.

    Raises:
        UserError: the header is no YAML object, or the file cannot be read.
    """
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # whatever the YAML reader stumbles over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: its YAML header cannot be read ({reason}); mend it, or name the files to read"
        ) from None


def _is_local(path: str, folder: Path) -> bool:
    """Whether `path` means a place on this machine rather than a repository."""
    return path.startswith((".", "/", "~")) or folder.exists() or not _REPOSITORY.fullmatch(path)


def _missing_folder(path: str | Path, folder: Path) -> UserError:
    if folder.exists():
        return UserError(
            f"model.path={str(path)!r}: is a file; pass the folder that holds it and config.json"
        )
    return UserError(
        f"model.path={str(path)!r}: {no_such_folder(folder)}; pass a folder that is there, or a "
        "repository of the Hub as owner/name"
    )


def _choose_small_files(names: Sequence[str], where: str) -> list[str]:
    """Return the names of configuration and tokenizer, or raise where there is no model."""
    top = sorted(name for name in names if "/" not in name)
    if "config.json" not in top:
        if "adapter_config.json" in top:
            raise UserError(
                f"{where}: holds an adapter, not a model; pass its base model as model.path and "
                "the adapter as lora.init_from"
            )
        raise UserError(
            f"{where}: has no config.json, so it is no model folder in Hugging Face layout; "
            "pass the folder or repository that holds config.json and *.safetensors"
        )
    small = [name for name in top if _SMALL.fullmatch(name) and not name.endswith(".index.json")]
    return small + sorted(name for name in names if _NAMED_TEMPLATE.fullmatch(name))


def choose_weights(names: Iterable[str], where: str, index: Mapping[str, str] | None) -> list[str]:
    """Return which of a model's files hold its weights.

    An index decides, whatever the names of its files, and stray files beside them do not count.
    Without one, or where its files are gone, it is model.safetensors, else the only file there is.

    Args:
        names: the files of the folder or repository.
        where: the folder or setting that messages name.
        index: tensor → file, where there is one (`read_index`).

    Raises:
        UserError: there are no weights, files that the index names are missing, or there are
            several files and no index.
    """
    top = {name for name in names if "/" not in name}
    indexed = sorted({*index.values()}) if index is not None else []
    missing = [name for name in indexed if name not in top]
    if indexed and not missing:
        return indexed
    if SINGLE_FILE in top:
        return [SINGLE_FILE]
    if missing:
        raise UserError(
            f"{where}: {missing[0]} is missing, {len(missing)} of the {len(indexed)} files that "
            f"{INDEX_FILE} names; complete the download (of the Hub's: run once more with network "
            "access)"
        )
    found = sorted(name for name in top if _WEIGHTS.fullmatch(name) and name not in _NO_MODEL)
    if len(found) == 1 and not SHARD.fullmatch(found[0]):
        return found
    if found:
        raise UserError(
            f"{where}: has {', '.join(found[:3])}{', …' if len(found) > 3 else ''} but no "
            f"{INDEX_FILE} to say which files are the model's and what each holds; fetch the index "
            "too"
        )
    raise _no_weights(top, where)


def read_index(folder: Path) -> dict[str, str]:
    """Return tensor → file as the index in `folder` says.

    Raises:
        UserError: it cannot be read, maps nothing, or names what is no plain *.safetensors file.
    """
    path = folder / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{path}: weight_map must map tensor names to file names; fetch the index again"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise UserError(
                f"{path}: names {shown(name)}; it must be a plain *.safetensors file name in the "
                "model folder"
            )
    return weight_map


def _no_weights(names: Iterable[str], where: str) -> UserError:
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    if pickles and pickles[0].startswith("consolidated."):
        return UserError(
            f"{where}: holds Meta's original release ({pickles[0]}), which is pickle and in "
            "another layout; use the repository's '-hf' version in safetensors"
        )
    if pickles:
        return UserError(
            f"{where}: only pickle weights found ({', '.join(pickles[:3])}), which can run code "
            "when read and are refused; convert to safetensors first (load with transformers, then "
            "save_pretrained) and pass that folder"
        )
    if "adapter_model.safetensors" in names:
        return UserError(
            f"{where}: holds an adapter, not a model; give its base model as model.path and this "
            "folder as lora.init_from"
        )
    return UserError(
        f"{where}: holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; complete the "
        "download, or set model.random_init=true to start from random weights"
    )


def hashed_weights(files: Sequence[Path]) -> dict[str, str]:
    """Return file name → sha256 (hex) of a model's weights files, read with a few threads.

    The Hub's cache keeps a large file under its sha256, so that damage since it was fetched is
    noticed here, without a network.

    Raises:
        UserError: A file cannot be read, or one of the cache is no longer what its name says.
    """
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            hashes = list(pool.map(sha256_file, files))
    except OSError as error:
        raise UserError(
            f"{error.filename}: the base model's weights cannot be read any more "
            f"({error.strerror}); put them back and continue with --resume"
        ) from None
    for path, digest in zip(files, hashes, strict=True):
        blob = path.resolve()
        if blob.parent.name == "blobs" and len(blob.name) == 64 and blob.name != digest:
            raise UserError(
                f"{path}: was damaged in the Hub's cache (sha256 {digest[:12]}…, fetched as "
                f"{blob.name[:12]}…): delete {blob} and fetch it again"
            )
    return {path.name: digest for path, digest in zip(files, hashes, strict=True)}
