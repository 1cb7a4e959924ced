"""Files as people have them: rows under a key, pretty-printed, several files, globs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.locate import open_source
from data.source import read_rows
from files.errors import UserError
from tests.shown import shown

A, B, C = {"text": "a"}, {"text": "b"}, {"text": "c"}


def write(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write text, a list as JSON Lines where the name says so, or else JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        lines = path.suffix == ".jsonl" and isinstance(content, list)
        content = (
            "".join(json.dumps(row) + "\n" for row in content)
            if lines
            else json.dumps(content, indent=indent)
        )
    path.write_text(content, encoding="utf-8")
    return path


def read(spec: Any, **arguments: Any) -> list[tuple[Any, str]]:
    return [(row.values, row.where) for row in read_rows(spec, **arguments)]


def refusal(spec: Any, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(spec, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one JSON document ---------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("content", "indent", "expected"),
    [
        ({"data": [A, B]}, None, [(A, 1), (B, 1)]),
        ({"data": [A, B]}, 2, [(A, 3), (B, 6)]),
        ({"version": "1.1", "rows": [A, B], "n": [1, 2], "meta": {"x": []}}, 1, [(A, 4), (B, 7)]),
        ({"empty": [], "data": [A]}, 1, [(A, 4)]),
        ({'a"b]{': [A]}, 1, [(A, 3)]),  # a key that looks like structure
        ('\n\n{"data":\n[\n{"text":"a"}]}\n\n', None, [(A, 5)]),
        (A, None, [(A, 1)]),
        (A, 2, [(A, 1)]),  # one row, pretty-printed
        ([A, B], 2, [(A, 2), (B, 5)]),
        ('{"text":"a"}\n{"text":"b"}\n', None, [(A, 1), (B, 2)]),  # JSON Lines all the same
    ],
)
def test_a_json_file_is_one_document_or_lines(
    tmp_path: Path, content: Any, indent: int | None, expected: list
) -> None:
    path = write(tmp_path / "rows.json", content, indent)
    assert read(path) == [(values, f"{path}:{line}") for values, line in expected]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"text": "a", "tags": [{"x": 1}]}, ["text"]),
        ({"messages": TURNS}, None),
        ({"messages": TURNS, "tools": [{"type": "function"}]}, None),
        ({"messages": json.dumps(TURNS), "tools": [{"type": "function"}]}, None),
        ({"conversations": [{"from": "human", "value": "a"}]}, None),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, None),
    ],
)
def test_a_row_that_holds_lists_is_no_container(
    tmp_path: Path, row: dict[str, Any], fields: list[str] | None
) -> None:
    path = write(tmp_path / "rows.json", row, 1)
    assert read(path, fields=fields) == [(row, f"{path}:1")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", {"train": [A], "test": [B]}, "a.json:1: is an object that holds several lists"),
        ("a.json", {"train": [A], "test": [B]}, "(train, test)"),
        ("a.json", '{"data": [{"text": "a"},\n{"text": 1 1}]}', "a.json:2: not JSON"),
        ("a.json", '{"data": [{"text": "a"}]}\nmore', "a.json:2: not JSON"),
        ("a.json", '{\n"data": [{"text": "a"}]}\nmore', "a.json:3: more text after the object"),
        ("a.json", '{"data": [{"text": "a"}],\n"data": [{}]}', "key 'data' stands twice"),
        ("a.jsonl", json.dumps([A, B]), "a.jsonl:1: begins one JSON document"),
        ("a.jsonl", json.dumps([A, B], indent=1), "rename the file so that it ends in .json"),
        ("a.jsonl", json.dumps({"data": [A]}, indent=1), "a.jsonl:1: begins one JSON document"),
        ("a.jsonl", json.dumps(A | {"n": 1}, indent=1), "a.jsonl:1: begins one JSON document"),
        ("a.jsonl", '\n[{"text": "a"},\n {"text": "b"}]', "a.jsonl:2: begins one JSON document"),
    ],
)
def test_a_document_that_leaves_a_doubt_is_refused(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    assert words in refusal(write(tmp_path / name, text))


def test_a_bad_row_under_a_key_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"data": [A, {"txt": "b"}]}, 1)
    assert refusal(path, fields=["text"]).startswith(f'{path}:6: field "text" missing')


def test_rows_under_a_key_are_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"data": [A, B]}, 1)
    rows = shown(tmp_path, path)
    assert [(row["row"], row["text"], row["source"]) for row in rows] == [
        (0, "a", f"{path}:3"),
        (1, "b", f"{path}:6"),
    ]


# --- several files -------------------------------------------------------------------------------


def names(spec: Any, split: str | None = None) -> list[str]:
    return [Path(file.name).name for file in open_source(spec, split).files]


def test_a_list_is_read_in_its_order(tmp_path: Path) -> None:
    b, a = write(tmp_path / "b.jsonl", [B]), write(tmp_path / "a.json", [A])
    folder = write(tmp_path / "more" / "train.csv", "text\nc\n").parent
    write(folder / "test.csv", "text\nd\n")
    spec = [str(b), a, str(folder)]
    assert read(spec, split="train") == [
        (B, f"{b}:1"),
        (A, f"{a}:1"),
        (C, f"{folder}/train.csv:2"),
    ]
    assert open_source(spec, "train").spec == f"{b}, {a}, {folder}"


def test_a_file_that_would_come_twice_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [A])
    link = tmp_path / "link.jsonl"
    link.symlink_to(a)
    for again in (a, link, tmp_path / "*.jsonl", tmp_path / "x" / ".." / "a.jsonl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert "would be read twice" in refusal([str(a), str(again)])


def test_a_glob_is_the_files_that_match_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "d.csv", ".hidden.jsonl"):
        write(tmp_path / name, "text\na\n" if name == "d.csv" else [A])
    (tmp_path / "folder.jsonl").mkdir()
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names(tmp_path / "?.csv") == ["d.csv"]
    assert names(tmp_path / "[bd].*") == ["b.jsonl", "d.csv"]
    assert read(tmp_path / "b*.jsonl") == [(A, f"{tmp_path}/b.jsonl:1")]


def test_a_glob_of_the_current_folder_or_of_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data" / "a.jsonl", [A])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("data/*.jsonl") == read("./data/*.jsonl") == [(A, "data/a.jsonl:1")]
    assert read("~/data/*.jsonl") == [(A, "~/data/a.jsonl:1")]
    monkeypatch.chdir(tmp_path / "data")
    assert read("*.jsonl") == [(A, "a.jsonl:1")]
    assert read("../data/*.jsonl") == [(A, "../data/a.jsonl:1")]


def test_a_file_whose_name_has_wildcards_is_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].jsonl", [A])
    write(tmp_path / "a1.jsonl", [B])
    assert read(path) == [(A, f"{path}:1")]


def test_a_glob_leaves_out_the_files_of_other_splits_where_some_are_of_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train-1", "more", "test", "dev"):
        write(tmp_path / f"{name}.jsonl", [A])
    glob = tmp_path / "*.jsonl"
    assert names(glob, "train") == ["more.jsonl", "train-1.jsonl"]
    told = f"note: {glob}: 2 data files left out of the split 'train' by name, such as dev.jsonl;"
    assert capsys.readouterr().err.startswith(told)
    assert names(glob, "test") == ["more.jsonl", "test.jsonl"]
    assert names(glob) == ["dev.jsonl", "more.jsonl", "test.jsonl", "train-1.jsonl"]
    capsys.readouterr()
    # Who names test files alone means them.
    assert names(tmp_path / "te*.jsonl", "train") == ["test.jsonl"]
    assert not capsys.readouterr().err


def test_a_glob_of_sources_is_a_row_a_file(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py", "a = 1\n")
    write(tmp_path / "src" / "tests" / "test_b.py", "b = 1\n")
    write(tmp_path / "src" / "tests" / "rows.csv", "text\na\n")
    write(tmp_path / "src" / "package.json", "{}")
    root = tmp_path / "src"
    assert read(root / "**" / "*.py", split="train") == [
        ({"text": "a = 1\n", "path": "a.py"}, f"{root}/a.py:1"),
        ({"text": "b = 1\n", "path": "tests/test_b.py"}, f"{root}/tests/test_b.py:1"),
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("*.csv", "*.csv: no file matches (looked in "),
        ("nowhere/**/*.py", "no file matches"),
        ("a.jsonl,b.jsonl", """several files are a list: data.train='["a.jsonl", "b.jsonl"]'"""),
        (["a.jsonl", "c.jsonl"], "c.jsonl: no such file"),
        (["a.jsonl", "*.csv"], "*.csv: no file matches"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, words: str
) -> None:
    write(tmp_path / "a.jsonl", [A])
    monkeypatch.chdir(tmp_path)
    assert words in refusal(spec)
    assert os.getcwd() == str(tmp_path)
