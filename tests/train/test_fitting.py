"""With which settings a run fits a card: what is said of them is what the run would decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.config import DecoderConfig
from train import run
from train.config.load import load_config
from train.inputs.known import NO_DATA, Unknown
from train.plan.decide import Machine, decide
from train.plan.document import plan_document
from train.plan.ledger import find_decoder_config
from train.plan.text import render_plan
from train.text import size_text

GB = 10**9


def document_of(preset: str, memory: int, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    config = load_config(preset, overrides=changes)
    decoder = find_decoder_config(config)
    assert not isinstance(decoder, Unknown)
    machine = Machine("cuda", memory, (8, 0))
    return plan_document(config, NO_DATA, decoder, machine, ranks)


def architecture(preset: str) -> DecoderConfig:
    decoder = find_decoder_config(load_config(preset))
    assert not isinstance(decoder, Unknown)
    return decoder


@pytest.mark.parametrize(
    ("preset", "memory", "ranks"),
    [
        ("llama2-7b", 24 * GB, 1),
        ("starcoder2-7b-lora", 24 * GB, 1),
        ("starcoder2-15b", 80 * GB, 6),
    ],
)
def test_what_fits_as_it_is_asked(preset: str, memory: int, ranks: int) -> None:
    document = document_of(preset, memory, ranks)
    (way,) = document["fitting"]["ways"]
    assert (way["settings"], way["slower"], way["changes"]) == ({}, 1.0, [])
    assert way["needed"] == document["memory"]["total"] <= memory
    assert "as it is: " in render_plan(document)


@pytest.mark.parametrize(
    ("preset", "memory", "changes", "settings"),
    [
        ("llama2-7b", 10 * GB, {}, {"model.quantization": "nf4"}),
        ("starcoder2-7b-lora", 14 * GB, {}, {"model.quantization": "nf4"}),
        ("starcoder2-15b", 141 * GB, {}, {"train.masters": "bf16"}),
        # By paging its moments or by smaller micro-batches the result stays as it is.
        ("starcoder2-3b", 50 * GB, {"optimizer.name": "adamw"}, {"optimizer.name": "paged_adamw"}),
        ("codellama-7b", 151 * GB // 10, {}, {"train.per_device_train_batch_size": 1}),
    ],
)
def test_a_way_that_is_named_is_one(
    preset: str, memory: int, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The plan of the run with the settings fits, needs what was said, and has the same batch."""
    # Streamed, a LoRA run would fit as it is (tests/train/test_streaming.py).
    changes = {"model.stream_layers": False, **changes}
    document = document_of(preset, memory, **changes)
    assert document["fits"] is False
    ways = document["fitting"]["ways"]
    assert any(settings.items() <= way["settings"].items() for way in ways), ways
    for way in ways:
        with_it = document_of(preset, memory, **{**changes, **way["settings"]})
        assert with_it["fits"] is True
        assert with_it["memory"]["total"] == way["needed"] <= memory
        assert with_it["effective_batch_size"] == document["effective_batch_size"]
    changed = [bool(way["changes"]) for way in ways]
    assert changed == sorted(changed) and len(ways) == len(set(changed))
    (said,) = [warning for warning in document["warnings"] if warning.startswith("memory: does")]
    assert "add " in said and next(iter(ways[0]["settings"])) in said


def test_the_fastest_way_is_taken_and_its_time_is_the_work_it_adds() -> None:
    """llama2-7b computing layers again has 6 in the place of 4 operations a weight."""
    document = document_of("llama2-7b", 16 * GB, gradient_checkpointing="none")
    (way, *others) = document["fitting"]["ways"]
    assert set(way["settings"]) == {"model.gradient_checkpointing"}
    assert way["settings"]["model.gradient_checkpointing"] == "layers"
    # The adapters' own 6 operations are 0.3 % of the weights.
    assert way["slower"] == pytest.approx(1.5, rel=0.01)
    assert [other["settings"] for other in others] == [{"model.quantization": "nf4"}]
    assert 1.0 < others[0]["slower"] < 1.3


