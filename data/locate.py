"""Which files a specification of data stands for, and which of them are of a split.

* A file: itself, rows of data or not a file that can be read.
* A folder, by all files below it, hidden ones left out. Files that hold rows are data (`.jsonl`,
  `.csv`, `.parquet`, and `.jsonl.gz` or `.csv.zst`; `.json` where there are none of these and no
  sources, because `package.json` and `dataset_infos.json` hold no rows); what is beside them in
  most data sets says nothing (README and LICENSE, `.md`, `.yaml`, `.toml`, pictures, …); everything
  else is a source file. So
    - data, and no sources: a data set, read by configuration and split as on the Hub, or as its
      README's `data_files` say;
    - no data: a tree of source files, a row for each, in the order of a repository: the files of
      one folder together, before those of its folders, each by the bytes of its name;
    - both: refused, with the two specifications to choose from.
* A glob (`data/*.jsonl`, `src/**/*.py`): the files that match, of which the same is true, except
  that no configuration is chosen, and that files whose names speak of another split are left out
  only where some do not.
* Of folders and globs, source files that `.gitignore` leaves out (`data.gitignore`) are not read,
  nor are data that it leaves out beside source files. What is spelled out is: a file by its name, a
  folder or the fixed part of a glob that lies in what is left out. Rows alone, which are often too
  large for git, are read whether they are left out or not.
* `hub:owner/name[:config][:split]`: data files of a data set of the Hub; where it has none (a
  loading script, an archive), the Parquet that the Hub has made of it, unless that is a part.
* `rows:SHA256`: rows that came from memory (`data.rows_in_memory`).
* A list of these: one after the other; a file that would come twice is refused.

Where names of files speak of splits (`train-00000-of-00002.parquet`, `test.jsonl`), only the files
of the asked split are read, so that test rows never train. A file that is named is read whatever
its name is.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.dataset_card import files_of_card
from data.gitignore import files_left_out
from data.packed import ending_of, kind_of_rows
from data.rows_in_memory import ROWS_PREFIX, find_rows
from data.splits import (
    canonical_split,
    configurations,
    files_of_config,
    files_of_split,
    folder_of_config,
    note_left_out,
    split_labels,
)
from files.errors import UserError, counted, did_you_mean, listed, note
from files.hub import resolve_dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_PREFIX = "hub:"

# What lies beside data without being rows or sources, by its name's beginning or its ending.
_DOCUMENTS = re.compile(
    r"(README|LICEN[CS]E|COPYING|NOTICE|AUTHORS|CITATION|CHANGELOG|CONTRIBUTING)\b.*"
    r"|dataset_(info|infos|dict)\.json"
    r"|.*\.(md|rst|ya?ml|toml|cff|bib|pdf|png|jpe?g|gif|svg|webp)",
    re.IGNORECASE,
)
# Rows, but in a form that is not read.
_PACKED = re.compile(
    r".*\.((jsonl?|csv|parquet)\.(bz2|xz|zip)|parquet\.(gz|zst)|arrow)", re.IGNORECASE
)
_WILDCARDS = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read.

    Attributes:
        path: Where it is on this machine.
        name: What messages call it.
        below: For a file of sources, its path below the folder or the glob's fixed part, which is
            the column `path` of its row; None for a data file.
    """

    path: Path
    name: str
    below: str | None = None


@dataclass(frozen=True)
class Source:
    """What a specification stands for: the files to read, in order.

    Attributes:
        spec: the specification, as the user wrote it.
        files: the files.
        commit: the commit of a data set of the Hub; None otherwise.
        parts: of a list, what each of its entries stands for.
    """

    spec: str
    files: tuple[SourceFile, ...]
    commit: str | None = None
    parts: tuple[Source, ...] = ()


def open_source(spec: str | Path | Sequence[str | Path], split: str | None = None) -> Source:
    """Return the files that `spec` stands for, without reading a row.

    Args:
        spec: a file, a folder, a glob, `hub:owner/name[:config][:split]`, or a list of these.
        split: the split to choose where file names speak of splits; a split in `spec` rules.
            None takes all files.

    Raises:
        UserError: nothing is there, the kind of file is unknown, data and sources are mixed, no
            file is of the split, or a file would be read twice.
    """
    if isinstance(spec, str | Path):
        return _open_one(str(spec), split)
    sources = [_open_one(str(part), split) for part in spec]
    files = [file for source in sources for file in source.files]
    asked_by: dict[Path, str] = {}
    for source in sources:
        for file in source.files:
            path = file.path.resolve()
            if path in asked_by:
                raise UserError(
                    f"{file.name}: would be read twice, by {asked_by[path]} and by {source.spec}, "
                    "and its rows would count twice; leave one of them out"
                )
            asked_by[path] = source.spec
    return Source(listed([str(part) for part in spec]), tuple(files), parts=tuple(sources))


def has_wildcards(spec: str) -> bool:
    """Return whether `spec` is a glob: it has a wildcard, and no file or folder bears its name."""
    return (
        _WILDCARDS.search(spec) is not None
        and not spec.startswith(HUB_PREFIX)
        and not os.path.lexists(os.path.expanduser(spec))
    )


