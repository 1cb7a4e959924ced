"""What a step of one rank needs of the device's memory, and what is decided by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.config.schema import RunConfig
from train.plan.decide import (
    Machine,
    decide_paging,
    decide_recomputing,
    decide_sharding,
    decide_streaming,
    possible_policies,
)
from train.plan.ledger import (
    MEMORY_CATEGORIES,
    memory_ledger,
    ring_bytes,
    streamed_bytes,
    widths,
)
from train.plan.sizes import model_sizes

if TYPE_CHECKING:
    from models.config import DecoderConfig


def memory_of(
    config: RunConfig,
    decoder: DecoderConfig | None,
    machine: Machine,
    lengths: Sequence[int] | None,
    world_size: int,
) -> dict[str, Any]:
    """Return the ledger of one rank; where recomputing is not decided, without and with it.

    Beside it stand the totals under each policy that is possible there.
    """
    ledger: dict[str, Any] = dict.fromkeys((*MEMORY_CATEGORIES, "total"))
    other: dict[str, Any] | None = None
    totals: dict[str, int] | None = None
    host = offloaded = streamed = saves = 0
    if decoder is None:
        paging, paging_reason = decide_paging(config, None, 0, machine)
        policy, reason = decide_recomputing(config, None, machine)
        sharding = decide_sharding(config, None, machine, world_size)
        streaming, streaming_reason = decide_streaming(config, None, 0, machine, sharding)
    else:
        sizes = model_sizes(decoder, config.train.method, config.lora)
        estimate = functools.partial(
            memory_ledger,
            config,
            decoder,
            sizes,
            precision=counted_precision(config),
            device=machine.device,
            lengths=lengths,
            world_size=world_size,
        )
        setting = config.model.gradient_checkpointing
        possible = possible_policies(config, machine.device)
        # A layer that is computed again costs less than one that is sent again and again.
        pages = config.optimizer.name == "paged_adamw" and machine.device == "cuda"
        allowed = possible if setting == "auto" else (setting,)
        least = min(estimate(policy=policy)["total"] for policy in allowed)
        sharding = decide_sharding(config, least, machine, world_size)
        estimate = functools.partial(estimate, sharding=sharding)
        least, less = (
            min(estimate(policy=policy, streaming=s, paging=pages)["total"] for policy in allowed)
            for s in (False, True)
        )
        streaming, streaming_reason = decide_streaming(
            config, least, least - less, machine, sharding
        )
        if streaming:
            estimate = functools.partial(estimate, streaming=True)
            streamed = streamed_bytes(sizes, decoder, widths(config, counted_precision(config))[1])
        totals = {policy: estimate(policy=policy)["total"] for policy in possible}
        policy, reason = decide_recomputing(config, totals, machine)
        ledger = dict(estimate(policy=policy or "none"))
        if policy is None:
            other = dict(estimate(policy="layers"))
        precision = counted_precision(config)
        offloaded = ring_bytes(config, decoder, precision, policy, lengths, world_size)
        paged = ledger
        if config.optimizer.name == "paged_adamw":
            paged = dict(estimate(policy=policy or "none", paging=True))
            saves = ledger["optimizer"] - paged["optimizer"]
        paging, paging_reason = decide_paging(config, ledger["total"], saves, machine)
        if paging:
            host, ledger = ledger["optimizer"], paged
    total, there = ledger["total"], machine.memory
    return {
        "sharding": sharding,
        "gradient_checkpointing": policy,
        "gradient_checkpointing_because": reason,
        "paging": paging,
        "paging_because": paging_reason,
        "paging_saves": saves,
        "streaming": streaming,
        "streaming_because": streaming_reason,
        "memory": ledger,
        "memory_recomputing": other,
        "memory_by_policy": totals,
        "offloaded_memory": offloaded,
        "streamed_memory": streamed,
        "host_memory": host,
        "available_memory": there,
        "fits": None if total is None or there is None else total <= there,
    }


def counted_precision(config: RunConfig) -> str:
    """Return the precision to count with: without a device the plan may be one for a GPU."""
    return "bf16" if config.train.precision == "auto" else config.train.precision
