"""Which rows become which set."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data.locate import open_source
from files.errors import UserError
from models.config import read_config
from train.config.load import load_config
from train.config.paths import with_whole_paths
from train.config.toml import to_toml
from train.inputs.base_model import base_dtype
from train.inputs.dataset import Data, load_data
from train.plan.decide import Machine, decide


def load(model: Path, rows: Path, **settings: object) -> Data:
    overrides = {"model.path": str(model), "data.train": str(rows), **settings}
    return load_data(load_config(overrides=overrides), model, read_config(model))


def write_rows(path: Path, splits: Sequence[str]) -> Path:
    rows = [{"text": "abc" * (n + 1), "split": split} for n, split in enumerate(splits)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("cache")
def test_a_split_column_need_not_name_all_splits(model_folder: Path, tmp_path: Path) -> None:
    def sizes(splits: Sequence[str], **settings: object) -> list[int]:
        rows = write_rows(tmp_path / "rows.jsonl", splits)
        data = load(model_folder, rows, **{"data.split_column": "split", **settings})
        return [0 if part is None else len(part) for part in (data.train, data.valid, data.test)]

    assert sizes(["train"] * 5 + ["valid", "test", "test"]) == [5, 1, 2]
    assert sizes(["train"] * 5 + ["validation"]) == [5, 1, 0]
    assert sizes(["train"] * 5 + ["test"]) == [5, 0, 1]
    assert sizes(["train"] * 5 + ["test"], **{"data.valid_fraction": 0.4}) == [3, 2, 1]
    with pytest.raises(UserError, match="no rows"):
        sizes(["valid"])


@pytest.mark.usefixtures("cache")
def test_a_column_of_splits_that_nobody_reads_is_noted(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["train", "valid"])
    load(model_folder, rows)
    assert "data.split_column=split makes train, valid and test sets" in capsys.readouterr().err
    load(model_folder, rows, **{"data.split_column": "split"})
    load(model_folder, write_rows(tmp_path / "rows.jsonl", ["left", "right"]))
    assert "split" not in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_a_set_that_is_named_must_have_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["train"] * 5)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        load(model_folder, rows, **{"data.valid": str(empty)})


@pytest.mark.usefixtures("cache")
def test_several_files_are_one_set_and_their_rows_are_counted_on(
    model_folder: Path, tmp_path: Path
) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", ["train"] * 3) for name in "ab"]
    listed = load(model_folder, files[0], **{"data.train": [str(file) for file in files]})
    assert listed.train.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert load(model_folder, tmp_path / "*.jsonl").train.fingerprint == listed.train.fingerprint
    turned = load(model_folder, files[0], **{"data.train": [str(file) for file in files[::-1]]})
    assert turned.train.fingerprint == listed.train.fingerprint  # the same rows in both
    files[1].write_text('{"text": "other"}\n')
    assert len(load(model_folder, tmp_path / "*.jsonl").train) == 4  # no older rows of a cache


def test_paths_are_whole_wherever_the_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a[1]b"
    folder.mkdir()
    rows = write_rows(folder / "rows.jsonl", ["train"])
    monkeypatch.chdir(folder)
    specs = ["rows.jsonl", "*.jsonl", "hub:owner/name", "rows:00", "gone.jsonl"]
    config = with_whole_paths(load_config(overrides={"data.train": specs, "data.test": "r*.jsonl"}))
    monkeypatch.chdir(tmp_path)
    assert config.data.train is not None
    assert config.data.test is not None
    assert config.data.train[0] == str(rows)
    for spec in (config.data.train[1], config.data.test):
        [file] = open_source(spec).files
        assert file.path == rows
    assert config.data.train[2:] == ("hub:owner/name", "rows:00", "gone.jsonl")
    text = tmp_path / "config.toml"
    text.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file=text) == config


@pytest.mark.usefixtures("cache")
def test_an_eos_for_which_the_model_has_no_row_is_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    """Named in tokenizer_config.json and nowhere else: it gets the next id, as in transformers."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    rows = write_rows(tmp_path / "rows.jsonl", ["train"])
    (copy / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(UserError, match=r"token id 257 \('<\|end\|>'\) is beyond the model's"):
        load(copy, rows)


@pytest.mark.parametrize(
    ("stored", "precision", "dtype"),
    [
        (None, "bf16", torch.bfloat16),
        (None, "fp32", torch.float32),
        ("bf16", "bf16", torch.bfloat16),
        ("fp16", "fp16", torch.float16),
        ("fp32", "bf16", torch.float32),
        ("fp32", "fp16", torch.float32),
        ("bf16", "fp32", None),  # would compute in bf16 throughout
        ("fp16", "fp32", None),  # and here without a loss scaler
        ("bf16", "fp16", None),
        ("fp16", "bf16", None),
    ],
)
def test_a_frozen_base_is_stored_in_fp32_or_in_what_is_computed_in(
    stored: str | None, precision: str, dtype: torch.dtype | None
) -> None:
    overrides = {"train.device": "cpu", "train.precision": precision, "model.dtype": stored}
    config = load_config(overrides=overrides)
    machine = Machine("cpu", None)
    if dtype is None:
        with pytest.raises(UserError, match=f"model.dtype={stored} with train.precision="):
            decide(config, machine)
    else:
        assert base_dtype(decide(config, machine)) == dtype
    full = load_config(overrides={**overrides, "train.method": "full"})
    assert base_dtype(decide(full, machine)) == torch.float32  # masters, whatever is asked
