"""What is written as Trainer, TRL, PEFT, axolotl, LLaMA-Factory or Unsloth take it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from files.errors import UserError
from train.config.load import load_config
from train.config.schema import KEYS
from train.config.spellings import TRANSLATED, keys_of, unsupported
from train.config.stack import RENAMED, SEVERAL, UNSUPPORTED, UNSUPPORTED_FAMILIES
from train.config.toml import flat, to_toml

PLAIN = flat(load_config())


def changes(overrides: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the keys whose values are not the defaults."""
    config = flat(load_config(overrides=overrides, **more))
    return {key: value for key, value in config.items() if PLAIN[key] != value}


def refusal(overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides)
    return str(caught.value)


# Names, values and their meaning are those of transformers 5.23 TrainingArguments, TRL SFTConfig
# and ModelConfig, PEFT LoraConfig, and axolotl's, LLaMA-Factory's and Unsloth's documentation.
BOTH = ("embed_tokens", "lm_head")
TAKEN: list[tuple[str, str, dict[str, Any]]] = [
    ("lr", "1e-4", {"optimizer.learning_rate": 1e-4}),
    ("num_epochs", "3", {"train.num_train_epochs": 3.0}),
    ("epochs", "3", {"train.num_train_epochs": 3.0}),
    ("sequence_len", "2048", {"data.max_length": 2048}),
    ("max_seq_length", "2048", {"data.max_length": 2048}),
    ("cutoff_len", "2048", {"data.max_length": 2048}),
    ("micro_batch_size", "2", {"train.per_device_train_batch_size": 2}),
    ("per_device_eval_batch_size", "2", {"eval.per_device_batch_size": 2}),
    ("model_name_or_path", "a/b", {"model.path": "a/b"}),
    ("base_model", "a/b", {"model.path": "a/b"}),
    ("attn_implementation", "eager", {"model.attention": "eager"}),
    ("torch_dtype", "float32", {"model.dtype": "fp32"}),
    ("lora_r", "4", {"lora.r": 4}),
    ("lora_target_modules", "q_proj,v_proj", {"lora.target_modules": ("q_proj", "v_proj")}),
    ("lora_target", "all", {}),
    ("lora_modules_to_save", "embed_tokens,lm_head", {"lora.modules_to_save": BOTH}),
    ("additional_target", "embed_tokens,lm_head", {"lora.modules_to_save": BOTH}),
    ("peft_use_dora", "true", {"lora.use_dora": True}),
    ("peft_init_lora_weights", "pissa", {"lora.init_lora_weights": "pissa"}),
    ("peft_init_lora_weights", "true", {}),
    ("lora_target_linear", "true", {}),
    ("load_in_4bit", "true", {"model.quantization": "nf4"}),
    ("load_in_4bit", "false", {}),
    ("load_in_8bit", "true", {"model.quantization": "int8"}),
    ("bnb_4bit_quant_type", "nf4", {}),
    ("bnb_4bit_use_double_quant", "true", {}),
    ("bnb_4bit_compute_dtype", "bfloat16", {"train.precision": "bf16"}),
    ("quantization_bit", "4", {"model.quantization": "nf4"}),
    ("quantization_method", "bnb", {}),
    ("adapter", "qlora", {"model.quantization": "nf4"}),
    ("optim", "adamw_torch_fused", {}),
    ("optim", "paged_adamw_32bit", {"optimizer.name": "paged_adamw"}),
    ("optim", "adafactor", {"optimizer.name": "adafactor"}),
    ("optim", "adamw_bnb_8bit", {"optimizer.name": "adamw_8bit"}),
    ("optim", "paged_adamw_8bit", {"optimizer.name": "adamw_8bit"}),
    ("use_gradient_checkpointing", "unsloth", {"model.gradient_checkpointing": "offload"}),
    ("activation_checkpointing", "true", {"model.gradient_checkpointing": "layers"}),
    ("activation_offloading", "true", {"model.gradient_checkpointing": "offload"}),
    ("activation_offloading", "false", {}),
    ("bf16", "true", {"train.precision": "bf16"}),
    ("fp16", "true", {"train.precision": "fp16"}),
    ("mixed_precision", "no", {"train.precision": "fp32"}),
    ("packing", "true", {}),
    ("sample_packing", "true", {}),
    ("padding", "max_length", {"data.batching": "max_length"}),
    ("padding", "true", {"data.batching": "longest"}),
    ("report_to", "tensorboard", {}),
    ("report_to", "none", {"log.tensorboard": False}),
    ("val_set_size", "0.1", {"data.valid_fraction": 0.1}),
    ("val_set_size", "0", {}),
    ("validation_split_percentage", "7", {"data.valid_fraction": 0.07}),
    ("dataset_name", "owner/name", {"data.train": "hub:owner/name"}),
    ("dataset_name", "rows.jsonl", {"data.train": "rows.jsonl"}),
    ("dataset_text_field", "content", {"data.text_field": "content"}),
    ("mask_history", "false", {}),
    ("train_on_inputs", "true", {"data.completion_only": False}),
    ("lr_scheduler_type", "linear", {"schedule.name": "linear"}),
    ("lr_scheduler_type", "constant_with_warmup", {"schedule.name": "constant"}),
    ("adam_epsilon", "1e-6", {"optimizer.eps": 1e-6}),
    ("logging_steps", "10", {"log.steps": 10}),
    ("logging_strategy", "epoch", {"log.steps": None, "log.per_epoch": 1}),
    ("eval_steps", "50", {"eval.steps": 50}),
    ("eval_strategy", "epoch", {"eval.steps": "epoch"}),
    ("eval_strategy", "no", {}),
    ("save_steps", "50", {"checkpoint.steps": 50}),
    ("save_strategy", "epoch", {}),
    ("save_total_limit", "2", {"checkpoint.total_limit": 2}),
    ("load_best_model_at_end", "true", {"checkpoint.load_best_at_end": True}),
    ("torch_compile", "true", {"train.compile": True}),
    ("use_cpu", "true", {"train.device": "cpu"}),
    ("finetuning_type", "full", {"train.method": "full"}),
    ("adapter", "lora", {}),
    ("random_state", "7", {"train.seed": 7}),
    ("train_sampling_strategy", "group_by_length", {"data.group_by_length": True}),
]


