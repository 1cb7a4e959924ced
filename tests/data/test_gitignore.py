"""Source trees: what `.gitignore` leaves out, with git as the oracle, and the order of files."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from data.gitignore import files_left_out
from data.locate import open_source
from files.errors import UserError

NAMES = ("a", "b", "ab", "a.py", "b.py", "a b", "a ", "foo", "foo.txt", "x[y]", "-", "]", "ü", "A1")
PIECES = (
    *("a", "b", "foo", ".py", "txt", "ü", "*", "**", "***", "?", "/", "**/", "/**", "/**/", "\\/"),
    *(
        "[ab]",
        "[!a]",
        "[^b]",
        "[a-c]",
        "[]]",
        "[]-a]",
        "[--0]",
        "[\\]a]",
        "[ü]",
        "[a",
        "[a-",
        "[[:]",
    ),
    *(
        "[[:alpha:]]",
        "[[:digit:]x]",
        "[[:punct:]]",
        "[[:bad:]]",
        "\\",
        "\\a",
        "\\*",
        " ",
        "\\ ",
        "#",
    ),
)


def write(path: Path, text: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(folder: Path) -> list[str]:
    return [file.below or "" for file in open_source(str(folder)).files]


def pattern(rng: random.Random) -> str:
    text = "".join(rng.choices(PIECES, k=rng.randint(1, 4)))
    slash, end = rng.choice(("", "", "", "/")), rng.choice(("", "", "", "/"))
    return rng.choice(("", "", "", "!")) + slash + text + end


def left_out_by_git(top: Path, files: list[str]) -> set[str]:
    if not (top / ".git").exists():
        subprocess.run(["git", "init", "-q", top], check=True)
    asked = subprocess.run(
        ["git", "-c", f"core.excludesFile={os.devnull}", "check-ignore", "-z", "--stdin"],
        cwd=top,
        input=b"".join(os.fsencode(name) + b"\0" for name in files),
        capture_output=True,
        check=False,
    )
    assert asked.returncode in (0, 1), asked.stderr  # 1: none is left out
    return {os.fsdecode(name) for name in asked.stdout.split(b"\0") if name}


@pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle, is not installed")
@pytest.mark.parametrize("seed", range(12))
def test_git_leaves_out_the_same_files_of_trees_made_at_random(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folders = [""]
    for _ in range(8):
        folders.append(f"{rng.choice(folders)}{rng.choice(NAMES)}.d/")
    files = sorted({f"{rng.choice(folders)}{rng.choice(NAMES)}" for _ in range(60)})
    for name in files:
        write(tmp_path / name)
    for folder in ("", *rng.sample(folders, 3)):
        end = rng.choice(("\n", "\r\n"))
        lines = end.join(pattern(rng) for _ in range(5))
        write(tmp_path / folder / ".gitignore", lines + rng.choice(("", end)))
    wanted = left_out_by_git(tmp_path, files)
    assert files_left_out(tmp_path, files) == wanted
    # What is asked of a folder alone is decided by the whole repository.
    for folder in folders[1:3]:
        below = [name.removeprefix(folder) for name in files if name.startswith(folder)]
        told = files_left_out(tmp_path / folder, below)
        rest = {name.removeprefix(folder) for name in wanted if name.startswith(folder)}
        assert told <= rest
        if told != rest:  # git says so of the folder itself, which somebody named
            assert rest == set(below)


@pytest.mark.parametrize(
    ("lines", "left_out", "kept"),
    [
        ("*.log", ["a.log", "x/y/b.log"], ["a.logs"]),
        ("/a.py", ["a.py"], ["x/a.py"]),
        ("x/a.py", ["x/a.py"], ["y/x/a.py", "a.py"]),
        ("build/", ["build/a", "x/build/a"], ["y/build"]),
        ("*.py\n!a.py", ["b.py"], ["a.py", "x/a.py"]),
        ("!a.py\n*.py", ["a.py", "b.py"], []),
        ("x/\n!x/a.py", ["x/a.py"], []),  # below a folder that is left out nothing comes back
        ("x/*\n!x/a.py", ["x/b.py"], ["x/a.py"]),
        ("**/z", ["z", "x/y/z"], []),
        ("x/**/z", ["x/z", "x/y/w/z"], ["z", "y/x/z"]),
        ("x/**", ["x/a", "x/y/a"], ["a"]),
        ("x/*", ["x/a"], ["y/x/a"]),
        ("a  \nb\\ ", ["a", "b "], ["a  ", "b"]),
        ("\ufeff#a\n\\#b\n\\!c", ["#b", "!c"], ["#a", "b", "c"]),
        ("[a-c].py\n?[!d]z", ["b.py", "qez"], ["d.py", "qdz", "z"]),
        ("a\r\nb", ["a", "b"], ["c"]),
    ],
)
def test_patterns(lines: str, left_out: list[str], kept: list[str], tmp_path: Path) -> None:
    """By gitignore(5); no file need be there to be asked about."""
    write(tmp_path / ".gitignore", lines)
    assert files_left_out(tmp_path, [*left_out, *kept]) == set(left_out)


def test_the_nearest_file_decides_and_a_repository_begins_anew(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".gitignore", "*.py\n/pkg/a.txt")
    write(tmp_path / "pkg" / ".gitignore", "!b.py\n/c.txt")
    write(tmp_path / "vendored" / ".git", "gitdir: elsewhere")
    asked = ["a.py", "pkg/b.py", "pkg/a.txt", "pkg/c.txt", "c.txt", "vendored/a.py"]
    assert files_left_out(tmp_path, asked) == {"a.py", "pkg/a.txt", "pkg/c.txt"}
    assert files_left_out(tmp_path / "pkg", ["b.py", "d.py", "a.txt"]) == {"d.py", "a.txt"}
    # Above the repository nobody is asked; a link is not followed, as git follows none.
    write(tmp_path.parent / ".gitignore", "*")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".gitignore").symlink_to(tmp_path.parent / ".gitignore")
    assert files_left_out(tmp_path, ["linked/a.txt", "a.txt"]) == set()


def test_a_tree_is_read_in_the_order_of_a_repository(tmp_path: Path) -> None:
    for name in ("b/x.py", "b.py", "b/a/x.py", "b/z.py", "B.py", "a-b/x.py", "a/x.py", "ü.py"):
        write(tmp_path / name)
    assert names(tmp_path) == [
        *("B.py", "b.py", "ü.py"),  # a folder's own files first, by bytes
        *("a/x.py", "a-b/x.py", "b/x.py", "b/z.py"),
        "b/a/x.py",
    ]
    source = open_source(f"{tmp_path}/**/x.py")
    assert [file.below for file in source.files] == ["a/x.py", "a-b/x.py", "b/x.py", "b/a/x.py"]


def test_a_note_counts_the_source_files_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / ".gitignore", "build/\n*.jsonl\n")
    for name in ("a.py", "build/a.py", "build/b.py", "metrics.jsonl"):
        write(tmp_path / name)
    # Data that are left out beside sources raise no question which of both are the rows.
    assert names(tmp_path) == ["a.py"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 3 of 4 files left out by .gitignore, such as build/a.py\n"
    )
    assert [file.below for file in open_source(f"{tmp_path}/**/*.py").files] == ["a.py"]


def test_what_is_spelled_out_is_read(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".gitignore", "build/\ndata/\n*.jsonl\n*.tmp\n")
    for name in ("a.py", "build/b.py", "build/c.tmp", "data/rows.jsonl", "data/cut.tmp"):
        write(tmp_path / name)
    assert names(tmp_path / "build") == ["b.py"]
    assert [file.below for file in open_source(f"{tmp_path}/build/*").files] == ["b.py"]
    for spec in ("data", "data/rows.jsonl", "data/*.jsonl"):  # rows are often too large for git
        assert [file.path.name for file in open_source(f"{tmp_path}/{spec}").files] == [
            "rows.jsonl"
        ]
    with pytest.raises(
        UserError, match=r"\.gitignore leaves out all of its 1 file, such as c\.tmp"
    ):
        open_source(f"{tmp_path}/build/*.tmp")
