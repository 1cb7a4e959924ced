"""`--plan` and plan.json: everything that is known of a run before it starts.

The parts: `train.plan.steps` (how many steps, and when what happens), `train.plan.ledger`
(parameters, memory, disk, work), `train.plan.claims` (what the seed document says, checked). Here
they become one document, with what a careful reader would object to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError, counted
from train.config.load import read_preset
from train.config.schema import RunConfig
from train.plan.adapters import starting_adapter_note, with_starting_adapter
from train.plan.claims import check_claims, claim_row
from train.plan.decide import (
    UNKNOWN,
    Machine,
    decide,
    decide_attention,
    decide_kernels,
    decide_recomputing,
    machine_to_plan_for,
    this_machine,
)
from train.plan.ledger import (
    MEMORY_CATEGORIES,
    SHARE_OF_PEAK,
    ModelSizes,
    compute_estimate,
    disk_bytes,
    find_decoder_config,
    is_hub_id,
    memory_ledger,
    micro_batch_tokens,
    model_sizes,
)
from train.plan.steps import RunPlan, effective_batch_size, plan_run, rank_shares, warmup_of
from train.text import size_text

if TYPE_CHECKING:
    from models.config import DecoderConfig
    from train.dataset import Data

# Below this, two evaluations that differ by a few hundredths of a nat may as well be equal.
FEW_VALID_EXAMPLES = 50


def plan_with_data(
    config: RunConfig, data: Data, decoder: DecoderConfig | None, **known: Any
) -> dict[str, Any]:
    """Return the plan document of a run whose data was read; `known` as in `plan_document`."""
    return plan_document(
        config,
        num_examples=len(data.train),
        num_valid=0 if data.valid is None else len(data.valid),
        num_test=0 if data.test is None else len(data.test),
        lengths=data.train.lengths.tolist(),
        counts=dataclasses.asdict(data.train.counts),
        decoder=decoder,
        **known,
    )


def complete(
    config: RunConfig,
    data: Data,
    decoder: DecoderConfig,
    machine: Machine,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the completed configuration of a run, and the plan's document.

    Gradient checkpointing is decided here, by the plan's memory ledger; what was decided before (a
    resume) stays.

    Args:
        config: What is asked, decided for the machine.
        data: The rows.
        decoder: The architecture.
        machine: Where the run computes.
        earlier: The schedules of a resumed run's steps so far (`Resume.earlier_schedules`).
    """
    document = plan_with_data(config, data, decoder, machine=machine)
    document["earlier_schedules"] = list(earlier)
    checkpointing = document["gradient_checkpointing"]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing=checkpointing),
    )
    return config, document


def print_plan(config: RunConfig, *, as_json: bool = False, ranks: int | None = None) -> None:
    """Answer `--plan`: print the plan as text, or as one JSON object and nothing else.

    Data and tokenizer are read where they can be had; where the hub cannot be reached, the plan
    counts with the rows that the seed states, and says what to pass instead.

    Raises:
        UserError: What would end the run before its first step (`train.plan.refuse`), or a row or
            config.json that is not what it must be.
    """
    document = _survey(config, ranks or 1)
    if as_json:
        print(json.dumps(document, allow_nan=False, indent=2))
        return
    print(render_plan(document))
    if "tokens" in document["data"]:
        from train.show_data import first_example

        print(f"An example, as it will be trained\n{first_example(config)}")


def _survey(config: RunConfig, ranks: int) -> dict[str, Any]:
    from train.config.paths import with_whole_paths
    from train.dataset import load_data
    from train.plan.refuse import refuse_early, refuse_model

    refuse_early(config, this_machine(config), new=True)
    config = with_whole_paths(config)
    decoder, unknown_model = find_decoder_config(config)
    refuse_model(config, decoder)
    config = with_starting_adapter(config, decoder)
    known = {
        "decoder": decoder,
        "unknown_model": unknown_model,
        "world_size": ranks,
        "machine": machine_to_plan_for(config),
    }
    if config.data.train is None:
        return plan_document(config, **known)
    try:
        folder, reason = _tokenizer_folder(config)
        if folder is None or decoder is None:
            rows = _row_counts(config)
            return plan_document(config, **rows, not_tokenised=reason or unknown_model, **known)
        return plan_with_data(config, load_data(config, folder, decoder), **known)
    except UserError as error:
        specs = config.data.train
        if not any(
            spec.startswith("hub:") for spec in ([specs] if isinstance(specs, str) else specs)
        ):
            raise
        return plan_document(config, missing_data=str(error), **known)