def test_history_is_masked_where_there_is_one() -> None:
    asked = {"mask_history": "true", "data.format": "messages"}
    assert load_config(overrides=asked).data.train_on == "last"


@pytest.mark.parametrize(("name", "text", "expected"), TAKEN)
def test_what_is_certain_is_taken_and_said(
    name: str, text: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert changes({name: text}) == expected
    told = capsys.readouterr()
    assert told.out == ""  # --plan --json prints one object and nothing else
    assert told.err.startswith(f"note: taken {name}={text} as ")
    assert told.err.count("\n") == 1
    for key, value in expected.items():
        if value is not None:
            assert f"{key}=" in told.err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lr": 1e-4, "num_epochs": 3}, "lr=0.0001 as optimizer.learning_rate=0.0001, num_epochs"),
        ({"learning_rate": 1e-4, "seed": 3}, ""),  # this project's own keys
        ({"optimizer.learning_rate": 1e-4}, ""),
    ],
)
def test_one_line_says_it_all(
    overrides: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load_config(overrides=overrides)
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == (1 if expected else 0)


def test_values_of_python_and_of_a_file_are_taken_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"train.precision": "bf16", "lora.r": 4, "data.valid_fraction": 0.1}
    assert changes({"bf16": True, "lora_r": 4, "val_set_size": 0.1}) == expected
    file = tmp_path / "stack.toml"
    file.write_text('bf16 = true\nlora_r = 4\nval_set_size = 0.1\nreport_to = ["tensorboard"]\n')
    assert changes({}, file=file) == expected
    assert 'report_to=["tensorboard"] as log.tensorboard=true' in capsys.readouterr().err


