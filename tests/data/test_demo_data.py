"""The demo's rows and tokenizer, as they ship, and their builder."""

import ast
import json

import pytest
from tokenizers import Tokenizer as Library

from data.demo.build import (
    CHAT_TEMPLATE,
    DEMO,
    ROWS,
    Module,
    build_corpus,
    functions,
    main,
    standard_library,
)
from data.tokenizer import Tokenizer

SOURCE = '''
class Shelf:
    @property
    def width(self) -> int:
        """Return the width of the shelf in centimetres."""

        # A comment that stays.
        return self._width

    def label(self): """Return the label of this shelf."""; return "a"

async def fetch(name, *, retries=3):
    """Fetch a thing by its name, with retries."""
    return await thing(name, retries)

def nothing():
    """A function that has no body of its own."""

def short():
    """Too short."""
    return [number for number in range(100) if number % 7]

def undocumented():
    return [number for number in range(100) if number % 7]
'''


def shipped(split: str) -> list[dict[str, str]]:
    text = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: shipped(split) for split in ROWS}


def test_sizes(rows):
    assert {split: len(found) for split, found in rows.items()} == ROWS
    assert sum((DEMO / f"{split}.jsonl").stat().st_size for split in ROWS) < 700_000


def test_no_module_is_in_two_splits(rows):
    modules = {
        split: {row["source"].split(":")[0] for row in found} for split, found in rows.items()
    }
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))
    for split, names in modules.items():
        assert {Module(name, "").split for name in names} == {split}


def test_every_row_is_a_documented_function(rows):
    everything = [row for found in rows.values() for row in found]
    for row in everything:
        assert set(row) == {"input", "solution", "source"}
        (function,) = ast.parse(row["solution"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert row["source"].endswith(function.name)
        assert f"def {function.name}(" in row["input"].splitlines()[0]
        statement, _, documentation = row["input"].partition("\n\n")
        assert statement.startswith("Write `") and 20 <= len(documentation) <= 800
        assert 40 <= len(row["solution"]) <= 1200
    for column in ("input", "solution", "source"):
        assert len({row[column] for row in everything}) == len(everything)


def test_tokenizer(rows):
    tokenizer = Tokenizer.load(DEMO / "base")
    assert tokenizer.vocabulary_size == 4096
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0
    assert tokenizer.token(0) == "<|endoftext|>"
    assert tokenizer.prefix_ids == []
    for found in rows.values():
        for row in found:
            text = row["input"] + row["solution"]
            assert tokenizer.decode(tokenizer.encode(text)) == text
    strange = "naïve — 漢字 🙂\t\r\n\x00 1234567890"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len(tokenizer.encode("1234567890")) == 10, "digits stand alone"


def test_functions_without_their_docstrings():
    found = {row["source"]: row for row in functions(Module("made.up", SOURCE))}
    assert set(found) == {"made.up:Shelf.width", "made.up:fetch"}
    width, fetch = found["made.up:Shelf.width"], found["made.up:fetch"]
    assert width["input"] == (
        "Write `def width(self) -> int` for class Shelf of the module made.up.\n\n"
        "Return the width of the shelf in centimetres."
    )
    assert width["solution"] == (
        "@property\ndef width(self) -> int:\n    # A comment that stays.\n    return self._width\n"
    )
    assert fetch["input"].startswith(
        "Write `async def fetch(name, *, retries=3)` for the module made.up."
    )


def test_corpus_holds_no_module_of_the_test_rows(tmp_path, rows):
    build_corpus(tmp_path)
    names = {}
    for split in ("train", "valid"):
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert all(row["text"].strip() for row in found)
        names[split] = {row["source"] for row in found}
    held_out = {row["source"].split(":")[0] for row in rows["test"] + rows["valid"]}
    assert len(names["train"]) > 200 and len(names["valid"]) > 20
    assert not names["train"] & (held_out | names["valid"])


def test_the_library_is_left_out_where_it_should_be():
    names = {module.name for module in standard_library()}
    assert {"json.decoder", "heapq", "dataclasses"} <= names
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "ensurepip"}
    # Modules with a licence of their own.
    assert not names & {"uu", "trace", "xmlrpc.client", "http.cookies", "turtle"}


def test_unknown_arguments(capsys):
    assert main(["corpse"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_tokenizer_file_is_plain():
    library = Library.from_file(str(DEMO / "base" / "tokenizer.json"))
    assert library.get_vocab_size() == 4096
    assert library.truncation is None and library.padding is None


def test_the_chat_template_is_the_one_that_the_build_writes():
    written = (DEMO / "base" / "chat_template.jinja").read_text()
    assert written == CHAT_TEMPLATE
