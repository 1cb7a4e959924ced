"""Folders: data sets as they are cloned from the Hub, source trees, and what is neither."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.locate import open_source
from data.source import read_rows
from files.errors import UserError
from tests.shown import shown

ROWS = {"train": ["a", "b"], "validation": ["v"], "test": ["t"]}
CARD = """---
license: mit
dataset_info:
  features:
  - name: text
    dtype: string
---
# A data set
"""


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def clone(folder: Path, names: dict[str, list[str]], card: str = CARD) -> Path:
    """Make what `git clone` of a data set leaves: name → texts of its rows."""
    for name, texts in names.items():
        path = write(folder / name)
        rows = [{"text": text} for text in texts]
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".csv":
            path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "README.md", card)
    write(folder / ".gitattributes", "*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    write(folder / ".git" / "config", "[core]\n")
    write(folder / "LICENSE", "MIT\n")
    write(folder / "dataset_infos.json", "{}")
    write(folder / "images" / "plot.png", b"\x89PNG")
    return folder


def texts(spec: Any, split: str | None = "train") -> list[str]:
    return [row.values["text"] for row in read_rows(spec, fields=["text"], split=split)]


def refusal(spec: Any, split: str | None = "train") -> str:
    with pytest.raises(UserError) as caught:
        texts(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYOUTS = [
    "data/{}-00000-of-00001.parquet",
    "data/{}.jsonl",
    "{}.csv",
    "data/{}.json",
    "{}/rows.jsonl",
    "python/data/{}/part-1.jsonl",
    "data/2024/rows_{}.jsonl",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cloned_data_set_is_read_by_split(tmp_path: Path, layout: str) -> None:
    folder = clone(tmp_path / "set", {layout.format(split): ROWS[split] for split in ROWS})
    assert texts(folder, "train") == ["a", "b"]
    assert texts(folder, "valid") == ["v"]
    assert texts(folder, "test") == ["t"]
    assert len(texts(folder, None)) == 4
    assert [row["text"] for row in shown(tmp_path, folder)] == ["a", "b"]
    settings = (f"data.test={folder}",)
    assert [row["text"] for row in shown(tmp_path, folder, *settings, split="test")] == ["t"]


def test_shards_are_read_in_order_and_documents_never(tmp_path: Path) -> None:
    names = {f"data/train-0000{i}-of-00002.parquet": [str(i)] for i in (1, 0)}
    folder = clone(tmp_path / "set", names)
    assert texts(folder) == ["0", "1"]
    assert "no files of the split 'test' (it has: train)" in refusal(folder, "test")


@pytest.mark.parametrize("other", ["more", "train_2"])
def test_files_that_the_names_leave_out_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    folder = clone(tmp_path / "set", {"train.jsonl": ["a"], "test.jsonl": ["t"]})
    assert texts(folder) == ["a"]
    assert not capsys.readouterr().err  # test rows are nobody's loss
    clone(folder, {f"{other}.jsonl": ["b"]})
    assert texts(folder) == ["a"]
    told = f"{folder}: 1 data file left out of the split 'train' by name, such as {other}.jsonl"
    assert told in capsys.readouterr().err
    assert texts(folder, "test") == ["t"]
    assert not capsys.readouterr().err


def test_configurations_are_asked_for_by_their_folder(tmp_path: Path) -> None:
    names = {
        "data/java/train.jsonl": ["j"],
        "data/python/train/x.jsonl": ["p"],
        "data/python/test/x.jsonl": ["t"],
    }
    folder = clone(tmp_path / "set", names)
    sentence = refusal(folder)
    assert "several configurations (java, python); name one, as in" in sentence
    assert texts(sentence.rpartition("as in ")[2]) == ["j"]
    assert texts(folder / "data" / "python") == ["p"]
    assert texts(folder / "data" / "*" / "**" / "*.jsonl") == ["j", "p"]


def test_files_at_the_top_are_the_default_configuration(tmp_path: Path) -> None:
    folder = clone(tmp_path / "set", {"train.jsonl": ["a"], "archive/old.jsonl": ["x"]})
    assert texts(folder) == ["a"]


def test_formats_are_not_mixed_below_a_folder(tmp_path: Path) -> None:
    folder = clone(tmp_path / "set", {"a/train.jsonl": ["a"], "b/train.csv": ["a"]})
    assert "several formats (.csv, .jsonl)" in refusal(folder)


# --- what the README says ------------------------------------------------------------------------


def card(configs: str) -> str:
    return f"---\nlicense: mit\n{configs}---\n# A data set\n"


TWO_SPLITS = """configs:
- config_name: default
  data_files:
  - split: train
    path: part_one.jsonl
  - split: test
    path: "part_t*.jsonl"
