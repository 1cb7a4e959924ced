"""How Trainer, TRL, PEFT, axolotl, LLaMA-Factory and Unsloth spell things, and what they mean here.

A configuration that was written for them is not guessed at. Each name stands in one table: those of
`train.config.stack`, or `TRANSLATED` here, where the key is certain and the values need a word. A
value that means the same here is taken; any other is refused with the setting to write.

What is taken is said (`train.config.load_config`). Names of this project's own keys need no entry.
This module never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from files.errors import UserError
from train.config.stack import (
    AN_EPOCH,
    BEST,
    LORA_ALONE,
    QUANTISED,
    RENAMED,
    SEVERAL,
    UNSUPPORTED,
    UNSUPPORTED_FAMILIES,
    each,
)

Settings = dict[str, Any]
# Gets the value and all that the same layer gives under its own names.
Translator = Callable[[Any, Mapping[str, Any]], Settings]
# The keys that a name can set, and how its values are read.
Spelling = tuple[tuple[str, ...], Translator]

_BY_ACCURACY: Settings = {
    "eval.metrics": ["token_accuracy"],
    "eval.best_metric": "token_accuracy",
}
_OFF = (False, None, 0, "", "no", "off", "disabled", [], {})


def unsupported(name: str) -> str:
    """Return the sentence on a name that stands for what is not there, or an empty string."""
    if name in UNSUPPORTED:
        return UNSUPPORTED[name]
    if name in RENAMED or name in TRANSLATED or name in SEVERAL:
        return ""
    return next(
        (text for start, text in UNSUPPORTED_FAMILIES.items() if name.startswith(start)), ""
    )


def keys_of(name: str) -> tuple[str, ...]:
    """Return the keys that a name of the stack's can mean, none where it is no such name."""
    if name in RENAMED:
        return (RENAMED[name],)
    if name in TRANSLATED:
        return TRANSLATED[name][0]
    return SEVERAL.get(name, ())


def translate(name: str, value: Any, layer: Mapping[str, Any]) -> Settings | None:
    """Return what a setting of the stack's means here: key → value; None where it is none.

    It may mean nothing at all: `load_in_4bit=false`.

    Args:
        name: The name as written, without a section.
        value: A TOML value, or text as on the command line.
        layer: All names and values that are given in the same place.

    Raises:
        UserError: It is not supported, or its value means something that is said in another way
            here.
    """
    if sentence := unsupported(name):
        if plain(value) in _OFF:
            return {}
        raise UserError(f"'{name}' is not supported: {sentence}")
    if name in RENAMED:
        return {RENAMED[name]: value}
    if name in TRANSLATED:
        return TRANSLATED[name][1](plain(value), {key: plain(item) for key, item in layer.items()})
    return None


def plain(value: Any) -> Any:
    """Return text as the boolean, the number or the None that it spells; anything else as it is."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    words = {"true": True, "false": False, "none": None, "null": None}
    if word in words:
        return words[word]
    if re.fullmatch(r"[-+]?\d{1,18}", word):
        return int(word)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?", word):
        return float(word)
    return value


def _words(key: str, values: Mapping[Any, Any], otherwise: str) -> Spelling:
    """Take the values of a table, for `key`; refuse any other, saying what to write.

    What means nothing here, or several keys, is written as the settings that it stands for.
    """
    means = {
        word: value if isinstance(value, dict) else {key: value} for word, value in values.items()
    }

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        for word, settings in means.items():
            # 1 is not True here: it would be a number of something.
            if word == value and type(word) is type(value):
                return settings
        raise UserError(otherwise)

    return tuple(dict.fromkeys(key for settings in means.values() for key in settings)), translator


def _switch(key: str, word: str) -> Spelling:
    """Take true as a word for `key`; switched off it says nothing."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if value is True or value in _OFF:
            return {key: word} if value is True else {}
        raise UserError(f"say {key}={word} or none")

    return (key,), translator


def _half(name: str, other: str) -> Spelling:
    """`bf16` and `fp16`: which of them is true; both false is fp32."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if value is True:
            return {"train.precision": name}
        if value is False and layer.get(other) is True:
            return {}
        if value is False and layer.get(other) is False:
            return {"train.precision": "fp32"}
        raise UserError(
            f"{name} takes true here, or false beside {other}: say train.precision=fp32, {other}, "
            f"or auto ({_AUTO_PRECISION})"
        )

    return ("train.precision",), translator


_AUTO_PRECISION = "bf16 where the device has it natively, else fp32"


def _strategy(key: str, steps: str, otherwise: str) -> Spelling:
    """`eval_strategy` and its like: `epoch`, `no`, or `steps` beside the number of steps."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if value == "epoch":
            return {"log.per_epoch": 1} if key == "log.steps" else {key: "epoch"}
        if value == "steps" and (steps in layer or key in layer):
            return {}
        if value in ("no", False) and key == "eval.steps":
            return {key: None}
        raise UserError(otherwise)

    return (key, "log.per_epoch") if key == "log.steps" else (key,), translator


