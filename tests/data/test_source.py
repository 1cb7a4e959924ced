"""Rows from every kind of file, and the sentence for every way in which one can be wrong."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import data.locate
import data.row_files
from data.locate import open_source
from data.source import Row, read_rows
from files.errors import UserError
from files.hub import DatasetSource


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(path: Path | str, **arguments: Any) -> list[tuple[Any, int]]:
    """Return (values, line) of each row."""
    rows = read_rows(str(path), **arguments)
    return [(row.values, int(row.where.rpartition(":")[2])) for row in rows]


def refusal(path: Path | str, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path), **arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


A, B = {"text": "a"}, {"text": "b"}


# --- JSON Lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text":"a"}\n{"text":"b"}\n', [(A, 1), (B, 2)]),
        ('{"text":"a"}\n{"text":"b"}', [(A, 1), (B, 2)]),  # no final line feed
        ('{"text":"a"}\r\n\r\n{"text":"b"}\r\n', [(A, 1), (B, 3)]),  # CRLF, blank line counted
        ('\n \n{"text":"a"}\n', [(A, 3)]),
        ("", []),
        ('{"text":"a\u2028b\x0b"}\n'.replace("\x0b", "\\u000b"), [({"text": "a\u2028b\x0b"}, 1)]),
        (
            '{"text":"\\ud83d\\ude00"}',
            [({"text": "😀"}, 1)],
        ),  # a whole surrogate pair is a character
        ('{"text":"\\\\ud800"}', [({"text": "\\ud800"}, 1)]),  # a backslash and five letters
    ],
)
def test_json_lines(tmp_path: Path, content: str, expected: list) -> None:
    assert lines_of(write(tmp_path / "a.jsonl", content)) == expected


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl": '{"text":"a"}\n',
        "a.json": '[{"text":"a"}]',
        "a.csv": "text\na\n",
    }.items():
        path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
        assert [values for values, _ in lines_of(path, fields=["text"])] == [A]


def test_a_row_says_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"text":"a"}\n')
    assert list(read_rows(path)) == [Row(A, f"{path}:2")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text":"\xff"}', "not UTF-8 (byte 0xff at position 10); save the file as UTF-8"),
        (b'{"text":"a"', "not JSON (Expecting ',' delimiter at column 12)"),
        (b"[1]", "is a list; each row must be a JSON object"),
        (b"null", "is null; each row must be a JSON object"),
        (b"3", "is a number; each row must be a JSON object"),
        (b'{"text":"a"} {"text":"b"}', "more than one value on the line (column 14)"),
        (b'{"text":"a","text":"b"}', "key 'text' stands twice"),
        (b'{"text":"a","n":{"k":1,"k":2}}', "key 'k' stands twice"),
        (b'{"text":"a","n":NaN}', "NaN is no JSON number; write null"),
        (b'{"text":"a","n":-Infinity}', "-Infinity is no JSON number"),
        (b'{"text":"a\\ud800"}', "half of a surrogate pair"),
        (b'{"text":"a","n":["\\uDC00"]}', "half of a surrogate pair"),
        (b'{"n":' + b"[" * 200_000, "JSON nested too deeply"),
        (b'{"n":' + b"1" * 5000 + b"}", "a number with too many digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text":"ok"}\n\n' + line + b"\n")
    sentence = refusal(path)
    assert sentence.startswith(f"{path}:3: ")
    assert words in sentence


def test_a_row_over_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.row_files, "MAX_ROW_BYTES", 20)
    fits = '{"text":"' + "x" * 8 + '"}\n'  # 20 bytes with its line feed
    assert len(lines_of(write(tmp_path / "a.jsonl", fits))) == 1
    longer = fits + fits.replace("x", "xxx", 1)
    assert f"{tmp_path}/a.jsonl:2: row over" in refusal(write(tmp_path / "a.jsonl", longer))
    assert "a.json:1: row over" in refusal(write(tmp_path / "a.json", f"[{longer[20:]}]"))


def test_a_huge_row_is_refused_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text":"a"}\n{"text":"')
        file.truncate(100 * 2**20)  # a hole: zeros that take no place on the disk
    tracemalloc.start()
    sentence = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sentence.startswith(f"{path}:2: row over 16 MiB")
    assert peak < 40 * 2**20


def test_what_unpacks_to_far_more_is_never_whole_in_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(200 * 2**20))
    packed = write(tmp_path / "a.jsonl.gz", bomb)
    tracemalloc.start()
    assert "a.jsonl.gz:1: row over 16 MiB" in refusal(packed)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    named_plain = write(tmp_path / "a.jsonl", bomb)
    assert f"{named_plain}:1: not UTF-8 (byte 0x8b at position 2)" in refusal(named_plain)


# --- required fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "texts": "t"}, 'field "text" missing (fields: prompt, texts)'),
        ({"prompt": "p", "texts": "t"}, "did you mean 'texts'?"),
        ({}, 'field "text" missing (fields: none)'),
        ({"text": None}, 'field "text" is null; it must be a string'),
        ({"text": 3}, 'field "text" is a number'),
        ({"text": True}, 'field "text" is true'),
        ({"text": ["a"]}, 'field "text" is a list'),
        ({"text": {}}, 'field "text" is an object'),
    ],
)
def test_a_required_field_must_be_a_string(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text":"ok"}\n' + json.dumps(row) + "\n")
    assert len(lines_of(path)) == 2  # nothing is required: nothing is checked
    sentence = refusal(path, fields=["text"])
    assert sentence.startswith(f"{path}:2: ")
    assert words in sentence


@pytest.mark.parametrize(
    ("row", "field", "remedy"),
    [
        ({"prompt": "p", "completion": "c"}, "text", "; data.format=completion reads such rows"),
        ({"messages": "m"}, "text", "; data.format=messages reads such rows"),
        ({"conversations": "m"}, "text", "; data.format=messages reads such rows"),
        (
            {"instruction": "i", "output": "o"},
            "text",
            "; data.format=instruction reads such rows",
        ),
        ({"text": "t"}, "input", "; data.format=text reads such rows"),
        ({"text": "t"}, "split", "; data.split_column=none reads all rows of a file"),
        ({"a": "t"}, "b", "(fields: a)"),
        ({"a": "t"}, "text", " makes text of columns of any names"),
    ],
)
def test_a_missing_field_names_the_format_that_fits(
    tmp_path: Path, row: dict, field: str, remedy: str
) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    assert refusal(path, fields=[field]).endswith(remedy)


def test_a_long_row_does_not_list_all_its_fields(tmp_path: Path) -> None:
    row = {f"column{i}": "x" for i in range(500)}
    sentence = refusal(write(tmp_path / "a.jsonl", json.dumps(row)), fields=["text"])
    assert "column19 and 480 more" in sentence


# --- the split column ----------------------------------------------------------------------------


def test_the_split_column_chooses_the_rows(tmp_path: Path) -> None:
    values = ["train", "valid", "test", "validation", "train", "dev"]
    text = "".join(json.dumps({"text": "t", "split": value}) + "\n" for value in values)
    path = write(tmp_path / "a.jsonl", text)

    def lines(split: str | None) -> list[int]:
        return [line for _, line in lines_of(path, split_column="split", split=split)]

    assert lines("train") == [1, 5]
    assert lines("valid") == lines("validation") == [2, 4, 6]
    assert lines("test") == [3]
    assert lines(None) == [1, 2, 3, 4, 5, 6]
    assert len(lines_of(path, split="train")) == 6  # no column: the file is of one split


def test_an_unknown_or_missing_split_value_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"split":"train"}\n{"split":"holdout"}\n')
    sentence = refusal(path, split_column="split", split="train")
    assert f"{path}:2: split column 'split' is 'holdout'; must be train, valid" in sentence
    sentence = refusal(path, split_column="part", split="train")
    assert f'{path}:1: field "part" missing' in sentence


# --- JSON lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text":"a"},\n\n {"text":"b"}]\n', [(A, 1), (B, 3)]),
        ('[\r\n  {\r\n"text": "a"\r\n},\r\n{"text":"b"}\r\n]', [(A, 2), (B, 5)]),
        ("[]", []),
        ("", []),
        ('{"text":"a"}\n{"text":"b"}\n', [(A, 1), (B, 2)]),  # JSON Lines under the name .json
    ],
)
def test_json_lists(tmp_path: Path, content: str, expected: list) -> None:
    assert lines_of(write(tmp_path / "a.json", content)) == expected


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        ('"text"', 1, "must hold a list of objects"),
        ('[{"text":"a"},\n3]', 2, "is a number"),
        ('[{"text":"a"}\n{"text":"b"}]', 2, "no comma between two rows"),
        ('[{"text":"a"},\n]', 2, "comma before the closing bracket"),
        ('[{"text":"a"},\n{"text":', 2, "not JSON"),
        ('[{"text":"a"}\n', 2, "the list is not closed"),
        ('[{"text":"a"}]\nmore', 2, "more text after the list"),
        ('[{"text":"a"},\n{"text":"\\ud800"}]', 2, "half of a surrogate pair"),
        (b'[{"text":"a"},\n{"text":"\xff"}]', 2, "not UTF-8"),
        ('[\n{"text":"a",\n"n": NaN}]', 2, "NaN is no JSON number; write null"),
    ],
)
def test_a_bad_json_list_is_named(
    tmp_path: Path, content: str | bytes, where: int, words: str
) -> None:
    path = write(tmp_path / "a.json", content)
    sentence = refusal(path)
    assert sentence.startswith(f"{path}:{where}: ")
    assert words in sentence


# --- CSV -----------------------------------------------------------------------------------------


def test_csv_rows_are_numbered_by_the_line_they_start_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,n\r\n"a\r\nb",1\r\n\r\n"c ""d"", e",2\r\n')
    assert lines_of(path) == [
        ({"text": "a\r\nb", "n": "1"}, 2),
        ({"text": 'c "d", e', "n": "2"}, 5),
    ]


def test_a_csv_field_may_be_a_whole_source_file(tmp_path: Path) -> None:
    text = "x = 1\n" * 100_000  # 600 kB: beyond the csv module's own limit
    [(values, line)] = lines_of(write(tmp_path / "a.csv", f'text\n"{text}"\n'))
    assert (values, line) == ({"text": text}, 2)


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        ("text,n\na,1\nb\n", 3, "has 1 values where the header has 2 columns"),
        ("text,text\na,b\n", 1, "column 'text' stands twice in the header"),
        ('text\na\n"b" c\n', 3, "not CSV"),
        ('text\na\n"b\nc\n', 3, "not CSV"),
        (b"text\na\n\xff\n", 3, "not UTF-8 (byte 0xff at position 1)"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, content: str | bytes, where: int, words: str) -> None:
    path = write(tmp_path / "a.csv", content)
    sentence = refusal(path)
    assert sentence.startswith(f"{path}:{where}: ")
    assert words in sentence


# --- Parquet -------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, list], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_rows_are_numbered_and_only_asked_columns_are_read(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        {"text": ["a", "b"], "n": [1, 2], "split": ["train", "test"]},
    )
    assert lines_of(path)[1] == ({"text": "b", "n": 2, "split": "test"}, 2)
    assert lines_of(path, fields=["text"]) == [(A, 1), (B, 2)]
    assert lines_of(path, fields=["text"], split_column="split", split="test") == [
        ({"text": "b", "split": "test"}, 2)
    ]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", None], "code": [1, 2]})
    assert f'{path}:1: field "prompt" missing (fields: text, code)' in refusal(
        path, fields=["prompt"]
    )
    assert f'{path}:2: field "text" is null' in refusal(path, fields=["text"])
    path.write_bytes(path.read_bytes()[:-7])
    assert f"{path}: not a readable Parquet file" in refusal(path)


def test_parquet_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["first", "secnd"]}, compression="none")
    whole = path.read_bytes()
    assert b"secnd" in whole
    path.write_bytes(whole.replace(b"secnd", b"\xff\xfe\xfd\xfc\xfb"))
    assert f"{path}: not a readable Parquet file" in refusal(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(write(tmp_path / "a.parquet", "x"))


# --- folders -------------------------------------------------------------------------------------


def test_a_split_column_rules_over_file_names(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", '{"split":"train"}\n{"split":"test"}\n')
    assert [line for _, line in lines_of(tmp_path, split_column="split", split="train")] == [1]


def test_files_without_a_word_of_splits_are_training_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", '{"text":"a"}\n')
    assert len(lines_of(tmp_path, split="train")) == 1
    assert "no files of the split 'test' (it has: rows)" in refusal(tmp_path, split="test")


def test_a_source_tree_is_a_row_a_file(tmp_path: Path) -> None:
    write(tmp_path / "b.py", "b = 1\r\n")
    write(tmp_path / "a" / "c.py", b"\xef\xbb\xbfc = 1\n")
    write(tmp_path / "a" / "__init__.py", "")
    write(tmp_path / "a" / "c.pyc", b"\x00\x01")
    write(tmp_path / "latin.py", b"# \xe9\n")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / ".hidden.py", "hidden")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    notices: list[str] = []
    rows = list(read_rows(tmp_path, fields=["text", "path"], notice=notices.append))
    assert rows == [
        Row({"text": "b = 1\r\n", "path": "b.py"}, f"{tmp_path}/b.py:1"),
        Row({"text": "c = 1\n", "path": "a/c.py"}, f"{tmp_path}/a/c.py:1"),
    ]
    [notice] = notices
    assert notice.startswith(f"{tmp_path}: 4 of 6 files passed over: ")
    for reason in ("1 empty", "1 binary", "1 not UTF-8", "1 unreadable"):
        assert f"{reason} (such as {tmp_path}/" in notice


def test_files_passed_over_are_a_plain_note_where_nobody_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.py", "a = 1\n")
    assert len(list(read_rows(tmp_path))) == 1
    assert capsys.readouterr().err == ""
    write(tmp_path / "b.pyc", b"\x00")
    list(read_rows(tmp_path))
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 1 of 2 files passed over: 1 binary (such as {tmp_path}/b.pyc)\n"
    )


# --- what is not there ---------------------------------------------------------------------------


def test_what_is_missing_is_noticed_before_the_first_row(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(UserError, match=r"no such file .* did you mean 'train\.jsonl'"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"written hub:owner/name"):
        read_rows("owner/name")
    with pytest.raises(UserError, match=r"files ending in '\.bz2' are not read"):
        read_rows(write(tmp_path / "a.jsonl.bz2", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files to read"):
        read_rows(tmp_path / "empty")


# --- data sets of the Hub: which files -----------------------------------------------------------

PLAIN = ["README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
CONFIGURED = [
    "README.md",
    "java/test-00000-of-00001.parquet",
    "java/train-00000-of-00001.parquet",
    "python/train-00000-of-00002.parquet",
    "python/train-00001-of-00002.parquet",
    "python/validation-00000-of-00001.parquet",
]
FOLDERS = ["train/a.jsonl", "test/a.jsonl", ".cache/b.jsonl"]
OWN_SPLITS = ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"]


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    spec: str,
    split: str | None = None,
    **branches: list[str],
) -> list[str]:
    def resolve(repository: str, choose: Any, revision: str | None = None) -> DatasetSource:
        assert repository == "owner/name"
        if revision is not None and revision not in branches:
            raise UserError(f"no revision {revision}")
        there = names if revision is None else branches[revision]
        return DatasetSource(Path("/cache"), tuple(choose(there)), repository, "0" * 40)

    monkeypatch.setattr(data.locate, "resolve_dataset", resolve)
    source = open_source(f"hub:owner/name{spec}", split)
    assert all(file.name.startswith("hub:owner/name/") for file in source.files)
    return [file.path.relative_to("/cache").as_posix() for file in source.files]


@pytest.mark.parametrize(
    ("names", "spec", "split", "expected"),
    [
        (PLAIN, "", "train", [PLAIN[2]]),
        (PLAIN, "", "test", [PLAIN[1]]),
        (PLAIN, "", None, PLAIN[1:]),
        (PLAIN, ":test", "train", [PLAIN[1]]),  # what the user wrote rules
        (PLAIN, ":default", "train", [PLAIN[2]]),
        (CONFIGURED, ":python", "train", CONFIGURED[3:5]),
        (CONFIGURED, ":python:validation", "train", [CONFIGURED[5]]),
        (CONFIGURED, ":java", "test", [CONFIGURED[1]]),
        (FOLDERS, "", "train", ["train/a.jsonl"]),
        (FOLDERS, "::test", None, ["test/a.jsonl"]),
        (OWN_SPLITS, ":train_gen", "train", [OWN_SPLITS[1]]),
        (["rows.jsonl", "dataset_infos.json"], "", "train", ["rows.jsonl"]),
    ],
)
def test_files_of_a_hub_data_set(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    spec: str,
    split: str | None,
    expected: list[str],
) -> None:
    assert chosen(monkeypatch, names, spec, split) == expected


@pytest.mark.parametrize(
    ("names", "spec", "words"),
    [
        (["README.md", "script.py"], "", "has no data files"),
        (PLAIN, "", "no files of the split 'valid' (it has: test, train)"),
        (CONFIGURED, "", "several configurations (java, python); name one, as in "),
        (CONFIGURED, ":pyton:train", "no configuration 'pyton' (it has: java, python); did you"),
        (PLAIN, ":a:b:c", "must be hub:owner/name"),
        (["a.csv", "a.parquet"], "", "several formats (.csv, .parquet)"),
    ],
)
def test_a_hub_data_set_that_leaves_no_choice(
    monkeypatch: pytest.MonkeyPatch, names: list[str], spec: str, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        chosen(monkeypatch, names, spec, "valid")


CONVERTED = "refs/convert/parquet"
AN_ARCHIVE = ["README.md", "rows.py", "rows.tar"]


def test_a_data_set_of_another_form_is_read_as_the_hub_converted_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["default/test/0000.parquet", "default/train/0000.parquet"]
    assert chosen(monkeypatch, AN_ARCHIVE, "", "train", **{CONVERTED: made}) == made[1:]
    assert "read as the Hub converted them" in capsys.readouterr().err
    several = ["java/train/0000.parquet", "python/train/0000.parquet"]
    assert (
        chosen(monkeypatch, AN_ARCHIVE, ":python", "train", **{CONVERTED: several}) == several[1:]
    )
    for branch, words in (
        (several, "several configurations (java, python)"),
        (["default/partial-train/0000.parquet"], "of a part of it alone"),
        (["README.md"], "has no data files"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            chosen(monkeypatch, AN_ARCHIVE, "", "train", **{CONVERTED: branch})
    with pytest.raises(UserError, match="has no data files"):
        chosen(monkeypatch, AN_ARCHIVE, "", "train")
    # Its own files come first, whatever the Hub has made of them.
    assert chosen(monkeypatch, PLAIN, "", "train", **{CONVERTED: made}) == [PLAIN[2]]


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(UserError, match="which is owner/name"):
        open_source("hub:a/b/c")