def _tokenizer_folder(config: RunConfig) -> tuple[Path | None, str]:
    """Return the folder of the model's small files, or None and why it cannot be had today."""
    from train.base_model import find_model

    path = config.model.path
    try:
        return find_model(config, weights=False).folder, ""
    except UserError as error:
        if path is not None and not is_hub_id(path):
            raise
        return None, str(error)


def _row_counts(config: RunConfig) -> dict[str, Any]:
    """Count the rows of each set, where they cannot be tokenised."""
    from data.source import read_rows
    from train.dataset import prompt_format, refuse_without_valid

    data = config.data
    columns = prompt_format(data).columns()

    def count(spec: str | Sequence[str] | None, split: str) -> int:
        if spec is None:
            return 0
        rows = read_rows(spec, fields=columns, split_column=data.split_column, split=split)
        return sum(1 for _ in rows)

    by_column = data.train if data.split_column is not None else None
    rows = train = count(data.train, "train")
    valid = count(data.valid or by_column, "valid")
    if not valid and data.valid_fraction:
        valid = math.ceil(train * data.valid_fraction)
        train -= valid
    if not valid:
        refuse_without_valid(config)
    return {
        "num_examples": train,
        "num_valid": valid,
        "num_test": count(data.test or by_column, "test"),
        "counts": {"rows": rows},
    }


def plan_document(
    config: RunConfig,
    *,
    num_examples: int | None = None,
    num_valid: int | None = None,
    num_test: int | None = None,
    lengths: Sequence[int] | None = None,
    counts: Mapping[str, Any] | None = None,
    decoder: DecoderConfig | None = None,
    unknown_model: str = "",
    missing_data: str = "",
    not_tokenised: str = "",
    world_size: int = 1,
    machine: Machine = UNKNOWN,
) -> dict[str, Any]:
    """Return everything that is known of a run before it starts, ready for JSON.

    What cannot be known without data or a model is None. Without data, the number of rows is the
    one that the preset's seed states.

    Args:
        config: What is asked.
        num_examples: Training examples, where the data was read.
        num_valid: Valid examples, where known; 0 plans no evaluation.
        num_test: Test examples, where known.
        lengths: Tokens of each training example.
        counts: What the data held (rows, truncated, dropped, …), passed on as it is.
        decoder: The architecture; see `find_decoder_config`.
        unknown_model: Why there is none.
        missing_data: Why the data that was named could not be read.
        not_tokenised: Why its rows were counted but not tokenised.
        world_size: Ranks that share a step.
        machine: What it is planned for; on an unknown one `train.precision=auto` counts as bf16.

    Raises:
        UserError: Settings that contradict each other on that machine, or have nothing to train.
    """
    config = decide(config, machine)
    preset = read_preset(config.preset) if config.preset else None
    from_data = num_examples is not None
    if num_examples is None and preset is not None:
        num_examples = preset.num_examples
    if num_valid is None and not from_data and preset is not None:
        num_valid = preset.num_valid
    plan = None
    if num_examples is not None:
        plan = plan_run(config, num_examples, world_size, num_valid=num_valid)
    sizes = model_sizes(decoder, config.train.method, config.lora) if decoder else None
    document: dict[str, Any] = {
        "preset": config.preset,
        "seed": preset.seed if preset else None,
        "model": config.model.path,
        "method": config.train.method,
        "num_examples": num_examples,
        "num_examples_from": _origin(num_examples, from_data),
        "world_size": world_size,
        "effective_batch_size": effective_batch_size(config, world_size),
        "rank_shares": list(rank_shares(effective_batch_size(config, world_size), world_size)),
        "micro_batch_size": plan.micro_batch_size if plan else None,
        "micro_batch_tokens": config.train.micro_batch_tokens,
        "micro_batches_per_step": plan.micro_batches_per_step if plan else None,
        **_steps_of(config, plan),
        "trainable_parameters": sizes.trainable if sizes else None,
        "total_parameters": sizes.total if sizes else None,
        "trainable_percent": sizes.trainable_percent if sizes else None,
        "precision": config.train.precision,
        "device": machine.device,
        "kernels": decide_kernels(config.train.kernels, machine.device),
        "attention": _attention_of(config, decoder, machine, lengths, world_size),
    }
    document |= _memory_of(config, decoder, sizes, machine, lengths, world_size)
    document |= {
        "disk": disk_bytes(config, plan, sizes, decoder, document["memory"]),
        "compute": compute_estimate(
            config, plan, sizes, lengths, bool(document["gradient_checkpointing"])
        ),
        "data": {"valid_examples": num_valid, "test_examples": num_test, **(counts or {})},
        "claims": [claim_row(claim, value) for claim, value in check_claims(preset)],
        "departures": list(preset.departures) if preset else [],
    }
    document["warnings"] = [
        *starting_adapter_note(config),
        *_model_warnings(config, decoder, unknown_model, machine),
        *_data_warnings(config, document, missing_data, not_tokenised),
        *(_step_warnings(config, document, plan) if plan else []),
        *_room_warnings(config, document),
    ]
    return document