def _steps(key: str, per_epoch: str) -> Spelling:
    """`eval_steps` and its like: a number of steps, where the stack also takes a share of all."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if isinstance(value, float) and value < 1:
            raise UserError(
                f"a share of all steps is not how this is said here: say {key}=STEPS, or "
                f"{per_epoch}=TIMES an epoch"
            )
        return {key: value}

    return (key,), translator


def _share(whole: int) -> Spelling:
    """A share of the rows, given as a part of `whole`."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 0 <= value / whole < 1:
            raise UserError(
                "the valid set is a share of the rows here, not a number of them: say "
                "data.valid_fraction=SHARE (0 to 1), or give its rows as data.valid"
            )
        return {"data.valid_fraction": value / whole}

    return ("data.valid_fraction",), translator


def _betas(value: Any, layer: Mapping[str, Any]) -> Settings:
    """`adam_beta1` beside `adam_beta2`: a pair here, given once."""
    pair = [layer.get("adam_beta1"), layer.get("adam_beta2")]
    if None in pair:
        raise UserError("the two betas are one key: say optimizer.betas=[BETA1, BETA2]")
    return {"optimizer.betas": pair}


def _rows(value: Any, layer: Mapping[str, Any]) -> Settings:
    """A data set's name: of this machine where it is there, else `owner/name` on the Hub."""
    on_hub = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value)
    if on_hub and not Path(value).suffix and not Path(value).exists():
        return {"data.train": f"hub:{value}"}
    return {"data.train": value}


def _mixed(value: Any, layer: Mapping[str, Any]) -> Settings:
    """LLaMA-Factory's `concat` has no shares, and its others end an epoch elsewhere."""
    if value == "concat" and not {"interleave_probs", "data.weights", "weights"} & layer.keys():
        return {}
    raise UserError(f"say data.weights=[SHARES], or leave both out: {AN_EPOCH}")


def _targets(value: Any, layer: Mapping[str, Any]) -> Settings:
    every = ("all", "all-linear", ["all-linear"], '["all-linear"]', "['all-linear']")
    return {"lora.target_modules": "all-linear" if value in every else value}


def _answers_alone(value: Any, layer: Mapping[str, Any]) -> Settings:
    """TRL's false, its default, is of messages; prompt and completion have a key of their own."""
    if value is True or layer.get("format", layer.get("data.format")) == "messages":
        return {"data.completion_only": value}
    return {}


def _evaluates(value: Any, layer: Mapping[str, Any]) -> Settings:
    asked = [name for name in _EVALUATION if layer.get(name) not in (*_OFF, "none")]
    if value is False and asked:
        raise UserError(f"{asked[0]} asks for evaluations beside it: leave one of them out")
    return {}


_EVALUATION = (
    *("eval_steps", "eval.steps", "eval_strategy", "evaluation_strategy", "eval.per_epoch"),
    *("evals_per_epoch", "valid", "data.valid", "validation_file", "eval_on_start"),
)


def _report(value: Any, layer: Mapping[str, Any]) -> Settings:
    names = [value] if isinstance(value, str) else value
    if value is None or names in (["none"], []):
        return {"log.tensorboard": False}
    if names == ["tensorboard"] or names == '["tensorboard"]':
        return {"log.tensorboard": True}
    raise UserError(
        "curves are TensorBoard's and report.md's, and metrics.jsonl has every step; say "
        "log.tensorboard=true or false"
    )


def _schedule(value: Any, layer: Mapping[str, Any]) -> Settings:
    """The stack's `constant` has no warm-up, whatever else is set; `schedule.name`'s has."""
    if value == "constant":
        raise UserError(
            "the stack's constant has no warm-up: say schedule.name=constant with "
            "schedule.warmup_ratio=0, or schedule.name=constant alone for one with a warm-up "
            "(the stack's constant_with_warmup)"
        )
    return {"schedule.name": "constant" if value == "constant_with_warmup" else value}


