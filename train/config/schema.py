"""What a run can be asked to do: each key with its type, default, allowed values, meaning, once.

Each section of the configuration (`[model]`, `[train]`, …) is a frozen dataclass, and each of its
fields carries its rule: the range or the words it takes and one line of documentation. Reading the
command line, checking a file, the error messages and the comments of `--show` (all in
`train.config`) come from these rules, so that none of them can disagree.

This module never imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from train.config.rows import DataSettings
from train.config.rules import Key, Table, key, section_keys

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}

# What `eval.metrics` takes: of tokens, and of completions. Higher is better of all but perplexity.
OF_COMPLETIONS = ("parse_rate", "exact_match", "edit_similarity", "pass@1")
METRICS = ("token_accuracy", "perplexity", *OF_COMPLETIONS)
LOWER_IS_BETTER = ("loss", "perplexity")
# Prompts that are completed together, where nothing else is asked for.
AT_ONCE = 16


@dataclass(frozen=True)
class ModelSettings:
    """The base model and how its layers compute."""

    path: str | None = key(None, "hub id (owner/name) or folder of the base model")
    revision: str | None = key(None, "branch, tag or commit on the hub; none: the newest")
    random_init: bool = key(
        False, "architecture from config.json, weights drawn from train.seed, none downloaded"
    )
    attention: str = key(
        "auto",
        "how attention is computed; flash_attention_2 is read as auto",
        words=("auto", "sdpa", "eager"),
        aliases={"flash_attention_2": "auto"},
    )
    dropout: float | None = key(
        None,
        "overrides the checkpoint's attention, residual and embedding dropout; none: its own",
        minimum=0,
        below=1,
    )
    dtype: str | None = key(
        None,
        "storage of the frozen base; none: what train.precision computes in "
        "(what is trained has its masters, train.masters)",
        words=("bf16", "fp16", "fp32"),
        aliases=_DTYPES,
    )
    quantization: str | None = key(
        None,
        "the frozen linear layers in four bits (nf4, absmax quantised too) or eight (int8 weights, "
        "without LLM.int8()'s decomposition of inputs), in bitsandbytes' formats; embedding, head, "
        "norms and biases stay; none: as model.path has them",
        words=("nf4", "int8"),
    )
    gradient_checkpointing: str = key(
        "auto",
        "what is computed again in the backward pass instead of being kept: norms and activations, "
        "the MLP too, whole layers, or those with their inputs in host memory; same results, less "
        "memory, more time; true is layers, false none; auto: the cheapest that fits by the plan",
        words=("auto", "none", "norms", "mlp", "layers", "offload"),
        aliases={
            **{"true": "layers", "True": "layers", "false": "none", "False": "none"},
            "unsloth": "offload",
        },
        on_resume=True,
    )
    stream_layers: str = key(
        "auto",
        "the frozen layers of a LoRA run in pinned host memory, on the device two at a time; same "
        "results, less memory, more time; auto: on CUDA, where the run does not fit otherwise",
        words=("auto", "true", "false"),
        aliases={"True": "true", "False": "false"},
        on_resume=True,
    )


@dataclass(frozen=True)
class TrainSettings:
    """The run as a whole: method, precision, length, batch, device, place."""

    method: str = key("lora", "adapters on a frozen base, or every weight", words=("lora", "full"))
    precision: str = key(
        "auto",
        "what matrix products compute in; auto: bf16 where the device has it natively, else fp32",
        words=("auto", "bf16", "fp16", "fp32"),
        aliases=_DTYPES,
    )
    masters: str = key(
        "fp32",
        "storage of the weights that train.method=full trains; bf16: rounded by chance at each "
        "update, half the memory of weights and gradients",
        words=("fp32", "bf16"),
        aliases=_DTYPES,
    )
    seed: int = key(42, "every random draw follows from it", minimum=0, below=2**63)
    num_train_epochs: float = key(
        20.0, "passes over the data; may be a fraction", above=0, maximum=1e6, on_resume=True
    )
    max_steps: int | None = key(
        None, "optimizer steps; rules over num_train_epochs if set", minimum=1, on_resume=True
    )
    per_device_train_batch_size: int = key(
        8, "examples in a micro-batch (one forward and backward)", minimum=1, recommended="4 to 16"
    )
    gradient_accumulation_steps: int = key(
        8, "micro-batches in a step (one optimizer update)", minimum=1, recommended="4 to 32"
    )
    effective_batch_size: int | None = key(
        None,
        "examples in a step over all ranks; if set it rules, on any number of ranks; "
        "none: per_device_train_batch_size × gradient_accumulation_steps × ranks",
        minimum=1,
    )
    effective_batch_tokens: int | None = key(
        None,
        "at least so many targets (tokens that are trained) in a step over all ranks: whole "
        "examples until they have them; if set it rules, instead of effective_batch_size",
        minimum=1,
    )
    micro_batch_tokens: int | str | None = key(
        None,
        "cut a step into micro-batches of at most so many tokens; none: by "
        "per_device_train_batch_size examples (same loss and gradient either way)",
        words=("auto",),
        minimum=1,
    )
    device: str = key("auto", "where the run computes", words=("auto", "cpu", "cuda", "mps"))
    kernels: str = key(
        "auto",
        "plain PyTorch (reference) or Triton kernels; triton raises where it is unavailable",
        words=("auto", "reference", "triton"),
    )
    compile: bool = key(False, "compile the decoder layers with torch.compile")
    deterministic: bool = key(False, "only deterministic kernels: the same bits on the same device")
    sharding: str = key(
        "auto",
        "of several ranks: each has the whole model, or they share it; auto: adapters are trained "
        "in replicas where the base fits a rank, every weight is shared",
        words=("auto", "replicate", "shard"),
        on_resume=True,
    )
    profile_steps: int | str | None = key(
        None,
        "steps traced for Perfetto or chrome://tracing, into profile/ of the run's folder: 10-12 "
        "is those three, a number so many after the first two; same results; of many ranks the "
        "first is traced",
        minimum=1,
        on_resume=True,
    )
    output_dir: str | None = key(
        None, "the run's folder; none: runs/<preset>-<UTC time>; never overwritten"
    )
    run_name: str | None = key(None, "a name for TensorBoard and the report")


@dataclass(frozen=True)
class LoraSettings:
    """The adapters (train.method = lora)."""

    r: int = key(8, "rank of the adapters", minimum=1, maximum=2**16, recommended="8 to 32")
    lora_alpha: int | float = key(
        32,
        "scale: the update counts lora_alpha / r",
        above=0,
        maximum=65504,  # fp16 has no larger number
        recommended="2 to 4 times r",
    )
    lora_dropout: float = key(0.05, "dropout on the adapter's input", minimum=0, below=1)
    target_modules: str | tuple[str, ...] = key(
        "all-linear",
        "all-linear (every linear layer but the head), a list of names, or a regular expression "
        "over full module names",
    )
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(r) instead")
    bias: str = key(
        "none", "biases trained beside the adapters", words=("none", "lora_only", "all")
    )
    init_lora_weights: str = key(
        "default",
        "how adapters begin: A drawn and B zero, or pissa: as the principal directions of their "
        "weights, which are trained in their place (saved with rank 2r, for the unchanged base)",
        words=("default", "pissa"),
        aliases={"true": "default"},
    )
    use_dora: bool = key(
        False,
        "DoRA: the lengths of the adapted weights' rows are trained beside their directions, at "
        "one to three more products with each weight (in plain PyTorch on every device)",
    )
    rank_pattern: Table | None = key(
        None,
        "other ranks, by regular expression for the end of a module's name, such as "
        "{q_proj = 16, 'layers.0.*' = 4}; the first that matches counts",
        minimum=1,
        maximum=2**16,
        whole=True,
    )
    alpha_pattern: Table | None = key(
        None, "other alphas, likewise, over the rank of the module", above=0, maximum=65504
    )
    modules_to_save: tuple[str, ...] | None = key(
        None,
        "embed_tokens, lm_head or both, trained whole beside the adapters, in fp32; a tied pair is "
        "one tensor, whichever is named",
    )
    trainable_token_indices: tuple[int, ...] | None = key(
        None, "ids of tokens whose rows of the embedding are trained, and no others", minimum=0
    )
    init_from: str | None = key(
        None,
        "a PEFT adapter folder to go on from, with its r, lora_alpha, target_modules, use_rslora, "
        "bias and patterns (lora_dropout is the run's own); none: B = 0",
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """The update rule."""

    name: str = key(
        "adamw",
        "the update rule; paged_adamw is AdamW whose state may leave the device, adamw_8bit has "
        "moments in 8 bits",
        words=("adamw", "paged_adamw", "adamw_8bit", "adafactor"),
        aliases={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "paged_adamw_32bit": "paged_adamw",
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw_8bit": "adamw_8bit",
        },
    )
    learning_rate: float = key(2e-4, "the peak", above=0, recommended="5e-5 to 2e-4")
    loraplus_lr_ratio: float | None = key(
        None,
        "LoRA+: the learning rate of B (and of trained biases) is so many times that of A; "
        "none: one rate for both",
        above=0,
        recommended="8 to 16, with half the learning rate",
    )
    weight_decay: float = key(0.0, "decoupled; none on biases and norms", minimum=0)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's two decay rates", minimum=0, below=1)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: never", minimum=0)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run."""

    name: str = key(
        "cosine",
        "the shape after warm-up; wsd: constant, and a fall at the end",
        words=("cosine", "linear", "constant", "wsd"),
        aliases={"cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"},
    )
    warmup_ratio: float = key(
        0.05,
        "share of all steps spent rising from 0",
        minimum=0,
        maximum=1,
        recommended="0.03 to 0.1",
    )
    warmup_steps: int | None = key(None, "rules over warmup_ratio if set", minimum=0)
    min_lr_ratio: float = key(
        0.0, "the schedule ends at this share of the peak", minimum=0, maximum=1
    )
    decay_ratio: float = key(
        0.1, "share of all steps in which schedule.name=wsd falls, the last", above=0, maximum=1
    )


