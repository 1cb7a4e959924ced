"""Settings that do not go with each other whatever the machine: one sentence each, and the way out.

`train.plan.decide` asks before anything is decided. This module never imports torch.
"""

from __future__ import annotations

from files.errors import UserError, counted
from train.config.schema import OF_COMPLETIONS, RunConfig


def refuse_with_steps_of_tokens(config: RunConfig) -> None:
    """Refuse what does not go with a step whose targets are counted before the run."""
    data, asked = config.data, f"train.effective_batch_tokens={config.train.effective_batch_tokens}"
    if config.train.effective_batch_tokens is None:
        return
    if data.fim_rate:
        raise UserError(
            f"{asked} with data.fim_rate={data.fim_rate:g}: an example's targets differ from epoch "
            "to epoch with its holes, so that no plan could say the steps; use "
            "train.effective_batch_size, or data.fim_rate=0"
        )
    if data.group_by_length:
        raise UserError(
            f"{asked} with data.group_by_length=true: lengths are grouped by the examples of a "
            "step, and their number differs; use data.group_by_length=false (unpadded rows gain "
            "nothing by it), or train.effective_batch_size"
        )


def refuse_with_holes(config: RunConfig) -> None:
    """Refuse what does not go with fill-in-the-middle, and its parts without it."""
    data, asked = config.data, f"data.fim_rate={config.data.fim_rate:g}"
    if data.fim_rate == 0:
        if config.eval.holes:
            raise UserError(
                f"eval.holes={config.eval.holes} with data.fim_rate=0: held-out rows have no holes "
                "to fill; set data.fim_rate, or eval.holes=0"
            )
        return
    if data.format != "text":
        raise UserError(
            f"{asked} with data.format={data.format}: a hole is cut out of a whole text, and the "
            "answer to a prompt is no middle of one; use data.format=text, or data.fim_rate=0"
        )
    if not data.append_eos:
        raise UserError(
            f"{asked} with data.append_eos=false: what ends a middle is how a model learns where "
            "the hole ends, and it is trained; use data.append_eos=true, or data.fim_rate=0"
        )


def refuse_with_weights(config: RunConfig) -> None:
    """Refuse shares of sources (`data.weights`) that are not told apart, one number for each."""
    data = config.data
    if data.weights is None:
        return
    if data.train is None or isinstance(data.train, str):
        raise UserError(
            "data.weights gives each entry of a list its share, and data.train is no list: write "
            """data.train='["A.jsonl", "B.jsonl"]', or leave data.weights out"""
        )
    entries, numbers = len(data.train), len(data.weights)
    if entries != numbers:
        raise UserError(
            f"data.weights holds {counted(numbers, 'number')} for the "
            f"{counted(entries, 'entry', 'entries')} of data.train; give one for each"
        )


def of_completions(config: RunConfig) -> list[str]:
    """Return those of `eval.metrics` that completions of held-out rows are made for."""
    asked = [name for name in OF_COMPLETIONS if name in (config.eval.metrics or ())]
    return [] if config.data.fim_rate and asked == ["exact_match"] else asked


def refuse_to_complete(config: RunConfig) -> None:
    """Refuse metrics of completions where no row has a prompt, or where tests are not known."""
    data, metrics = config.data, config.eval.metrics or ()
    asked = f"eval.metrics={','.join(of_completions(config))}"
    if data.fim_rate and "exact_match" in metrics and not config.eval.holes:
        raise UserError(
            f"eval.metrics=exact_match with data.fim_rate={data.fim_rate:g} is the share of "
            "held-out holes that are filled exactly, and none is; set eval.holes=50, or so"
        )
    if not of_completions(config):
        return
    if data.fim_rate:
        raise UserError(
            f"{asked} with data.fim_rate={data.fim_rate:g}: rows with holes have no prompt, and of "
            "holes exact_match alone is known; use eval.metrics=exact_match with eval.holes"
        )
    if data.format == "text":
        raise UserError(
            f"{asked} with data.format=text: a whole text has no prompt that the model could "
            "complete; use data.format=completion, template, instruction or messages"
        )
    if "pass@1" in metrics and data.valid is None and data.split_column is None:
        raise UserError(
            "eval.metrics=pass@1 reads the tests in the held-out rows themselves; name them by "
            "data.valid or data.split_column"
        )


