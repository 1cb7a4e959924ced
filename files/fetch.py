"""Files of the Hub onto this machine, each with the hash that the Hub has of it.

1. ask the Hub which commit the revision stands for, and which files it has, with their hashes;
2. refuse what cannot work (no weights, pickle only) before anything large is transferred;
3. fetch what the cache lacks, and hash each file that arrived, since the library checks sizes only.

Where the Hub does not answer (no network, `HF_HUB_OFFLINE=1`, a token that ran out) the copy in the
cache is used if it is complete. `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` work as huggingface_hub
documents them. Every failure is one `UserError` sentence with its remedy.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from files.errors import UserError, counted, did_you_mean, no_such_folder

# A file of several, by its name.
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\..+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds until a Hub that does not answer counts as out of reach.
_TIMEOUT = 30.0

RepositoryKind = Literal["model", "dataset"]
FOLDER_REMEDY = {
    "model": "pass a folder as model.path=/path/to/folder",
    "dataset": "pass a file or folder of this machine as data.train=/path/to/rows.jsonl",
}


@dataclass(frozen=True)
class _Listing:
    """What the Hub says of one revision: its commit, and the hash of each file.

    `hashes` maps a name to its sha256 (64 digits, large files) or git blob id (40 digits), or None.
    """

    commit: str
    hashes: dict[str, str | None]


def fetch(
    repository: str,
    kind: RepositoryKind,
    revision: str | None,
    choose: Callable[[Sequence[str]], Sequence[str]],
) -> tuple[Path, str, list[str]]:
    """Return (snapshot folder, commit, chosen names), with every chosen file there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        listing = _list(repository, kind, revision)
    except (RevisionNotFoundError, HFValidationError) as error:
        raise _explain(error, repository, kind, revision) from error
    except Exception as error:  # the library's HTTP layer differs by version, and so do its errors
        cached = _cached_snapshot(repository, kind, revision)
        if cached is None:
            raise _explain(error, repository, kind, revision) from error
        try:
            names = list(choose(_names_below(cached)))
        except UserError as refusal:
            raise UserError(
                f"{refusal} (judged by the copy in the cache, as the Hub does not answer; it may "
                "be incomplete)"
            ) from error
        _check_shard_numbers(names, repository, kind)
        return cached, cached.name, names

    names = list(choose(list(listing.hashes)))
    missing = [
        name
        for name in names
        if not isinstance(
            try_to_load_from_cache(repository, name, revision=listing.commit, repo_type=kind), str
        )
    ]
    try:
        # By revision, not by commit: so the cache learns what the revision stands for, and finds
        # it again without a network.
        folder = Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
            )
        )
    except Exception as error:
        raise _explain(error, repository, kind, revision, fetching=True) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{_where(repository, kind)}: {counted(len(absent), 'file')} did not arrive "
            f"({absent[0]}); run once more with network access"
        )
    if folder.name == listing.commit:
        for name in missing:
            _verify(folder / name, listing.hashes[name], f"{repository}/{name}")
    return folder, folder.name, names