def _origin(num_examples: int | None, from_data: bool) -> str | None:
    if from_data:
        return "data"
    return None if num_examples is None else "the seed's claim"


def _steps_of(config: RunConfig, plan: RunPlan | None) -> dict[str, Any]:
    if plan is not None:
        return {
            "steps_per_epoch": plan.steps_per_epoch,
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
            "eval_steps": list(plan.eval_steps),
            "save_steps": list(plan.save_steps),
            "learning_rates": {str(step): plan.learning_rate(step) for step in plan.eval_steps},
            "earlier_schedules": [],
        }
    total = config.train.max_steps
    warmup = config.schedule.warmup_steps if total is None else warmup_of(config, total)
    return {
        "steps_per_epoch": None,
        "total_steps": total,
        "warmup_steps": warmup,
        "eval_steps": None,
        "save_steps": None,
        "learning_rates": None,
        "earlier_schedules": [],
    }


def _attention_of(
    config: RunConfig,
    decoder: DecoderConfig | None,
    machine: Machine,
    lengths: Sequence[int] | None,
    world_size: int,
) -> str | None:
    """Return how attention runs on the longest example; None where model or device is unknown."""
    if decoder is None or machine.device is None:
        return None
    longest = micro_batch_tokens(config, lengths, world_size)[1]
    return decide_attention(config, decoder, machine.device, longest)


def _memory_of(
    config: RunConfig,
    decoder: DecoderConfig | None,
    sizes: ModelSizes | None,
    machine: Machine,
    lengths: Sequence[int] | None,
    world_size: int,
) -> dict[str, Any]:
    """Return the ledger of one rank; where recomputing is not decided, without and with it."""
    ledger: dict[str, Any] = dict.fromkeys((*MEMORY_CATEGORIES, "total"))
    other: dict[str, Any] | None = None
    if decoder is None or sizes is None:
        checkpointing, reason = decide_recomputing(config, None, machine)
    else:
        precision = config.train.precision
        estimate = functools.partial(
            memory_ledger,
            config,
            decoder,
            sizes,
            # Without a device the plan may be one for a GPU.
            precision="bf16" if precision == "auto" else precision,
            device=machine.device,
            lengths=lengths,
            world_size=world_size,
        )
        checkpointing, reason = decide_recomputing(config, estimate()["total"], machine)
        ledger = dict(estimate(gradient_checkpointing=bool(checkpointing)))
        if checkpointing is None:
            other = dict(estimate(gradient_checkpointing=True))
    return {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_because": reason,
        "memory": ledger,
        "memory_recomputing": other,
        "available_memory": machine.memory,
    }


