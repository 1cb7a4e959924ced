"""The arithmetic of a run, the ledger of its memory, and the document that `--plan` prints."""

import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from files.errors import UserError
from kernels.segments import Segments
from lora import inject
from models import build
from models.config import DecoderConfig, parse_config
from models.recompute import POLICIES
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.adapters import lora_config
from train.inputs.known import NO_DATA, KnownData, Unknown
from train.plan.activations import activations_of
from train.plan.decide import UNKNOWN, Machine
from train.plan.document import plan_document
from train.plan.ledger import (
    MEMORY_CATEGORIES,
    disk_bytes,
    find_decoder_config,
    memory_ledger,
    micro_batch_tokens,
    widths,
)
from train.plan.sizes import model_sizes
from train.plan.steps import plan_run, rank_shares
from train.plan.text import head_rows, render_plan
from train.survey import print_plan
from train.text import size_text

TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = TINY | {"model_type": "llama", "intermediate_size": 704}
MISTRAL = LLAMA | {"model_type": "mistral"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 128}
STARCODER2 = TINY | {
    "model_type": "starcoder2",
    "intermediate_size": 1024,
    "use_bias": True,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.0,
}


def planned(num_examples: int, world_size: int = 1, *, num_valid: int | None = None, **overrides):
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return plan_run(load_config(overrides=keys), num_examples, world_size, num_valid=num_valid)


def decoder(raw: dict) -> DecoderConfig:
    return parse_config(raw, "a test")


# --- steps ---


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation", "steps"),
    [
        (22, 2, 4, 3),  # SEMANTICS §1: a floor would give 2
        (16, 2, 8, 1),
        (17, 2, 8, 2),
        (1, 8, 8, 1),
        (4530, 4, 4, 284),
        (12480, 4, 2, 1560),
    ],
)
def test_steps_per_epoch_round_up(examples: int, batch: int, accumulation: int, steps: int) -> None:
    plan = planned(
        examples, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert plan.steps_per_epoch == steps
    # The stack's own two roundings come to the same.
    assert steps == math.ceil(math.ceil(examples / batch) / accumulation)


def test_epochs_of_three_uneven_steps() -> None:
    plan = planned(22, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert [plan.batch(step) for step in range(1, 5)] == [
        (0, 0, 8),
        (0, 8, 16),
        (0, 16, 22),
        (1, 0, 8),
    ]
    assert [round(plan.epoch_of(step), 4) for step in range(5)] == [
        0.0,
        0.3636,
        0.7273,
        1.0,
        1.3636,
    ]


@pytest.mark.parametrize(("examples", "batch"), [(1, 1), (7, 3), (22, 8), (64, 64), (65, 64)])
def test_each_epoch_holds_every_example_once(examples: int, batch: int) -> None:
    plan = planned(examples, effective_batch_size=batch, num_train_epochs=3)
    for epoch in range(3):
        seen: list[int] = []
        for step in range(1, plan.total_steps + 1):
            at, start, stop = plan.batch(step)
            if at == epoch:
                assert 0 < stop - start <= batch
                seen += range(start, stop)
        assert seen == list(range(examples))


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (2, 20), (0.5, 5), (0.01, 1), (1.05, 11), (2.5, 25)]
)
def test_fractional_epochs_round_up_to_a_step(epochs: float, steps: int) -> None:
    assert planned(100, effective_batch_size=10, num_train_epochs=epochs).total_steps == steps


def test_max_steps_rule_over_epochs() -> None:
    plan = planned(100, effective_batch_size=10, num_train_epochs=1, max_steps=37)
    assert plan.total_steps == 37
    assert plan.epoch_of(37) == 3.7


