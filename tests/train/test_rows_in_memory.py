"""Rows that a Python program holds: trained as if they lay in a file, and there on a resume."""

import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from runs import resume, rows_of

from data.rows_in_memory import keep_rows
from data.source import read_rows
from files.atomic import sha256_file
from files.errors import UserError
from train.config.load import load_config
from train.inputs.dataset import with_rows
from train.run import run

ROWS = [{"text": f"def f{i}(x): return x + {i}"} for i in range(9)]
VALID = [{"text": f"class C{i}: pass"} for i in range(3)]


def settings(model_folder: Path, output: Path, **files: str) -> dict[str, Any]:
    """Return a run of 4 steps of 2 examples, over the files named or none."""
    values = {"data.train": None, "data.valid": None, **files, "train.max_steps": 4}
    values |= {"train.gradient_accumulation_steps": 1, "checkpoint.steps": 2}
    return runs.settings(model_folder, output, output, **values)


class Dataset:
    """What `datasets.Dataset` is to a reader: no list, but it can be gone through again."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def weights(folder: Path) -> str:
    return sha256_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.usefixtures("cache")
def test_a_run_of_rows_is_the_run_of_the_file_that_holds_them(
    model_folder: Path, tmp_path: Path
) -> None:
    files = {
        "data.train": lines(tmp_path / "train.jsonl", ROWS),
        "data.valid": lines(tmp_path / "valid.jsonl", VALID),
    }
    expected = run(load_config(overrides=settings(model_folder, tmp_path / "file", **files)))
    config = load_config(overrides=settings(model_folder, tmp_path / "rows"))
    found = run(config, rows={"train": Dataset(), "validation": (row for row in VALID)})
    assert weights(found) == weights(expected)
    evaluations = [[row["loss"] for row in rows_of(one, "eval")] for one in (found, expected)]
    assert evaluations[0] == evaluations[1] != []


@pytest.mark.usefixtures("cache")
def test_a_list_takes_the_place_of_the_training_data_alone(tmp_path: Path) -> None:
    config = load_config(overrides={"data.valid": "valid.jsonl"})
    data = with_rows(config, ROWS).data
    assert str(data.train).startswith("rows:") and data.valid == "valid.jsonl"
    assert [row.values for row in read_rows(str(data.train))] == ROWS
    assert [row.where for row in read_rows(str(data.train))][:2] == ["rows:1", "rows:2"]
    # The same rows are the same file, and others are another.
    assert with_rows(config, tuple(ROWS)).data.train == data.train
    assert with_rows(config, ROWS[1:]).data.train != data.train


@pytest.mark.usefixtures("cache")
def test_what_a_row_never_had_stays_out_of_a_data_set_of_columns() -> None:
    """A `datasets.Dataset` (known by its features) holds null where another row has a key."""

    class Columns(list):
        features = "of all rows"

    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}], "note": None}
    config = load_config()
    [found] = read_rows(str(with_rows(config, Columns([row])).data.train))
    assert found.values == {"messages": [{"role": "user", "content": "a"}], "note": None}
    [found] = read_rows(str(with_rows(config, [row]).data.train))
    assert found.values == row


def test_a_resume_finds_the_rows_or_says_what_is_missing(
    model_folder: Path, tmp_path: Path, cache: Path
) -> None:
    whole = run(load_config(overrides=settings(model_folder, tmp_path / "whole")), rows=ROWS)
    config = load_config(overrides=settings(model_folder, tmp_path / "cut"))
    cut = run(config, rows=ROWS)
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    (cut / "status.json").unlink()
    kept = next((cache / "rows").glob("*.jsonl"))
    assert f'train = "rows:{kept.stem}"' in (cut / "config.toml").read_text()

    aside = kept.rename(tmp_path / "aside.jsonl")
    with pytest.raises(UserError, match=r"given in memory, and .* does not hold them any more"):
        resume(cut)
    keep_rows(ROWS)
    assert kept.read_bytes() == aside.read_bytes()
    resume(cut)
    assert weights(cut) == weights(whole)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.jsonl", "rows:2: is of type str; each row must be a dictionary"),
        (None, "rows:2: is of type NoneType"),
        ({1: "a"}, "rows:2: the column 1 must have a text as its name"),
        ({"a": b"x"}, r"rows:2: the column 'a' holds b'x' \(bytes\), which JSON cannot"),
        ({"a": [datetime.date(2024, 1, 1)]}, "the column 'a' holds datetime.date"),
        ({"a": float("nan")}, r"holds nan \(float\)"),
        ({"a": {"b": float("-inf")}}, r"holds -inf \(float\)"),
        ({"a": np.int64(1)}, "int64"),
        ({"a": [{1: 2}]}, "a dictionary with other keys than texts"),
        ({"a": 10**5000}, "cannot be kept as JSON"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_row_that_json_cannot_hold_is_named(row: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        keep_rows([{"a": 1}, row])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_what_json_holds_comes_back(cache: Path) -> None:
    row = {"a": [1, 2.5, None, True, "é\u2028"], "b": {"c": {"d": ""}}}
    assert [found.values for found in read_rows(keep_rows([row, {}]))] == [row, {}]
    # Nothing is left of rows that were refused.
    with pytest.raises(UserError):
        keep_rows([row, 3])  # type: ignore[list-item]
    assert len(list((cache / "rows").iterdir())) == 1


@pytest.mark.usefixtures("cache")
def test_rows_in_another_shape_say_which_is_right(model_folder: Path, tmp_path: Path) -> None:
    config = load_config(overrides=settings(model_folder, tmp_path / "run"))
    with pytest.raises(UserError, match="rows: 'text' is no split; give a list of dictionaries"):
        run(config, rows={"text": ["a", "b"]})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="'dev' is a split given twice"):
        run(config, rows={"validation": VALID, "dev": VALID})
    with pytest.raises(UserError, match=r"rows\['valid'\]:1: is of type int"):
        run(config, rows={"train": ROWS, "valid": [3]})  # type: ignore[list-item]
    with pytest.raises(UserError, match=r'^rows:1: field "text" missing \(fields: txt\)'):
        run(config, rows=[{"txt": "a"}])
    with pytest.raises(UserError, match="no rows"):
        run(config, rows=[])
    with pytest.raises(UserError, match=r"holds rows, which train.run.run\(config, rows=...\) tak"):
        load_config(overrides={"data.train": ROWS})
    assert not (tmp_path / "run").exists()


def test_rows_given_twice_and_what_is_no_configuration_are_refused() -> None:
    config = load_config(overrides={"data.train": "text.jsonl"})
    with pytest.raises(UserError, match=r"rows and data\.train both name the train rows"):
        with_rows(config, [{"text": "x"}])
    with_rows(config, {"valid": [{"text": "x"}]})
    with pytest.raises(UserError, match="load_config"):
        run({"model.path": "x"}, rows=[{"text": "x"}])  # type: ignore[arg-type]
