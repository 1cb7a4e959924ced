"""The plan as one JSON object (`--plan --json`, plan.json): all that is known of a run beforehand.

The parts: `train.plan.steps` (how many steps, and when what happens), `train.plan.sizes`
(parameters), `train.plan.ledger` (memory, disk, work), `train.plan.sharing` (what a rank of many
sends), `train.plan.claims` (what the seed document says, checked) and `train.plan.objections` (what
to look at). `train.plan.text` makes text of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.config.presets import read_preset
from train.config.schema import AT_ONCE, RunConfig
from train.inputs.known import KnownData, Unknown
from train.plan.claims import check_claims, claim_row
from train.plan.cuts import with_mean_examples
from train.plan.decide import (
    UNKNOWN,
    Machine,
    attention_kernels,
    decide,
    decide_attention,
    decide_device,
    decide_kernels,
)
from train.plan.fitting import fitting
from train.plan.ledger import (
    compute_estimate,
    disk_bytes,
    micro_batch_tokens,
    widths,
)
from train.plan.memory import counted_precision, memory_of
from train.plan.mixture import mixture_document
from train.plan.objections import objections
from train.plan.refusals import of_completions, refuse_to_complete_shared
from train.plan.sharing import rank_facts
from train.plan.sizes import model_sizes
from train.plan.steps import RunPlan, effective_batch_size, plan_run, rank_shares, warmup_of
from train.process.world import ALONE, World

if TYPE_CHECKING:
    from models.config import DecoderConfig
    from train.inputs.dataset import Data


def complete(
    config: RunConfig,
    data: Data,
    decoder: DecoderConfig,
    machine: Machine,
    earlier: Sequence[Mapping[str, Any]] = (),
    world: World = ALONE,
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the completed configuration of a run, and the plan's document.

    Gradient checkpointing and where layers lie are decided here, by the plan's memory ledger; what
    was decided before (a resume) stays. All ranks decide as rank 0 does.
    """
    document = plan_document(config, KnownData.of(data), decoder, machine, world.size)
    document["earlier_schedules"] = list(earlier)
    names = ("gradient_checkpointing", "sharding", "paging", "streaming")
    decided = world.told("decided", lambda: json.dumps({name: document[name] for name in names}))
    document |= json.loads(decided)
    model = dataclasses.replace(
        config.model,
        gradient_checkpointing=document["gradient_checkpointing"],
        stream_layers="true" if document["streaming"] else "false",
    )
    config = dataclasses.replace(config, model=model)
    return config, document