def test_warmup_steps_rule_over_the_ratio() -> None:
    assert planned(1000, max_steps=100, warmup_ratio=0.5, warmup_steps=7).warmup_steps == 7
    # The preset's own ratio is nobody's wish; 0 steps beside an asked one is refused
    # (tests/train/test_spellings.py).
    assert planned(1000, max_steps=100, warmup_steps=0).warmup_steps == 0


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"eval__steps": 30}, (30, 60, 90, 100)),
        ({"eval__steps": 50}, (50, 100)),
        ({"eval__steps": 1000}, (100,)),
        ({"eval__steps": "epoch"}, (25, 50, 75, 100)),
        ({"eval__per_epoch": 2}, (12, 24, 36, 48, 60, 72, 84, 96, 100)),
        ({"eval__per_epoch": 1}, (25, 50, 75, 100)),
        ({}, (100,)),
    ],
)
def test_evaluations_include_the_last_step(keys: dict, steps: tuple[int, ...]) -> None:
    plan = planned(250, effective_batch_size=10, num_train_epochs=4, **keys)
    assert plan.total_steps == 100
    assert plan.eval_steps == steps
    assert [step for step in range(1, 101) if plan.evaluates_at(step)] == list(steps)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, (25, 50, 75, 100)),  # an epoch, the default
        ({"checkpoint__steps": "none"}, (100,)),
        ({"checkpoint__steps": 40}, (40, 80, 100)),
        ({"checkpoint__per_epoch": 100}, tuple(range(1, 101))),  # at least one step apart
    ],
)
def test_saves_include_the_last_step(keys: dict, steps: tuple[int, ...]) -> None:
    plan = planned(250, effective_batch_size=10, num_train_epochs=4, **keys)
    assert plan.save_steps == steps
    assert [step for step in range(1, 101) if plan.saves_at(step)] == list(steps)


def test_logging() -> None:
    assert planned(40, effective_batch_size=10, max_steps=5).log_steps == (1, 2, 3, 4, 5)
    plan = planned(40, effective_batch_size=10, max_steps=5, log__steps=2)
    assert [plan.logs_at(step) for step in range(1, 6)] == [False, True, False, True, True]


def test_no_valid_set_plans_no_evaluation() -> None:
    assert planned(100, num_valid=0, eval__steps=1).eval_steps == ()
    assert planned(100, num_valid=1, eval__steps=1).eval_steps != ()


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train holds no example"):
        planned(0)


@pytest.mark.parametrize(
    ("examples", "ranks", "shares"),
    [
        (24, 2, (12, 12)),
        (24, 4, (6, 6, 6, 6)),
        (25, 6, (5, 4, 4, 4, 4, 4)),
        (1, 3, (1, 0, 0)),
        (7, 1, (7,)),
    ],
)
def test_rank_shares(examples: int, ranks: int, shares: tuple[int, ...]) -> None:
    assert rank_shares(examples, ranks) == shares


def test_effective_batch_size_on_any_number_of_ranks() -> None:
    grown = planned(1000, 4, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert grown.effective_batch_size == 24
    fixed = planned(1000, 4, per_device_train_batch_size=2, effective_batch_size=25)
    assert fixed.effective_batch_size == 25
    assert fixed.micro_batches_per_step == 4  # the busiest rank has 7 examples
    assert (
        planned(1000, per_device_train_batch_size=64, effective_batch_size=25).micro_batch_size
        == 25
    )


# --- parameters and memory ---


def test_sizes_of_a_small_model_by_hand() -> None:
    hidden, intermediate, vocabulary, layers, kv = 256, 704, 512, 4, 128
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    base = 2 * vocabulary * hidden + layers * (layer + 2 * hidden) + hidden
    adapters = layers * (4 * (2 * hidden + hidden + kv) + 6 * (hidden + intermediate))
    sizes = model_sizes(decoder(LLAMA), "lora", load_config(overrides={"r": 2}).lora)
    assert sizes.base == base
    assert sizes.trainable == adapters
    assert sizes.total == base + adapters
    assert sizes.matmul == layers * layer + vocabulary * hidden
    assert sizes.trained_state == 2 * adapters
    full = model_sizes(decoder(LLAMA), "full", load_config().lora)
    assert full.trainable == full.total == base
    # Adafactor: rows and columns of each matrix, each element of a norm.
    linear = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + intermediate)
    assert full.factored_state == (
        2 * (vocabulary + hidden) + layers * (linear + 2 * hidden) + hidden
    )


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="q_prog"):
        model_sizes(
            decoder(LLAMA), "lora", load_config(overrides={"target_modules": "q_prog"}).lora
        )


