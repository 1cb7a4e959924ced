"""Ranks that would not do the same run: nodes with other files, ranks with other settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import ended, said, start_ranks
from small import DROPOUTS, small_model
from trials import settings

from models.weights import save_model
from train.config.load import load_config
from train.process.world import World
from train.run import execute, run

Changes = dict[str, Any]
TEXTS = ["abcdefghij"[: 4 + i % 6] * (1 + i % 3) for i in range(11)]
BACKWARDS = [text[::-1] for text in TEXTS]


def rows_in(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def other_base(one_layer: Path, folder: Path, vocab_size: int = 257) -> Changes:
    """Return the setting that names a base of like shapes, in a folder of its own."""
    shutil.copytree(one_layer, folder)
    model = small_model("starcoder2", vocab_size=vocab_size, num_hidden_layers=1, **DROPOUTS)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    save_model(model, folder, config=model.config)
    return {"model.path": str(folder)}


def refused(folder: Path, values: dict[str, Any], of_rank_1: Changes) -> str:
    """Start two ranks, of which rank 1 differs; return what it says after both have ended."""

    def work(world: World) -> int:
        changes = {**values, "train.output_dir": str(folder / "run")}
        changes |= of_rank_1 if world.rank == 1 else {}
        return execute(load_config(overrides=changes), world=world).exit_code

    assert ended(start_ranks(2, work, folder, timeout=20)) == [2, 2]
    assert said(folder, 0) == ""
    assert said(folder, 1).count("error: ") == 1
    return said(folder, 1)


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        (
            lambda folder, _: {"data.train": rows_in(folder / "other.jsonl", [*TEXTS, "one more"])},
            "what data.train holds is 12 examples (",
        ),
        (
            lambda folder, _: {
                "data.train": rows_in(folder / "other.jsonl", [t[::-1] for t in TEXTS])
            },
            "what data.train holds is 11 examples (",
        ),
        (lambda *_: {"data.valid": None}, "what data.valid holds is nothing on rank 1 and 3 ex"),
        (
            lambda *_: {"optimizer.learning_rate": 0.1},
            "optimizer.learning_rate is 0.1 on rank 1 and 0.05 on rank 0",
        ),
        (lambda *_: {"train.max_steps": 9}, "train.max_steps is 9 on rank 1 and 5 on rank 0"),
        (
            lambda folder, base: other_base(base, folder / "base"),
            "the model's model.safetensors is ",
        ),
        (
            lambda folder, base: other_base(base, folder / "base", vocab_size=260),
            "the model's config.json is ",
        ),
    ],
    ids=["more-rows", "other-rows", "no-valid", "learning-rate", "steps", "base", "config"],
)
def test_a_rank_that_would_do_another_run_is_refused(
    differs: Callable[[Path, Path], Changes],
    named: str,
    one_layer: Path,
    few_rows: Path,
    tmp_path: Path,
) -> None:
    values = settings(
        one_layer, few_rows, **{"data.train": rows_in(tmp_path / "rows.jsonl", TEXTS)}
    )
    told = refused(tmp_path, values, differs(tmp_path, one_layer))
    assert f"rank 1 of 2 would do another run than rank 0: {named}" in told
    if "safetensors" not in named:
        assert not (tmp_path / "run").exists()


def test_rows_in_memory_that_differ_are_refused(
    one_layer: Path, few_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that gives each rank a part of the rows, as it would to DistributedSampler."""
    values = settings(one_layer, few_rows, **{"train.output_dir": str(tmp_path / "run")})
    values = {key: value for key, value in values.items() if key != "data.train"}

    def work(world: World) -> int:
        monkeypatch.setattr(World, "from_environment", lambda **_: world)
        run(load_config(overrides=values), [{"text": text} for text in TEXTS[world.rank :: 2]])
        return 0

    assert ended(start_ranks(2, work, tmp_path, timeout=20)) == [2, 2]
    assert "what data.train holds is 5 examples (" in said(tmp_path, 1)
    assert not (tmp_path / "run").exists()


def test_the_same_files_in_other_places_are_one_run(
    one_layer: Path, few_rows: Path, tmp_path: Path
) -> None:
    """Each node has copies of its own."""
    shutil.copytree(one_layer, tmp_path / "model")
    shutil.copytree(few_rows, tmp_path / "rows")

    def work(world: World) -> int:
        places = (tmp_path / "model", tmp_path / "rows") if world.rank else (one_layer, few_rows)
        values = settings(*places, **{"train.output_dir": str(tmp_path / "run")})
        return execute(load_config(overrides=values), world=world).exit_code

    assert ended(start_ranks(2, work, tmp_path, timeout=20)) == [0, 0], said(tmp_path, 1)