def plan_document(
    config: RunConfig,
    data: KnownData | Unknown,
    decoder: DecoderConfig | Unknown,
    machine: Machine = UNKNOWN,
    world_size: int = 1,
) -> dict[str, Any]:
    """Return everything that is known of a run before it starts, ready for JSON.

    What cannot be known without data or a model is None. Without data, the number of rows is the
    one that the preset's seed states.

    On an unknown machine `train.precision=auto` counts as bf16.

    Raises:
        UserError: Settings that contradict each other on that machine, or have nothing to train.
    """
    config = decide(config, machine)
    preset = read_preset(config.preset) if config.preset else None
    tokens = config.train.effective_batch_tokens
    if isinstance(data, KnownData):
        examples, origin, valid, test = data.num_examples, "data", data.num_valid, data.num_test
        counts = data.counts
    else:
        examples, valid = (preset.num_examples, preset.num_valid) if preset else (None, None)
        origin, test, counts = None if examples is None else "the seed's claim", None, {}
    rows = data if isinstance(data, KnownData) else None
    plan = None
    if examples is not None and (tokens is None or (rows and rows.num_targets is not None)):
        plan = plan_run(config, examples, world_size, num_valid=valid, rows=rows)
    config = with_mean_examples(config, plan and plan.effective_batch_size)
    lengths = _lengths(data)
    known = None if isinstance(decoder, Unknown) else decoder
    sizes = model_sizes(known, config.train.method, config.lora) if known else None
    batch = effective_batch_size(config, world_size)
    document: dict[str, Any] = {
        "preset": config.preset,
        "seed": preset.seed if preset else None,
        "model": config.model.path,
        "method": config.train.method,
        "num_examples": examples,
        "num_examples_from": origin,
        "world_size": world_size,
        "effective_batch_size": batch,
        "effective_batch_tokens": tokens,
        "sharding": None,
        "rank_shares": list(rank_shares(batch, world_size)),
        "micro_batch_size": plan.micro_batch_size if plan else None,
        "micro_batch_tokens": config.train.micro_batch_tokens,
        "micro_batches_per_step": plan.micro_batches_per_step if plan else None,
        **_steps_of(config, plan),
        "measured": _measured(config, valid),
        "trainable_parameters": sizes.trainable if sizes else None,
        "total_parameters": sizes.total if sizes else None,
        "trainable_percent": sizes.trainable_percent if sizes else None,
        "precision": config.train.precision,
        "quantization": config.model.quantization,
        "device": machine.device,
        "kernels": decide_kernels(config.train.kernels, machine.device, machine.capability),
        "attention": None,
    }
    if known is not None and machine.device is not None:
        longest = micro_batch_tokens(config, lengths, world_size)[1]
        document["attention"] = decide_attention(config, known, machine.device, longest)
        here = machine.capability is None and decide_device("auto") == "cuda"
        if machine.device == "cuda" and here:
            p, precision = config.model.dropout, config.train.precision
            p = known.attention_dropout if p is None else p
            document["attention"] = attention_kernels(
                known, "cuda", precision, longest, p, config.model.attention
            )
    document |= memory_of(config, known, machine, lengths, world_size)
    refuse_to_complete_shared(config, document["sharding"])
    policy = document["gradient_checkpointing"]
    of_a_number = widths(config, counted_precision(config))
    document |= rank_facts(config, lengths, document, known, sizes, of_a_number)
    document |= {
        "disk": disk_bytes(config, plan, sizes, known),
        "compute": compute_estimate(config, plan, sizes, lengths, policy),
        "data": {"valid_examples": valid, "test_examples": test, **counts},
        "mixture": mixture_document(data, plan) if isinstance(data, KnownData) and plan else None,
        "fingerprints": dict(data.fingerprints) if isinstance(data, KnownData) else {},
        "claims": [claim_row(claim, value) for claim, value in check_claims(preset)],
        "departures": list(preset.departures) if preset else [],
    }
    document["fitting"] = None
    if known is not None and machine.memory is not None:
        document["fitting"] = fitting(config, known, machine, lengths, world_size)
    document["warnings"] = objections(config, document, plan, data, decoder, machine)
    return document


def _lengths(data: KnownData | Unknown) -> Sequence[int] | None:
    """Return the tokens of each training example; None where each counts as `data.max_length`."""
    if isinstance(data, Unknown) or isinstance(data.lengths, Unknown):
        return None
    return data.lengths


def _steps_of(config: RunConfig, plan: RunPlan | None) -> dict[str, Any]:
    total = plan.total_steps if plan else config.train.max_steps
    warmup = config.schedule.warmup_steps if total is None else warmup_of(config, total)
    return {
        "steps_per_epoch": plan.steps_per_epoch if plan else None,
        "total_steps": total,
        "epochs": plan.epoch_of(plan.total_steps) if plan else None,
        "warmup_steps": warmup,
        "eval_steps": list(plan.eval_steps) if plan else None,
        "save_steps": list(plan.save_steps) if plan else None,
        "learning_rates": {str(step): plan.learning_rate(step) for step in plan.eval_steps}
        if plan
        else None,
        "earlier_schedules": [],
    }


def _measured(config: RunConfig, valid: int | None) -> dict[str, Any]:
    """Return what each evaluation of the valid set measures beside the loss, and its work."""
    settings, completed = config.eval, 0
    if of_completions(config):
        completed = settings.complete if valid is None else min(settings.complete, valid)
    return {
        "metrics": list(settings.metrics or ()),
        "completed_rows": completed,
        "max_new_tokens": settings.max_new_tokens,
        "passes": -(-completed // AT_ONCE) * settings.max_new_tokens,
        "holes": settings.holes if valid is None else min(settings.holes, valid),
    }