def test_the_command_line_still_rules_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "stack.toml"
    file.write_text("lr = 1e-3\n[lora]\nr = 2\n")
    assert changes({"lora_r": "4"}, file=file) == {"optimizer.learning_rate": 1e-3, "lora.r": 4}
    assert changes({"learning_rate": "1e-5"}, file=file)["optimizer.learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("val_set_size", "100", ["val_set_size=100", "data.valid_fraction=SHARE"]),
        ("val_set_size", "1", ["data.valid_fraction=SHARE"]),
        ("validation_split_percentage", "100", ["data.valid_fraction=SHARE"]),
        ("bf16", "auto", ["bf16=auto", "train.precision="]),
        ("bf16", "false", ["train.precision=fp32, fp16"]),
        ("packing", "false", ["data.batching=longest"]),
        ("padding_free", "false", ["data.batching=longest"]),
        ("report_to", "wandb", ["log.tensorboard=true"]),
        ("report_to", "all", ["log.tensorboard=true"]),
        ("eval_strategy", "steps", ["eval.steps=STEPS"]),
        ("eval_steps", "0.1", ["eval.per_epoch=TIMES"]),
        ("save_steps", "0.5", ["checkpoint.per_epoch=TIMES"]),
        ("save_strategy", "no", ["checkpoint.steps=none"]),
        ("save_strategy", "best", ["best/ is kept always"]),
        ("save_safetensors", "false", ["never as pickles"]),
        ("lr_scheduler_type", "constant", ["schedule.warmup_ratio=0"]),
        ("lr_scheduler_type", "polynomial", ["schedule.name", "cosine | linear | constant"]),
        ("adam_beta2", "0.95", ["optimizer.betas=[BETA1, BETA2]"]),
        ("adapter", "ia3", ["train.method=lora or full"]),
        ("bnb_4bit_quant_type", "fp4", ["model.quantization=nf4"]),
        ("bnb_4bit_use_double_quant", "false", ["quantises its absmax too, always"]),
        ("bnb_4bit_quant_storage", "bfloat16", ["two a byte, always"]),
        ("quantization_bit", "3", ["model.quantization=nf4 or int8"]),
        ("quantization_method", "hqq", ["model.quantization=nf4 or int8"]),
        ("quantization", "gptq", ["model.quantization=nf4 or int8", "nf4 | int8, or none"]),
        ("lora_target_linear", "false", ["lora.target_modules=[NAMES]"]),
        ("finetuning_type", "freeze", ["train.method=lora or full"]),
        ("mixed_precision", "fp8", ["train.precision="]),
        ("lr", "abc", ["lr: optimizer.learning_rate", "a number > 0"]),
        ("lora_r", "0", ["lora_r: lora.r", "≥ 1"]),
        ("optim", "lion_8bit", ["optim: optimizer.name", "adamw_8bit alone"]),
    ],
)
def test_a_value_that_means_something_else_is_never_misread(
    name: str, text: str, words: list[str]
) -> None:
    message = refusal({name: text})
    assert message.startswith("on the command line: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", SEVERAL)
def test_what_could_mean_several_keys_is_refused_naming_them(name: str) -> None:
    message = refusal({name: "2"})
    assert "could mean several keys" in message
    for key in SEVERAL[name]:
        assert key in message


def test_a_batch_of_no_side_is_not_that_of_evaluation() -> None:
    """It stands once among the keys, and that by accident."""
    message = refusal({"per_device_batch_size": "2"})
    assert "train.per_device_train_batch_size or eval.per_device_batch_size" in message
    assert changes({"eval.per_device_batch_size": "2"}) == {"eval.per_device_batch_size": 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"bf16": "true", "fp16": "true"}, "bf16 and fp16 both set train.precision"),
        ({"load_in_4bit": "true", "load_in_8bit": "true"}, "both set model.quantization"),
        ({"lr": "1e-4", "learning_rate": "2e-4"}, "lr and learning_rate both set"),
        ({"learning_rate": "2e-4", "lr": "1e-4"}, "learning_rate and lr both set"),
        ({"epochs": "1", "num_epochs": "2"}, "epochs and num_epochs both set"),
        ({"packing": "true", "padding": "longest"}, "packing and padding both set data.batching"),
        ({"eval_strategy": "epoch", "eval_steps": "50"}, "both set eval.steps"),
    ],
)
def test_two_names_of_one_key_with_two_values_are_a_contradiction(
    overrides: dict[str, str], words: str
) -> None:
    message = refusal(overrides)
    assert words in message
    assert "give one of them" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lr": "1e-4", "learning_rate": "0.0001"}, {"optimizer.learning_rate": 1e-4}),
        ({"bf16": "false", "fp16": "true"}, {"train.precision": "fp16"}),
        ({"bf16": "false", "fp16": "false"}, {"train.precision": "fp32"}),
        ({"eval_strategy": "steps", "eval_steps": "50"}, {"eval.steps": 50}),
        ({"eval_strategy": "steps", "eval.steps": "50"}, {"eval.steps": 50}),
        ({"adapter": "qlora", "load_in_4bit": "true"}, {"model.quantization": "nf4"}),
        ({"adam_beta1": "0.8", "adam_beta2": "0.95"}, {"optimizer.betas": (0.8, 0.95)}),
    ],
)
def test_names_that_say_one_thing_together(overrides: dict, expected: dict) -> None:
    assert changes(overrides) == expected