"""


def test_the_data_files_of_the_readme_rule_over_names(tmp_path: Path) -> None:
    names = {"part_one.jsonl": ["a"], "part_two.jsonl": ["t"], "old/train.jsonl": ["x"]}
    folder = clone(tmp_path / "set", names, card(TWO_SPLITS))
    assert texts(folder) == ["a"]
    assert texts(folder, "test") == ["t"]
    assert sorted(texts(folder, None)) == ["a", "t"]
    assert "README.md names no files of the split 'valid' (it has: test, train)" in refusal(
        folder, "valid"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data_files: a.jsonl", ["a"]),
        ("data_files: [b.jsonl, a.jsonl]", ["b", "a"]),
        ("data_files: {train: [a.jsonl, b.jsonl], dev: c.jsonl}", ["a", "b"]),
        ("data_files: [{split: train, path: [c.jsonl, 'a*']}]", ["c", "a"]),
        ("data_files: [{split: train_sft, path: c.jsonl}, {split: train, path: b.jsonl}]", ["b"]),
        ("data_files: 'deep/**/*.jsonl'", ["d"]),
    ],
)
def test_every_form_of_data_files(tmp_path: Path, given: str, expected: list[str]) -> None:
    names = {f"{name}.jsonl": [name] for name in "abc"} | {"deep/er/d.jsonl": ["d"]}
    configs = f"configs:\n- config_name: default\n  {given}\n"
    assert texts(clone(tmp_path / "set", names, card(configs))) == expected


def test_a_configuration_of_the_readme_is_the_default_or_named(tmp_path: Path) -> None:
    names = {"a.jsonl": ["a"], "b.jsonl": ["b"]}
    both = "configs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: y, data_files: "
    folder = clone(tmp_path / "one", names, card(both + "b.jsonl}\n"))
    sentence = refusal(folder)
    assert "several configurations (x, y)" in sentence
    assert texts(sentence.rpartition("as in ")[2]) == ["a"]
    default = card(both + "b.jsonl, default: true}\n")
    assert texts(clone(tmp_path / "two", names, default)) == ["b"]


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ("configs: [{config_name: x, data_files: [3]}]\n", "data_files are not understood"),
        ("configs: [{config_name: x, data_files: [{split: a}]}]\n", "data_files are not underst"),
        ("configs: [{config_name: x, data_files: gone.jsonl}]\n", "of which none is here"),
        ("configs: [\n", "its YAML header cannot be read"),
    ],
)
def test_a_readme_that_cannot_be_followed_is_refused(
    tmp_path: Path, configs: str, words: str
) -> None:
    assert words in refusal(clone(tmp_path / "set", {"a.jsonl": ["a"]}, card(configs)))


@pytest.mark.parametrize("header", ["", "# No header\n", card("configs: none\n"), "---\n"])
def test_a_readme_without_data_files_leaves_it_to_the_names(tmp_path: Path, header: str) -> None:
    assert texts(clone(tmp_path / "set", {"train.jsonl": ["a"]}, header)) == ["a"]


# --- data beside sources -------------------------------------------------------------------------


def test_a_tree_of_data_and_sources_is_refused_with_a_choice(tmp_path: Path) -> None:
    folder = clone(tmp_path / "my set", {"data/train.jsonl": ["a"], "data/test.jsonl": ["t"]})
    write(folder / "tools" / "convert.py", "c = 1\n")
    write(folder / "load.py", "l = 1\n")
    sentence = refusal(folder)
    assert "holds data (2 files, such as data/test.jsonl) beside other files (2 files" in sentence
    rows, sources = re.findall(r"pass ('.+?') to read the data, or ('.+?') to", sentence)[0]
    assert texts(shlex.split(rows)[0]) == ["a"]
    assert texts(shlex.split(sources)[0]) == ["l = 1\n", "c = 1\n"]


def test_a_code_folder_with_a_fixture_names_the_way_out(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    for i in range(3):
        write(folder / f"{i}.py", f"{i}\n")
    write(folder / "web" / "x.js", "x\n")
    write(folder / "tests" / "fixture.csv", "text\nf\n")
    write(folder / "package.json", "{}")
    sentence = refusal(folder)
    [fixture, both] = re.findall(r"pass ('.+?') to read the data, or ('.+?') to", sentence)[0]
    assert texts(shlex.split(fixture)[0]) == ["f"]
    sources = json.loads(shlex.split(both)[0])
    assert sorted(texts(sources)) == ["0\n", "1\n", "2\n", "x\n"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.py", "package.json", "tests/fixture.json"],
        ["a.js", "README.md", "LICENSE"],
        ["Makefile", "config.json"],
        ["notes.txt", "dataset_infos.json"],
        ["README.md", "docs/a.md"],
    ],
)
def test_a_tree_without_data_is_one_of_sources(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / "tree" / name, f"{name}\n")
    read = [row.values["path"] for row in read_rows(tmp_path / "tree", split="train")]
    assert read == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train.jsonl.bz2", "README.md"],
        ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"],
        ["train.jsonl", "test.jsonl.xz"],
    ],
)
def test_rows_in_a_form_that_is_not_read_are_no_sources(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / "set" / name, "{}")
    assert "holds rows in a form that is not read; unpack it" in refusal(tmp_path / "set")


def test_a_clone_without_its_large_files_says_so(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    for name in ("train.parquet", "train.jsonl", "train.json", "train.csv"):
        folder = tmp_path / name.replace(".", "-")
        write(folder / name, pointer)
        assert f"{folder}/{name}: holds no rows, only git's pointer" in refusal(folder)


def test_a_folder_of_json_files_alone_is_data(tmp_path: Path) -> None:
    folder = clone(tmp_path / "set", {"train.json": ["a"], "test.json": ["t"]})
    assert texts(folder) == ["a"]
    assert [Path(file.name).name for file in open_source(folder, "test").files] == ["test.json"]