def test_ledger_of_lora() -> None:
    config = load_config(overrides={"r": 4})
    sizes = model_sizes(decoder(LLAMA), "lora", config.lora)
    ledger = memory_ledger(config, decoder(LLAMA), precision="bf16")
    assert ledger["weights"] == 2 * sizes.base
    assert ledger["adapters"] == ledger["gradients"] == 4 * sizes.trainable
    assert ledger["optimizer"] == 8 * sizes.trainable
    assert set(ledger) == {*MEMORY_CATEGORIES, "total"}
    assert ledger["total"] == sum(ledger[name] for name in MEMORY_CATEGORIES)


def test_ledger_of_full_fine_tuning_holds_masters_and_lowered_copies() -> None:
    config = load_config(overrides={"method": "full", "optimizer.name": "adafactor"})
    sizes = model_sizes(decoder(LLAMA), "full", config.lora)
    exact = memory_ledger(config, decoder(LLAMA), precision="fp32")
    assert exact["weights"] == 4 * sizes.base
    assert exact["adapters"] == 0
    assert exact["optimizer"] == 4 * sizes.factored_state
    lowered = memory_ledger(config, decoder(LLAMA), precision="bf16")
    assert lowered["weights"] == 4 * sizes.base + 2 * sizes.matmul


WAYS = [
    ("lora", 0.0, "fp32", "sdpa"),
    ("lora", 0.05, "bf16", "sdpa"),
    ("lora", 0.05, "fp32", "eager"),
    ("full", 0.0, "bf16", "sdpa"),
    ("full", 0.0, "fp32", "eager"),
    ("dora", 0.0, "fp32", "sdpa"),
    ("dora", 0.05, "bf16", "sdpa"),
    ("pissa", 0.05, "bf16", "sdpa"),
    ("embedding", 0.05, "bf16", "sdpa"),
    ("rows", 0.0, "fp32", "sdpa"),
]
ARCHITECTURES = [LLAMA, MISTRAL, QWEN3, STARCODER2]


def every_pair() -> list[Any]:
    """Return all of policies, ways and architectures; quick are those that have every pair once."""
    return [
        pytest.param(
            *way,
            policy,
            raw,
            marks=() if (i + j - k) % len(ARCHITECTURES) == 0 else pytest.mark.slow,
            id="-".join([policy, *map(str, way), raw["model_type"]]),
        )
        for i, policy in enumerate(POLICIES)
        for j, way in enumerate(WAYS)
        for k, raw in enumerate(ARCHITECTURES)
    ]


