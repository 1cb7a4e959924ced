"""What a run can be asked to do: each key with its type, default, allowed values, meaning, once.

Each section of the configuration (`[model]`, `[train]`, …) is a frozen dataclass, and each of its
fields carries its rule: the range or the words it takes and one line of documentation. Reading the
command line, checking a file, the error messages and the comments of `--show` (all in
`train.config`) come from these rules, so that none of them can disagree.

This module never imports torch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What one key takes: a line of documentation, words, and bounds for numbers.

    `words` are the allowed strings (empty: any string), `aliases` other spellings of them.
    `minimum` and `maximum` are inclusive, `above` and `below` exclusive. `recommended` is advice,
    not a check. `on_resume` marks the keys that `--resume` lets change.
    """

    doc: str
    words: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    recommended: str = ""
    on_resume: bool = False


def _key(default: Any, doc: str, **rule: Any) -> Any:
    return dataclasses.field(default=default, metadata={"rule": Rule(doc, **rule)})


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}


@dataclass(frozen=True)
class ModelSettings:
    """The base model and how its layers compute."""

    path: str | None = _key(None, "hub id (owner/name) or folder of the base model")
    revision: str | None = _key(None, "branch, tag or commit on the hub; none: the newest")
    random_init: bool = _key(
        False, "architecture from config.json, weights drawn from train.seed, none downloaded"
    )
    attention: str = _key(
        "auto",
        "how attention is computed; flash_attention_2 is read as auto",
        words=("auto", "sdpa", "eager"),
        aliases={"flash_attention_2": "auto"},
    )
    dropout: float | None = _key(
        None,
        "overrides the checkpoint's attention, residual and embedding dropout; none: its own",
        minimum=0,
        below=1,
    )
    dtype: str | None = _key(
        None,
        "storage of the frozen base; none: what train.precision computes in "
        "(what is trained always has fp32 masters)",
        words=("bf16", "fp16", "fp32"),
        aliases=_DTYPES,
    )
    gradient_checkpointing: bool | str = _key(
        "auto",
        "recompute activations in the backward pass: same results, less memory, about a third "
        "more time; auto: only where the plan says that memory needs it",
        words=("auto",),
    )


@dataclass(frozen=True)
class TrainSettings:
    """The run as a whole: method, precision, length, batch, device, place."""

    method: str = _key("lora", "adapters on a frozen base, or every weight", words=("lora", "full"))
    precision: str = _key(
        "auto",
        "what matrix products compute in; auto: bf16 where the device has it natively, else fp32",
        words=("auto", "bf16", "fp16", "fp32"),
        aliases=_DTYPES,
    )
    seed: int = _key(42, "every random draw follows from it", minimum=0, below=2**63)
    num_train_epochs: float = _key(
        20.0, "passes over the data; may be a fraction", above=0, maximum=1e6, on_resume=True
    )
    max_steps: int | None = _key(
        None, "optimizer steps; rules over num_train_epochs if set", minimum=1, on_resume=True
    )
    per_device_train_batch_size: int = _key(
        8, "examples in a micro-batch (one forward and backward)", minimum=1, recommended="4 to 16"
    )
    gradient_accumulation_steps: int = _key(
        8, "micro-batches in a step (one optimizer update)", minimum=1, recommended="4 to 32"
    )
    effective_batch_size: int | None = _key(
        None,
        "examples in a step over all ranks; if set it rules, on any number of ranks; "
        "none: per_device_train_batch_size × gradient_accumulation_steps × ranks",
        minimum=1,
    )
    micro_batch_tokens: int | str | None = _key(
        None,
        "cut a step into micro-batches of at most so many tokens; none: by "
        "per_device_train_batch_size examples (same loss and gradient either way)",
        words=("auto",),
        minimum=1,
    )
    device: str = _key("auto", "where the run computes", words=("auto", "cpu", "cuda", "mps"))
    kernels: str = _key(
        "auto",
        "plain PyTorch (reference) or Triton kernels; triton raises where it is unavailable",
        words=("auto", "reference", "triton"),
    )
    compile: bool = _key(False, "compile the decoder layers with torch.compile")
    deterministic: bool = _key(
        False, "only deterministic kernels: the same bits on the same device"
    )
    sharding: str = _key(
        "auto",
        "of several ranks: each has the whole model, or they share it; auto: adapters are trained "
        "in replicas where the base fits a rank, every weight is shared",
        words=("auto", "replicate", "shard"),
        on_resume=True,
    )
    output_dir: str | None = _key(
        None, "the run's folder; none: runs/<preset>-<UTC time>; never overwritten"
    )
    run_name: str | None = _key(None, "a name for TensorBoard and the report")