def refuse_to_complete_shared(config: RunConfig, sharding: str | None) -> None:
    """Refuse metrics of completions where ranks share the weights: memory that one lacks ends all.

    Every pass of a shared model is one of all ranks, and batches are halved by one alone.
    """
    if sharding == "shard" and (asked := of_completions(config)):
        raise UserError(
            f"eval.metrics={','.join(asked)} with ranks that share the model's weights "
            "(train.sharding): nothing is completed there; use train.sharding=replicate, or leave "
            "them out and ask `lathe evaluate` of a checkpoint"
        )


def refuse_moments(config: RunConfig, precision: str) -> None:
    """Refuse masters and optimizers that do not go with what is trained, or with each other."""
    full, name = config.train.method == "full", config.optimizer.name
    if name == "adamw_8bit" and full and config.train.sharding == "shard":
        raise UserError(
            "optimizer.name=adamw_8bit with train.sharding=shard: its blocks of 256 would be cut "
            "where the ranks' rows are, and the result depend on their number; use "
            "train.sharding=replicate, or optimizer.name=adafactor"
        )
    if config.train.masters == "fp32":
        return
    if not full:
        raise UserError(
            "train.masters=bf16 with train.method=lora: adapters are small and keep fp32 masters; "
            "use train.masters=fp32 (how the frozen base is stored says model.dtype)"
        )
    if precision not in ("bf16", "auto"):
        raise UserError(
            f"train.masters=bf16 with train.precision={precision}: the masters are the very "
            "weights that are computed with; use train.precision=bf16, or train.masters=fp32"
        )
    if name == "adamw_8bit":
        raise UserError(
            "train.masters=bf16 with optimizer.name=adamw_8bit: only adamw, paged_adamw and "
            "adafactor round masters by chance; use one of these, or train.masters=fp32"
        )


def refuse_with_quantization(config: RunConfig) -> None:
    """Refuse what does not go with quantised weights."""
    asked, none = f"model.quantization={config.model.quantization}", "model.quantization=none"
    if config.model.quantization is None:
        return
    if config.train.method == "full":
        raise UserError(
            f"{asked} with train.method=full: quantised weights are frozen and cannot be trained; "
            f"use train.method=lora, or {none} with the model's original weights"
        )
    if config.train.sharding == "shard":
        raise UserError(
            f"{asked} with train.sharding=shard: every rank has the quantised weights whole; use "
            f"train.sharding=auto or replicate, or {none}"
        )
    for setting, given in (
        ("lora.use_dora=true", config.lora.use_dora),
        ("lora.init_lora_weights=pissa", config.lora.init_lora_weights == "pissa"),
    ):
        if given:
            raise UserError(
                f"{asked} with {setting}: it is made of weights that are not quantised; use {none} "
                "or plain adapters"
            )
    if config.train.compile:
        raise UserError(
            f"{asked} with train.compile=true: that has never been tried together; use "
            f"train.compile=false or {none}"
        )


def why_not_streamed(config: RunConfig, device: str | None) -> str:
    """Return what forbids `model.stream_layers`, and the way out; empty where nothing does."""
    train, off = config.train, "or model.stream_layers=false"
    if train.method == "full":
        return (
            f"with train.method=full: weights that are trained stay; use train.method=lora, {off}"
        )
    if config.model.quantization is not None:
        return (
            f"with model.quantization={config.model.quantization}: packed weights stay on the "
            f"device; use model.quantization=none, {off}"
        )
    if train.sharding == "shard":
        return (
            "with train.sharding=shard: every rank streams whole layers; use "
            f"train.sharding=replicate, {off}"
        )
    if train.compile:
        return (
            "with train.compile=true: compiled layers take their weights for tensors that stay; "
            f"use train.compile=false, {off}"
        )
    if config.lora.use_dora or config.lora.init_lora_weights == "pissa":
        setting = "use_dora=true" if config.lora.use_dora else "init_lora_weights=pissa"
        return f"with lora.{setting}: it reads weights beside the pass; use plain adapters, {off}"
    if device not in (None, "cuda"):
        return f"on {device}: its memory is the host's, so nothing would be gained; leave it out"
    return ""


def wants_whole_weights(config: RunConfig) -> str:
    """Return the setting of the adapters that no shared base can serve; empty where none is."""
    lora = config.lora
    found = {
        "lora.use_dora=true": lora.use_dora,
        "lora.modules_to_save=…": lora.modules_to_save,
        "lora.trainable_token_indices=…": lora.trainable_token_indices,
        f"lora.init_lora_weights={lora.init_lora_weights}": lora.init_lora_weights != "default",
    }
    asked = [setting for setting, given in found.items() if given]
    return asked[0] if asked and config.train.method == "lora" else ""
