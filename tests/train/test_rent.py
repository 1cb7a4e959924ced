"""What a run would take on cards that can be rented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.traffic import ATTENTION_SHARE, Speed, report, with_layers
from files.errors import UserError
from train import run
from train.config.command_line import parse
from train.config.load import load_config
from train.config.toml import to_toml
from train.inputs.known import NO_DATA, Unknown
from train.plan.cards import CARDS
from train.plan.ledger import find_decoder_config, flops_per_token
from train.plan.rent import LEDGER_SHARE, OF_SPEED, render_rent, rent_document
from train.plan.sizes import model_sizes


def rented(preset: str, cards: str, prices: tuple[float, ...] = (), ranks: int = 1) -> Any:
    config = load_config(preset)
    decoder = find_decoder_config(config)
    return rent_document(config, NO_DATA, decoder, cards.split(","), prices, ranks)


def test_time_is_work_over_peak_and_cost_is_time_times_price() -> None:
    document = rented("llama2-7b", "a100,4090,l4", (1.5, 0.4, 0.3))
    tokens = 8 * 1024 * 1024  # epochs, rows of the seed, each as long as can be
    assert document["compute"]["tokens"] == tokens
    for row, peak, price in zip(
        document["cards"], (312e12, 165.2e12, 121e12), (1.5, 0.4, 0.3), strict=True
    ):
        low, high = row["predicted_tokens_per_second"]
        # 4 operations a weight of 6.6e9 in products, the adapters' 6.
        assert low == pytest.approx(0.4 * peak / (4 * 6.607e9 + 6 * 20e6), rel=2e-3)
        assert high == pytest.approx(low * LEDGER_SHARE / 0.4)
        assert row["hours"] == pytest.approx([tokens / high / 3600, tokens / low / 3600])
        assert row["cost"] == pytest.approx([hours * price for hours in row["hours"]])


def test_several_cards_cost_several_times_an_hour() -> None:
    one, two = (rented("llama2-7b", "a100", (2.0,), n)["cards"][0] for n in (1, 2))
    assert two["hours"] == pytest.approx([hours / 2 for hours in one["hours"]], rel=1e-3)
    assert two["cost"] == pytest.approx(one["cost"], rel=1e-3)
    assert "2 cards share each step" in render_rent(rented("llama2-7b", "a100", (2.0,), 2))


def test_what_does_not_fit_has_no_time_and_what_fits_otherwise_says_how() -> None:
    document = rented("starcoder2-15b", "a100,4090", (1.0,))
    first, second = document["cards"]
    assert first["fits"] and first["with"]["train.masters"] == "bf16"
    assert second["fits"] is False and second["hours"] is second["cost"] is None
    text = render_rent(document)
    assert "train.masters=bf16 (another result)" in text
    assert "no, needs " in text
    assert "predicted, no card was asked" in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "llama2-7b", "--plan", "--gpu", "A100 40GB, 4090", "--price", "1.5"]
    assert run.main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["card"] for row in document["cards"]] == ["A100 40GB", "4090"]
    assert {row["price"] for row in document["cards"]} == {1.5}
    assert run.main(["--preset", "starcoder2-15b", "--plan", "--gpu", "4090,l4"]) == 2
    text = capsys.readouterr().out
    assert "to rent by" in text and "cost" not in text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("--plan --price 2", "--price is what one --gpu costs an hour; name the cards"),
        ("--gpu a100 --price 2", "goes with --plan"),
        ("--plan --records runs", "--records is of cards: name those to plan for with --gpu"),
        ("--plan --gpu a100 --price 2,3", "has 2 prices for 1 card; give one for all"),
        ("--plan --gpu a100,l4 --price 2,x", "must be numbers such as"),
        ("--plan --gpu a100 --price -1", "--price"),
        ("--plan --gpu a100 --price nan", "must be numbers"),
        ("--plan --gpu a100,l4 --memory 24GB", "--memory is one card's"),
        ("--plan --gpu a100 --memory 24GB", "cannot be given with --gpu, which says it"),
    ],
)
def test_what_is_asked_badly_is_refused(asked: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(["--preset", "demo", *asked.split()])
    assert words in str(refused.value)
    with pytest.raises(UserError, match=r"--gpu 4080: is not one of"):
        rented("llama2-7b", "a100,4080")


def recorded(folder: Path, device: str, **changes: Any) -> Path:
    """Return the folder of a run of `llama2-7b` on a card: 100 steps of 1,000 tokens in 0.1 s."""
    asked = load_config("llama2-7b")
    there = rented("llama2-7b", "a100")
    plan = {name: there[name] for name in OF_SPEED if name != "batching"} | changes
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(asked))
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {"device": "cuda", "device_name": device}
    (folder / "environment.json").write_text(json.dumps(environment))
    step = {"kind": "train", "tokens": 1000, "loss": 1.0, "targets": 1000, "seconds": 0.1}
    steps = [{**step, "step": n, "seconds": 9.0 if n < 3 else 0.1} for n in range(1, 103)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    return folder


def test_a_like_run_on_the_card_takes_the_place_of_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10,000 tokens/s were measured, the first steps left out: 8 epochs of 1,048,576 at most."""
    like = recorded(tmp_path / "runs" / "like", "NVIDIA A100-SXM4-80GB")
    recorded(tmp_path / "runs" / "elsewhere", "NVIDIA L40S")
    recorded(tmp_path / "runs" / "other", "NVIDIA H100 80GB HBM3", precision="bf16")
    given = ["--preset", "llama2-7b", "--plan", "--gpu", "A100,h100", "--price", "3,5"]
    asked = [*given, "--records", str(tmp_path / "runs")]
    assert run.main([*asked, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["cards"]
    assert first["measured_tokens_per_second"] == pytest.approx([1e4, 1e4])
    assert first["measured"] == [
        {"run": str(like), "device": "NVIDIA A100-SXM4-80GB", "steps": 100}
    ]
    hours = 8 * 1024 * 1024 / 1e4 / 3600
    assert first["hours"] == pytest.approx([hours, hours])
    assert first["cost"] == pytest.approx([3 * hours, 3 * hours])
    assert second["measured_tokens_per_second"] is None and second["hours"][0] < second["hours"][1]
    assert second["unlike"] == [{"run": str(tmp_path / "runs" / "other"), "precision": "bf16"}]
    assert run.main(asked) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"\nA100 +74.5 GiB +as it is +10,000 measured +14 min +3.00 +0.70\n",
        text.replace("\n  ", "\n"),
    )
    assert f"A100: measured in {like} (NVIDIA A100-SXM4-80GB, 100 steps), predicted " in text
    assert "is no measure of this run: it had precision bf16" in text
    assert "tokens/s and time are else predicted" in text
    assert run.main([*given, "--records", str(like)]) == 0
    capsys.readouterr()
    for place, words in ((tmp_path, "is no run's folder and holds none"), ("no", "no such folder")):
        assert run.main([*given, "--records", str(place)]) == 2
        assert words in capsys.readouterr().err


def test_short_times_are_said_in_minutes_and_equal_ends_once() -> None:
    row = rented("llama2-7b", "a100", (0.0,))
    for hours, text in (
        ([0.001, 0.002], "under 1 min"),
        ([0.1, 0.1001], "  6 min  "),
        ([0.5, 1.9], "30–114 min"),
        ([1.96, 2.04], "  2.0 h  "),
        (None, "  -  "),
    ):
        row["cards"][0]["hours"] = hours
        assert text in render_rent(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "card"),
    [
        ("starcoder2-3b-lora", "a100"),
        ("starcoder2-3b-lora", "4090"),
        ("qwen2.5-coder-1.5b", "h200"),
        ("llama2-7b", "4090"),
        ("codellama-7b", "a100"),
        ("starcoder2-15b-lora", "h100"),
    ],
)
def test_the_upper_share_is_what_the_traffic_ledger_counts(preset: str, card: str) -> None:
    """Within the 12 % that its steps lie around it, of eight layers."""
    config = load_config(preset, overrides={"train.kernels": "triton", "train.precision": "bf16"})
    decoder = find_decoder_config(config)
    assert not isinstance(decoder, Unknown)
    decoder, there = with_layers(decoder, 8), CARDS[card]
    speed = Speed(0.9 * there.flops, 0.8 * there.bandwidth, ATTENTION_SHARE * there.flops)
    counted = report(config, decoder, there, speed)
    sizes = model_sizes(decoder, "lora", config.lora)
    work = flops_per_token(config, sizes, config.model.gradient_checkpointing)
    share = counted["predicted_tokens_per_second"] * work / there.peak_flops
    assert share == pytest.approx(LEDGER_SHARE, rel=0.12)
