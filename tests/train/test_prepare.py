"""Which rows become which set."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from files.errors import UserError
from models.config import read_config
from train.config import load_config
from train.decide import Machine, decide
from train.prepare import Data, base_dtype, load_data


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
def test_a_set_that_is_named_must_have_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["train"] * 5)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        load(model_folder, rows, **{"data.valid": str(empty)})


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
