"""`train.show_data`: rows as they will be trained, before a weight is read."""

import json
from pathlib import Path

import pytest
from shown import DEMO_MODEL, shown

from data.examples import cache_root, load_examples
from data.tokenizer import Tokenizer
from files.errors import UserError
from train import run as train_run
from train.config.load import load_config
from train.inputs.dataset import prompt_format
from train.show_data import main, printable, segments

ROWS = [
    {"prompt": "Add two numbers\n", "completion": "def add(a, b):\n    return a + b\n"},
    {"prompt": "Say é\n", "completion": "über"},
]


def test_an_example_shows_its_text_its_ids_and_what_is_trained(tmp_path: Path) -> None:
    first, second = shown(tmp_path, ROWS, "data.format=completion")
    assert first["row"] == 0 and first["source"] == f"{tmp_path / 'rows.jsonl'}:1"
    assert first["text"] == ROWS[0]["prompt"] + ROWS[0]["completion"]
    assert first["trained"] == [ROWS[0]["completion"] + "<|endoftext|>"]
    assert second["trained"] == ["über<|endoftext|>"]
    assert first["fate"] == "whole" and first["tokens"] == len(first["input_ids"])
    assert first["targets"] == sum(label != -100 for label in first["labels"][1:])


@pytest.mark.parametrize("overflow", ["truncate", "drop", "split"])
def test_what_is_shown_is_what_is_trained(tmp_path: Path, overflow: str) -> None:
    settings = ("data.format=completion", "data.max_length=12", f"data.on_overflow={overflow}")
    rows = [{"prompt": "a " * length, "completion": "b " * length} for length in (2, 5, 30)]
    examples = load_examples(
        str(_written(tmp_path, rows)),
        split_column=None,
        split="train",
        tokenizer=Tokenizer.load(DEMO_MODEL),
        prompt_format=prompt_format(load_config(overrides={"data.format": "completion"}).data),
        max_length=12,
        on_overflow=overflow,
        cache_root=cache_root(),
    )
    found = shown(tmp_path, rows, *settings)
    kept = [one for one in found if not one["fate"].startswith("dropped")]
    assert [one["row"] for one in kept] == examples.rows.tolist()
    assert [one["input_ids"] for one in kept] == [e.input_ids.tolist() for e in examples]
    assert [one["labels"] for one in kept] == [e.labels.tolist() for e in examples]
    assert [one["targets"] for one in kept] == examples.num_targets.tolist()
    assert len(found) - len(kept) == examples.counts.dropped


def test_fates_say_why(tmp_path: Path) -> None:
    long = [{"prompt": "a " * 20, "completion": "b"}]
    settings = ("data.format=completion", "data.max_length=8")
    assert shown(tmp_path, long, *settings)[0]["fate"].startswith("dropped: cut before its")
    dropped = shown(tmp_path, long, *settings, "data.on_overflow=drop")[0]
    assert (
        dropped["fate"].startswith("dropped: 42 tokens") or "data.max_length=8" in dropped["fate"]
    )
    assert dropped["trained"] == [] and dropped["targets"] == 0
    parts = shown(tmp_path, ROWS[:1], *settings, "data.on_overflow=split")
    assert [one["fate"].split(" of ")[0] for one in parts] == [
        "split: part 1", "split: part 2", "split: part 3",
    ]  # fmt: skip


def test_a_character_with_tokens_on_both_sides_of_a_border_is_shown_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(DEMO_MODEL)
    ids = tokenizer.encode("aéb", add_special_tokens=False)
    labels = [-100, -100, *ids[2:]]
    assert len(ids) == 4, "é has two tokens"
    assert segments(ids, labels, tokenizer) == [("a\ufffd", False), ("éb", True)]


