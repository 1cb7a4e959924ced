"""`data.near_duplicates=drop`: what lint tells of within train is left out, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from shown import DEMO_MODEL, shown
from test_lint_command import PAIRS, Row, kinds, lint, pair, write

import data.examples as examples_module
from files.errors import UserError
from train.config.load import load_config
from train.inputs.dataset import Data, load_data
from train.survey import print_plan

DROPPING = ("data.format=completion", "data.near_duplicates=drop", "data.max_length=256")


def loaded(train: Path | tuple[str, ...], **settings: object) -> Data:
    given = str(train) if isinstance(train, Path) else train
    overrides = {"data.train": given, "data.format": "completion", "data.max_length": 256}
    config = load_config(
        overrides={**overrides, "model.path": str(DEMO_MODEL)}
        | {key.replace("_", ".", 1): value for key, value in settings.items()}
    )
    return load_data(config, DEMO_MODEL, None)


def nearly(row: Row) -> Row:
    return row | {"completion": row["completion"].replace("return x", "return xx")}


ROWS = [
    *(pair(number) for number in range(8)),
    pair(2),  # row 8
    nearly(pair(3)),
    {"prompt": "a\n", "completion": "b"},  # too short to be compared but word for word
    {"prompt": "a\n", "completion": "c"},
    {"prompt": "a\n", "completion": "b"},  # row 12
    nearly(pair(2)),
    pair(20),
]
LEFT_OUT = {8: 2, 9: 3, 12: 10, 13: 2}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", ROWS)


def test_the_first_of_those_alike_is_trained(train: Path) -> None:
    kept = [row for number, row in enumerate(ROWS) if number not in LEFT_OUT]
    examples = loaded(train, data_near_duplicates="drop").train
    expected = loaded(write(train.with_name("kept.jsonl"), kept)).train
    assert [e.input_ids.tolist() for e in examples] == [e.input_ids.tolist() for e in expected]
    assert examples.rows.tolist() == [n for n in range(len(ROWS)) if n not in LEFT_OUT]
    counts = examples.counts
    assert (counts.rows, counts.examples, counts.dropped) == (len(ROWS), len(kept), 0)
    assert counts.near_duplicates == len(LEFT_OUT)
    everything = loaded(train).train
    assert len(everything) == len(ROWS) and everything.counts.near_duplicates == 0
    assert everything.first_alike is None


def test_lint_tells_of_the_same_rows(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = kinds(lint(capsys, train, *PAIRS, code=1))
    told = {int(place.partition(":")[2]) - 1 for kind in found for place in found[kind]}
    assert sorted(found) == ["duplicate", "near_duplicate"] and told == set(LEFT_OUT)


def test_rows_of_valid_and_test_are_kept_and_leaks_are_lint_s_to_tell(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pair(0), pair(1), pair(1)])
    valid = write(tmp_path / "valid.jsonl", [pair(1), nearly(pair(1)), pair(1)])
    given = {"data_near_duplicates": "drop", "data_valid": str(valid), "data_test": str(valid)}
    data = loaded(train, **given)
    assert data.valid is not None and data.test is not None
    assert (len(data.train), len(data.valid), len(data.test)) == (2, 3, 3)
    split = [{**row, "split": name} for name in ("train", "valid") for row in (pair(1), pair(1))]
    data = loaded(
        write(tmp_path / "both.jsonl", split),
        data_near_duplicates="drop",
        data_split_column="split",
    )
    assert data.valid is not None and (len(data.train), len(data.valid)) == (1, 2)


def test_rows_are_held_out_of_those_that_are_left(train: Path) -> None:
    data = loaded(train, data_near_duplicates="drop", data_valid_fraction=0.5)
    assert data.valid is not None
    assert sorted([*data.train.rows, *data.valid.rows]) == [
        number for number in range(len(ROWS)) if number not in LEFT_OUT
    ]


def test_a_row_of_weight_0_takes_no_copy_along(tmp_path: Path) -> None:
    weights = (0, 1, 0, 2)
    rows = [{**pair(1), "weight": weight} for weight in weights]
    train = loaded(
        write(tmp_path / "train.jsonl", rows),
        data_near_duplicates="drop",
        data_weight_field="weight",
    ).train
    assert train.rows.tolist() == [1]
    counts = train.counts
    assert (counts.weightless, counts.near_duplicates, counts.rows) == (2, 1, 4)


def test_a_mixture_is_drawn_from_what_is_left_of_each_source(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [pair(1), pair(2), pair(1)])
    other = write(tmp_path / "other.jsonl", [pair(2), pair(3), pair(4)])
    data = loaded((str(one), str(other)), data_near_duplicates="drop", data_weights=[1.0, 1.0])
    assert data.train.rows.tolist() == [0, 1, 4, 5] and data.train.source_rows == (3, 3)
    assert data.mixture is not None
    drawn = data.mixture.drawn(seed=1, epoch=0, shuffle=True)
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3]


def test_files_of_a_tree_are_compared_in_the_order_of_the_repository(tmp_path: Path) -> None:
    for name, row in (("vendored/a.py", 1), ("z.py", 1), ("vendored/b.py", 2), ("b/c.py", 3)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n{pair(row)['completion']}", encoding="utf-8")
    found = shown(tmp_path, tmp_path, "data.near_duplicates=drop")
    fates = {Path(one["source"]).relative_to(tmp_path).as_posix(): one["fate"] for one in found}
    assert fates == {
        "z.py:1": "whole",
        "b/c.py:1": "whole",
        "vendored/a.py:1": f"dropped: near-duplicate of {tmp_path}/z.py:1",
        "vendored/b.py:1": "whole",
    }


def test_show_data_tells_what_each_is_like(train: Path) -> None:
    found = shown(train.parent, train, *DROPPING)
    assert {one["row"]: one["fate"] for one in found if one["fate"] != "whole"} == {
        row: f"dropped: near-duplicate of {train}:{first + 1}" for row, first in LEFT_OUT.items()
    }
    assert all(one["targets"] == 0 for one in found if one["row"] in LEFT_OUT)
    # What somebody held out has no place among the training rows.
    held = ("data.valid_fraction=0.5",)
    rows = [one for split in ("train", "valid") for one in shown(
        train.parent, train, *DROPPING, *held, split=split)]  # fmt: skip
    assert sorted(one["row"] for one in rows) == list(range(len(ROWS)))
    assert {one["row"] for one in rows if "near-duplicate of" in one["fate"]} == set(LEFT_OUT)


@pytest.mark.usefixtures("offline")
def test_the_plan_counts_them_with_a_tokenizer_or_without(
    train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (str(DEMO_MODEL), "meta-llama/Llama-2-7b-hf"):
        given = {"model.path": model, "data.train": str(train)}
        config = load_config(overrides=given | dict(setting.split("=") for setting in DROPPING))
        print_plan(config, as_json=True)
        document = json.loads(capsys.readouterr().out)
        assert (document["num_examples"], document["data"]["rows"]) == (11, 15)
        said = "4 of 15 rows (26.7%) are left out: like a row before them"
        assert said in "\n".join(document["warnings"])


def test_a_second_start_reads_no_row(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(train, data_near_duplicates="drop").train

    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("the rows are read though they are cached")

    monkeypatch.setattr(examples_module, "read_rows", never)
    again = loaded(train, data_near_duplicates="drop").train
    assert again.fingerprint == first.fingerprint
    assert again.first_alike is not None
    assert {n: int(f) for n, f in enumerate(again.first_alike) if n != f} == LEFT_OUT


@pytest.mark.parametrize("later", [1, 3])
def test_rows_that_changed_after_the_comparison_are_refused(
    later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair(31), pair(32 + later), pair(33 + later)]  # in nobody's cache
    train = write(tmp_path / "train.jsonl", rows[:2])
    compare = examples_module.first_alike

    def compare_then_change(*given: Any) -> Any:
        found = compare(*given)
        write(train, rows[:later])
        return found

    monkeypatch.setattr(examples_module, "first_alike", compare_then_change)
    with pytest.raises(UserError, match=rf"held 2 rows when .* and {later} when .* changed"):
        loaded(train, data_near_duplicates="drop")
