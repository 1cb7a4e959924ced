"""Predictions over many ranks: arithmetic by hand, and the plan's own messages."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import LINKS, RANKS, Assumptions, Link, predict, simulate
from models.config import DecoderConfig
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.known import NO_DATA, Unknown
from train.plan.decide import Machine
from train.plan.document import plan_document
from train.plan.ledger import find_decoder_config
from train.plan.sharing import Message
from train.plan.sizes import model_sizes

SLOW = Link("slow", 1e9, 0.0, "a test")
FAST = Link("fast", 10e9, 0.0, "a test")
PLAIN = Assumptions(gpus_per_node=4, adapters=1, attained=1.0, overlap=0.5, spread=0.0)


def asked(method: str) -> tuple[RunConfig, DecoderConfig]:
    changes = {"train.method": method, "train.precision": "bf16"}
    config = load_config("starcoder2-3b", overrides=changes)
    decoder = find_decoder_config(config)
    assert not isinstance(decoder, Unknown)
    return config, decoder


def test_a_ring_by_hand() -> None:
    """4 ranks send 2 · 3/4 of an all-reduce each, and 3/4 of a gather."""
    reduce, gather = Message("all-reduce", 4 * 10**9, 1), Message("all-gather", 4 * 10**9, 2)
    alone = predict([reduce], 1.0, 4, FAST, SLOW, PLAIN)
    assert alone["waiting"] == pytest.approx(0.6)
    assert alone["efficiency"] == pytest.approx(1 / 1.6)
    # 0.6 s of gathers, of which half a second of compute hides 0.5.
    assert predict([gather], 1.0, 4, FAST, SLOW, PLAIN)["waiting"] == pytest.approx(0.1)
    assert predict([gather], 2.0, 4, FAST, SLOW, PLAIN)["waiting"] == 0
    # Over two nodes the network is the slowest link, unless there are enough adapters.
    assert predict([reduce], 1.0, 8, FAST, SLOW, PLAIN)["waiting"] == pytest.approx(7.0)
    several = dataclasses.replace(PLAIN, adapters=20)
    assert predict([reduce], 1.0, 8, FAST, SLOW, several)["waiting"] == pytest.approx(0.7)
    # Half of the bandwidth, and three latencies over eight ranks.
    late = dataclasses.replace(SLOW, latency=0.5)
    half = dataclasses.replace(PLAIN, attained=0.5)
    assert predict([reduce], 1.0, 8, FAST, late, half)["waiting"] == pytest.approx(14 + 1.5)


def test_what_a_rank_computes_by_hand() -> None:
    """8 × 1,024 tokens, 6 operations a weight, 8 where layers are computed again."""
    config, decoder = asked("full")
    sizes = model_sizes(decoder, "full", config.lora)
    once = scaling.compute_seconds(config, sizes, "a100", "none")
    assert once == pytest.approx(8192 * 6 * sizes.matmul / (0.4 * 312e12))
    again = scaling.compute_seconds(config, sizes, "a100", "layers")
    assert again == pytest.approx(once * 8 / 6)


def test_the_slowest_of_many_is_waited_for() -> None:
    spread = dataclasses.replace(PLAIN, spread=0.1)
    found = predict([], 2.0, 64, FAST, SLOW, spread)
    assert found["seconds"] == pytest.approx(2 * (1 + 0.1 * math.sqrt(2 * math.log(64))))
    assert predict([], 2.0, 1, FAST, SLOW, spread) == {
        "seconds": 2.0,
        "waiting": 0.0,
        "efficiency": 1.0,
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_plan_and_simulation_send_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted is of the very messages that the plan adds up."""
    seen: list[tuple[int, float]] = []
    honest = scaling.predict

    def noting(messages: list[Message], compute: float, ranks: int, *rest: Any) -> dict[str, float]:
        seen.append((ranks, sum(message.times * message.sent(ranks) for message in messages)))
        return honest(messages, compute, ranks, *rest)

    monkeypatch.setattr(scaling, "predict", noting)
    config, decoder = asked(method)
    rows = simulate(config, decoder, "a100", 0.5)
    assert [row["ranks"] for row in rows] == [ranks for ranks, _ in seen]
    assert {row["ranks"] for row in rows} == set(RANKS)
    for row, (ranks, sent) in zip(rows, seen, strict=True):
        batch = ranks * config.train.per_device_train_batch_size
        train = dataclasses.replace(config.train, effective_batch_size=batch)
        document = plan_document(
            dataclasses.replace(config, train=train),
            NO_DATA,
            decoder,
            Machine("cuda", 80 * 10**9),
            ranks,
        )
        assert row["communication_bytes"] == document["communication_bytes"]
        assert round(sent) == (document["communication_bytes"] or 0)
        assert row["sharding"] == document["sharding"]
        assert row["predicted"] is True


def test_adapters_scale_better_than_every_weight() -> None:
    (lora, full) = (
        {(r["ranks"], r["inside"], r["network"]): r for r in simulate(*asked(method), "a100", 0.5)}
        for method in ("lora", "full")
    )
    for key, row in lora.items():
        if key[0] > 8:  # inside a node all may hide behind the compute
            assert row["efficiency"] > full[key]["efficiency"]
        assert (row["sharding"], full[key]["sharding"]) == (
            (None, None) if key[0] == 1 else ("replicate", "shard")
        )
    fast, slow = full[64, "nvlink3", "400"], full[64, "nvlink3", "200"]
    assert fast["efficiency"] > slow["efficiency"]


def test_the_tables_say_that_they_predict_and_what_they_assume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--preset", "starcoder2-15b", "--card", "a100", "--seconds", "0.7"]
    assert scaling.main([*arguments, "--adapters", "4", "--spread", "0.03"]) == 0
    text = capsys.readouterr().out
    assert text.count("PREDICTED tokens/s") == 2
    assert "Assumed: nodes of 8 GPUs and 4 network adapter(s)" in text
    assert "hide behind 80%" in text and "spreads by 3%" in text
    assert "a rank's compute is given" in text
    assert "no room" in text  # 15B's masters on one card
    for link in LINKS.values():
        assert link.source in text
    assert scaling.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["assumptions"]["overlap"] == 0.8
    assert all(row["predicted"] for row in document["rows"])
