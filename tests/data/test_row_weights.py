"""`data.weight_field`: the column of the rows' weights is read in every format, and strictly."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shown import DEMO_MODEL, shown

from data.batch import Batching, micro_batches
from data.examples import Examples, load_examples
from data.fim import FillInTheMiddle, FimTokens
from data.prompt import PromptFormat
from data.rows_in_memory import keep_rows
from data.source import Row
from data.tokenizer import Tokenizer
from data.weights import row_weight
from files.errors import UserError

ROWS = [{"text": "a b c", "w": 2}, {"text": "d", "w": 0}, {"text": "e f", "w": 0.25}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_MODEL)


def load(spec: str | Path, tokenizer: Tokenizer, **changes: Any) -> Examples:
    settings = {
        "split_column": None,
        "split": None,
        "prompt_format": PromptFormat(),
        "max_length": 100,
        "on_overflow": "truncate",
        "cache_root": None,
        "weight_field": "w",
    }
    return load_examples(str(spec), tokenizer=tokenizer, **(settings | changes))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv(path: Path) -> Path:
    path.write_text("text,w\na b c, 2 \nd,0.0\ne f,2.5e-1\n")
    return path


def parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**row, "w": float(row["w"])} for row in ROWS]), path)
    return path


FILES: dict[str, Callable[[Path], Path | str]] = {
    "a.jsonl": lambda path: jsonl(path, ROWS),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)) and path,
    "a.csv": csv,
    "a.parquet": parquet,
    "in memory": lambda path: keep_rows(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_weights(
    name: str, tokenizer: Tokenizer, tmp_path: Path, cache: Path
) -> None:
    examples = load(FILES[name](tmp_path / name), tokenizer)
    assert examples.weights is not None
    assert examples.weights.tolist() == [2.0, 0.25]
    assert examples.rows.tolist() == [0, 2]  # numbered as they stand in the file
    assert [example.weight for example in examples] == [2.0, 0.25]
    counts = examples.counts
    assert (counts.rows, counts.examples, counts.dropped, counts.weightless) == (3, 2, 1, 1)
    assert examples.subset([1])[0].weight == 0.25


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "weight": 1}]
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "template": (
        {"prompt_template": "{a}\n", "completion_template": "{b}"},
        {"a": "x", "b": "y"},
    ),
    "completion": ({}, {"prompt": "x\n", "completion": "y"}),
    "messages": ({}, {"messages": CHAT}),
    "instruction": ({}, {"instruction": "Do.", "output": "Done."}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_weights(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A row's own `weight` is none of a message, nor does a message's weigh the row."""
    settings, row = FORMATS[name]
    path = jsonl(tmp_path / "rows.jsonl", [{**row, "weight": 3}, {**row, "weight": 0.5}])
    form = PromptFormat(format=name, **settings)
    examples = load(path, tokenizer, prompt_format=form, weight_field="weight")
    assert [example.weight for example in examples] == [3.0, 0.5]
    plain = load(path, tokenizer, prompt_format=form, weight_field=None)
    for one, other in zip(examples, plain, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert other.weight is None
    assert examples.fingerprint != plain.fingerprint


def test_every_piece_of_a_row_and_every_hole_weighs_what_the_row_does(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"text": "x " * 30, "w": 4}, {"text": "y", "w": 5}, {"text": "z " * 90, "w": 0}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    split = load(path, tokenizer, max_length=16, on_overflow="split")
    assert len(split) > 2
    assert [example.weight for example in split] == [4.0] * (len(split) - 1) + [5.0]
    # A row that is left out is not too long either.
    assert len(load(path, tokenizer, max_length=64, on_overflow="error")) == 2


def test_holes_weigh_what_their_rows_do(tmp_path: Path) -> None:
    from infilling import write_tokenizer

    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "fim", "starcoder2"))
    fim = FillInTheMiddle(
        FimTokens(tokenizer),
        rate=1.0, spm_rate=0.5, unit="character", targets="all", seed=1, max_length=100,
    )  # fmt: skip
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "abcdefgh", "w": 4}, {"text": "hgfe", "w": 5}])
    examples = load(path, tokenizer, fim=fim)
    assert [(e.has_hole, e.weight) for e in examples] == [(True, 4.0), (True, 5.0)]