@pytest.mark.parametrize(
    ("method", "dropout", "precision", "attention", "policy", "raw"), every_pair()
)
def test_activations_are_what_autograd_saves(
    method: str, dropout: float, precision: str, attention: str, policy: str, raw: dict
) -> None:
    beside = {
        "dora": {"lora.use_dora": True},
        "pissa": {"lora.init_lora_weights": "pissa"},
        "embedding": {"lora.modules_to_save": ["embed_tokens"]},
        "rows": {"lora.trainable_token_indices": [0, 5]},
    }.get(method, {})
    method = "lora" if beside else method
    config = load_config(
        overrides={
            "method": method,
            "lora_dropout": dropout,
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "attention": attention,
            **beside,
        }
    )
    architecture = decoder(raw)
    model = build(architecture, attention=attention, device="cpu")
    model.to(torch.bfloat16 if (method, precision) == ("lora", "bf16") else torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if method == "lora":
        inject(model, lora_config(config.lora))
    model.gradient_checkpointing = policy
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    segments = Segments.build([128] * 4, device="cpu", examples=[0, 1, 2, 3], draw=(1, 1))
    lowered = (
        torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), lowered:
        model.hidden_states(torch.zeros(512, dtype=torch.int64), segments)

    ledger = functools.partial(
        memory_ledger, config, architecture, precision=precision, device="cpu"
    )
    estimate = float(ledger(policy=policy)["activations"])
    if method == "full" and precision == "bf16" and policy in ("none", "norms", "mlp"):
        # Autocast's copies of the weights, which the ledger counts as weights, are saved as well;
        # the head's belongs to the loss.
        sizes = model_sizes(architecture, method, config.lora)
        head = architecture.vocab_size * architecture.hidden_size
        estimate += 2 * (sizes.matmul - head - (sizes.mlp_matmul if policy == "mlp" else 0))
    # What is computed again comes in the backward pass only, and what is on its way then too; what
    # is on the host is not saved by autograd.
    sizes = model_sizes(architecture, method, config.lora)
    compute, stored = widths(config, precision)
    token = activations_of(config, architecture, sizes, (compute, stored), policy, "cpu", 128)
    estimate -= 512 * (token.again + token.passing)
    if policy in ("layers", "offload") and (method, precision) == ("lora", "bf16"):
        estimate -= compute * (sizes.total - sizes.base) / 4  # its adapters, lowered
    if policy == "offload":
        # The final norm alone is left, and outside the layers the embedding's mask and a few
        # numbers a row.
        estimate -= 512 * 4 * token.kept
        assert 0 <= sum(saved.values()) - estimate <= 512 * (256 + 16)
        return
    # What the formulas leave out or round up: rotary tables, row statistics. At these small sizes
    # they are up to a tenth of the rest; `tests/benchmarks/test_traffic.py` has the presets'.
    assert 0.9 * sum(saved.values()) < estimate < 1.12 * sum(saved.values())


def test_largest_micro_batch() -> None:
    def rows(lengths: list[int] | None, **overrides: object) -> tuple[int, int]:
        keys = {"per_device_train_batch_size": 2, "max_length": 100, **overrides}
        return micro_batch_tokens(load_config(overrides=keys), lengths)

    assert rows(None) == (200, 100)
    assert rows([10, 50, 30]) == (80, 50)
    assert rows([10, 50, 30], batching="longest") == (100, 50)
    assert rows([10, 50, 30], batching="max_length") == (200, 100)
    assert rows([10, 50, 30], micro_batch_tokens=64) == (64, 50)
    assert rows([10, 90, 30], micro_batch_tokens=64) == (90, 90)
    assert rows([10], effective_batch_size=1) == (10, 10)
    # No more than a step holds: here 2 × 8 examples.
    assert rows([10, 50, 30], micro_batch_tokens=1000) == (90, 50)
    assert rows([10, 50, 30], micro_batch_tokens=1000, batching="longest") == (150, 50)
    assert rows(None, micro_batch_tokens=1000) == (1000, 100)
    assert rows(None, micro_batch_tokens=10_000) == (1600, 100)
    assert rows(None, micro_batch_tokens="auto") == (200, 100)  # 2 examples of max_length


def test_disk() -> None:
    config = load_config(overrides={"checkpoint.total_limit": 3, "checkpoint.steps": 1, "r": 4})
    architecture = decoder(LLAMA | {"torch_dtype": "bfloat16"})
    sizes = model_sizes(architecture, "lora", config.lora)
    plan = plan_run(config, 1000)
    disk = disk_bytes(config, plan, sizes, architecture)
    assert disk["checkpoint"] == 12 * sizes.trainable  # fp32 adapters and two moments
    assert (disk["checkpoints_kept"], disk["one_more_each_minutes"]) == (3, None)
    assert disk["best_and_final"] == 8 * sizes.trainable
    assert disk["total"] == 3 * 12 * sizes.trainable + 8 * sizes.trainable
    # The newest and the best stay, whatever the limit.
    one = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, total_limit=1)
    )
    assert disk_bytes(one, plan, sizes, architecture)["checkpoints_kept"] == 2
    full = load_config(overrides={"method": "full"})
    sizes = model_sizes(architecture, "full", full.lora)
    disk = disk_bytes(full, plan, sizes, architecture)
    assert disk["best_and_final"] == 2 * 2 * sizes.base  # in the model's own dtype
    assert disk["one_more_each_minutes"] == 15


# --- the document ---

NO_MODEL = Unknown("no model in this test")


def held(num_examples: int, num_valid: int = 0, **counts: int) -> KnownData:
    """Return data of so many short examples."""
    return KnownData(num_examples, num_valid, 0, [10] * num_examples, counts)


def document_of(
    config: RunConfig,
    data: KnownData | Unknown = NO_DATA,
    decoder: DecoderConfig | Unknown = NO_MODEL,
    machine: Machine = UNKNOWN,
    world_size: int = 1,
) -> dict[str, Any]:
    return plan_document(config, data, decoder, machine, world_size)