def _model_warnings(
    config: RunConfig, decoder: DecoderConfig | None, unknown_model: str, machine: Machine
) -> list[str]:
    if config.model.path is None:
        return ["model.path is not set: give a hub id or a folder"]
    if unknown_model:
        return [f"the model is not known, so neither are its parameters: {unknown_model}"]
    if decoder is None:
        return []
    found = list(decoder.notes)
    length, trained = config.data.max_length, decoder.max_position_embeddings
    if length > trained and decoder.rope.rope_type == "default":
        found.append(f"data.max_length={length} is beyond the {trained} positions of the model")
    p = decoder.attention_dropout if config.model.dropout is None else config.model.dropout
    if p > 0 and decide_attention(config, decoder, machine.device, length) == "fused":
        found.append(
            f"attention dropout {p:g}: on CUDA the fused attention draws it by (seed, step, "
            "micro-batch, layer), so a resumed run is exact, but another cut into micro-batches "
            "draws other masks; model.attention=eager draws the same for any cut, model.dropout=0 "
            "nothing"
        )
    return found


def _room_warnings(config: RunConfig, document: Mapping[str, Any]) -> list[str]:
    found = []
    if document["world_size"] > 1:
        found.append(
            f"{document['world_size']} ranks asked: planned for them, but this version trains on "
            "one (with train.effective_batch_size set, the steps are the same there)"
        )
    total, available = document["memory"]["total"], document["available_memory"]
    if available is not None and total is not None and total > available:
        remedy = "train.per_device_train_batch_size (results are the same) or data.max_length"
        lasting = ("weights", "adapters", "gradients", "optimizer")
        if sum(document["memory"][name] for name in lasting) > available:
            remedy = "lora.r, or take a smaller model: batches are not what fills it"
        found.append(
            f"memory: about {size_text(total)} needed, {size_text(available)} there; lower {remedy}"
        )
    free, needed = _free_disk(config), document["disk"]["total"]
    if needed is not None and free is not None and needed > free:
        found.append(
            f"disk: {size_text(needed)} needed, {size_text(free)} free; set checkpoint.total_limit"
        )
    return found


def _data_warnings(
    config: RunConfig, document: Mapping[str, Any], missing_data: str, not_tokenised: str
) -> list[str]:
    found = []
    data, counts = config.data, document["data"]
    from_data = document["num_examples_from"] == "data"
    if not from_data:
        given = document["num_examples"]
        source = f"the seed's {given:,} rows stand in" if given else "the steps are not known"
        remedy = missing_data or "pass a file or folder as data.train"
        found.append(f"no data was read ({source}): {remedy}")
    if not_tokenised:
        found.append(
            f"rows are counted, not tokenised, each taken to be data.max_length long: "
            f"{not_tokenised}"
        )
    if data.format != "template" and (data.prompt_template or data.completion_template):
        found.append(f"data.prompt_template is not read under data.format={data.format}")
    rows = counts.get("rows")
    limit = f"data.max_length={data.max_length}"
    for name, what in (
        ("truncated", f"cut at {limit}"),
        ("dropped", f"dropped: longer than {limit}, or without a token to train on"),
    ):
        share = counts.get(name)
        if share and rows:
            found.append(f"{share:,} of {rows:,} rows ({share / rows:.1%}) are {what}")
    merged = counts.get("merged_prompts")
    if merged and rows:
        found.append(
            f"in {merged:,} of {rows:,} rows ({merged / rows:.1%}) the completion begins inside a "
            "token of the prompt, and a model that is given the prompt reads other tokens: end the "
            "prompt with a line break"
        )
    turns = counts.get("assistant_turns")
    for name, what in (
        (
            "untrained_turns",
            "untrained: the chat template leaves nothing of them in the text (train.show_data "
            "shows what it leaves)",
        ),
        ("left_out_turns", "kept out of the loss by their rows (weight 0, or train false)"),
        (
            "thoughtless_turns",
            "trained without their thinking, which the chat template leaves out of the text",
        ),
    ):
        if turns and counts.get(name):
            found.append(f"{counts[name]:,} of {turns:,} assistant turns are {what}")
    valid = counts.get("valid_examples")
    if from_data and not valid and config.checkpoint.load_best_at_end:
        found.append(
            "checkpoint.load_best_at_end has no valid set to choose by: final/ will be the last "
            "state; give data.valid or data.valid_fraction"
        )
    if from_data and not valid and (config.eval.steps or config.eval.per_epoch) is not None:
        found.append(
            "evaluations are asked for, and there is no valid set: give data.valid or "
            "data.valid_fraction"
        )
    # A folder may hold files of both, and a column may tell them apart.
    same = data.valid == data.train and data.split_column is None
    if same and isinstance(data.valid, str) and Path(data.valid).is_file():
        found.append("data.valid is data.train: the valid loss will not show overfitting")
    if valid and valid < FEW_VALID_EXAMPLES and config.eval.early_stopping_patience is not None:
        found.append(
            f"{valid} valid examples decide early stopping: their noise may be larger than the "
            "differences between evaluations"
        )
    return found


