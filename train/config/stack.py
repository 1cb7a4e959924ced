"""The names of Trainer, TRL, PEFT, axolotl, LLaMA-Factory and Unsloth, as tables.

- `RENAMED`: another name of one key, with the same values.
- `SEVERAL`: what could mean more than one key; refused, naming them.
- `UNSUPPORTED`: what is not there; refused with one sentence. A feature that comes leaves its line.

Names whose values need a word each stand in `train.config.spellings.TRANSLATED`.
"""

from __future__ import annotations

RENAMED: dict[str, str] = {
    # the model
    "adapter_name_or_path": "lora.init_from",
    "attn_implementation": "model.attention",
    "base_model": "model.path",
    "base_model_name_or_path": "model.path",
    "lora_model_dir": "lora.init_from",
    "model": "model.path",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "pretrained_model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    # the run
    "activation_checkpointing": "model.gradient_checkpointing",
    "epochs": "train.num_train_epochs",
    "full_determinism": "train.deterministic",
    "grad_accum": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "max_train_steps": "train.max_steps",
    "micro_batch_size": "train.per_device_train_batch_size",
    "n_epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "random_state": "train.seed",
    "torch_compile": "train.compile",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    # adapters
    "alpha": "lora.lora_alpha",
    "lora_bias": "lora.bias",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "peft_use_rslora": "lora.use_rslora",
    "rank": "lora.r",
    # data
    "cutoff_len": "data.max_length",
    "dataset_text_field": "data.text_field",
    "default_system": "data.system_prompt",
    "default_system_message": "data.system_prompt",
    "completion_only_loss": "data.completion_only",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "test_file": "data.test",
    "text_column": "data.text_field",
    "text_column_name": "data.text_field",
    "train_file": "data.train",
    "training_field": "data.text_field",
    "validation_file": "data.valid",
    # optimizer and schedule
    "adam_epsilon": "optimizer.eps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.name",
    # evaluation, checkpoints, logs
    "eval_batch_size": "eval.per_device_batch_size",
    "eval_on_start": "eval.on_start",
    "evals_per_epoch": "eval.per_epoch",
    "load_best_model_at_end": "checkpoint.load_best_at_end",
    "patience": "eval.early_stopping_patience",
    "per_device_eval_batch_size": "eval.per_device_batch_size",
    "per_gpu_eval_batch_size": "eval.per_device_batch_size",
    "save_total_limit": "checkpoint.total_limit",
    "saves_per_epoch": "checkpoint.per_epoch",
}

SEVERAL: dict[str, tuple[str, ...]] = {
    "batch_size": ("train.per_device_train_batch_size", "train.effective_batch_size"),
    "dropout": ("lora.lora_dropout", "model.dropout"),
    "dtype": ("train.precision", "model.dtype"),
    "path": ("model.path", "data.train"),
    "per_device_batch_size": ("train.per_device_train_batch_size", "eval.per_device_batch_size"),
    "split": ("data.train", "data.split_column"),
    "train_batch_size": ("train.per_device_train_batch_size", "train.effective_batch_size"),
    "warmup": ("schedule.warmup_ratio", "schedule.warmup_steps"),
}

QUANTISED = "the base model is not quantised: it is stored in train.precision (model.dtype)"
_ONE_PROCESS = (
    "this version trains in one process (--plan --ranks N plans for more); memory is saved by "
    "model.gradient_checkpointing and train.micro_batch_tokens"
)
_NO_HUB = "nothing is uploaded: final/ holds what `hf upload` takes"
_ATTENTION = "say model.attention=auto: unpadded rows run in torch's own fused attention"
_ANSWERS_ALONE = "models are trained on given answers alone, with the cross-entropy of their tokens"
_LOADER = "rows are tokenised once, before training, and read from a memory map"
_HUB_ENVIRONMENT = "set it in the environment as huggingface_hub reads it"
_KERNELS = "the fused operations are this project's own: train.kernels"
BEST = "the best state is the one with the lowest loss on the valid set"
LORA_ALONE = "adapters are plain LoRA (lora.use_rslora=true for its scaling)"
_CURVES = "curves are TensorBoard's and report.md's; metrics.jsonl has every step"
_EACH_ANSWER = 'each answer of an assistant is trained; {"train": false} on a message leaves it out'
_LOSS_ALONE = "evaluation is the loss on data.valid and data.test"
_ALL_IS_LOGGED = "every step stands in metrics.jsonl, whatever is shown (log.steps)"