def _list(repository: str, kind: RepositoryKind, revision: str | None) -> _Listing:
    """Ask the Hub for the commit and the files of a revision."""
    from huggingface_hub import HfApi

    api = HfApi()
    describe = api.model_info if kind == "model" else api.dataset_info
    info = describe(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise OSError("the Hub named no commit")
    hashes = {
        file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id
        for file in info.siblings or ()
    }
    return _Listing(info.sha, hashes)


def _cached_snapshot(repository: str, kind: RepositoryKind, revision: str | None) -> Path | None:
    """Return the folder in the cache that holds files of the revision, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked for no file at all, it answers with the folder, complete or not.
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                local_files_only=True,
                allow_patterns=[],
            )
        )
    except LocalEntryNotFoundError:
        return None


def _names_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _check_shard_numbers(names: Sequence[str], repository: str, kind: RepositoryKind) -> None:
    """Raise where files numbered `-00000-of-00004` are not all in the cache."""
    found: dict[tuple[str, str, str], int] = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            group = (match["stem"], match["count"], match["suffix"])
            found[group] = found.get(group, 0) + 1
    for (stem, count, suffix), number in found.items():
        if number != int(count):
            raise UserError(
                f"{_where(repository, kind)}: the Hub cannot be reached and the copy in the cache "
                f"is incomplete ({number} of {int(count)} files {stem}-*{suffix}); run once more "
                f"with network access, or {FOLDER_REMEDY[kind]}"
            )


def _verify(path: Path, expected: str | None, name: str) -> None:
    """Raise, and take the file out of the cache, where its content is not what the Hub has.

    Source: the Hub's hashes are the sha256 of a large file, and for others git's blob id, the sha1
    of `blob <size>` and a zero byte before the content.
    """
    if expected is None:
        return
    with open(path, "rb") as file:
        if len(expected) == 64:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            blob = hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode(), usedforsecurity=False)
            actual = hashlib.file_digest(file, lambda: blob).hexdigest()
    if actual != expected:
        blob_path = path.resolve()
        path.unlink()
        blob_path.unlink(missing_ok=True)
        raise UserError(
            f"{name}: arrived damaged (hash {actual[:12]}…, the Hub has {expected[:12]}…) and was "
            "removed from the cache; run once more to fetch it again"
        )


def _where(repository: str, kind: RepositoryKind) -> str:
    """Return how the user wrote the repository."""
    return f"model.path={repository!r}" if kind == "model" else f"hub:{repository}"


def _explain(
    error: Exception,
    repository: str,
    kind: RepositoryKind,
    revision: str | None,
    *,
    fetching: bool = False,
) -> UserError:
    """Return the sentence for a failure of the Hub or of the way to it.

    `fetching`: the Hub had answered, and a file did not come through.
    """
    from huggingface_hub import constants, errors

    where = _where(repository, kind)
    # What may have been meant as a folder is said to be none, before the network is blamed.
    here = f"{no_such_folder(Path(repository))}; as a repository: " if kind == "model" else ""
    absent = f"{where}: {here}"
    folder = FOLDER_REMEDY[kind]
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    if fetching and isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = cast(Exception, error.__cause__)  # the library wraps what happened on the way
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{where}: gated; accept the licence at {page}, then set HF_TOKEN or run "
            f"'hf auth login', or {folder}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{absent}not found on the Hub, or private{_nearest(repository, kind)}; check the "
            f"spelling, set HF_TOKEN or run 'hf auth login' if it is private, or {folder}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{where}: has no revision {revision!r}; give a branch, tag or commit listed at "
            f"{page}/tree/main"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{where}: not the name of a repository (owner/name); {folder}")
    if status in (401, 403):
        return UserError(
            f"{absent}the Hub refused access (HTTP {status}); set HF_TOKEN to a token that may "
            f"read it, accept the licence at {page} if there is one, or {folder}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif status is not None:
        reason = f"HTTP {status}"
    else:
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
    if fetching:
        return UserError(
            f"{where}: a file could not be fetched ({reason}); what has arrived is kept in "
            f"{constants.HF_HUB_CACHE}, so run once more, or {folder}"
        )
    at = "" if revision is None else f" of revision {revision!r}"
    return UserError(
        f"{absent}{constants.ENDPOINT} cannot be reached ({reason}) and there is no copy{at} in "
        f"the cache{_nearest(repository, kind)}; {folder}"
    )


def _nearest(repository: str, kind: RepositoryKind) -> str:
    """Return the hint at the repository in the cache whose name is nearest, or nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    prefix = f"{kind}s--"
    cached = [
        entry.removeprefix(prefix).replace("--", "/", 1)
        for entry in (os.listdir(HF_HUB_CACHE) if os.path.isdir(HF_HUB_CACHE) else [])
        if entry.startswith(prefix)
    ]
    # Names of one owner share half their letters already, so only near misses count here.
    near = difflib.get_close_matches(repository, cached, n=1, cutoff=0.8)
    return did_you_mean(repository, [name for name in near if name != repository])