def _step_warnings(config: RunConfig, document: Mapping[str, Any], plan: RunPlan) -> list[str]:
    found = []
    shares = document["rank_shares"]
    if len(set(shares)) > 1:
        found.append(
            f"{counted(plan.effective_batch_size, 'example')} over {plan.world_size} ranks are "
            f"{', '.join(str(share) for share in shares)}: uneven, and exact all the same"
        )
    last = plan.num_examples - (plan.steps_per_epoch - 1) * plan.effective_batch_size
    if plan.num_examples < plan.effective_batch_size:
        found.append(
            f"all {counted(plan.num_examples, 'example')} are fewer than the "
            f"{plan.effective_batch_size} of one step: lower train.gradient_accumulation_steps or "
            "train.per_device_train_batch_size"
        )
    elif 2 * last < plan.effective_batch_size:
        found.append(
            f"the last step of an epoch holds {last} of "
            f"{counted(plan.effective_batch_size, 'example')}"
        )
    if plan.warmup_steps >= plan.total_steps:
        found.append(
            f"the warm-up ({counted(plan.warmup_steps, 'step')}) is as long as the run "
            f"({counted(plan.total_steps, 'step')}): the peak learning rate is never reached"
        )
    if config.checkpoint.total_limit is None and len(plan.save_steps) > 20:
        found.append(
            f"{len(plan.save_steps)} checkpoints are kept: checkpoint.total_limit bounds them"
        )
    return found


def _free_disk(config: RunConfig) -> int | None:
    folder = Path(config.train.output_dir or "runs").absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def render_plan(document: Mapping[str, Any]) -> str:
    """Return a plan document as text for a terminal."""
    lines = ["Plan" + (f" of {document['preset']}" if document["preset"] else "")]
    rows = [*_head_rows(document), *_step_rows(document), *_cost_rows(document)]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    if document["claims"]:
        lines += ["", "The seed's claims, against its own settings"]
        lines += [f"  {_claim_line(claim)}" for claim in document["claims"]]
    if document["departures"]:
        lines += ["", "Where this preset departs from its seed, or fills a gap"]
        lines += [f"  - {departure}" for departure in document["departures"]]
    if document["warnings"]:
        lines += ["", "To look at"]
        lines += [f"  ! {warning}" for warning in document["warnings"]]
    return "\n".join(lines) + "\n"