def warnings_of(*arguments: Any, **more: Any) -> str:
    return "\n".join(document_of(*arguments, **more)["warnings"])


CONTRACT = (
    "num_examples",
    "world_size",
    "effective_batch_size",
    "steps_per_epoch",
    "total_steps",
    "warmup_steps",
    "eval_steps",
    "save_steps",
    "trainable_parameters",
    "total_parameters",
    "memory",
)


def test_document_has_the_contract_keys() -> None:
    config = load_config("qwen2.5-coder-1.5b")
    document = document_of(config, decoder=find_decoder_config(config))
    for key in CONTRACT:
        assert document[key] is not None, key
    assert set(document["memory"]) == {
        "weights",
        "adapters",
        "gradients",
        "optimizer",
        "gathered",
        "activations",
        "loss",
        "overhead",
        "total",
    }
    assert (document["num_examples"], document["num_examples_from"]) == (4530, "the seed's claim")
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_what_is_not_known_is_null() -> None:
    document = document_of(load_config("default"))
    for key in CONTRACT:
        if key in ("world_size", "effective_batch_size"):
            assert document[key] is not None
        elif key == "memory":
            assert set(document[key].values()) == {None}
        else:
            assert document[key] is None, key
    assert "unknown without data" in render_plan(document)
    bounded = document_of(load_config(overrides={"max_steps": 100}))
    assert (bounded["total_steps"], bounded["warmup_steps"]) == (100, 5)
    assert bounded["steps_per_epoch"] is None


def test_data_rules_over_the_claim() -> None:
    config = load_config("llama2-7b")
    document = document_of(config, held(2, rows=4, truncated=1, dropped=2))
    assert (document["num_examples"], document["num_examples_from"]) == (2, "data")
    assert document["eval_steps"] == []
    text = "\n".join(document["warnings"])
    assert "1 of 4 rows (25.0%) are cut" in text
    assert "2 of 4 rows (50.0%) are dropped" in text
    assert "no data was read" not in text


def test_untrained_turns_are_told_from_those_that_rows_leave_out() -> None:
    def warnings(**counts: int) -> str:
        config = load_config("llama2-7b")
        return warnings_of(config, held(4, rows=4, assistant_turns=1200, **counts))

    assert "3 of 1,200 assistant turns are untrained" in warnings(untrained_turns=3)
    assert "2 of 1,200 assistant turns are kept out of the loss" in warnings(left_out_turns=2)
    assert "4 of 1,200 assistant turns are trained without" in warnings(thoughtless_turns=4)
    assert "assistant turns" not in warnings(untrained_turns=0, left_out_turns=0)