@dataclass(frozen=True)
class LoraSettings:
    """The adapters (train.method = lora)."""

    r: int = _key(8, "rank of the adapters", minimum=1, maximum=2**16, recommended="8 to 32")
    lora_alpha: int | float = _key(
        32,
        "scale: the update counts lora_alpha / r",
        above=0,
        maximum=65504,  # fp16 has no larger number
        recommended="2 to 4 times r",
    )
    lora_dropout: float = _key(0.05, "dropout on the adapter's input", minimum=0, below=1)
    target_modules: str | tuple[str, ...] = _key(
        "all-linear",
        "all-linear (every linear layer but the head), a list of names, or a regular expression "
        "over full module names",
    )
    use_rslora: bool = _key(False, "scale by lora_alpha / sqrt(r) instead")
    bias: str = _key(
        "none", "biases trained beside the adapters", words=("none", "lora_only", "all")
    )
    init_from: str | None = _key(
        None,
        "a PEFT adapter folder to go on from, with its r, lora_alpha, target_modules, use_rslora "
        "and bias (lora_dropout is the run's own); none: B = 0",
    )


@dataclass(frozen=True)
class DataSettings:
    """Rows, and how they become tokens and labels."""

    train: str | tuple[str, ...] | None = _key(
        None,
        "file, folder, glob (data/*.jsonl), or hub:owner/name[:config][:split]; or a list of these",
    )
    valid: str | tuple[str, ...] | None = _key(None, "the same, for evaluation during the run")
    test: str | tuple[str, ...] | None = _key(None, "the same, for one evaluation at the end")
    split_column: str | None = _key(
        None, "data.train holds all rows; this column says train, valid (validation) or test"
    )
    format: str = _key(
        "text",
        "text: one field; template: prompt and completion templates over columns; "
        "completion: columns prompt and completion; messages: a chat; "
        "instruction: columns instruction, input and output in Alpaca's prompts",
        words=("text", "template", "completion", "messages", "instruction"),
    )
    text_field: str = _key("text", "the column of data.format = text")
    prompt_template: str | None = _key(
        None,
        "the prompt, with {column} placeholders; {?column}…{/column} is a part that is left out "
        "where that column is empty or absent, {{ and }} are braces",
    )
    completion_template: str | None = _key(None, "the completion, in the same way")
    system_prompt: str | None = _key(
        None,
        "stands first, with a blank line; in messages it is the system turn of rows without one",
    )
    chat_template: str | None = _key(
        None,
        "in place of the tokenizer's own for messages: a file, or the name of one of several that "
        "the tokenizer has; none: its own, tool_use where the row has tools",
    )
    completion_only: bool | None = _key(
        None, "labels on the completion alone; none: wherever there is a prompt and a completion"
    )
    append_eos: bool = _key(
        True, "the end-of-text token after each row, trained; cut rows get none"
    )
    max_length: int = _key(
        1024, "tokens of an example", minimum=2, recommended="the least that holds your rows"
    )
    on_overflow: str = _key(
        "truncate",
        "what becomes of a longer row; counted in the plan and the report",
        words=("truncate", "drop", "error", "split"),
    )
    batching: str = _key(
        "unpadded",
        "documents end to end, padded to the longest, or padded to data.max_length: "
        "the same loss, at very different speed",
        words=("unpadded", "longest", "max_length"),
    )
    group_by_length: bool = _key(False, "examples of like length in one step")
    shuffle: bool = _key(True, "a new order each epoch, a function of (train.seed, epoch)")
    valid_fraction: float = _key(
        0.0, "share of data.train held out where there is no valid set", minimum=0, below=1
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """The update rule."""

    name: str = _key(
        "adamw",
        "the update rule; paged_adamw is AdamW whose state may leave the device",
        words=("adamw", "paged_adamw", "adafactor"),
        aliases={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "paged_adamw_32bit": "paged_adamw",
        },
    )
    learning_rate: float = _key(2e-4, "the peak", above=0, recommended="5e-5 to 2e-4")
    weight_decay: float = _key(0.0, "decoupled; none on biases and norms", minimum=0)
    betas: tuple[float, float] = _key((0.9, 0.999), "AdamW's two decay rates", minimum=0, below=1)
    eps: float = _key(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = _key(1.0, "gradients are clipped to this norm; 0: never", minimum=0)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run."""

    name: str = _key("cosine", "the shape after warm-up", words=("cosine", "linear", "constant"))
    warmup_ratio: float = _key(
        0.05,
        "share of all steps spent rising from 0",
        minimum=0,
        maximum=1,
        recommended="0.03 to 0.1",
    )
    warmup_steps: int | None = _key(None, "rules over warmup_ratio if set", minimum=0)
    min_lr_ratio: float = _key(
        0.0, "the schedule ends at this share of the peak", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class EvalSettings:
    """When the valid set is evaluated, and when that ends the run."""

    steps: int | str | None = _key(
        None,
        "every so many steps, or each epoch; none: at the end alone",
        words=("epoch",),
        minimum=1,
        on_resume=True,
    )
    per_epoch: int | None = _key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    per_device_batch_size: int | None = _key(
        None, "examples in a forward pass; none: as in training", minimum=1
    )
    on_start: bool = _key(False, "also before the first step, the test set too")
    samples: int = _key(
        0,
        "held-out prompts that the model completes before and after training, for the report",
        minimum=0,
    )
    early_stopping_patience: int | None = _key(
        None, "stop after so many evaluations without a better loss", minimum=1
    )
    early_stopping_threshold: float = _key(
        0.0, "better means lower by more than this (loss)", minimum=0
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved, and what is kept."""

    steps: int | str | None = _key(
        "epoch",
        "every so many steps, or each epoch; none: by minutes and at the end",
        words=("epoch",),
        minimum=1,
        on_resume=True,
    )
    minutes: float | None = _key(
        15.0, "also when so many minutes passed since the last save", above=0, on_resume=True
    )
    per_epoch: int | None = _key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    total_limit: int | None = _key(
        None, "keep so many; never deletes the newest or the best; none: all", minimum=1
    )
    load_best_at_end: bool = _key(False, "final/ is the best evaluated state, not the last")


@dataclass(frozen=True)
class LogSettings:
    """What goes to TensorBoard and the console (metrics.jsonl always has every step)."""

    steps: int | None = _key(1, "every so many steps", minimum=1, on_resume=True)
    per_epoch: int | None = _key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    tensorboard: bool = _key(True, "write tensorboard/", on_resume=True)
    progress: bool | str = _key(
        "auto", "progress line; auto: on a terminal", words=("auto",), on_resume=True
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is asked to do.

    `preset` is the name that it started from, if any; `given` holds the keys that the user wrote
    (in a file, on the command line, in Python), whatever the values: the rest are a preset's or the
    defaults'.
    """

    preset: str | None = None
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()


@dataclass(frozen=True)
class Key:
    """One key of the configuration: `section.name`, the types it takes, and its rule."""

    section: str
    name: str
    default: Any
    optional: bool
    scalars: frozenset[type]
    item: type | None
    length: int | None
    rule: Rule

    @property
    def path(self) -> str:
        """The key as it is written: `section.name`."""
        return f"{self.section}.{self.name}"

    def allowed(self) -> str:
        """Say in words what the key takes."""
        parts: list[str] = []
        if bool in self.scalars:
            parts.append("true or false")
        if int in self.scalars and float not in self.scalars:
            parts.append(f"an integer{self._bounds()}")
        if float in self.scalars:
            parts.append(f"a number{self._bounds()}")
        if self.rule.words:
            parts.append(" | ".join(self.rule.words))
        elif str in self.scalars:
            parts.append("text")
        if self.item is not None:
            what = "names" if self.item is str else f"numbers{self._bounds()}"
            parts.append(f"a list of {f'{self.length} ' if self.length else ''}{what}")
        if self.optional:
            parts.append("none")
        return ", or ".join(parts)

    def _bounds(self) -> str:
        rule = self.rule
        signs = {"≥": rule.minimum, ">": rule.above, "≤": rule.maximum, "<": rule.below}
        told = [f"{sign} {bound:g}" for sign, bound in signs.items() if bound not in (None, 2**63)]
        return f" {' and '.join(told)}" if told else ""


def _section_keys(section: str, settings: type) -> list[Key]:
    keys = []
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        tuples = [member for member in members if typing.get_origin(member) is tuple]
        items = typing.get_args(tuples[0]) if tuples else ()
        keys.append(
            Key(
                section=section,
                name=field.name,
                default=field.default,
                optional=types.NoneType in members,
                scalars=frozenset(m for m in members if m in (bool, int, float, str)),
                item=items[0] if items else None,
                length=len(items) if items and Ellipsis not in items else None,
                rule=field.metadata["rule"],
            )
        )
    return keys


SECTIONS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(field.default)
}
KEYS: dict[str, Key] = {
    key.path: key
    for section, settings in SECTIONS.items()
    for key in _section_keys(section, settings)
}
# Keys that name files and folders.
PATH_KEYS = ("model.path", "data.train", "data.valid", "data.test", "lora.init_from")


def keys_in(section: str) -> list[Key]:
    """Return a section's keys, in order."""
    return [key for key in KEYS.values() if key.section == section]