def test_what_would_do_where_nothing_fits() -> None:
    document = document_of("starcoder2-15b", 24 * GB)
    fitting = document["fitting"]
    assert fitting["ways"] == []
    least = fitting["least"]
    with_it = document_of("starcoder2-15b", 24 * GB, **least["settings"])
    assert with_it["memory"]["total"] == least["needed"]
    assert least["settings"]["train.masters"] == "bf16"
    assert fitting["would_fit"]["card"] == "a100"
    ranks = fitting["would_fit"]["ranks"]
    assert document_of("starcoder2-15b", 24 * GB, ranks)["fits"] is True
    assert document_of("starcoder2-15b", 24 * GB, ranks // 2)["fits"] is False
    text = render_plan(document)
    assert "does not fit" in text
    assert f"as asked it fits on {ranks} such cards (--ranks {ranks})" in text
    assert "which fits --gpu a100" in text


def test_one_card_of_80_gb_is_told_what_fifteen_billion_parameters_take() -> None:
    """Of 15.96e9 parameters bf16 weights and gradients alone are 63.8 GB."""
    document = document_of("starcoder2-15b", 80 * GB, **{"train.masters": "bf16"})
    assert document["memory"]["weights"] + document["memory"]["gradients"] == pytest.approx(
        63.8 * GB, rel=2e-3
    )


def test_settings_that_do_not_go_with_the_run_are_not_named() -> None:
    """DoRA needs weights that are numbers: nothing is quantised under it."""
    document = document_of("llama2-7b", 10 * GB, **{"lora.use_dora": True})
    least = document["fitting"]["least"]
    assert "model.quantization" not in least["settings"]


def test_a_plan_for_one_rank_is_not_refused_for_what_many_may_not() -> None:
    """How many ranks would do is asked of a run whose adapters no shared base can serve."""
    asked = {"lora.use_dora": True, "train.sharding": "shard"}
    document = document_of("llama2-7b", 1 * GB, **asked)
    assert document["fits"] is False
    assert document["fitting"]["would_fit"]["ranks"] is None


def test_the_command_says_it_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    resident = "model.stream_layers=false"
    asked = ["--preset", "llama2-7b", resident, "--plan", "--json", "--memory"]
    assert run.main([*asked, "24GB"]) == 0
    assert json.loads(capsys.readouterr().out)["fitting"]["ways"][0]["settings"] == {}
    assert run.main([*asked, "10GB"]) == 2
    (way,) = json.loads(capsys.readouterr().out)["fitting"]["ways"]
    assert way["settings"]["model.quantization"] == "nf4"
    settings = [f"{key}={value}" for key, value in way["settings"].items()]
    assert run.main([*asked, "10GB", *settings]) == 0


@pytest.mark.parametrize(
    ("row", "preset", "memory", "ranks", "changes"),
    [
        (0, "llama2-7b", 24, 1, {}),
        (0, "llama2-7b", 16, 1, {"model.quantization": "nf4"}),
        (1, "starcoder2-7b-lora", 24, 1, {}),
        (1, "starcoder2-7b-lora", 24, 1, {"model.quantization": "nf4"}),
        (2, "starcoder2-15b", 80, 6, {}),
        (3, "starcoder2-15b", 141, 1, {"train.masters": "bf16"}),
        (4, "starcoder2-15b", 80, 1, {"train.masters": "bf16", "per_device_train_batch_size": 1}),
        (5, "starcoder2-7b", 80, 1, {"optimizer.name": "paged_adamw"}),
    ],
)
def test_readme_says_what_the_plan_says(
    row: int, preset: str, memory: int, ranks: int, changes: dict[str, Any]
) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("| preset | card | as it is asked | and |\n|---|---|---|---|\n")[1]
    line = table.splitlines()[row]
    document = document_of(preset, memory * GB, ranks, **changes)
    assert document["fits"] is True
    assert f"`{preset}`" in line and f"{size_text(document['memory']['total'])}" in line
    policy = document["gradient_checkpointing"]
    assert ("computed again" in line) >= (policy in ("layers", "mlp"))


def test_without_known_memory_nothing_is_said() -> None:
    config = load_config("llama2-7b")
    machine = Machine(None, None)
    document = plan_document(decide(config, machine), NO_DATA, architecture("llama2-7b"), machine)
    assert document["fitting"] is None