def test_few_rows_and_valid_sets_that_say_little_are_said(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    overrides = {"data.train": str(rows), "data.valid": str(rows), "eval.steps": 5}
    text = warnings_of(load_config(overrides=overrides), held(20, 20, rows=20))
    assert "all 20 examples are fewer than the 64 of one step" in text
    assert "data.valid is data.train" in text and "there is no valid set" not in text
    assert "no evaluation before the last step" not in text
    never = {**overrides, "eval.steps": "none"}
    text = warnings_of(load_config(overrides=never), held(20, 20, rows=20))
    assert "20 valid examples and no evaluation before the last step: eval.steps=epoch" in text
    without = load_config(overrides={"data.train": str(rows), "eval.steps": 5})
    text = warnings_of(without, held(64))
    assert "evaluations are asked for, and there is no valid set" in text
    assert "fewer than" not in text and "data.valid is" not in text


def test_warnings_name_what_a_reader_would_object_to() -> None:
    away = Unknown("the hub is away")
    text = warnings_of(load_config("starcoder2-15b"), away, away, world_size=6)
    assert "5, 4, 4, 4, 4, 4" in text
    assert "the seed's 20,000 rows stand in): the hub is away" in text
    assert "the model is not known, so neither are its parameters: the hub is away" in text
    text = warnings_of(load_config("qwen2.5-coder-1.5b"), held(4530, 19))
    assert "19 valid examples decide early stopping" in text
    assert "the last step of an epoch holds 2 of 16 examples" in text
    text = warnings_of(load_config(overrides={"max_steps": 3, "warmup_steps": 3}), held(9))
    assert "the peak learning rate is never reached" in text
    assert "model.path is not set" in text
    config = load_config(overrides={"model.path": "x"})
    small = Machine("cpu", 10**6)
    assert "976.6 KiB there" in warnings_of(config, decoder=decoder(LLAMA), machine=small)


@pytest.mark.parametrize(
    ("device", "attention", "override", "noted"),
    [
        ("cuda", "auto", None, "attention dropout 0.1"),
        (None, "flash_attention_2", None, "attention dropout 0.1"),
        ("cuda", "sdpa", 0.2, "attention dropout 0.2"),
        ("cuda", "eager", None, None),
        ("cuda", "auto", 0.0, None),
        ("cpu", "auto", None, None),
        ("mps", "auto", None, None),
    ],
)
def test_the_plan_says_where_attention_dropout_depends_on_the_cut(
    device: str | None, attention: str, override: float | None, noted: str | None
) -> None:
    config = load_config(
        overrides={"model.path": "x", "model.attention": attention, "model.dropout": override}
    )
    raw = STARCODER2 | {"attention_dropout": 0.1}
    warnings = document_of(config, NO_DATA, decoder(raw), Machine(device, None))["warnings"]
    found = [warning for warning in warnings if "attention dropout" in warning]
    if noted is None:
        assert not found
        return
    (warning,) = found
    assert warning.startswith(f"{noted}: on CUDA")
    for part in (
        "(seed, step, micro-batch, layer)",
        "a resumed run is exact",
        "another cut into micro-batches draws other masks",
        "model.attention=eager",
        "model.dropout=0 ",
    ):
        assert part in warning


def test_attention_dropout_is_noted_for_no_model_without_it() -> None:
    config = load_config(overrides={"model.path": "x"})
    text = warnings_of(config, decoder=decoder(LLAMA), machine=Machine("cuda", None))
    assert "attention dropout" not in text


def test_on_cuda_bits_repeat_where_that_is_asked_for() -> None:
    said = "train.deterministic=true repeats every bit"
    config = load_config()
    assert said in warnings_of(config, decoder=decoder(LLAMA), machine=Machine("cuda", None))
    assert said not in warnings_of(config, decoder=decoder(LLAMA), machine=Machine("cpu", None))
    assert said not in warnings_of(config, decoder=decoder(LLAMA))
    config = load_config(overrides={"train.deterministic": True})
    assert said not in warnings_of(config, decoder=decoder(LLAMA), machine=Machine("cuda", None))


@pytest.mark.parametrize(
    ("kernels", "device", "words"),
    [
        ("auto", None, "kernels Triton's on a CUDA card from Ampere on, else the reference"),
        ("auto", "cpu", "kernels reference"),
        ("reference", "cuda", "kernels reference"),
        ("triton", None, "kernels Triton's, checked against the reference at the start where no"),
    ],
)
def test_the_plan_says_which_kernels_are_taken(
    kernels: str, device: str | None, words: str
) -> None:
    config = load_config(overrides={"train.kernels": kernels})
    text = render_plan(document_of(config, machine=Machine(device, None)))
    assert words in " ".join(text.split())


def test_rendered_plan_checks_the_claims() -> None:
    config = load_config("qwen2.5-coder-1.5b")
    text = render_plan(document_of(config, decoder=find_decoder_config(config)))
    assert "852 (284 an epoch), 26 of warm-up" in text
    assert "36,929,536 trained of 1,580,643,840 (2.34 %)" in text
    assert "✓ steps per epoch: 284" in text
    assert "✗ learning rate ~5.3e-5 at step 700 → 1.63e-05" in text
    assert "✗ optimizer states ~12 GB → 0.295" in text


def test_memory_is_that_of_a_rank_and_without_a_device_both_figures_are_shown() -> None:
    config = load_config("llama2-7b")
    architecture = find_decoder_config(config)
    assert not isinstance(architecture, Unknown)
    unknown = document_of(config, decoder=architecture)
    assert unknown["gradient_checkpointing"] is None
    recomputing = memory_ledger(config, architecture, precision="fp16", policy="layers")
    assert unknown["memory_recomputing"] == recomputing
    assert unknown["memory"]["total"] > recomputing["total"]
    text = render_plan(unknown)
    for total in (unknown["memory"]["total"], recomputing["total"]):
        assert size_text(total) in text
    assert "without recomputing" in text
    assert "not decided (auto: no device is known yet)" in text
    assert "a rank" not in text
    known = document_of(config, decoder=architecture, machine=Machine("cuda", 2**40))
    assert (known["gradient_checkpointing"], known["memory_recomputing"]) == ("none", None)
    assert "memory a rank" in render_plan(document_of(config, decoder=architecture, world_size=4))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "in 8 micro-batches of 8"),
        ({"gradient_accumulation_steps": 1}, "in 1 micro-batch of 8"),
        ({"micro_batch_tokens": 4096}, "in micro-batches of at most 4,096 tokens"),
        ({"micro_batch_tokens": "auto"}, "in micro-batches of at most 8,192 tokens"),
    ],
)
def test_the_plan_says_how_a_step_is_cut(keys: dict[str, object], words: str) -> None:
    document = document_of(load_config(overrides=keys), held(100))
    assert words in render_plan(document)
    by_tokens = "micro_batch_tokens" in keys
    assert (document["micro_batches_per_step"] is None) == by_tokens
    assert (document["micro_batch_tokens"] is not None) == by_tokens


