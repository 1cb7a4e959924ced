"""The names of Trainer, TRL, PEFT, axolotl, LLaMA-Factory and Unsloth, as tables.

- `RENAMED`: other names of one key, with the same values.
- `SEVERAL`: what could mean more than one key; refused, naming them.
- `UNSUPPORTED`: what is not there; refused with one sentence. A feature that comes leaves its line.

Names whose values need a word each stand in `train.config.spellings.TRANSLATED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

What = TypeVar("What")


def each(table: Mapping[str, What]) -> dict[str, What]:
    """Return name → what, from a table whose keys are one name or several, with spaces between."""
    return {name: what for names, what in table.items() for name in names.split()}


RENAMED = each(
    {
        # the model
        "adapter_name_or_path lora_model_dir": "lora.init_from",
        "attn_implementation": "model.attention",
        "base_model base_model_name_or_path model model_id model_name "
        "model_name_or_path pretrained_model_name_or_path": "model.path",
        "model_revision": "model.revision",
        "torch_dtype": "model.dtype",
        "bnb_4bit_compute_dtype": "train.precision",
        # the run
        "activation_checkpointing use_gradient_checkpointing": "model.gradient_checkpointing",
        "epochs n_epochs num_epochs": "train.num_train_epochs",
        "full_determinism": "train.deterministic",
        "grad_accum gradient_accumulation": "train.gradient_accumulation_steps",
        "max_train_steps": "train.max_steps",
        "micro_batch_size per_gpu_train_batch_size "
        "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
        "random_state": "train.seed",
        "torch_compile": "train.compile",
        # adapters
        "alpha": "lora.lora_alpha",
        "lora_bias": "lora.bias",
        "lora_r lora_rank rank": "lora.r",
        "additional_target lora_modules_to_save": "lora.modules_to_save",
        "peft_init_lora_weights": "lora.init_lora_weights",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        # data
        "cutoff_len max_seq_len max_seq_length model_max_length sequence_len": "data.max_length",
        "dataset_text_field text_column text_column_name training_field": "data.text_field",
        "default_system default_system_message": "data.system_prompt",
        "completion_only_loss": "data.completion_only",
        "weight_column": "data.weight_field",
        "dataset_weights interleave_prob interleave_probs sampling_probabilities": "data.weights",
        "test_file": "data.test",
        "train_file": "data.train",
        "validation_file": "data.valid",
        # optimizer and schedule
        "adam_epsilon": "optimizer.eps",
        "gradient_clipping": "optimizer.max_grad_norm",
        "lr": "optimizer.learning_rate",
        "optim": "optimizer.name",
        # evaluation, checkpoints, logs
        "eval_batch_size per_device_eval_batch_size "
        "per_gpu_eval_batch_size": "eval.per_device_batch_size",
        "eval_on_start": "eval.on_start",
        "evals_per_epoch": "eval.per_epoch",
        "load_best_model_at_end": "checkpoint.load_best_at_end",
        "patience": "eval.early_stopping_patience",
        "save_total_limit": "checkpoint.total_limit",
        "saves_per_epoch": "checkpoint.per_epoch",
    }
)

SEVERAL: dict[str, tuple[str, ...]] = {
    "batch_size": ("train.per_device_train_batch_size", "train.effective_batch_size"),
    "batch_tokens": ("train.effective_batch_tokens", "train.micro_batch_tokens"),
    "dropout": ("lora.lora_dropout", "model.dropout"),
    "dtype": ("train.precision", "model.dtype"),
    # In some places a number of examples, in others of tokens.
    "global_batch_size": ("train.effective_batch_size", "train.effective_batch_tokens"),
    "max_tokens_per_batch": ("train.micro_batch_tokens", "train.effective_batch_tokens"),
    "path": ("model.path", "data.train"),
    "per_device_batch_size": ("train.per_device_train_batch_size", "eval.per_device_batch_size"),
    "split": ("data.train", "data.split_column"),
    "tokens_per_batch": ("train.effective_batch_tokens", "train.micro_batch_tokens"),
    "total_batch_size": ("train.effective_batch_size", "train.effective_batch_tokens"),
    "train_batch_size": ("train.per_device_train_batch_size", "train.effective_batch_size"),
    "warmup": ("schedule.warmup_ratio", "schedule.warmup_steps"),
}

QUANTISED = (
    "the base is quantised in bitsandbytes' formats alone: say model.quantization=nf4 or int8"
)
_RANKS = "the ranks are torchrun's, and train.sharding says how they share a model"
_NO_HUB = "no run uploads anything: `lathe push RUN` does, after it"
_ATTENTION = "say model.attention=auto: unpadded rows run in torch's own fused attention"
_ANSWERS_ALONE = "models are trained on given answers alone, with the cross-entropy of their tokens"
AN_EPOCH = (
    "an epoch has as many examples as all sources together, in the shares of data.weights if that "
    "is given, and a source that runs out begins anew"
)
_LOADER = "rows are tokenised once, before training, and read from a memory map"
_HUB_ENVIRONMENT = "set it in the environment as huggingface_hub reads it"
_KERNELS = "the fused operations are this project's own: train.kernels"
BEST = (
    "the best state is the one with the lowest loss on the valid set, or by eval.best_metric with "
    "the lowest perplexity or the highest of any other of eval.metrics"
)
LORA_ALONE = "adapters are plain LoRA (lora.use_rslora=true for its scaling)"
_CURVES = (
    "curves are TensorBoard's and report.md's; `lathe export-metrics RUN --to wandb` or mlflow, "
    "trackio, csv gives them away after the run"
)
_EACH_ANSWER = (
    "the answers of an assistant are trained, all or the last (data.train_on); "
    '{"train": false} on a message leaves it out'
)
_LOSS_ALONE = "evaluation is the loss on data.valid and data.test, and what eval.metrics names"
_ALL_IS_LOGGED = "every step stands in metrics.jsonl, whatever is shown (log.steps)"

UNSUPPORTED = each(
    {
        # quantisation
        "bnb_config bnb_config_kwargs gptq qalora_group_size quantization_config "
        "use_qalora": QUANTISED,
        "llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules "
        "llm_int8_threshold": "int8 weights are all linear layers but the head, and no column is "
        "held back (model.quantization=int8)",
        # several processes
        "accelerator_config context_parallel_size ddp_backend "
        "ddp_find_unused_parameters ddp_timeout deepspeed fsdp fsdp_config "
        "fsdp_transformer_layer_cls_to_wrap local_rank log_on_each_node megatron_config "
        "megatron_core parallelism_config save_on_each_node sequence_parallel_degree "
        "tensor_parallel_size zero_stage": _RANKS,
        "device_map max_memory": f"a rank computes on one device, train.device; {_RANKS}",
        # the hub
        "hub_model_id hub_private_repo hub_strategy hub_token push_to_hub "
        "push_to_hub_model_id": _NO_HUB,
        "cache_dir": f"HF_HOME says where the Hub's files are kept; {_HUB_ENVIRONMENT}",
        "hf_token token use_auth_token": f"HF_TOKEN opens gated models; {_HUB_ENVIRONMENT}",
        "trust_remote_code": "a model's own code is never run; the families that are built are "
        "Llama, Mistral, Qwen2, Qwen3 and StarCoder2",
        "trust_remote_code_model": "a model's own code is never run",
        # adapters
        "galore": "optimizer.name is adamw, paged_adamw, adamw_8bit or adafactor",
        "alora_invocation_tokens arrow_config corda_config eva_config kasa_config "
        "layer_replication lora_ga_config lora_on_cpu monteclora_config relora_steps "
        "runtime_config use_bdlora velora_config": LORA_ALONE,
        "ensure_weight_tying": "an embedding and a head that are tied stay one tensor, always",
        "exclude_modules layers_pattern layers_to_transform": "say it as a regular expression in "
        "lora.target_modules",
        "fan_in_fan_out": "the families that are built keep every weight as (out, in)",
        "inference_mode": "an adapter that is trained is trainable",
        "target_parameters": "adapters stand on linear layers, lora.target_modules",
        "loraplus_lr_embedding": "embeddings have no low-rank factors here; one that is trained "
        "has the learning rate of A, optimizer.learning_rate",
        "peft_config": "give the adapter's keys one by one, as lora.r, lora.lora_alpha, …",
        "unfreeze_layers unfrozen_parameters": "train.method is lora or full; there is no choice "
        "of layers",
        # the objective
        "dpo dpo_beta kto label_names label_smoothing_factor loss_type reward_model rl "
        "rlhf": _ANSWERS_ALONE,
        "neftune_noise_alpha noisy_embedding_alpha": "no noise is added to embeddings; dropout is "
        "lora.lora_dropout and model.dropout",
        "router_aux_loss_coef": "models with experts are not built",
        # speed
        "cut_cross_entropy enable_liger_kernel liger liger_kernel liger_kernel_config "
        "unsloth unsloth_tiled_mlp use_liger_kernel use_unsloth": _KERNELS,
        "flash_attention flash_attn sdp_attention use_flash_attention_2 "
        "xformers_attention": _ATTENTION,
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs": "say "
        "model.gradient_checkpointing=true: draws have no state, so there is nothing to choose",
        "tf32": "fp32 is computed in fp32 (train.precision)",
        "torch_compile_backend torch_compile_mode": "say train.compile=true",
        "torch_empty_cache_steps": "memory is planned (--plan), and a step that does not fit is "
        "done again in smaller micro-batches",
        "auto_find_batch_size": "a step that does not fit in memory is done again in smaller "
        "micro-batches, always; --plan says what fits",
        # rows
        "data_collator": "data.format says how rows become tokens, data.batching how they are "
        "laid out",
        "stopping_strategy": AN_EPOCH,
        "data_seed": "all draws follow from train.seed",
        "dataloader_drop_last": "the last, smaller step of an epoch is always done",
        "dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
        "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor "
        "dataset_num_proc dataset_processes overwrite_cache preprocessing_num_workers "
        "streaming": _LOADER,
        "dataset_kwargs": "data.format says how rows become tokens",
        "dataset_prepared_path": f"{_LOADER}; LATHE_CACHE says where that lies",
        "datasets": "rows are named by data.train (one name, or a list, mixed by data.weights), "
        "data.valid and data.test, their format by data.format",
        "eval_packing": "evaluation lays rows out as training does (data.batching)",
        "formatting_func": "say it as data.prompt_template and data.completion_template with "
        "{column} placeholders",
        "pad_to_multiple_of": "lengths are rounded where the device needs it, without a setting",
        "roles_to_train": _EACH_ANSWER,
        "max_samples": "all rows are read; train.max_steps bounds a run, or give a shorter file",
        "pad_token": "special tokens are those of the model's tokenizer, and unpadded rows need "
        "no pad token",
        "rope_scaling": "it is read from the model's config.json",
        "test_size": "say data.valid_fraction=SHARE, or give rows of their own as data.valid and "
        "data.test",
        "tokenizer_name tokenizer_name_or_path": "the tokenizer is the one that lies in model.path",
        "train_on_eos": "the EOS that ends an answer is trained; data.append_eos=false adds none",
        "truncation": "rows longer than data.max_length are cut, or what data.on_overflow says",
        "pad_to_sequence_len": "say data.batching=max_length to pad each row to data.max_length",
        "remove_unused_columns": "columns that data.format does not name are never read",
        "response_template": "labels are set by data.completion_only, from the parts of the row "
        "and not from a search in the text",
        "special_tokens": "special tokens are those of the model's tokenizer",
        "length_column_name": "lengths are counted from the rows themselves (data.group_by_length)",
        "truncation_side": "rows are cut at their end; data.on_overflow says what else is possible",
        # evaluation, records
        "batch_eval_metrics compute_metrics eval_do_concat_batches "
        "eval_use_gather_object include_for_metrics prediction_loss_only": _LOSS_ALONE,
        "bf16_full_eval fp16_full_eval": "evaluation computes in train.precision, as training does",
        "debug": "what is not finite is told with its rows, always",
        "enable_jit_checkpoint": "a signal saves a checkpoint before the run stops, always",
        "log_level log_level_replica": "what is said is the same for all; log.steps says how often",
        "logging_nan_inf_filter": "a loss that is not finite is told, and its step changes nothing",
        "optim_args": "the optimizer's keys are optimizer.betas, eps and weight_decay",
        "optim_target_modules": "one update rule serves all parameters, optimizer.name",
        "project use_wandb wandb_entity wandb_project wandb_run_id": _CURVES,
        "restore_callback_states_from_checkpoint": "there are no callbacks; a resumed run is exact",
        "skip_memory_metrics": "the peak of memory stands in status.json and report.md",
        "use_cache": "keys and values are kept for generation alone",
        "do_predict": "what is named is done: data.test is evaluated at the end",
        "do_train": "what is named is done: data.train is trained on",
        "eval_accumulation_steps": "evaluation keeps sums, not logits; eval.per_device_batch_size "
        "is its batch",
        "eval_delay": "evaluations come at eval.steps or eval.per_epoch",
        "greater_is_better": BEST,
        "include_num_input_tokens_seen include_tokens_per_second "
        "logging_first_step": _ALL_IS_LOGGED,
        "logging_dir": "TensorBoard's files lie in the run's folder",
        "min_lr": "say schedule.min_lr_ratio, the share of the peak that is left at the end",
        "lr_scheduler_kwargs": "the end of a schedule is schedule.min_lr_ratio",
        "ignore_data_skip": "a resumed run goes on with the next example, always",
        "overwrite_output_dir": "an existing run is never overwritten; choose another "
        "train.output_dir, or --resume it",
        "resume_from_checkpoint": "say --resume FOLDER, a run or one of its checkpoints",
        "save_only_model": "a checkpoint is whole, so that a run can be resumed",
        "wandb_name": "curves are TensorBoard's and report.md's; a run's name is train.run_name",
    }
)
# Families of such names, by how they begin.
UNSUPPORTED_FAMILIES = each(
    {
        "bnb_ loftq quantization_": QUANTISED,
        "ddp_ deepspeed_ fsdp_": _RANKS,
        "hub_ push_to_hub_": _NO_HUB,
        "liger_": _KERNELS,
        "mlflow_ trackio_ wandb_": _CURVES,
    }
)
# Values of keys that are there.
UNSUPPORTED_VALUES: dict[str, tuple[str, str]] = {
    "model.quantization": (
        "fp4|awq|gptq|hqq|fp8|aqlm|eetq|torchao|int4|4bit|8bit|bnb|bitsandbytes|[0-9]+",
        QUANTISED,
    ),
    "optimizer.name": (
        r".*(8bit|4bit).*",
        "adamw_8bit alone has a quantised state; adafactor's is smaller",
    ),
    "model.attention": (r"flash_attention_3|xformers|flex_attention|.*/.*", _ATTENTION),
    "data.format": (
        "sharegpt|chatml|chat|alpaca",
        "sharegpt, chatml and chat are data.format=messages, alpaca is data.format=instruction",
    ),
    "schedule.warmup_steps": (r"0?\.\d+", "a share of the steps is schedule.warmup_ratio"),
    "schedule.name": (
        "polynomial|inverse_sqrt|reduce.*|.*restarts|cosine_warmup_with_min_lr",
        "schedules are cosine, linear, constant and wsd, each with a warm-up",
    ),
    "lora.init_lora_weights": (
        r"(?!pissa$)\w+",
        "adapters begin as A drawn and B zero (default), or as principal directions (pissa)",
    ),
}
