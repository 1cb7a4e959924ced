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
    BEST,
    LORA_ALONE,
    QUANTISED,
    RENAMED,
    SEVERAL,
    UNSUPPORTED,
    UNSUPPORTED_FAMILIES,
)

Settings = dict[str, Any]
# Gets the value and all that the same layer gives under its own names.
Translator = Callable[[Any, Mapping[str, Any]], Settings]

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


def _words(values: Mapping[Any, Settings], otherwise: str) -> Translator:
    """Take the values of a table; refuse any other, saying what to write."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        for word, settings in values.items():
            # 1 is not True here: it would be a number of something.
            if word == value and type(word) is type(value):
                return settings
        raise UserError(otherwise)

    return translator


def _half(name: str, other: str) -> Translator:
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

    return translator


_AUTO_PRECISION = "bf16 where the device has it natively, else fp32"


def _strategy(key: str, steps: str, no: Settings | None, otherwise: str) -> Translator:
    """`eval_strategy` and its like: `epoch`, `no`, or `steps` beside the number of steps."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if value == "epoch":
            return {"log.per_epoch": 1} if key == "log.steps" else {key: "epoch"}
        if value == "steps" and (steps in layer or key in layer):
            return {}
        if value in ("no", False) and no is not None:
            return no
        raise UserError(otherwise)

    return translator


def _steps(key: str, per_epoch: str) -> Translator:
    """`eval_steps` and its like: a number of steps, where the stack also takes a share of all."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        if isinstance(value, float) and value < 1:
            raise UserError(
                f"a share of all steps is not how this is said here: say {key}=STEPS, or "
                f"{per_epoch}=TIMES an epoch"
            )
        return {key: value}

    return translator


def _share(whole: int) -> Translator:
    """A share of the rows, given as a part of `whole`."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 0 <= value / whole < 1:
            raise UserError(
                "the valid set is a share of the rows here, not a number of them: say "
                "data.valid_fraction=SHARE (0 to 1), or give its rows as data.valid"
            )
        return {"data.valid_fraction": value / whole}

    return translator


def _beta(number: int) -> Translator:
    """`adam_beta1` beside `adam_beta2`: a pair here, given once."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        pair = [layer.get("adam_beta1"), layer.get("adam_beta2")]
        if None in pair:
            raise UserError("the two betas are one key: say optimizer.betas=[BETA1, BETA2]")
        return {"optimizer.betas": pair}

    return translator


def _rows(key: str) -> Translator:
    """A data set's name: of this machine where it is there, else `owner/name` on the Hub."""

    def translator(value: Any, layer: Mapping[str, Any]) -> Settings:
        on_hub = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value)
        if on_hub and not Path(value).suffix and not Path(value).exists():
            return {key: f"hub:{value}"}
        return {key: value}

    return translator


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


_UNPADDED = _words(
    {True: {"data.batching": "unpadded"}},
    "rows that are not packed are padded: say data.batching=longest or max_length (unpadded puts "
    "rows end to end too, but none sees another, so that loss and gradient are the same)",
)
_METHODS = {"lora": {"train.method": "lora"}, "full": {"train.method": "full"}}
_WHERE = _words(
    {True: {"train.device": "cpu"}, False: {"train.device": "auto"}},
    "say train.device=cpu, cuda, mps or auto",
)
_PEFT = _words({True: _METHODS["lora"], False: _METHODS["full"]}, "say train.method=lora or full")