def test_a_micro_batch_has_the_weight_of_each_target(tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples = load(jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer)
    for layout in ("unpadded", "longest", "max_length"):
        cut = Batching(micro_batch_size=2, layout=layout, max_length=100, pad_id=0)
        (batch,) = micro_batches(examples, [1, 0], cut)
        assert batch.weights is not None
        expected = np.repeat([0.25, 2.0], examples.num_targets[[1, 0]])
        assert batch.weights.tolist() == expected.tolist()
        assert batch.total_weight == expected.sum()


BAD = {
    "-1": "a number (-1)",
    "-0.5": "a number (-0.5)",
    "1e31": "a number (1e+31)",
    '"2"': "a string ('2')",
    "true": "true",
    "null": "null",
    "[1]": "a list",
}


@pytest.mark.parametrize("value", [*BAD, "missing", "NaN", "Infinity"])
def test_what_is_no_weight_is_refused_with_its_place(
    value: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row = '{"text": "b"}' if value == "missing" else f'{{"text": "b", "w": {value}}}'
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "w": 1}\n' + row + "\n")
    with pytest.raises(UserError) as error:
        load(path, tokenizer)
    said = str(error.value)
    assert said.startswith(f"{path}:2: ") and "\n" not in said
    if value in BAD:
        assert f'field "w" is {BAD[value]}; data.weight_field names a column of numbers' in said
    elif value == "missing":
        assert 'field "w" missing (fields: text)' in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -(10**400)])
def test_numbers_that_json_does_not_have_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^a\.parquet:7: field"):
        row_weight(Row({"w": value}, "a.parquet:7"), "w")


@pytest.mark.parametrize("text", ["", "nan", "inf", "1_000", "-1", "0x10", "two", "1e400", "٣"])
def test_in_csv_a_weight_is_a_number_in_digits(text: str) -> None:
    with pytest.raises(UserError, match=r"^a\.csv\.gz:7: field"):
        row_weight(Row({"w": text}, "a.csv.gz:7"), "w")


def test_weights_are_part_of_what_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{**row, "other": 1} for row in ROWS])
    made = [
        load(path, tokenizer, cache_root=tmp_path / "cache", weight_field=field)
        for field in ("w", "other", None, "w")
    ]
    assert [len(examples) for examples in made] == [2, 3, 3, 2]
    assert len({examples.fingerprint for examples in made}) == 3
    assert made[3].weights is not None and made[3].weights.tolist() == [2.0, 0.25]


def test_rows_that_weigh_nothing_leave_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "w": 0}])
    with pytest.raises(UserError, match=r"1 weigh 0 in the column of data\.weight_field"):
        load(path, tokenizer)


def test_what_is_shown_weighs_what_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.show_data import main

    found = shown(tmp_path, ROWS, "data.weight_field=w")
    assert [one["weight"] for one in found] == [2.0, 0.0, 0.25]
    assert found[1]["fate"] == "dropped: weight 0 in 'w'"
    assert not found[1]["trained"] and found[0]["trained"]
    assert [one["weight"] for one in shown(tmp_path, ROWS)] == [1.0] * 3
    path = f"data.train={tmp_path / 'rows.jsonl'}"
    assert main([f"model.path={DEMO_MODEL}", path, "data.weight_field=w"]) == 0
    assert "targets, weight 2\n" in capsys.readouterr().out
    valid = [*(path, f"data.valid={jsonl(tmp_path / 'valid.jsonl', [{'text': 'a'}])}")]
    assert main([f"model.path={DEMO_MODEL}", *valid, "data.weight_field=w", "--split=valid"]) == 0


def test_lint_tells_of_rows_without_a_weight_and_of_weight_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.inputs.lint import main

    rows: list[dict[str, Any]] = [*ROWS, {"text": "no weight"}, {"text": "wrong", "w": "2"}]
    train = jsonl(tmp_path / "train.jsonl", rows)
    valid = jsonl(tmp_path / "valid.jsonl", [{"text": "of no weight, and needs none"}])
    arguments = (f"data.train={train}", f"data.valid={valid}", f"model.path={DEMO_MODEL}")
    assert main([*arguments, "data.weight_field=w", "--json"]) == 1
    found: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    by_kind = {one["kind"]: one["count"] for one in found["findings"]}
    assert by_kind["unreadable"] == 2
    assert by_kind["weightless"] == 1
