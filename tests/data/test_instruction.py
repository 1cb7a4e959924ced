"""Alpaca's rows, and templates with parts that are left out where a column is empty."""

import csv
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from shown import DEMO_MODEL, shown

from data.prompt import Part, PromptFormat, parse_template
from data.tokenizer import Tokenizer
from files.errors import UserError

# Both prompts as Stanford Alpaca's README gives them.
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Response:
"""
END = "<|endoftext|>"
ROW = {"instruction": "Reverse {the} string.", "output": "tac"}
INSTRUCTION = "data.format=instruction"


def test_alpaca_has_two_prompts(tmp_path: Path):
    rows = [ROW | {"input": "cat"}, ROW, *(ROW | {"input": empty} for empty in ("", None, " \n"))]
    first, *others = shown(tmp_path, rows, INSTRUCTION)
    assert (
        first["text"]
        == WITH_INPUT.replace("{instruction}", ROW["instruction"]).replace("{input}", "cat") + "tac"
    )
    for one in others:
        prompt = WITHOUT_INPUT.replace("{instruction}", ROW["instruction"])
        assert one["text"] == prompt + "tac"
    assert all(one["trained"] == ["tac" + END] for one in (first, *others))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_with_columns(tmp_path: Path, kind: str):
    rows = [ROW | {"input": "cat"}, ROW | {"input": "" if kind == "csv" else None}]
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output", "input"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = shown(tmp_path, path, INSTRUCTION)
    assert [one["text"] for one in found] == [
        one["text"] for one in shown(tmp_path, rows, INSTRUCTION)
    ]


def test_everything_may_be_trained_and_a_system_prompt_stands_first(tmp_path: Path):
    (found,) = shown(tmp_path, [ROW], INSTRUCTION, "data.completion_only=false")
    assert found["trained"] == [found["text"] + END]
    settings = (INSTRUCTION, "data.system_prompt=Be brief.")
    own, empty = shown(tmp_path, [ROW | {"system": "Rhyme."}, ROW | {"system": ""}], *settings)
    assert own["text"] == "Rhyme.\n\n" + found["text"]
    assert empty["text"] == "Be brief.\n\n" + found["text"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"output": "x"}, "no column 'instruction', which data.format=instruction asks for"),
        ({"instruction": "x", "response": "y"}, "no column 'output'"),
        ({"instruction": "x", "output": None}, "'output' must hold text, holds null"),
        (ROW | {"input": 3}, r"'input' must hold text, holds 3 \(int\)"),
        (ROW | {"system": 3}, r"'system' must hold text, holds 3 \(int\)"),
        (ROW | {"history": [["a", "b"]]}, "'history' holds earlier turns.*data.format=messages"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: dict, complaint: str):
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{complaint}"):
        shown(tmp_path, [ROW | {"history": []}, row], INSTRUCTION)


def test_generation_takes_the_instruction_or_the_columns():
    form = PromptFormat(format="instruction")
    tokenizer = Tokenizer.load(DEMO_MODEL)
    alone = WITHOUT_INPUT.replace("{instruction}", "Add.")
    assert form.generation_prompt("Add.") == alone
    assert form.prompt_ids("Add.", tokenizer) == tokenizer.encode(alone)
    both = WITH_INPUT.replace("{instruction}", "Add.").replace("{input}", "1 2")
    assert form.generation_prompt({"instruction": "Add.", "input": "1 2"}) == both
    with pytest.raises(UserError, match="no column 'instruction'"):
        form.generation_prompt({"input": "1 2"})
    assert PromptFormat.from_dict(form.to_dict()) == form


# --- parts that are left out ---------------------------------------------------------------------


def test_a_part_is_left_out_where_its_column_is_empty(tmp_path: Path):
    settings = (
        "data.format=template",
        "data.prompt_template={?file}# {{{file}}}\n{/file}{?note}With a note.{/note}{task}:",
        "data.completion_template={?why}# {why}\n{/why}{code}",
    )
    rows = [
        {"task": "a", "code": "b", "file": "f.py", "note": "n", "why": "w"},
        {"task": "a", "code": "b", "file": "", "note": None},
        {"task": "a", "code": "b", "file": "f.py", "why": " "},
        {"task": "a", "code": "b", "note": 3},
    ]
    found = shown(tmp_path, rows, *settings)
    assert [one["text"] for one in found] == [
        "# {f.py}\nWith a note.a:# w\nb",
        "a:b",
        "# {f.py}\na:b",
        "With a note.a:b",
    ]
    assert [one["trained"] for one in found] == [["# w\nb" + END], *([["b" + END]] * 3)]
    with pytest.raises(UserError, match=r":1: no column 'task', which data\.prompt_template"):
        shown(tmp_path, [{"code": "b", "file": "f.py"}], *settings)
    with pytest.raises(UserError, match=r":1: the column 'why' must hold text, holds 3"):
        shown(tmp_path, [rows[0] | {"why": 3}], *settings)


def test_a_part_may_be_left_out_of_a_columnar_file(tmp_path: Path):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"a": "1", "b": "2"}, {"a": "3", "b": None}]),
        tmp_path / "rows.parquet",
    )
    settings = ("data.format=template", "data.completion_template={a}{?b}+{b}{/b}{?c}{c}{/c}")
    found = shown(tmp_path, tmp_path / "rows.parquet", *settings)
    assert [one["text"] for one in found] == ["1+2", "3"]


def test_parts_of_a_template():
    assert parse_template("{x}{?y}a{{{y}{/y}", "k") == (
        Part("x", True),
        Part("a", False, "y"),
        Part("{", False, "y"),
        Part("y", True, "y"),
    )
    form = PromptFormat(
        format="template", prompt_template="{a}{?b}{b}{/b}", completion_template="{c}"
    )
    assert form.generation_prompt("A") == "A"
    assert form.generation_prompt({"a": "A", "b": "B"}) == "AB"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{?a}x", r"\{\?a\} begins a part that \{/a\} never ends"),
        ("x{/a}", r"\{/a\} ends nothing, as no part has begun"),
        ("{?a}x{/b}", r"\{/b\} ends nothing, as \{\?a\} is the part to end"),
        ("{?a}{?b}x{/b}{/a}", r"\{\?b\} stands before \{/a\}; end that part first"),
        ("{?}x", "'{[?]}' is no placeholder"),
        ("{?a}x{/}", "'{/}' is no placeholder"),
    ],
)
def test_a_part_without_its_end_is_one_sentence(template: str, complaint: str):
    with pytest.raises(UserError, match=rf"^data\.completion_template: {complaint}"):
        PromptFormat(format="template", completion_template=template)