@dataclass(frozen=True)
class EvalSettings:
    """When the valid set is evaluated, and when that ends the run."""

    steps: int | str | None = key(
        None,
        "every so many steps, or each epoch; none: at the end alone",
        words=("epoch",),
        minimum=1,
        on_resume=True,
    )
    per_epoch: int | None = key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    per_device_batch_size: int | None = key(
        None, "examples in a forward pass; none: as in training", minimum=1
    )
    on_start: bool = key(False, "also before the first step, the test set too")
    samples: int = key(
        0,
        "held-out prompts that the model completes before and after training, for the report",
        minimum=0,
    )
    holes: int = key(
        0,
        "held-out holes (data.fim_rate) that the model fills at each evaluation, for exact_match",
        minimum=0,
    )
    early_stopping_patience: int | None = key(
        None, "stop after so many evaluations without a better loss", minimum=1
    )
    early_stopping_threshold: float = key(
        0.0, "better means lower (of an accuracy: higher) by more than this", minimum=0
    )
    metrics: tuple[str, ...] | None = key(
        None,
        "measured beside the loss at every evaluation; the last four of what the model writes "
        "behind prompts of held-out rows (exact_match also of eval.holes), pass@1 by running it",
        words=METRICS,
    )
    complete: int = key(
        64, "rows, evenly spread, that the model completes for those metrics", minimum=1
    )
    max_new_tokens: int = key(256, "tokens of such a completion at most", minimum=1)
    best_metric: str = key(
        "loss",
        "what best/ and early stopping go by: the loss, or one of eval.metrics",
        words=("loss", *METRICS),
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved, and what is kept."""

    steps: int | str | None = key(
        "epoch",
        "every so many steps, or each epoch; none: by minutes and at the end",
        words=("epoch",),
        minimum=1,
        on_resume=True,
    )
    minutes: float | None = key(
        15.0, "also when so many minutes passed since the last save", above=0, on_resume=True
    )
    per_epoch: int | None = key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    total_limit: int | None = key(
        None, "keep so many; never deletes the newest or the best; none: all", minimum=1
    )
    load_best_at_end: bool = key(False, "final/ is the best evaluated state, not the last")


@dataclass(frozen=True)
class LogSettings:
    """What goes to TensorBoard and the console (metrics.jsonl always has every step)."""

    steps: int | None = key(1, "every so many steps", minimum=1, on_resume=True)
    per_epoch: int | None = key(
        None, "so many times an epoch: every steps_per_epoch // n", minimum=1, on_resume=True
    )
    tensorboard: bool = key(True, "write tensorboard/", on_resume=True)
    progress: bool | str = key(
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


SECTIONS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(field.default)
}
KEYS: dict[str, Key] = {
    one.path: one
    for section, settings in SECTIONS.items()
    for one in section_keys(section, settings)
}
# Keys that name files and folders.
PATH_KEYS = ("model.path", "data.train", "data.valid", "data.test", "lora.init_from")


def keys_in(section: str) -> list[Key]:
    """Return a section's keys, in order."""
    return [one for one in KEYS.values() if one.section == section]
