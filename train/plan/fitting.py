"""Whether a run fits a card and, where not, with which settings: the cheapest first.

Every combination of the settings that need less memory is put to the plan's own ledger
(`train.plan.memory`), so that what is said here is what the run would decide. How much longer a
step takes is a prediction: the work and the bytes that a setting adds, over what a card attains
(`train.plan.cards`); no card has checked it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from files.errors import UserError
from train.config.schema import KEYS, RunConfig
from train.plan.cards import CARDS
from train.plan.decide import Machine, decide
from train.plan.ledger import SHARE_OF_PEAK, flops_per_token, micro_batch_tokens, widths
from train.plan.memory import counted_precision, memory_of
from train.plan.refusals import wants_whole_weights
from train.plan.sharing import micro_batches_of
from train.plan.sizes import model_sizes
from train.plan.steps import effective_batch_size, rank_shares

if TYPE_CHECKING:
    from models.config import DecoderConfig

# What a setting changes of the result; the others change memory and time alone.
_CHANGES = {
    "model.quantization": "the frozen base has 4 bits a weight",
    "train.masters": "weights are bf16, rounded by chance at each update",
    "optimizer.name": "moments have 8 bits",
}
_POLICY = "model.gradient_checkpointing"
_WHOLE = ("layers", "offload")  # policies that compute whole layers again
_RANKS = (2, 3, 4, 6, 8, 16, 32, 64)

Settings = Mapping[str, Any]  # key → value


@dataclass(frozen=True)
class Way:
    """Settings to add, and what a run with them needs.

    Attributes:
        settings: Key → value, none of them where the run fits as it is asked.
        needed: Bytes of a rank.
        seconds: Predicted time of a step, at `SHARE_OF_PEAK`.
        slower: That over the time of the run as asked on a card with room for it.
        changes: What they change of the result, in words; empty where nothing.
    """

    settings: Settings
    needed: int
    seconds: float
    slower: float
    changes: tuple[str, ...]


def fitting(
    config: RunConfig,
    decoder: DecoderConfig,
    machine: Machine,
    lengths: Sequence[int] | None,
    world_size: int,
) -> dict[str, Any]:
    """Return, ready for JSON, how the run fits the machine's memory.

    `ways` has the run as it is asked, where that fits; else the fastest way that leaves the result
    as it is, and the fastest that changes least of it, where there are such. Where there is none,
    `least` is the way that needs least, and `would_fit` names the smallest card for it and how many
    ranks would do as the run is asked; None where none does.

    Args:
        config: What is asked, decided for the machine (`decide`).
        decoder: The architecture.
        machine: Its memory is known.
        lengths: Tokens of the training examples; None where each counts as `data.max_length`.
        world_size: Ranks that share a step.
    """
    there = machine.memory
    assert there is not None

    def needed(changed: RunConfig, ranks: int = world_size) -> dict[str, Any]:
        return memory_of(decide(changed, machine), decoder, machine, lengths, ranks)

    asked = needed(config)
    total, streams = asked["memory"]["total"], bool(asked["streaming"])
    as_asked = _seconds(config, decoder, asked, machine, lengths, world_size)
    if total <= there and not streams:
        return {"ways": [_told(Way({}, total, as_asked, 1.0, ()))], "least": None}
    setting = config.model.gradient_checkpointing
    roomy = {"gradient_checkpointing": "none" if setting == "auto" else setting, "paging": False}
    roomy["streaming"] = False
    before = _seconds(config, decoder, asked | roomy, machine, lengths, world_size)
    ways = []
    if streams:  # `auto` takes what is slower than other settings may be
        ways.append(Way({}, total, as_asked, as_asked / before, ()))
    for settings in _combinations(config, machine):
        changed = _with(config, settings)
        try:
            memory = needed(changed)
        except UserError:  # they do not go with each other
            continue
        if "model.gradient_checkpointing" in settings:
            settings = {
                **settings,
                "model.gradient_checkpointing": memory["gradient_checkpointing"],
            }
        after = _seconds(changed, decoder, memory, machine, lengths, world_size)
        changes = tuple(
            _CHANGES[key]
            for key, value in settings.items()
            if key in _CHANGES and value != "paged_adamw"
        )
        ways.append(Way(settings, memory["memory"]["total"], after, after / before, changes))
    fit = [way for way in ways if way.needed <= there]
    same = [way for way in fit if not way.changes]
    other = [way for way in fit if way.changes]
    found = [min(same, key=_cost)] if same else []
    found += [min(other, key=_cost)] if other else []
    if found or not ways:
        return {"ways": [_told(way) for way in found], "least": None}
    least = min(ways, key=lambda way: way.needed)
    cards = sorted(CARDS.items(), key=lambda card: (card[1].memory, card[1].peak_flops))
    # Adapters that no shared base can serve are refused on many ranks, and planned on one.
    may = world_size > 1 or config.train.sharding != "shard" or not wants_whole_weights(config)
    enough = (ranks for ranks in _RANKS if ranks > world_size and may)
    return {
        "ways": [],
        "least": _told(least),
        "would_fit": {
            "card": next((name for name, card in cards if card.memory >= least.needed), None),
            "ranks": next((n for n in enough if needed(config, n)["fits"]), None),
        },
    }


def _told(way: Way) -> dict[str, Any]:
    return {**dataclasses.asdict(way), "changes": list(way.changes)}


def _cost(way: Way) -> tuple[int, float, int, int]:
    return len(way.changes), round(way.slower, 3), len(way.settings), way.needed


def _combinations(config: RunConfig, machine: Machine) -> Iterator[Settings]:
    """Yield every combination of settings that need less memory, each as what it adds."""
    train, full = config.train, config.train.method == "full"
    batches: list[Settings] = [{}]
    if train.micro_batch_tokens is None:
        batch = train.per_device_train_batch_size
        for smaller in (size for size in range(batch - 1, 0, -1) if batch % size == 0):
            settings = {"train.per_device_train_batch_size": smaller}
            if train.effective_batch_size is None:
                steps = train.gradient_accumulation_steps * batch // smaller
                settings["train.gradient_accumulation_steps"] = steps
            batches.append(settings)
    policies: list[Settings] = [{}]
    if config.model.gradient_checkpointing != "auto":
        policies.append({_POLICY: "auto"})
    optimizers: list[Settings] = [{}]
    if config.optimizer.name == "adamw" and machine.device == "cuda":
        optimizers.append({"optimizer.name": "paged_adamw"})
    if config.optimizer.name in ("adamw", "paged_adamw"):
        optimizers.append({"optimizer.name": "adamw_8bit"})
    stored: list[Settings] = [{}]
    if full and train.masters == "fp32":
        stored.append({"train.masters": "bf16"})
    if not full and config.model.quantization is None:
        stored.append({"model.quantization": "nf4"})
    for some in itertools.product(batches, policies, optimizers, stored):
        settings = {key: value for part in some for key, value in part.items()}
        if settings:
            yield settings


def _with(config: RunConfig, settings: Settings) -> RunConfig:
    for path, value in settings.items():
        section, name = KEYS[path].section, KEYS[path].name
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _seconds(
    config: RunConfig,
    decoder: DecoderConfig,
    memory: Mapping[str, Any],
    machine: Machine,
    lengths: Sequence[int] | None,
    world_size: int,
) -> float:
    """Predict the time of a rank's part of a step.

    - the operations of `flops_per_token`, at the share of its peak that the plan counts with;
    - quantised weights are read and written as 16-bit ones in each pass of each micro-batch;
    - moments in host memory come and go once a step, over the card's link to the host;
    - layers in host memory come twice a micro-batch, beside the computing, as far as that lasts;
    - layers' inputs in host memory go and come once, beside the computing, as far as that lasts.
    """
    card = CARDS[machine.card or "a100"]  # of one that only the memory is known of, an A100's
    sizes = model_sizes(decoder, config.train.method, config.lora)
    batch = effective_batch_size(config, world_size)
    share = rank_shares(batch, world_size)[0]
    mean = config.data.max_length if lengths is None else sum(map(int, lengths)) / len(lengths)
    tokens = mean * batch / world_size
    policy = memory["gradient_checkpointing"]
    computing = tokens * flops_per_token(config, sizes, policy) / (SHARE_OF_PEAK * card.peak_flops)
    seconds = computing
    if config.model.quantization is not None:
        compute, _ = widths(config, counted_precision(config))
        _, packed = sizes.quantised(config.model.quantization, compute, machine.device)
        passes = micro_batches_of(config, tokens, share) * (3 if policy in _WHOLE else 2)
        seconds += passes * (packed + compute * sizes.matmul) / card.bandwidth
    if memory["paging"]:
        seconds += 2 * memory["host_memory"] / card.host_bytes
    if memory["streaming"]:
        sent = 2 * micro_batches_of(config, tokens, share) * memory["streamed_memory"]
        seconds += max(0.0, sent / card.host_bytes - computing)
    if policy == "offload":
        rows, _ = micro_batch_tokens(config, lengths, world_size)
        sent = 2 * memory["offloaded_memory"] * max(1.0, tokens / rows)
        seconds += max(0.0, sent / card.host_bytes - computing)
    return seconds