def test_a_setting_in_a_section_is_answered_with_its_key() -> None:
    assert "lr is spelled optimizer.learning_rate here" in refusal({"train.lr": "1"})
    assert "bf16 is spelled train.precision here" in refusal({"model.bf16": "true"})


def test_overrides_say_what_they_are() -> None:
    for wrong in (["lora.r=8"], "lora.r=8", ("lora.r", 8), {1: 2}):
        message = refusal(wrong)
        assert "overrides is a dictionary of key → value" in message
        assert '{"lora.r": 16' in message


# --- what is not there ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bnb_4bit_of_tomorrow", "model.quantization=nf4 or int8"),
        ("gptq", "model.quantization=nf4 or int8"),
        ("quantization_config", "model.quantization=nf4 or int8"),
        ("llm_int8_threshold", "model.quantization=int8"),
        ("deepspeed", "torchrun"),
        ("fsdp", "train.sharding"),
        ("fsdp_min_num_params", "train.sharding"),
        ("device_map", "train.device"),
        ("neftune_noise_alpha", "no noise"),
        ("trust_remote_code", "never run"),
        ("push_to_hub", "no run uploads anything"),
        ("hub_model_id", "no run uploads anything"),
        ("loraplus_lr_embedding", "optimizer.learning_rate"),
        ("label_smoothing_factor", "cross-entropy"),
        ("flash_attn", "model.attention"),
        ("use_liger_kernel", "train.kernels"),
        ("gradient_checkpointing_kwargs", "model.gradient_checkpointing=true"),
        ("dpo_beta", "given answers alone"),
        ("use_unsloth", "train.kernels"),
        ("dataloader_num_workers", "before training"),
        ("remove_unused_columns", "never read"),
        ("resume_from_checkpoint", "--resume FOLDER"),
        ("wandb_project", "TensorBoard"),
    ],
)
def test_what_is_not_supported_says_so(name: str, words: str) -> None:
    for value in ("true", True, "4", "some words", 1.5):
        message = refusal({name: value})
        assert f"'{name}' is not supported: " in message
        assert words in message
        assert "did you mean" not in message
    assert "is not supported: " in refusal({f"train.{name}": "true"})