def _open_one(spec: str, split: str | None) -> Source:
    if spec.startswith(HUB_PREFIX):
        return _open_hub(spec, split)
    if spec.startswith(ROWS_PREFIX):
        return Source(spec, (SourceFile(find_rows(spec), "rows"),))
    if has_wildcards(spec):
        return _open_glob(spec, split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(spec, path, split)
    if not path.exists():
        raise _missing(spec, path)
    if not path.is_file():
        raise UserError(
            f"{spec}: neither a regular file nor a folder; save the rows to a file first"
        )
    if kind_of_rows(path) not in SUFFIXES:
        raise UserError(
            f"{spec}: files ending in '{path.suffix}' are not read; the rows must be in one of "
            f"{', '.join(SUFFIXES)} (the first three also as .gz or .zst), or pass the folder of "
            "source files"
        )
    return Source(spec, (SourceFile(path, spec),))


def _missing(spec: str, path: Path) -> UserError:
    parent = path.parent
    neighbours = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(path.name, neighbours)
    if "," in spec:
        several = ", ".join(f'"{part.strip()}"' for part in spec.split(","))
        hint = f"; several files are a list: data.train='[{several}]'"
    elif not hint and spec.count("/") == 1:
        hint = f"; a data set of the Hub is written {HUB_PREFIX}{spec}"
    return UserError(f"{spec}: no such file or folder (looked in {parent.resolve()}){hint}")


# --- folders and globs ---------------------------------------------------------------------------


def _open_folder(spec: str, folder: Path, split: str | None) -> Source:
    names = _names_below(folder)
    if not names:
        raise UserError(
            f"{spec}: holds no files to read (data files end in {', '.join(SUFFIXES)}; hidden "
            "files are left out)"
        )
    names = _not_ignored(names, folder, spec)
    data = _data_among(names, spec, glob.escape(spec.rstrip("/") or "/"))
    if not data:
        return _tree(spec, folder, Path(spec), names)
    chosen = files_of_card(folder, data, split, spec)
    if chosen is None:
        data = _of_one_format(data, spec)

        def example(config: str) -> str:
            return f"{spec.rstrip('/')}/{folder_of_config(config, data)}"

        chosen = files_of_split(files_of_config(data, "", spec, example), split, spec)
    return Source(spec, tuple(SourceFile(folder / name, str(Path(spec) / name)) for name in chosen))


def _open_glob(spec: str, split: str | None) -> Source:
    parts = Path(spec).parts
    fixed = next(i for i, part in enumerate(parts) if _WILDCARDS.search(part))
    root, pattern = Path(*parts[:fixed]), str(Path(*parts[fixed:]))
    folder = root.expanduser()
    names = sorted(
        PurePosixPath(Path(name)).as_posix()
        for name in set(glob.iglob(pattern, root_dir=folder, recursive=True))
        if (folder / name).is_file()
    )
    if not names:
        raise UserError(
            f"{spec}: no file matches (looked in {folder.resolve()}); * stands for letters of one "
            "name, ** for folders, and hidden files are left out"
        )
    names = _not_ignored(names, folder, spec)
    data = _data_among(names, spec, glob.escape(str(root)))
    if not data:
        return _tree(spec, folder, root, names)
    if split is not None:
        wanted = canonical_split(split)
        ours = [name for name in data if split_labels(name)[1] <= {wanted}]
        if ours:
            note_left_out([name for name in data if name not in ours], split, spec)
            data = ours
    return Source(spec, tuple(SourceFile(folder / name, str(root / name)) for name in data))


def _tree(spec: str, folder: Path, shown: Path, names: Sequence[str]) -> Source:
    """Return source files as a reader of the repository meets them.

    What a folder says itself (`__init__.py`, `setup.py`) comes before what is below it, and one
    folder's files, which know each other, stand together.
    """

    def place(name: str) -> list[tuple[bool, bytes]]:
        *folders, last = map(os.fsencode, name.split("/"))
        return [*((True, part) for part in folders), (False, last)]

    ordered = sorted(names, key=place)
    return Source(spec, tuple(SourceFile(folder / n, str(shown / n), n) for n in ordered))


def _not_ignored(names: Sequence[str], folder: Path, spec: str) -> list[str]:
    """Return the names without source files, and data beside some, that `.gitignore` leaves out."""
    ignored = files_left_out(folder, names)
    sources = {name for name in names if _kind(name) == "source"}
    if not sources - ignored:  # what is left are rows
        ignored &= sources
    kept = [name for name in names if name not in ignored]
    if not kept:
        raise UserError(
            f"{spec}: .gitignore leaves out all of its {counted(len(names), 'file')}, such as "
            f"{names[0]}; name a file by itself to read it all the same"
        )
    if ignored:
        note(
            f"{spec}: {len(ignored)} of {counted(len(names), 'file')} left out by .gitignore, such "
            f"as {min(ignored)}"
        )
    return kept


def _names_below(folder: Path) -> list[str]:
    """Return the files below `folder` as sorted POSIX paths, hidden files and folders left out."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        names += [
            (Path(root) / name).relative_to(folder).as_posix() for name in files if name[0] != "."
        ]
    return sorted(names)


def _data_among(names: Sequence[str], spec: str, pattern: str) -> list[str]:
    """Return the names that hold rows; none of them where these are source files.

    `pattern` is the folder of the names, as the beginning of a glob for the user to type.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[_kind(name)].append(name)
    data, sources, packed = kinds["data"], kinds["source"], kinds["packed"]
    if data and sources:
        raise UserError(
            f"{spec}: holds data ({_counted(data)}) beside other files ({_counted(sources)}), and "
            f"which of them are the rows is not certain; pass {_as_globs(data, pattern)} to read "
            f"the data, or {_as_globs(sources, pattern)} to read the others, a row each"
        )
    if packed and not sources:
        raise UserError(
            f"{spec}: {packed[0]} holds rows in a form that is not read; unpack it, or save it as "
            f"one of {', '.join(SUFFIXES)}"
        )
    return data or ([] if sources else kinds[".json"])


def _kind(name: str) -> str:
    """Return what a file is by its name: `data`, `.json`, `packed`, `source`, or a `document`."""
    suffix, last = kind_of_rows(name), PurePosixPath(name).name
    if _PACKED.fullmatch(last):
        return "packed"
    if _DOCUMENTS.fullmatch(last):
        return "document"
    if suffix in SUFFIXES:
        return ".json" if suffix == ".json" else "data"
    return "source"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} file{'' if len(names) == 1 else 's'}, such as {names[0]}"