def _head_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    count = document["num_examples"]
    data = document["data"]
    examples = "unknown" if count is None else f"{count:,} ({document['num_examples_from']})"
    held = [
        f"{data[f'{name}_examples']:,} {name}"
        for name in ("valid", "test")
        if data.get(f"{name}_examples")
    ]
    batch = f"{counted(document['effective_batch_size'], 'example')} a step"
    if document["world_size"] > 1:
        batch += (
            f", on {document['world_size']} ranks {'/'.join(map(str, document['rank_shares']))}"
        )
    if document["micro_batches_per_step"]:
        micro_batches = counted(document["micro_batches_per_step"], "micro-batch", "micro-batches")
        batch += f", in {micro_batches} of {document['micro_batch_size']}"
    elif document["micro_batch_tokens"]:
        batch += f", in micro-batches of at most {document['micro_batch_tokens']:,} tokens"
    if document["world_size"] > 1:
        batch += " a rank"
    precision = document["precision"]
    if precision == "auto":
        precision = "precision auto (counted as bf16)"
    return [
        ("model", f"{document['model'] or 'unknown'}, {document['method']}, {precision}"),
        ("examples", ", ".join([examples, *held])),
        ("batch", batch),
    ]


def _step_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    if document["steps_per_epoch"] is None:
        total = document["total_steps"]
        return [("steps", f"{total:,}" if total else "unknown without data")]
    rates = document["learning_rates"]
    rows = [
        (
            "steps",
            f"{document['total_steps']:,} ({document['steps_per_epoch']:,} an epoch), "
            f"{document['warmup_steps']:,} of warm-up",
        ),
        ("evaluations", _listed(document["eval_steps"])),
        ("checkpoints", _listed(document["save_steps"])),
    ]
    if rates:
        shown = list(rates.items())
        shown = shown if len(shown) <= 6 else [*shown[:3], *shown[-2:]]
        rows.append(("learning rate", ", ".join(f"{rate:.3g} at {step}" for step, rate in shown)))
    return rows


def _cost_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if document["total_parameters"]:
        rows.append(
            (
                "parameters",
                f"{document['trainable_parameters']:,} trained of {document['total_parameters']:,} "
                f"({document['trainable_percent']:.2f} %)",
            )
        )
    memory = document["memory"]
    if memory["total"]:
        rank = " a rank" if document["world_size"] > 1 else ""
        parts = ", ".join(
            f"{name} {size_text(memory[name])}" for name in MEMORY_CATEGORIES if memory[name]
        )
        recomputing = {None: "not decided", True: "on", False: "off"}
        without = ""
        if other := document["memory_recomputing"]:
            without = f" without recomputing, {size_text(other['total'])} with it"
        rows.append((f"memory{rank}", f"about {size_text(memory['total'])}{without}: {parts}"))
        rows.append(
            (
                "recomputing",
                f"{recomputing[document['gradient_checkpointing']]} "
                f"({document['gradient_checkpointing_because']})",
            )
        )
    disk = document["disk"]
    if disk["total"]:
        minutes = disk["one_more_each_minutes"]
        more = f" (and one each {minutes:g} minutes)" if minutes else ""
        rows.append(
            (
                "disk",
                f"{size_text(disk['total'])}: {counted(disk['checkpoints_kept'], 'checkpoint')} of "
                f"{size_text(disk['checkpoint'])}{more}, best and final "
                f"{size_text(disk['best_and_final'])}",
            )
        )
    compute = document["compute"]
    if compute["flops"]:
        tokens = f"{compute['tokens_are']} {compute['tokens']:,} tokens"
        hours = compute["a100_hours"]
        estimate = f"; one A100 at {SHARE_OF_PEAK:.0%} of its bf16 peak: about {hours:.1f} h"
        rows.append(("work", tokens + (estimate if hours >= 0.05 else "")))
    return rows


def _claim_line(claim: Mapping[str, Any]) -> str:
    mark = "✓" if claim["holds"] else "✗"
    value = claim["planned"]
    planned = ""
    if value is not None and not claim["holds"]:
        planned = f" → {value:,}" if isinstance(value, int) else f" → {value:.3g}"
    note = f" ({claim['note']})" if claim["note"] else ""
    return f"{mark} {claim['statement']}{planned}{note}"


def _listed(steps: Sequence[int]) -> str:
    if not steps:
        return "none"
    if len(steps) <= 6:
        return ", ".join(f"{step:,}" for step in steps)
    return f"{steps[0]:,}, {steps[1]:,}, {steps[2]:,}, … {steps[-1]:,} ({len(steps)} in all)"