@pytest.mark.parametrize("off", ["false", "none", "", False, None, 0, "0"])
def test_a_feature_that_is_switched_off_is_nothing_to_refuse(
    off: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert changes({"load_in_4bit": off, "neftune_noise_alpha": off}) == {}
    assert "as asking for nothing" in capsys.readouterr().err


def test_nested_values_of_a_file_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.toml"
    file.write_text('lora_r = 8\ndatasets = [{path = "a/b", type = "alpaca"}]\n')
    with pytest.raises(UserError, match=r"axolotl\.toml:2: .*'datasets' is not supported"):
        load_config(file=file)
    file.write_text("[quantization_config]\nload_in_4bit = true\n")
    with pytest.raises(UserError, match=r"axolotl\.toml:1: 'quantization_config' is not supported"):
        load_config(file=file)


# --- what the stack's own defaults mean ---


def test_no_steps_of_warm_up_beside_a_ratio_are_refused_and_either_alone_is_taken(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup_steps=0 means no warm-up, and"):
        load_config(overrides={"warmup_ratio": "0.1", "warmup_steps": "0"})
    assert load_config(overrides={"warmup_steps": "0"}).schedule.warmup_steps == 0
    both = load_config(overrides={"warmup_ratio": "0.1", "warmup_steps": "5"}).schedule
    assert (both.warmup_ratio, both.warmup_steps) == (0.1, 5)
    # A run's own file holds every key.
    config = load_config(overrides={"warmup_steps": "0"})
    (tmp_path / "config.toml").write_text(to_toml(config, comments=False))
    assert load_config(file=tmp_path / "config.toml").schedule == config.schedule


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"assistant_only_loss": "false"}, {}),
        (
            {"assistant_only_loss": "false", "data.format": "completion"},
            {"data.format": "completion"},
        ),
        (
            {"assistant_only_loss": "false", "data.format": "messages"},
            {"data.format": "messages", "data.completion_only": False},
        ),
        (
            {"assistant_only_loss": "true", "data.format": "messages"},
            {"data.format": "messages", "data.completion_only": True},
        ),
        ({"max_steps": "-1"}, {}),
        ({"train.max_steps": -1}, {}),
        ({"do_eval": "true"}, {}),
        ({"do_eval": "false"}, {}),
        ({"metric_for_best_model": "eval_loss"}, {}),
        (
            {"metric_for_best_model": "eval_mean_token_accuracy"},
            {"eval.metrics": ("token_accuracy",), "eval.best_metric": "token_accuracy"},
        ),
        ({"lora_target_modules": "all"}, {}),
        ({"lora_target_modules": ["all-linear"]}, {}),
        ({"lora_target_modules": '["q_proj"]'}, {"lora.target_modules": ("q_proj",)}),
    ],
)
def test_values_that_say_nothing_here(settings: dict, expected: dict) -> None:
    assert changes(settings) == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"do_eval": "false", "eval_steps": "10"}, "eval_steps asks for evaluations"),
        ({"do_eval": "false", "data.valid": "v.jsonl"}, "data.valid asks for evaluations"),
        ({"metric_for_best_model": "accuracy"}, "lowest loss"),
        ({"warmup_steps": "0.1"}, "schedule.warmup_ratio"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "schedules are cosine, linear"),
        ({"lr_scheduler_type": "polynomial"}, "schedules are cosine, linear"),
        ({"data.format": "sharegpt"}, "data.format=messages"),
        ({"data.format": "alpaca"}, "data.format=instruction"),
        ({"data.format": "chatml"}, "data.format=messages"),
        ({"roles_to_train": "assistant"}, "data.train_on"),
        ({"pad_token": "<pad>"}, "model's tokenizer"),
        ({"min_lr": "1e-6"}, "schedule.min_lr_ratio"),
        ({"max_samples": "100"}, "train.max_steps"),
    ],
)
def test_what_is_said_in_another_way_here(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(overrides=settings)
    assert sentence in str(raised.value)


# --- the tables ---


def test_every_name_stands_in_one_table_and_none_hides_a_key() -> None:
    names = [*RENAMED, *TRANSLATED, *SEVERAL, *UNSUPPORTED]
    assert sorted(names) == sorted(set(names))
    own = {key.name for key in KEYS.values()} - set(SEVERAL)
    assert not own & {*names}
    assert not [name for name in own if unsupported(name)]


def test_the_tables_name_keys_that_are_there() -> None:
    for name in (*RENAMED, *TRANSLATED, *SEVERAL):
        assert set(keys_of(name)) <= set(KEYS), name


def test_every_sentence_is_one() -> None:
    for sentence in (*UNSUPPORTED.values(), *UNSUPPORTED_FAMILIES.values()):
        assert 15 < len(sentence) < 200
        assert not sentence.endswith(".")


def unanswered(names: set[str]) -> set[str]:
    known = {*(key.name for key in KEYS.values()), *RENAMED, *TRANSLATED, *SEVERAL}
    return {name for name in names - known if not unsupported(name)}


def test_every_argument_of_peft_s_lora_config_is_known() -> None:
    """Whatever a script for PEFT sets is taken, or answered by name."""
    from peft import LoraConfig

    of_the_file = {"auto_mapping", "peft_version"}
    names = {field.name for field in dataclasses.fields(LoraConfig)} - of_the_file
    assert unanswered(names) == set()


def test_every_argument_of_transformers_trainer_is_known() -> None:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert unanswered(names) == set()