def _as_globs(names: Sequence[str], pattern: str) -> str:
    """Return the value of `data.train` that reads these files, or most of them."""
    if len(names) == 1:
        return f"'{os.path.join(pattern, glob.escape(names[0]))}'"
    endings = Counter(ending_of(name) or PurePosixPath(name).name for name in names)
    globs = [
        os.path.join(pattern, "**", f"{'*' if ending.startswith('.') else ''}{ending}")
        for ending, _ in endings.most_common(3)
    ]
    return f"'{globs[0]}'" if len(globs) == 1 else f"""'["{'", "'.join(globs)}"]'"""


def _of_one_format(names: Sequence[str], spec: str) -> list[str]:
    suffixes = sorted(set(map(ending_of, names)))
    if len(suffixes) > 1:
        raise UserError(
            f"{spec}: holds data files of several formats ({', '.join(suffixes)}), which may be "
            "the same rows twice; pass one file, or a folder with one format"
        )
    return sorted(names)


# --- data sets of the Hub -------------------------------------------------------------------------


# Where the Hub keeps the Parquet that it makes of data sets in other forms.
_CONVERTED = "refs/convert/parquet"


class _NoDataFilesError(UserError):
    """A data set of the Hub holds no file of rows."""


def _open_hub(spec: str, split: str | None) -> Source:
    repository, *choices = spec.removeprefix(HUB_PREFIX).split(":")
    if len(choices) > 2:
        raise UserError(f"{spec}: must be hub:owner/name, hub:owner/name:config or …:config:split")
    config, asked = (choices[0], choices[1]) if len(choices) == 2 else ("", "")
    listings: list[Sequence[str]] = []

    def choose(names: Sequence[str]) -> list[str]:
        listings.append(names)
        found = _data_files_of_hub(names, spec)
        if not found:
            raise _NoDataFilesError(
                f"{spec}: has no data files ({', '.join(SUFFIXES)}); fetch its rows another way "
                "and pass the file"
            )
        if parts := [name for name in found if "/partial-" in name]:
            raise UserError(
                f"{spec}: the Hub has made Parquet of a part of it alone ({parts[0]}); fetch its "
                "rows another way and pass the file"
            )
        chosen_config, chosen_split = config, asked or split
        if len(choices) == 1:
            # One word after the name is a configuration where there is one of that name.
            if choices[0] in configurations(found):
                chosen_config = choices[0]
            else:
                chosen_split = choices[0]
        chosen = files_of_config(
            found, chosen_config, spec, lambda configuration: f"{spec}:{configuration}"
        )
        return files_of_split(chosen, chosen_split, spec)

    try:
        dataset = resolve_dataset(repository, choose)
    except UserError as error:
        if listings and not isinstance(error, _NoDataFilesError):
            raise
        listings.clear()  # without a network what was converted may be in the cache alone
        try:
            dataset = resolve_dataset(repository, choose, _CONVERTED)
        except UserError as other:  # there is no such branch, or its files leave no choice
            raise (other if listings else error) from None
        note(f"{spec}: has no data files of its own; its rows are read as the Hub converted them")
    files = tuple(
        SourceFile(dataset.folder / name, f"{HUB_PREFIX}{repository}/{name}")
        for name in dataset.names
    )
    return Source(spec, files, commit=dataset.commit)


def _data_files_of_hub(names: Sequence[str], spec: str) -> list[str]:
    """Return the names that hold rows, all of one format, or nothing."""
    found = [
        name
        for name in names
        if kind_of_rows(name) in SUFFIXES
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    ]
    better = [name for name in found if kind_of_rows(name) != ".json"]
    return _of_one_format(better or found, spec)