# Names, with spaces between, → the keys that they can set, and how their values are read.
TRANSLATED: dict[str, Spelling] = each(
    {
        "activation_offloading": _words(
            "model.gradient_checkpointing",
            {True: "offload", False: {}},
            "say model.gradient_checkpointing=offload: layers' inputs in host memory",
        ),
        "adam_beta1 adam_beta2": (("optimizer.betas",), _betas),
        "adapter": _words(
            "train.method",
            {
                "lora": "lora",
                "qlora": {"train.method": "lora", "model.quantization": "nf4"},
                None: "full",
                "": "full",
            },
            f"say train.method=lora or full: {LORA_ALONE}",
        ),
        "assistant_only_loss": (("data.completion_only",), _answers_alone),
        "average_tokens_across_devices": _words(
            "", {True: {}}, "a step's loss is the mean over all its targets, on any ranks"
        ),
        "bf16": _half("bf16", "fp16"),
        "bits quantization_bit": _words(
            "model.quantization", {4: "nf4", 8: "int8", 16: None, None: None}, QUANTISED
        ),
        "bnb_4bit_quant_storage": _words("", {"uint8": {}}, "four bits lie two a byte, always"),
        "bnb_4bit_quant_type quant_type": _words(
            "", {"nf4": {}}, "the format of four bits is nf4: say model.quantization=nf4"
        ),
        "bnb_4bit_use_double_quant double_quant double_quantization use_bnb_nested_quant": _words(
            "", {True: {}}, "model.quantization=nf4 quantises its absmax too, always"
        ),
        "data_files data_path dataset dataset_name": (("data.train",), _rows),
        "disable_tqdm": _words(
            "log.progress", {True: False, False: "auto"}, "say log.progress=true, false or auto"
        ),
        "do_eval": ((), _evaluates),
        "eval_steps": _steps("eval.steps", "eval.per_epoch"),
        "eval_strategy evaluation_strategy": _strategy(
            "eval.steps", "eval_steps", "say eval.steps=STEPS, epoch or none"
        ),
        "finetuning_type": _words(
            "train.method", {"lora": "lora", "full": "full"}, "say train.method=lora or full"
        ),
        "fp16": _half("fp16", "bf16"),
        "load_in_4bit": _switch("model.quantization", "nf4"),
        "load_in_8bit": _switch("model.quantization", "int8"),
        "logging_steps": _steps("log.steps", "log.per_epoch"),
        "logging_strategy": _strategy(
            "log.steps",
            "logging_steps",
            "say log.steps=STEPS or log.per_epoch=TIMES (metrics.jsonl has every step)",
        ),
        "lora_target lora_target_modules": (("lora.target_modules",), _targets),
        "lora_target_linear": _words(
            "lora.target_modules", {True: "all-linear"}, "say lora.target_modules=[NAMES]"
        ),
        "lr_scheduler lr_scheduler_type scheduler": (("schedule.name",), _schedule),
        "metric_for_best_model": _words(
            "",
            {"eval_loss": {}, "loss": {}, "eval_mean_token_accuracy": _BY_ACCURACY},
            BEST,
        ),
        "mixed_precision": _words(
            "train.precision",
            {"no": "fp32", "bf16": "bf16", "fp16": "fp16"},
            f"say train.precision=bf16, fp16, fp32 or auto ({_AUTO_PRECISION})",
        ),
        "no_cuda use_cpu": _words(
            "train.device", {True: "cpu", False: "auto"}, "say train.device=cpu, cuda, mps or auto"
        ),
        "packing padding_free sample_packing": _words(
            "data.batching",
            {True: "unpadded"},
            "rows that are not packed are padded: say data.batching=longest or max_length "
            "(unpadded puts rows end to end too, but none sees another, so that loss and gradient "
            "are the same)",
        ),
        "pad_to_max_length": _words(
            "data.batching",
            {True: "max_length", False: "longest"},
            "say data.batching=max_length, longest or unpadded",
        ),
        "padding": _words(
            "data.batching",
            {True: "longest", "longest": "longest", "max_length": "max_length"},
            "say data.batching=max_length, longest or unpadded",
        ),
        "mix_strategy": ((), _mixed),
        "mask_history": _words(
            "data.train_on", {True: "last", False: "all"}, "say data.train_on=last or all"
        ),
        "peft_type": _words("", {"LORA": {}}, f"say train.method=lora: {LORA_ALONE}"),
        "quantization_method": _words("", {"bnb": {}, "bitsandbytes": {}}, QUANTISED),
        "report_to": (("log.tensorboard",), _report),
        "save_safetensors": _words(
            "", {True: {}}, "weights are always saved as safetensors, never as pickles"
        ),
        "save_steps": _steps("checkpoint.steps", "checkpoint.per_epoch"),
        "save_strategy": _strategy(
            "checkpoint.steps",
            "save_steps",
            "say checkpoint.steps=STEPS or epoch; with checkpoint.steps=none and "
            "checkpoint.minutes=none the end alone is saved, and best/ is kept always",
        ),
        "task_type": _words(
            "", {"CAUSAL_LM": {}}, "decoders alone are trained, to say what comes next"
        ),
        "train_on_inputs train_on_prompt": _words(
            "data.completion_only",
            {True: False, False: True},
            "say data.completion_only=true or false",
        ),
        "train_sampling_strategy": _words(
            "",
            {
                "random": {"data.shuffle": True, "data.group_by_length": False},
                "sequential": {"data.shuffle": False, "data.group_by_length": False},
                "group_by_length": {"data.group_by_length": True},
            },
            "say data.shuffle and data.group_by_length",
        ),
        "use_lora use_peft": _words(
            "train.method", {True: "lora", False: "full"}, "say train.method=lora or full"
        ),
        "val_set_size": _share(1),
        "validation_split_percentage": _share(100),
    }
)