def test_the_head_of_the_text_is_that_of_the_document() -> None:
    document = document_of(load_config("qwen2.5-coder-1.5b"), held(4530, 19))
    rows = head_rows(document)
    assert [name for name, _ in rows][:4] == ["model", "examples", "batch", "steps"]
    lines = render_plan(document).splitlines()[1 : len(rows) + 1]
    assert lines == [f"  {name:<13}  {text}" for name, text in rows]


def test_claims_speak_of_the_preset_not_of_the_run() -> None:
    config = load_config("llama2-7b", overrides={"num_train_epochs": 1})
    document = document_of(config, held(10))
    assert document["total_steps"] == 1
    claims = {claim["statement"]: claim for claim in document["claims"]}
    assert claims["8 epochs: 512 steps"]["planned"] == 512


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(load_config("llama2-7b"), as_json=True, ranks=2)
    document = json.loads(capsys.readouterr().out)
    assert document["world_size"] == 2
    assert document["effective_batch_size"] == 32
    assert document["total_steps"] == 256


def test_named_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        print_plan(load_config(overrides={"model.path": str(tmp_path / "missing")}))


@pytest.mark.usefixtures("offline")
def test_rows_are_counted_where_the_tokenizer_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n' * 40)
    config = load_config("llama2-7b", overrides={"data.train": str(rows), "valid_fraction": 0.2})
    print_plan(config, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["num_examples"], document["num_examples_from"]) == (32, "data")
    assert document["data"]["valid_examples"] == 8
    assert document["steps_per_epoch"] == 2
    assert document["trainable_parameters"] == 8 * 2_498_560
    assert "not tokenised" in "\n".join(document["warnings"])
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        print_plan(load_config("llama2-7b", overrides={"data.train": str(tmp_path / "gone.jsonl")}))


@pytest.mark.usefixtures("offline")
def test_the_claim_stands_in_where_the_data_set_cannot_be_had(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_plan(load_config("starcoder2-3b"), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["num_examples"], document["total_steps"]) == (20000, 2502)
    assert any("HF_HUB_OFFLINE is set" in warning for warning in document["warnings"])


def test_an_architecture_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = load_config(overrides={"model.path": str(tmp_path)})
    assert find_decoder_config(config) == decoder(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "lama"}))
    with pytest.raises(UserError, match="lama"):
        find_decoder_config(load_config(overrides={"model.path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12_345_678, "11.8 MiB"),
        (3.09e9, "2.9 GiB"),
        (4e12, "3.6 TiB"),
    ],
)
def test_sizes_in_binary_units(size: float, text: str) -> None:
    assert size_text(size) == text


def test_more_steps_than_can_be_listed_are_refused() -> None:
    config = load_config(overrides={"train.max_steps": 10**9})
    with pytest.raises(UserError, match="1,000,000,000 steps are more than a run can have"):
        plan_run(config, 100)
