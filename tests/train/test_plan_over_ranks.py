"""The plan of a run over ranks: what each holds, does and sends, and whether it can start.

Expected bytes are RELIABILITY's table and closed formulas over the models' published sizes.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from models.config import DecoderConfig
from train import run
from train.config.command_line import parse
from train.config.load import load_config
from train.inputs.known import NO_DATA, KnownData, Unknown
from train.plan.decide import UNKNOWN, Machine
from train.plan.document import plan_document
from train.plan.ledger import find_decoder_config
from train.plan.sharing import communication_bytes, messages_of_a_step
from train.plan.sizes import model_sizes
from train.plan.text import render_plan
from train.text import size_text

# Seed 002's hardware: A100s of 80 GB, so many for each model.
A100 = Machine("cuda", 80 * 10**9)
SEED_002 = {"starcoder2-3b": 2, "starcoder2-7b": 4, "starcoder2-15b": 6}
LASTING = ("weights", "adapters", "gradients", "optimizer")


def document_of(
    preset: str,
    ranks: int,
    machine: Machine = A100,
    data: KnownData | Unknown = NO_DATA,
    **changes: Any,
) -> dict[str, Any]:
    config = load_config(preset, overrides={k.replace("__", "."): v for k, v in changes.items()})
    return plan_document(config, data, architecture(preset), machine, ranks)


def architecture(preset: str) -> DecoderConfig:
    found = find_decoder_config(load_config(preset))
    assert not isinstance(found, Unknown)
    return found


@pytest.mark.parametrize(
    ("preset", "ranks", "optimizer", "gigabytes"),
    [
        ("starcoder2-15b", 2, "adafactor", 63.8),
        ("starcoder2-15b", 4, "adafactor", 31.9),
        ("starcoder2-15b", 6, "adafactor", 21.3),
        ("starcoder2-15b", 8, "adafactor", 16.0),
        ("starcoder2-15b", 2, "adamw", 127.7),
        ("starcoder2-15b", 4, "adamw", 63.8),
        ("starcoder2-15b", 6, "adamw", 42.6),
        ("starcoder2-15b", 8, "adamw", 31.9),
        ("starcoder2-3b", 2, "adafactor", 12.1),
        ("starcoder2-3b", 2, "adamw", 24.2),
        ("starcoder2-7b", 4, "adafactor", 14.3),
        ("starcoder2-7b", 4, "adamw", 28.7),
    ],
)
def test_what_lasts_on_a_rank_is_the_table_s(
    preset: str, ranks: int, optimizer: str, gigabytes: float
) -> None:
    memory = document_of(preset, ranks, optimizer__name=optimizer)["memory"]
    # The table is printed to a decimal, and leaves Adafactor's statistics out.
    lasting = sum(memory[name] for name in LASTING)
    assert lasting / 1e9 == pytest.approx(gigabytes, abs=0.08)
    assert memory["weights"] + memory["gradients"] + (
        memory["optimizer"] if optimizer == "adamw" else 0
    ) == pytest.approx(gigabytes * 1e9, abs=5.1e7)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("preset", SEED_002)
def test_seed_002_fits_its_gpus(preset: str, method: str) -> None:
    suffix = "-lora" if method == "lora" else ""
    document = document_of(preset + suffix, SEED_002[preset])
    assert document["fits"] is True
    memory = document["memory"]
    parts = {name: size for name, size in memory.items() if name != "total"}
    assert sum(parts.values()) == memory["total"] <= A100.memory
    assert document["sharding"] == ("shard" if method == "full" else "replicate")
    ranks, sizes = (
        SEED_002[preset],
        model_sizes(architecture(preset), method, load_config(preset).lora),
    )
    if method == "full":
        for name in ("weights", "gradients"):
            assert parts[name] == pytest.approx(4 * sizes.base / ranks, rel=1e-3)
        assert parts["gathered"] > 4 * sizes.outside_layers
    else:  # replicas: all of it on each
        assert parts["weights"] >= sizes.base * 2
        assert parts["gathered"] == 0
        assert parts["optimizer"] == 8 * sizes.trainable
    assert not [w for w in document["warnings"] if w.startswith("memory")]


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    sizes = model_sizes(architecture("starcoder2-3b"), "full", load_config("starcoder2-3b").lora)
    for ranks in (1, 2, 5, 7):
        share = sizes.share(ranks)
        rows = sum(
            -(-shape[0] // ranks) * (shape[1] if shape[1:] else 1) for shape in sizes.base_shapes
        )
        assert share.base == share.trainable == rows >= sizes.base / ranks
    assert sizes.share(1) == sizes


def test_lora_replicates_where_the_base_fits_and_shares_it_elsewhere() -> None:
    fits = document_of("starcoder2-15b-lora", 6, train__precision="bf16")
    assert (fits["sharding"], fits["memory"]["gathered"]) == ("replicate", 0)
    small = Machine("cuda", 24 * 10**9)
    shared = document_of("starcoder2-15b-lora", 6, small, train__precision="bf16")
    assert (shared["sharding"], shared["fits"]) == ("shard", True)
    sizes = model_sizes(architecture("starcoder2-15b"), "lora", load_config("default").lora)
    memory = shared["memory"]
    assert memory["weights"] == pytest.approx(2 * sizes.base / 6, rel=1e-3)
    assert memory["gradients"] == fits["memory"]["gradients"] == 4 * sizes.trainable
    assert memory["gathered"] == 2 * (2 * sizes.layer + sizes.outside_layers)
    # What was set stays, and where memory is not known the base is taken to fit.
    asked = document_of("starcoder2-15b-lora", 6, train__sharding="shard")
    assert asked["sharding"] == "shard"
    assert document_of("starcoder2-15b-lora", 6, UNKNOWN)["sharding"] == "replicate"
    assert document_of("starcoder2-15b-lora", 1, small)["sharding"] is None


def test_what_ranks_send_in_a_step() -> None:
    """One all-reduce for replicas; per micro-batch gathers, forward and backward, and a scatter."""
    adapters = document_of("starcoder2-3b-lora", 4)
    assert adapters["communication_bytes"] == round(
        2 * 3 / 4 * 4 * adapters["trainable_parameters"]
    )
    assert document_of("starcoder2-3b-lora", 1)["communication_bytes"] is None
    full = document_of("starcoder2-3b", 2, train__precision="bf16")
    decoder, base = architecture("starcoder2-3b"), full["total_parameters"]
    vocabulary = decoder.vocab_size * decoder.hidden_size + 2 * decoder.hidden_size
    layers = base - vocabulary  # the head is tied; the final norm has a bias
    micro_batches = 2  # 12 examples in eights
    assert full["micro_batches_per_step"] == micro_batches
    expected = micro_batches * (2 * 2 * layers + 4 * vocabulary + 4 * base) / 2
    assert full["communication_bytes"] == round(expected)
    shared = document_of("starcoder2-3b-lora", 2, train__precision="bf16", train__sharding="shard")
    gathers = micro_batches * (2 * 2 * layers + 2 * vocabulary) / 2
    assert shared["communication_bytes"] == round(gathers + 4 * shared["trainable_parameters"])


def test_the_document_s_bytes_are_the_messages() -> None:
    config = load_config("starcoder2-15b", overrides={"train.precision": "bf16"})
    decoder = architecture("starcoder2-15b")
    sizes = model_sizes(decoder, "full", config.lora)
    messages = messages_of_a_step(config, decoder, sizes, "shard", 1, (2, 4))
    document = document_of("starcoder2-15b", 6, train__precision="bf16")
    assert document["communication_bytes"] == communication_bytes(messages, 6)


def test_the_text_says_what_a_rank_does() -> None:
    data = KnownData(20_000, 0, 0, [600] * 20_000, {})
    document = document_of("starcoder2-15b", 6, data=data)
    assert document["tokens_per_rank"] == 2500  # 25 × 600 / 6
    text = render_plan(document)
    assert "on 6 ranks 5/4/4/4/4/4, in 1 micro-batch of 5 a rank, about 2,500 tokens each" in text
    sent = size_text(document["communication_bytes"])
    assert f"they share it (train.sharding); each sends {sent} a step" in text
    assert "gathered " in text
    assert "each has the model whole" in render_plan(document_of("starcoder2-3b-lora", 2))
    alone = render_plan(document_of("starcoder2-3b-lora", 1))
    assert "train.sharding" not in alone and "gathered" not in alone


@pytest.mark.parametrize(
    ("preset", "ranks", "changes", "remedy"),
    [
        ("starcoder2-15b", 1, {}, "start more ranks (torchrun), which can share the model"),
        ("starcoder2-15b", 2, {}, "start more ranks, or take a smaller model"),
        (
            "starcoder2-15b-lora",
            2,
            {"train__sharding": "replicate", "model__stream_layers": False},
            "set train.sharding=shard",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    preset: str, ranks: int, changes: dict[str, Any], remedy: str
) -> None:
    card = Machine("cuda", 48 * 10**9)
    document = document_of(preset, ranks, card, **changes)
    assert document["fits"] is False
    (said,) = [warning for warning in document["warnings"] if warning.startswith("memory")]
    assert "does not fit: about" in said and remedy in said
    assert document_of(preset, ranks, UNKNOWN, **changes)["fits"] is None


def test_a_plan_of_what_cannot_start_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "starcoder2-15b", "--plan", "--json", "--memory", "80GB", "--ranks"]
    codes = []
    for ranks in (1, 6):
        codes.append(run.main([*arguments, str(ranks)]))
        document = json.loads(capsys.readouterr().out)
        assert document["fits"] is (codes[-1] == 0)
    assert codes == [2, 0]


README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
TORCHRUN = re.findall(r"^(?:srun )?torchrun (--(?:.*\\\n)*.*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", TORCHRUN)
def test_a_command_of_the_readme_is_torchrun_s_and_fits(command: str) -> None:
    parser = get_args_parser()
    given = parser.parse_args(shlex.split(command.replace("\\\n", " ")))
    assert given.module and given.training_script == "train.run"
    asked = parse(given.training_script_args)
    config = load_config(asked.preset, asked.config_file, asked.overrides)
    ranks = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
    assert ranks == SEED_002[asked.preset or ""]
    document = plan_document(config, NO_DATA, architecture(asked.preset or ""), A100, ranks)
    assert document["fits"] is True


def test_the_readme_has_seed_002_s_presets_on_its_gpus() -> None:
    assert len(TORCHRUN) == 5
    for preset, ranks in SEED_002.items():
        assert f"torchrun --nproc-per-node {ranks} -m train.run --preset {preset}\n" in README
    lasting = []
    for preset, ranks in SEED_002.items():
        memory = document_of(preset, ranks)["memory"]
        lasting.append(f"{sum(memory[name] for name in LASTING) / 2**30:.1f}")
    assert f"planned at {lasting[0]}, {lasting[1]} and {lasting[2]} GiB a rank" in README