UNSUPPORTED: dict[str, str] = {
    # quantisation
    "bits": QUANTISED,
    "bnb_4bit_compute_dtype": QUANTISED,
    "bnb_4bit_quant_storage": QUANTISED,
    "bnb_4bit_quant_type": QUANTISED,
    "bnb_4bit_use_double_quant": QUANTISED,
    "bnb_config": QUANTISED,
    "bnb_config_kwargs": QUANTISED,
    "gptq": QUANTISED,
    "load_in_4bit": QUANTISED,
    "load_in_8bit": QUANTISED,
    "quantization": QUANTISED,
    "quantization_bit": QUANTISED,
    "quantization_config": QUANTISED,
    "quantization_method": QUANTISED,
    "use_bnb_nested_quant": QUANTISED,
    # several processes
    "accelerator_config": _ONE_PROCESS,
    "context_parallel_size": _ONE_PROCESS,
    "ddp_backend": _ONE_PROCESS,
    "ddp_find_unused_parameters": _ONE_PROCESS,
    "ddp_timeout": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
    "local_rank": _ONE_PROCESS,
    "log_on_each_node": _ONE_PROCESS,
    "save_on_each_node": _ONE_PROCESS,
    "device_map": f"a model lies on one device, train.device; {_ONE_PROCESS}",
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "fsdp_transformer_layer_cls_to_wrap": _ONE_PROCESS,
    "max_memory": f"a model lies on one device, train.device; {_ONE_PROCESS}",
    "parallelism_config": _ONE_PROCESS,
    "sequence_parallel_degree": _ONE_PROCESS,
    "tensor_parallel_size": _ONE_PROCESS,
    "zero_stage": _ONE_PROCESS,
    # the hub
    "hub_model_id": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_token": _NO_HUB,
    "push_to_hub": _NO_HUB,
    "push_to_hub_model_id": _NO_HUB,
    "cache_dir": f"HF_HOME says where the Hub's files are kept; {_HUB_ENVIRONMENT}",
    "hf_token": f"HF_TOKEN opens gated models; {_HUB_ENVIRONMENT}",
    "token": f"HF_TOKEN opens gated models; {_HUB_ENVIRONMENT}",
    "use_auth_token": f"HF_TOKEN opens gated models; {_HUB_ENVIRONMENT}",
    "trust_remote_code": "a model's own code is never run; the families that are built are Llama, "
    "Mistral, Qwen2, Qwen3 and StarCoder2",
    "trust_remote_code_model": "a model's own code is never run",
    # adapters
    "galore": "the optimizers are adamw, paged_adamw and adafactor (optimizer.name)",
    "init_lora_weights": f"A is drawn and B is zero, as PEFT does by default; {LORA_ALONE}",
    "alora_invocation_tokens": LORA_ALONE,
    "arrow_config": LORA_ALONE,
    "corda_config": LORA_ALONE,
    "ensure_weight_tying": "whole modules are not trained beside adapters; train.method=full "
    "trains all",
    "eva_config": LORA_ALONE,
    "exclude_modules": "say it as a regular expression in lora.target_modules",
    "fan_in_fan_out": "the families that are built keep every weight as (out, in)",
    "inference_mode": "an adapter that is trained is trainable",
    "kasa_config": LORA_ALONE,
    "layer_replication": LORA_ALONE,
    "lora_ga_config": LORA_ALONE,
    "megatron_config": _ONE_PROCESS,
    "megatron_core": _ONE_PROCESS,
    "monteclora_config": LORA_ALONE,
    "qalora_group_size": QUANTISED,
    "runtime_config": LORA_ALONE,
    "target_parameters": "adapters stand on linear layers, lora.target_modules",
    "use_bdlora": LORA_ALONE,
    "use_qalora": QUANTISED,
    "velora_config": LORA_ALONE,
    "layers_pattern": "say it as a regular expression in lora.target_modules",
    "layers_to_transform": "say it as a regular expression in lora.target_modules",
    "lora_modules_to_save": "whole modules are not trained beside adapters; train.method=full "
    "trains all",
    "lora_on_cpu": LORA_ALONE,
    "loraplus_lr_ratio": "A and B have one learning rate, optimizer.learning_rate",
    "loraplus_lr_embedding": "A and B have one learning rate, optimizer.learning_rate",
    "lora_plus": "A and B have one learning rate, optimizer.learning_rate",
    "modules_to_save": "whole modules are not trained beside adapters; train.method=full trains "
    "all",
    "alpha_pattern": "all adapters have one alpha, lora.lora_alpha",
    "rank_pattern": "all adapters have one rank, lora.r",
    "peft_config": "give the adapter's keys one by one, as lora.r, lora.lora_alpha, …",
    "relora_steps": LORA_ALONE,
    "trainable_token_indices": "embeddings are not trained beside adapters; train.method=full "
    "trains all",
    "unfreeze_layers": "train.method is lora or full; there is no choice of layers",
    "unfrozen_parameters": "train.method is lora or full; there is no choice of layers",
    "use_dora": LORA_ALONE,
    # the objective
    "dpo": _ANSWERS_ALONE,
    "dpo_beta": _ANSWERS_ALONE,
    "kto": _ANSWERS_ALONE,
    "label_names": _ANSWERS_ALONE,
    "label_smoothing_factor": _ANSWERS_ALONE,
    "loss_type": _ANSWERS_ALONE,
    "neftune_noise_alpha": "no noise is added to embeddings; dropout is lora.lora_dropout and "
    "model.dropout",
    "noisy_embedding_alpha": "no noise is added to embeddings; dropout is lora.lora_dropout and "
    "model.dropout",
    "reward_model": _ANSWERS_ALONE,
    "rl": _ANSWERS_ALONE,
    "rlhf": _ANSWERS_ALONE,
    "router_aux_loss_coef": "models with experts are not built",
    # speed
    "cut_cross_entropy": _KERNELS,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "activation_checkpointing_kwargs": "say model.gradient_checkpointing=true: draws have no "
    "state, so there is nothing to choose",
    "gradient_checkpointing_kwargs": "say model.gradient_checkpointing=true: draws have no state, "
    "so there is nothing to choose",
    "liger": _KERNELS,
    "liger_kernel": _KERNELS,
    "liger_kernel_config": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "sdp_attention": _ATTENTION,
    "tf32": "fp32 is computed in fp32 (train.precision)",
    "torch_compile_backend": "say train.compile=true",
    "torch_compile_mode": "say train.compile=true",
    "torch_empty_cache_steps": "memory is planned (--plan), and a step that does not fit is done "
    "again in smaller micro-batches",
    "unsloth": _KERNELS,
    "unsloth_tiled_mlp": _KERNELS,
    "use_flash_attention_2": _ATTENTION,
    "use_liger_kernel": _KERNELS,
    "use_unsloth": _KERNELS,
    "xformers_attention": _ATTENTION,
    "auto_find_batch_size": "a step that does not fit in memory is done again in smaller "
    "micro-batches, always; --plan says what fits",
    # rows
    "data_collator": "data.format says how rows become tokens, data.batching how they are laid out",
    "data_seed": "all draws follow from train.seed",
    "dataloader_drop_last": "the last, smaller step of an epoch is always done",
    "dataloader_in_order": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataset_kwargs": "data.format says how rows become tokens",
    "dataset_num_proc": _LOADER,
    "dataset_prepared_path": f"{_LOADER}; LATHE_CACHE says where that lies",
    "dataset_processes": _LOADER,
    "datasets": "one set of rows is named by data.train, data.valid and data.test, their format by "
    "data.format",
    "eval_packing": "evaluation lays rows out as training does (data.batching)",
    "formatting_func": "say it as data.prompt_template and data.completion_template with "
    "{column} placeholders",
    "overwrite_cache": _LOADER,
    "pad_to_multiple_of": "lengths are rounded where the device needs it, without a setting",
    "mask_history": _EACH_ANSWER,
    "max_samples": "all rows are read; train.max_steps bounds a run, or give a shorter file",
    "pad_token": "special tokens are those of the model's tokenizer, and unpadded rows need no pad "
    "token",
    "roles_to_train": _EACH_ANSWER,
    "rope_scaling": "it is read from the model's config.json",
    "test_size": "say data.valid_fraction=SHARE, or give rows of their own as data.valid and "
    "data.test",
    "tokenizer_name": "the tokenizer is the one that lies in model.path",
    "tokenizer_name_or_path": "the tokenizer is the one that lies in model.path",
    "train_on_eos": "the EOS that ends an answer is trained; data.append_eos=false adds none",
    "truncation": "rows longer than data.max_length are cut, or what data.on_overflow says",
    "pad_to_sequence_len": "say data.batching=max_length to pad each row to data.max_length",
    "preprocessing_num_workers": _LOADER,
    "remove_unused_columns": "columns that data.format does not name are never read",
    "response_template": "labels are set by data.completion_only, from the parts of the row and "
    "not from a search in the text",
    "special_tokens": "special tokens are those of the model's tokenizer",
    "streaming": _LOADER,
    "length_column_name": "lengths are counted from the rows themselves (data.group_by_length)",
    "truncation_side": "rows are cut at their end; data.on_overflow says what else is possible",
    # evaluation, records
    "batch_eval_metrics": _LOSS_ALONE,
    "bf16_full_eval": "evaluation computes in train.precision, as training does",
    "debug": "what is not finite is told with its rows, always",
    "enable_jit_checkpoint": "a signal saves a checkpoint before the run stops, always",
    "eval_do_concat_batches": _LOSS_ALONE,
    "eval_use_gather_object": _LOSS_ALONE,
    "fp16_full_eval": "evaluation computes in train.precision, as training does",
    "include_for_metrics": _LOSS_ALONE,
    "log_level": "what is said is the same for all; log.steps says how often",
    "log_level_replica": "what is said is the same for all; log.steps says how often",
    "logging_nan_inf_filter": "a loss that is not finite is told, and its step changes nothing",
    "optim_args": "the optimizer's keys are optimizer.betas, eps and weight_decay",
    "optim_target_modules": "one update rule serves all parameters, optimizer.name",
    "project": _CURVES,
    "restore_callback_states_from_checkpoint": "there are no callbacks; a resumed run is exact",
    "skip_memory_metrics": "the peak of memory stands in status.json and report.md",
    "use_cache": "keys and values are kept for generation alone",
    "compute_metrics": _LOSS_ALONE,
    "do_predict": "what is named is done: data.test is evaluated at the end",
    "do_train": "what is named is done: data.train is trained on",
    "eval_accumulation_steps": "evaluation keeps sums, not logits; eval.per_device_batch_size is "
    "its batch",
    "eval_delay": "evaluations come at eval.steps or eval.per_epoch",
    "greater_is_better": BEST,
    "include_num_input_tokens_seen": _ALL_IS_LOGGED,
    "include_tokens_per_second": _ALL_IS_LOGGED,
    "logging_dir": "TensorBoard's files lie in the run's folder",
    "logging_first_step": _ALL_IS_LOGGED,
    "min_lr": "say schedule.min_lr_ratio, the share of the peak that is left at the end",
    "lr_scheduler_kwargs": "the end of a schedule is schedule.min_lr_ratio",
    "ignore_data_skip": "a resumed run goes on with the next example, always",
    "overwrite_output_dir": "an existing run is never overwritten; choose another "
    "train.output_dir, or --resume it",
    "prediction_loss_only": _LOSS_ALONE,
    "resume_from_checkpoint": "say --resume FOLDER, a run or one of its checkpoints",
    "save_only_model": "a checkpoint is whole, so that a run can be resumed",
    "use_wandb": _CURVES,
    "wandb_entity": _CURVES,
    "wandb_name": "curves are TensorBoard's and report.md's; a run's name is train.run_name",
    "wandb_project": _CURVES,
    "wandb_run_id": _CURVES,
}
# Families of such names, by how they begin.
UNSUPPORTED_FAMILIES: dict[str, str] = {
    "bnb_": QUANTISED,
    "ddp_": _ONE_PROCESS,
    "deepspeed_": _ONE_PROCESS,
    "fsdp_": _ONE_PROCESS,
    "hub_": _NO_HUB,
    "liger_": _KERNELS,
    "loftq": QUANTISED,
    "mlflow_": _CURVES,
    "push_to_hub_": _NO_HUB,
    "quantization_": QUANTISED,
    "trackio_": _CURVES,
    "wandb_": _CURVES,
}
# Values of keys that are there.
UNSUPPORTED_VALUES: dict[str, tuple[str, str]] = {
    "optimizer.name": (
        r".*(8bit|4bit).*",
        "the optimizer's state is not quantised; paged_adamw may leave the device, adafactor is "
        "small",
    ),
    "model.attention": (
        r"flash_attention_3|xformers|flex_attention|.*/.*",
        _ATTENTION,
    ),
    "data.format": (
        "sharegpt|chatml|chat|alpaca",
        "sharegpt, chatml and chat are data.format=messages, alpaca is data.format=instruction",
    ),
    "schedule.warmup_steps": (r"0?\.\d+", "a share of the steps is schedule.warmup_ratio"),
    "schedule.name": (
        "cosine_with.*|polynomial|inverse_sqrt|reduce.*|.*restarts",
        "schedules are cosine, linear and constant, each with a warm-up",
    ),
    "model.gradient_checkpointing": ("unsloth", "say model.gradient_checkpointing=true"),
}
