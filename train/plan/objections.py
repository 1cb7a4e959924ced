"""What a careful reader would object to in a plan, each in one sentence that says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import counted
from train.config.schema import KEYS, RunConfig
from train.inputs.adapters import starting_adapter_note
from train.inputs.known import KnownData, Unknown
from train.plan.decide import Machine, decide_attention
from train.plan.mixture import mixture_objections
from train.plan.refusals import of_completions
from train.plan.steps import RunPlan
from train.process.room import available_memory
from train.text import size_text

if TYPE_CHECKING:
    from models.config import DecoderConfig

# Below this, two evaluations that differ by a few hundredths of a nat may as well be equal.
FEW_VALID_EXAMPLES = 50
_OF_HOLES = ("fim_spm_rate", "fim_unit", "fim_targets")
_OF_ROWS = ("complete", "max_new_tokens")


def objections(
    config: RunConfig,
    document: Mapping[str, Any],
    plan: RunPlan | None,
    data: KnownData | Unknown,
    decoder: DecoderConfig | Unknown,
    machine: Machine,
) -> list[str]:
    """Return what is to be looked at before the run starts."""
    return [
        *starting_adapter_note(config),
        *_of_the_model(config, decoder, machine),
        *_of_the_data(config, document, data),
        *mixture_objections(document),
        *(_of_the_steps(config, document, plan) if plan else _of_unknown_steps(document)),
        *_of_the_room(config, document),
        *_of_the_bits(config, document, machine),
    ]


def _of_the_model(
    config: RunConfig, decoder: DecoderConfig | Unknown, machine: Machine
) -> list[str]:
    if config.model.path is None:
        return ["model.path is not set: give a hub id or a folder"]
    if isinstance(decoder, Unknown):
        return [f"the model is not known, so neither are its parameters: {decoder.because}"]
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


def _of_the_bits(config: RunConfig, document: Mapping[str, Any], machine: Machine) -> list[str]:
    found = []
    micro_batches = document["micro_batches_per_step"] or config.train.gradient_accumulation_steps
    if config.train.masters == "bf16" and micro_batches > 1:
        found.append(
            f"train.masters=bf16 keeps gradients in bf16, and those of {micro_batches} "
            "micro-batches are added up in it: another cut of a step rounds otherwise, and one "
            "micro-batch a step not at all"
        )
    if machine.device == "cuda" and not config.train.deterministic:
        found.append(
            "on CUDA the backward pass of flash attention adds up by atomics, in no fixed order: a "
            "resumed run goes on exactly, but not bit for bit; train.deterministic=true repeats "
            "every bit"
        )
    return found


def _of_the_room(config: RunConfig, document: Mapping[str, Any]) -> list[str]:
    found = []
    total, available = document["memory"]["total"], document["available_memory"]
    if document["fits"] is False:
        remedy = "lower train.per_device_train_batch_size (results are the same) or data.max_length"
        lasting = ("weights", "adapters", "gradients", "optimizer", "gathered")
        if sum(document["memory"][name] for name in lasting) > available:
            ranks = {
                None: "start more ranks (torchrun), which can share the model",
                "replicate": "set train.sharding=shard",
                "shard": "start more ranks",
            }[document["sharding"]]
            adapters = "lower lora.r, " if config.train.method == "lora" else ""
            remedy = f"{ranks}, {adapters}or take a smaller model: batches are not what fills it"
        if ways := (document["fitting"] or {"ways": []})["ways"]:
            settings = " ".join(f"{key}={value}" for key, value in ways[0]["settings"].items())
            same = "" if ways[0]["changes"] else " (results are the same)"
            remedy = f"add {settings}{same}, or {remedy}"
        found.append(
            f"memory: does not fit: about {size_text(total)} needed, {size_text(available)} there; "
            f"{remedy}"
        )
    host, on_host = document["host_memory"], available_memory("cpu") if document["paging"] else None
    if on_host is not None and host > on_host:
        found.append(
            f"memory: optimizer.name=paged_adamw pins {size_text(host)} of host memory, and "
            f"{size_text(on_host)} are free; use optimizer.name=adafactor or adamw_8bit"
        )
    held = document["streamed_memory"]
    on_host = available_memory("cpu") if held else None
    if on_host is not None and held > on_host:
        found.append(
            f"memory: model.stream_layers pins {size_text(held)} of host memory, and "
            f"{size_text(on_host)} are free where this plan is made; use model.quantization=nf4"
        )
    free, needed = _free_disk(config), document["disk"]["total"]
    if needed is not None and free is not None and needed > free:
        found.append(
            f"disk: {size_text(needed)} needed, {size_text(free)} free; set checkpoint.total_limit"
        )
    return found


def _of_the_data(
    config: RunConfig, document: Mapping[str, Any], known: KnownData | Unknown
) -> list[str]:
    found = []
    data, counts = config.data, document["data"]
    if isinstance(known, Unknown):
        given = document["num_examples"]
        source = f"the seed's {given:,} rows stand in" if given else "the steps are not known"
        found.append(f"no data was read ({source}): {known.because}")
    elif isinstance(known.lengths, Unknown):
        found.append(
            f"rows are counted, not tokenised, each taken to be data.max_length long: "
            f"{known.lengths.because}"
        )
    if data.format != "template" and (data.prompt_template or data.completion_template):
        found.append(f"data.prompt_template is not read under data.format={data.format}")
    rows = counts.get("rows")
    limit = f"data.max_length={data.max_length}"
    weightless = counts.get("weightless", 0)
    weightless = f"of weight 0 ({weightless:,} of them), " if weightless else ""
    for name, what in (
        ("truncated", f"cut at {limit}"),
        ("dropped", f"dropped: longer than {limit}, {weightless}or without a token to train on"),
        ("near_duplicates", "left out: like a row before them (data.near_duplicates=drop)"),
    ):
        share = counts.get(name)
        if share and rows:
            found.append(f"{share:,} of {rows:,} rows ({share / rows:.1%}) are {what}")
    unread = [name for name in _OF_HOLES if getattr(data, name) != KEYS[f"data.{name}"].default]
    if unread and not data.fim_rate:
        found.append(f"data.{', data.'.join(unread)}: not read while data.fim_rate is 0")
    unread = [f"eval.{n}" for n in _OF_ROWS if getattr(config.eval, n) != KEYS[f"eval.{n}"].default]
    if unread and not of_completions(config):
        found.append(f"{', '.join(unread)}: not read while eval.metrics names none of completions")
    held, asked = counts.get("valid_examples") or 0, config.eval.holes
    if held and asked > held * data.fim_rate:
        found.append(
            f"eval.holes={asked}: about {held * data.fim_rate:,.0f} of {counted(held, 'valid row')}"
            " have a hole, and no more are filled"
        )
    for name, what in (
        ("unparsed", "not Python to its parser (cut rows seldom are): holes are cut by lines"),
        ("holeless", "without a hole, ever: they hold special tokens of the tokenizer themselves"),
    ):
        if counts.get(name):
            share = counts[name] / counts["examples"]
            found.append(f"{counted(counts[name], 'example')} ({share:.1%}) {what}")
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
        ("left_out_turns", "kept out of the loss (weight 0, train false, or data.train_on=last)"),
        (
            "thoughtless_turns",
            "trained without their thinking, which the chat template leaves out of the text",
        ),
    ):
        if turns and counts.get(name):
            found.append(f"{counts[name]:,} of {turns:,} assistant turns are {what}")
    valid = counts.get("valid_examples")
    without_valid = isinstance(known, KnownData) and not valid
    if without_valid and config.checkpoint.load_best_at_end:
        found.append(
            "checkpoint.load_best_at_end has no valid set to choose by: final/ will be the last "
            "state; give data.valid or data.valid_fraction"
        )
    if without_valid and (config.eval.steps or config.eval.per_epoch) is not None:
        found.append(
            "evaluations are asked for, and there is no valid set: give data.valid or "
            "data.valid_fraction"
        )
    if valid and (config.eval.steps or config.eval.per_epoch) is None:
        found.append(
            f"{counted(valid, 'valid example')} and no evaluation before the last step: "
            "eval.steps=epoch evaluates them after every epoch, and draws a valid curve"
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


def _of_unknown_steps(document: Mapping[str, Any]) -> list[str]:
    if not document["effective_batch_tokens"]:
        return []
    return [
        "train.effective_batch_tokens: the steps are known when the rows are tokenised; until then "
        "each example counts as data.max_length targets"
    ]


def _of_the_steps(config: RunConfig, document: Mapping[str, Any], plan: RunPlan) -> list[str]:
    found = []
    shares = document["rank_shares"]
    if len(set(shares)) > 1 and plan.cut is None:
        found.append(
            f"{counted(plan.effective_batch_size, 'example')} over {plan.world_size} ranks are "
            f"{', '.join(str(share) for share in shares)}: uneven, and exact all the same"
        )
    last = plan.num_examples - (plan.steps_per_epoch - 1) * plan.effective_batch_size
    if plan.cut is not None:
        if plan.steps_per_epoch == 1:
            found.append(
                f"all {counted(plan.num_examples, 'example')} make one step: lower "
                f"train.effective_batch_tokens={document['effective_batch_tokens']}"
            )
    elif plan.num_examples < plan.effective_batch_size:
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
