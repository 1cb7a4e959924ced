"""generation_config.json says where a text ends: it stays with what was trained, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import settings, train
from transformers import AutoModelForCausalLM, GenerationConfig

from data.tokenizer import Tokenizer
from lora import LoraConfig, inject, save_adapter
from models import load_model
from train.generation.loaded import (
    find_stop_ids,
    load_from_adapter,
    load_from_model,
    load_run,
)
from train.merge.fold import merge_adapter

GENERATION_CONFIG = "generation_config.json"

# Odd spacing and a key of another version: a file that is read and written again loses them.
TEXT = '{\n "eos_token_id" : [0, 98],"a_key_of_tomorrow": null}\n'
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model_folder, folder)
    (folder / GENERATION_CONFIG).write_text(TEXT)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = load_model(base)
    inject(model, LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_keeps_it_in_final_and_best(
    method: str, base: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"train.method": method, "train.max_steps": 2, "eval.steps": 1}
    train(settings(base, rows_file, run, **changes))
    for name in ("final", "best"):
        assert (run / name / GENERATION_CONFIG).read_text() == TEXT
    assert load_run(run, CPU, FP32).stop_ids == {0, 98}
    if method == "full":
        # The base is not needed any more, and transformers stops at the same ids.
        theirs = AutoModelForCausalLM.from_pretrained(run / "final").generation_config
        assert theirs.eos_token_id == [0, 98]
        assert load_from_model(str(run / "final"), CPU, FP32).stop_ids == {0, 98}


def test_a_base_without_one_gives_none(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    train(settings(model_folder, rows_file, tmp_path / "run", **{"train.max_steps": 1}))
    assert not (tmp_path / "run" / "final" / GENERATION_CONFIG).exists()


def test_merging_keeps_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "merged", str(base))
    assert (tmp_path / "merged" / GENERATION_CONFIG).read_text() == TEXT


def test_the_one_beside_an_adapter_rules_over_its_bases(adapter: Path, base: Path) -> None:
    assert load_from_adapter(adapter, str(base), CPU, FP32).stop_ids == {0, 98}
    (adapter / GENERATION_CONFIG).write_text('{"eos_token_id": 7}')
    assert load_from_adapter(adapter, str(base), CPU, FP32).stop_ids == {0, 7}


@pytest.mark.parametrize(
    ("value", "ids"), [(None, set()), (0, {0}), (5, {5}), ([0, 5], {0, 5}), ([], set())]
)
def test_null_names_no_id_and_zero_names_one(
    value: object, ids: set[int], base: Path, tmp_path: Path
) -> None:
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": value}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    shutil.copyfile(base / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path)
    config = load_model(base).config
    object.__setattr__(config, "eos_token_id", None)
    assert find_stop_ids(config, tokenizer, tmp_path) == ids
    theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(theirs if isinstance(theirs, list) else [theirs]) - {None} == ids