def test_rows_of_a_split(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "part": part} for number, part in enumerate("abab")]
    names = {"a": "train", "b": "valid"}
    rows = [{"text": row["text"], "split": names[row["part"]]} for row in rows]
    valid = shown(tmp_path, rows, "data.split_column=split", split="valid")
    assert [one["text"] for one in valid] == ["row 1", "row 3"]
    with pytest.raises(UserError, match="no rows"):
        shown(tmp_path, rows, "data.split_column=split", split="test")
    with pytest.raises(UserError, match=r"data\.test is not set"):
        shown(tmp_path, rows, split="test")


def test_rows_held_out_by_fraction_are_the_run_s(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(10)]
    train = shown(tmp_path, rows, "data.valid_fraction=0.3")
    valid = shown(tmp_path, rows, "data.valid_fraction=0.3", split="valid")
    assert len(valid) == 3
    assert sorted(one["row"] for one in train + valid) == list(range(10))


def test_the_text_marks_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, [*ROWS, {"prompt": "", "completion": "\x1b[2J"}])
    settings = [f"model.path={DEMO_MODEL}", f"data.train={path}", "data.format=completion"]
    assert main([*settings, "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "rows.jsonl:1: 18 tokens, 14 targets" in text
    assert "Add two numbers\n⟦def add(a, b):" in text and "<|endoftext|>⟧" in text
    assert "über" not in text
    assert main(settings) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert printable("a\x1bb\n") == "a\\x1bb\n"


def test_only_the_tokenizer_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    assert shown(tmp_path, [{"text": "x = 1"}], model=folder)[0]["text"] == "x = 1"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--split", "dev"], "--split dev"),
        (["--rows", "0"], "--rows 0"),
        (["--plan"], "--plan belongs to a run"),
        (["--resume", "nowhere"], "nowhere: no such folder"),
        (["--bogus"], "unknown option"),
        (["model.path=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_cannot_be_shown_is_said(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint and complaint.count("\n") == 1


def _written(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_plan_shows_one_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"prompt": "a", "completion": ""}
    long = {"prompt": "Say\n", "completion": "word " * 1000}
    path = _written(tmp_path, [empty, long])
    settings = [f"model.path={DEMO_MODEL}", f"data.train={path}", "data.format=completion"]
    arguments = [*settings, "data.append_eos=false", "data.max_length=2000", "--plan"]
    assert train_run.main(arguments) == 0
    text = capsys.readouterr().out
    assert "rows.jsonl:2: " in text and "Say\n⟦word word" in text
    assert "more characters: " in text and len(text) < 6000
    path.write_text(json.dumps({"prompt": "Say\n", "completion": "word\n" * 200}) + "\n")
    assert train_run.main(arguments) == 0
    assert capsys.readouterr().out.count("word\n") < 30
    assert train_run.main([*arguments, "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_a_row_behind_those_that_are_asked_for_is_not_read(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": 3, "completion": "x"}]
    assert len(shown(tmp_path, rows, "data.format=completion", "--rows", "2")) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        shown(tmp_path, rows, "data.format=completion", "--rows", "3")


def test_a_completion_that_begins_inside_a_token_of_the_prompt_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "def retu", "completion": "rn_it"},  # `return` is one token
        {"prompt": "def\n", "completion": "return"},
    ]
    tokenizer = Tokenizer.load(DEMO_MODEL)
    assert tokenizer.encode(" return") != [*tokenizer.encode(" retu"), *tokenizer.encode("rn")]
    found = shown(tmp_path, rows, "data.format=completion")
    assert [one["merged_prompts"] for one in found] == [1, 0]
    path = _written(tmp_path, rows)
    settings = [f"model.path={DEMO_MODEL}", f"data.train={path}", "data.format=completion"]
    assert main([*settings, "--rows", "1"]) == 0
    assert "the completion begins inside a token of the prompt\n" in capsys.readouterr().out
    assert train_run.main([*settings, "--plan"]) == 0
    assert "in 1 of 2 rows (50.0%) the completion begins inside" in capsys.readouterr().out
    # Where all of the text is trained, nothing is asked of the border.
    whole = shown(tmp_path, rows, "data.format=completion", "data.completion_only=false")
    assert [one["merged_prompts"] for one in whole] == [0, 0]
