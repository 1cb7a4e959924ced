"""Method × optimizer × masters × policy × quantisation × adapters: what runs, and what is refused.

What is allowed runs two steps, stopped between them, and ends in the bits of the run that was not
stopped; what is not is refused in one sentence before anything is read.
"""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import resume, rows_of, signalled, train, trained_bits

from files.errors import UserError
from models.recompute import POLICIES
from train.config.load import load_config
from train.optim import OPTIMIZERS
from train.plan.decide import Machine, decide
from train.run import main

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"lora.use_dora": True},
    "pissa": {"lora.init_lora_weights": "pissa"},
}
Combination = tuple[str, str, str, str, str | None, str]
ALL: list[Combination] = list(
    itertools.product(
        ("lora", "full"), OPTIMIZERS, ("fp32", "bf16"), POLICIES, (None, "nf4", "int8"), ADAPTERS
    )
)


def allowed(combination: Combination) -> bool:
    """Say what README promises: quantised and DoRA's bases are frozen, bf16 masters are trained."""
    method, optimizer, masters, _, quantization, adapters = combination
    if method == "full":
        rounds = masters == "fp32" or optimizer != "adamw_8bit"
        return quantization is None and adapters == "plain" and rounds
    return masters == "fp32" and (quantization is None or adapters == "plain")


def settings(combination: Combination) -> dict[str, Any]:
    method, optimizer, masters, policy, quantization, adapters = combination
    return {
        "train.method": method,
        "optimizer.name": optimizer,
        "train.masters": masters,
        "train.precision": "bf16",
        "model.gradient_checkpointing": policy,
        "model.quantization": quantization,
        **ADAPTERS[adapters],
    }


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_not_allowed_is_refused_in_one_sentence(method: str) -> None:
    for combination in (one for one in ALL if one[0] == method):
        try:
            decide(load_config(overrides=settings(combination)), Machine("cpu", None))
        except UserError as error:
            assert not allowed(combination), f"{combination}: {error}"
            assert "\n" not in str(error) and "; " in str(error), combination
        else:
            assert allowed(combination), combination


# What is refused beside these, each with what makes it so.
FULL, STREAMED = {"train.method": "full"}, {"model.stream_layers": "true"}
REFUSED: list[dict[str, Any]] = [
    {"optimizer.name": "adamw_8bit", "train.sharding": "shard", **FULL},
    {"train.masters": "bf16", "train.precision": "fp32", **FULL},
    {"model.quantization": "nf4", "train.sharding": "shard"},
    {"model.quantization": "nf4", "train.compile": True},
    {"model.dtype": "fp16", "train.precision": "bf16"},
    {"model.gradient_checkpointing": "mlp", "train.compile": True},
    {"optimizer.loraplus_lr_ratio": 16, **FULL},
    {"lora.init_lora_weights": "pissa", "lora.use_dora": True},
    {"lora.init_lora_weights": "pissa", "lora.r": 33},
    {"lora.init_lora_weights": "pissa", "lora.lora_alpha": 40000},
    {"lora.modules_to_save": ["norm"]},
    {"lora.modules_to_save": ["lm_head"], "lora.trainable_token_indices": 3},
    {"lora.trainable_token_indices": 257},
    {"lora.rank_pattern": "{q_porj = 2}"},
    {"lora.init_from": "nowhere"},
    *(
        {**STREAMED, **with_it}
        for with_it in (
            {},
            FULL,
            {"model.quantization": "int8"},
            {"train.sharding": "shard"},
            {"train.compile": True},
            {"lora.use_dora": True},
            {"lora.init_lora_weights": "pissa"},
        )
    ),
]


def first_of_each_sentence() -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for combination in (one for one in ALL if not allowed(one)):
        try:
            decide(load_config(overrides=settings(combination)), Machine("cpu", None))
        except UserError as error:
            found.setdefault(str(error), settings(combination))
    return list(found.values())


def test_the_command_refuses_each_with_2_and_leaves_nothing(
    model_folder: Path, rows_file: Path, tmp_path: Path, refused: runs.Refused
) -> None:
    given = runs.arguments(runs.settings(model_folder, rows_file, tmp_path / "run"))
    sentences = set()
    for changes in (*first_of_each_sentence(), *REFUSED):
        asked = runs.changed(given, *runs.arguments(changes))
        told = refused(main, *asked)
        assert told == refused(main, *asked, "--plan"), changes
        assert not (tmp_path / "run").exists(), changes
        sentences.add(told)
    assert len(sentences) >= len(REFUSED) + 8


RUN = [combination for combination in ALL if allowed(combination)]


def pairs(combination: Combination) -> set[tuple[tuple[int, str | None], ...]]:
    return set(itertools.combinations(enumerate(combination), 2))


def quick() -> list[Combination]:
    """Return few combinations in which every pair of values that is allowed occurs."""
    chosen: list[Combination] = []
    missing = set().union(*map(pairs, RUN))
    while missing:
        chosen.append(max(RUN, key=lambda one: len(pairs(one) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


QUICK = quick()


@pytest.mark.parametrize(
    "combination",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in RUN],
    ids=lambda combination: "-".join(map(str, combination)),
)
def test_what_is_allowed_runs_and_goes_on_bit_for_bit(
    combination: Combination, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    changes = {
        **settings(combination),
        "train.max_steps": 2,
        "schedule.warmup_steps": 0,
        "checkpoint.steps": 1,
    }
    whole = train(runs.settings(model_folder, rows_file, tmp_path / "whole", **changes))
    values = runs.settings(model_folder, rows_file, tmp_path / "stopped", **changes)
    assert train(values, signalled(1, signal.SIGTERM)).reason == "sigterm"
    resume(tmp_path / "stopped")
    assert trained_bits(tmp_path / "stopped") == trained_bits(whole.folder)
    assert rows_of(tmp_path / "stopped") == rows_of(whole.folder)