# Name → the keys that it can set, and how its values are read.
TRANSLATED: dict[str, tuple[tuple[str, ...], Translator]] = {
    "adam_beta1": (("optimizer.betas",), _beta(1)),
    "adam_beta2": (("optimizer.betas",), _beta(2)),
    "adapter": (
        ("train.method",),
        _words(
            {"lora": _METHODS["lora"], None: _METHODS["full"], "": _METHODS["full"]},
            f"the adapters are LoRA's on a base that is not quantised; {QUANTISED}",
        ),
    ),
    "average_tokens_across_devices": (
        (),
        _words({True: {}}, "a step's loss is the mean over all its targets, on any ranks"),
    ),
    "bf16": (("train.precision",), _half("bf16", "fp16")),
    "fp16": (("train.precision",), _half("fp16", "bf16")),
    "data_files": (("data.train",), _rows("data.train")),
    "data_path": (("data.train",), _rows("data.train")),
    "dataset": (("data.train",), _rows("data.train")),
    "dataset_name": (("data.train",), _rows("data.train")),
    "assistant_only_loss": (("data.completion_only",), _answers_alone),
    "do_eval": ((), _evaluates),
    "metric_for_best_model": ((), _words({"eval_loss": {}, "loss": {}}, BEST)),
    "lora_target_modules": (("lora.target_modules",), _targets),
    "disable_tqdm": (
        ("log.progress",),
        _words(
            {True: {"log.progress": False}, False: {"log.progress": "auto"}},
            "say log.progress=true, false or auto",
        ),
    ),
    "eval_steps": (("eval.steps",), _steps("eval.steps", "eval.per_epoch")),
    "eval_strategy": (
        ("eval.steps",),
        _strategy(
            "eval.steps", "eval_steps", {"eval.steps": None}, "say eval.steps=STEPS, epoch or none"
        ),
    ),
    "finetuning_type": (("train.method",), _words(_METHODS, "say train.method=lora or full")),
    "logging_steps": (("log.steps",), _steps("log.steps", "log.per_epoch")),
    "logging_strategy": (
        ("log.steps", "log.per_epoch"),
        _strategy(
            "log.steps",
            "logging_steps",
            None,
            "say log.steps=STEPS or log.per_epoch=TIMES (metrics.jsonl has every step)",
        ),
    ),
    "lora_target": (("lora.target_modules",), _targets),
    "lora_target_linear": (
        ("lora.target_modules",),
        _words(
            {True: {"lora.target_modules": "all-linear"}},
            "say lora.target_modules=[NAMES]",
        ),
    ),
    "lr_scheduler": (("schedule.name",), _schedule),
    "lr_scheduler_type": (("schedule.name",), _schedule),
    "mixed_precision": (
        ("train.precision",),
        _words(
            {
                "no": {"train.precision": "fp32"},
                "bf16": {"train.precision": "bf16"},
                "fp16": {"train.precision": "fp16"},
            },
            f"say train.precision=bf16, fp16, fp32 or auto ({_AUTO_PRECISION})",
        ),
    ),
    "no_cuda": (("train.device",), _WHERE),
    "packing": (("data.batching",), _UNPADDED),
    "pad_to_max_length": (
        ("data.batching",),
        _words(
            {
                True: {"data.batching": "max_length"},
                False: {"data.batching": "longest"},
            },
            "say data.batching=max_length, longest or unpadded",
        ),
    ),
    "padding": (
        ("data.batching",),
        _words(
            {
                True: {"data.batching": "longest"},
                "longest": {"data.batching": "longest"},
                "max_length": {"data.batching": "max_length"},
            },
            "say data.batching=max_length, longest or unpadded",
        ),
    ),
    "padding_free": (("data.batching",), _UNPADDED),
    "peft_type": ((), _words({"LORA": {}}, f"say train.method=lora: {LORA_ALONE}")),
    "report_to": (("log.tensorboard",), _report),
    "sample_packing": (("data.batching",), _UNPADDED),
    "save_safetensors": (
        (),
        _words({True: {}}, "weights are always saved as safetensors, never as pickles"),
    ),
    "save_steps": (("checkpoint.steps",), _steps("checkpoint.steps", "checkpoint.per_epoch")),
    "save_strategy": (
        ("checkpoint.steps",),
        _strategy(
            "checkpoint.steps",
            "save_steps",
            None,
            "say checkpoint.steps=STEPS or epoch; with checkpoint.steps=none and "
            "checkpoint.minutes=none the end alone is saved, and best/ is kept always",
        ),
    ),
    "scheduler": (("schedule.name",), _schedule),
    "task_type": (
        (),
        _words({"CAUSAL_LM": {}}, "decoders alone are trained, to say what comes next"),
    ),
    "train_on_inputs": (
        ("data.completion_only",),
        _words(
            {True: {"data.completion_only": False}, False: {"data.completion_only": True}},
            "say data.completion_only=true or false",
        ),
    ),
    "train_on_prompt": (
        ("data.completion_only",),
        _words(
            {True: {"data.completion_only": False}, False: {"data.completion_only": True}},
            "say data.completion_only=true or false",
        ),
    ),
    "train_sampling_strategy": (
        ("data.shuffle", "data.group_by_length"),
        _words(
            {
                "random": {"data.shuffle": True, "data.group_by_length": False},
                "sequential": {"data.shuffle": False, "data.group_by_length": False},
                "group_by_length": {"data.group_by_length": True},
            },
            "say data.shuffle and data.group_by_length",
        ),
    ),
    "use_cpu": (("train.device",), _WHERE),
    "use_lora": (("train.method",), _PEFT),
    "use_peft": (("train.method",), _PEFT),
    "val_set_size": (("data.valid_fraction",), _share(1)),
    "validation_split_percentage": (("data.valid_fraction",), _share(100)),
}
TRANSLATED["evaluation_strategy"] = TRANSLATED["eval_strategy"]
