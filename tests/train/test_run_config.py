"""Keys, values, layers, files and presets of a configuration."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from files.errors import UserError
from train.config.layers import PACKAGE_ROOT, preset_names
from train.config.load import check_resume_overrides, load_config, resolve_key, resume_keys
from train.config.presets import read_preset
from train.config.schema import KEYS, SECTIONS
from train.config.stack import SEVERAL
from train.config.toml import flat, to_toml

# The whole of the design's table of keys, with its defaults.
DEFAULTS = {
    "model.path": None,
    "model.revision": None,
    "model.random_init": False,
    "model.attention": "auto",
    "model.dropout": None,
    "model.dtype": None,
    "model.gradient_checkpointing": "auto",
    "train.method": "lora",
    "train.precision": "auto",
    "train.seed": 42,
    "train.num_train_epochs": 20,
    "train.max_steps": None,
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 8,
    "train.effective_batch_size": None,
    "train.effective_batch_tokens": None,
    "train.micro_batch_tokens": None,
    "train.device": "auto",
    "train.kernels": "auto",
    "train.compile": False,
    "train.deterministic": False,
    "train.output_dir": None,
    "train.run_name": None,
    "lora.r": 8,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": "all-linear",
    "lora.use_rslora": False,
    "lora.bias": "none",
    "lora.init_from": None,
    "data.train": None,
    "data.valid": None,
    "data.test": None,
    "data.split_column": None,
    "data.format": "text",
    "data.text_field": "text",
    "data.prompt_template": None,
    "data.completion_template": None,
    "data.system_prompt": None,
    "data.completion_only": None,
    "data.train_on": "all",
    "data.append_eos": True,
    "data.max_length": 1024,
    "data.on_overflow": "truncate",
    "data.batching": "unpadded",
    "data.group_by_length": False,
    "data.shuffle": True,
    "data.valid_fraction": 0,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-4,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.max_grad_norm": 1.0,
    "schedule.name": "cosine",
    "schedule.warmup_ratio": 0.05,
    "schedule.warmup_steps": None,
    "schedule.min_lr_ratio": 0,
    "schedule.decay_ratio": 0.1,
    "eval.steps": None,
    "eval.per_epoch": None,
    "eval.per_device_batch_size": None,
    "eval.on_start": False,
    "eval.early_stopping_patience": None,
    "eval.early_stopping_threshold": 0.0,
    "eval.metrics": None,
    "eval.complete": 64,
    "eval.max_new_tokens": 256,
    "eval.best_metric": "loss",
    "checkpoint.steps": "epoch",
    "checkpoint.minutes": 15,
    "checkpoint.per_epoch": None,
    "checkpoint.total_limit": None,
    "checkpoint.load_best_at_end": False,
    "log.steps": 1,
    "log.per_epoch": None,
    "log.tensorboard": True,
    "log.progress": "auto",
}


def value_of(key: str, **overrides: object) -> object:
    return flat(load_config(overrides=overrides))[key]


def error_of(overrides: dict) -> str:
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides)
    return str(caught.value)


def test_keys_and_defaults_are_the_contract() -> None:
    config = flat(load_config())
    assert {key: config[key] for key in DEFAULTS} == DEFAULTS


def test_every_default_is_a_value_of_its_own_key() -> None:
    assert load_config(overrides=DEFAULTS) == load_config()


def test_every_key_is_documented() -> None:
    for key in KEYS.values():
        assert len(key.rule.doc) >= 8, key.path
        assert key.allowed(), key.path


# --- layers ---


def test_later_layers_rule(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[lora]\nr = 64\nlora_dropout = 0.2\n")
    config = load_config("qwen2.5-coder-1.5b", file, {"lora.r": "128"})
    assert config.preset == "qwen2.5-coder-1.5b"
    assert config.lora.r == 128  # command line
    assert config.lora.lora_dropout == 0.2  # file
    assert config.lora.lora_alpha == 64  # preset
    assert config.lora.use_rslora is False  # default


def test_file_in_every_spelling_of_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "default"\n'
        "train.seed = 7\n"  # dotted
        "learning_rate = 1e-3\n"  # bare and unique
        '[data]\ntrain = "a.jsonl"\n'
        '[lora]\ntarget_modules = ["q_proj", "v_proj"]\n'
        '[checkpoint]\nsteps = "none"\nminutes = "none"\n'
    )
    config = load_config(file=file)
    assert config.preset == "default"
    assert config.train.seed == 7
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.train == "a.jsonl"
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.checkpoint.steps, config.checkpoint.minutes) == (None, None)


@pytest.mark.parametrize("section", ["eval", "checkpoint", "log"])
def test_the_later_of_steps_and_per_epoch_rules(section: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[{section}]\nsteps = 10\n")
    config = flat(load_config(file=file, overrides={f"{section}.per_epoch": "5"}))
    assert (config[f"{section}.steps"], config[f"{section}.per_epoch"]) == (None, 5)
    file.write_text(f"[{section}]\nper_epoch = 5\n")
    config = flat(load_config(file=file, overrides={f"{section}.steps": "10"}))
    assert (config[f"{section}.steps"], config[f"{section}.per_epoch"]) == (10, None)
    assert "both set" in error_of({f"{section}.steps": "10", f"{section}.per_epoch": "5"})


# --- values ---


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("r", "16", 16),
        ("max_steps", "1e3", 1000),
        ("num_train_epochs", "3", 3.0),
        ("num_train_epochs", "0.5", 0.5),
        ("max_steps", "none", None),
        ("random_init", "true", True),
        ("random_init", "True", True),
        ("gradient_checkpointing", "false", "none"),
        ("gradient_checkpointing", "true", "layers"),
        ("gradient_checkpointing", "none", "none"),
        ("gradient_checkpointing", "mlp", "mlp"),
        ("gradient_checkpointing", "auto", "auto"),
        ("eval.steps", "epoch", "epoch"),
        ("eval.steps", "100", 100),
        ("checkpoint.steps", "none", None),
        ("lora.bias", "none", "none"),
        ("attention", "flash_attention_2", "auto"),
        ("optimizer.name", "adamw_torch_fused", "adamw"),
        ("optimizer.name", "paged_adamw_32bit", "paged_adamw"),
        ("betas", "[0.8, 0.95]", (0.8, 0.95)),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", '["q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("target_modules", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("target_modules", "q_proj", ("q_proj",)),
        ("target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("data.train", "hub:owner/name:config:split", "hub:owner/name:config:split"),
        ("run_name", "42", "42"),
        ("run_name", "true", "true"),
        ("prompt_template", '"Q: {q}\\n"', "Q: {q}\n"),
        ("prompt_template", "Q: {q}\n", "Q: {q}\n"),
        ("prompt_template", r'"Q: \\nabla"', r"Q: \nabla"),
        ("data.train", "a b.jsonl", "a b.jsonl"),
        ("data.train", "5", "5"),
        ("data.train", "data/*.jsonl", "data/*.jsonl"),
        ("data.train", "[a-c]*.jsonl", "[a-c]*.jsonl"),
        ("data.train", "a.jsonl,b.jsonl", "a.jsonl,b.jsonl"),
        ("data.train", '["a.jsonl", "hub:b/c"]', ("a.jsonl", "hub:b/c")),
        ("data.train", "[a.jsonl, b/*.jsonl]", ("a.jsonl", "b/*.jsonl")),
        ("data.valid", ["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl")),
        ("target_modules", "[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("system_prompt", "a = b", "a = b"),
        ("completion_only", "none", None),
        ("micro_batch_tokens", "auto", "auto"),
        ("micro_batch_tokens", "4096", 4096),
    ],
)
def test_values_as_they_are_typed(key: str, text: str, value: object) -> None:
    found = value_of(resolve_key(key), **{key: text})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("key", ["prompt_template", "data.completion_template", "system_prompt"])
def test_an_escape_that_the_shell_left_alone_is_refused_with_what_to_type(key: str) -> None:
    """In single quotes a shell leaves a backslash and an n, which nobody wants to train."""
    typed = r"Say 'x':\n\tA"
    with pytest.raises(UserError) as raised:
        load_config(overrides={key: typed})
    sentence = str(raised.value)
    remedy, literal = re.findall(r"(?<= )data\.\w+=(.*?)(?=, for the two|$)", sentence)
    full = resolve_key(key)
    [remedy] = shlex.split(remedy)
    assert value_of(full, **{key: remedy}) == "Say 'x':\n\tA"
    [literal] = shlex.split(literal)
    assert value_of(full, **{key: literal}) == typed


def test_an_escape_of_a_file_or_of_another_key_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("data.prompt_template = 'a\\nb'\n")
    assert load_config(file=file).data.prompt_template == r"a\nb"
    assert value_of("train.run_name", **{"train.run_name": r"a\nb"}) == r"a\nb"


def test_python_values_need_no_text() -> None:
    config = load_config(
        overrides={
            "lora.r": 4,
            "lora.target_modules": ["q_proj"],
            "max_steps": None,
            "compile": True,
        }
    )
    assert (config.lora.r, config.lora.target_modules) == (4, ("q_proj",))
    assert config.train.compile is True


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("lora.r", "0", ["lora.r", "out of range", "≥ 1"]),
        ("lora.r", str(10**18), ["lora.r", "out of range", "≤ 65536"]),
        ("lora.lora_alpha", "1e308", ["lora.lora_alpha", "out of range", "≤ 65504"]),
        ("lora.lora_alpha", "0", ["lora.lora_alpha", "out of range", "> 0"]),
        ("train.num_train_epochs", "1e308", ["train.num_train_epochs", "out of range", "≤ 1e+06"]),
        ("lora.r", "1.5", ["lora.r", "integer"]),
        ("lora.r", "eight", ["lora.r", '"eight"', "integer ≥ 1"]),
        ("lora.r", "none", ["lora.r", "no unset state"]),
        ("lora.r", "true", ["lora.r", "wrong type"]),
        ("lora_dropout", "1", ["lora.lora_dropout", "< 1"]),
        ("lora_dropout", "nan", ["lora.lora_dropout", "out of range"]),
        ("learning_rate", "inf", ["optimizer.learning_rate", "out of range"]),
        ("learning_rate", "0", ["optimizer.learning_rate", "> 0"]),
        ("warmup_ratio", "1.5", ["schedule.warmup_ratio", "≤ 1"]),
        ("optimizer.name", "adamm", ["did you mean 'adamw'", "adafactor"]),
        ("precision", "bf8", ["train.precision", "did you mean 'bf16'", "fp32"]),
        ("on_overflow", "truncat", ["did you mean 'truncate'"]),
        ("compile", "maybe", ["true or false"]),
        ("gradient_checkpointing", "yes", ["auto", "norms", "offload"]),
        ("eval.steps", "epochs", ["did you mean 'epoch'"]),
        ("eval.steps", "0", ["≥ 1"]),
        ("betas", "[0.9]", ["optimizer.betas", "2 numbers"]),
        ("betas", "[0.9, 1.0]", ["1.0", "out of range"]),
        ("betas", "0.9", ["wrong type"]),
        ("target_modules", "[]", ["0 items"]),
        ("target_modules", "[1]", ["holds 1"]),
        ("seed", "-1", ["train.seed", "≥ 0"]),
    ],
)
def test_bad_values_name_key_value_and_rule(key: str, text: str, words: list[str]) -> None:
    message = error_of({key: text})
    assert message.startswith("on the command line: ")
    for word in words:
        assert word in message


# --- keys ---


def test_bare_keys_resolve_where_they_are_unique() -> None:
    names = [key.name for key in KEYS.values()]
    for path, key in KEYS.items():
        if key.name in SEVERAL:
            with pytest.raises(UserError, match="could mean several keys"):
                resolve_key(key.name)
        elif names.count(key.name) == 1:
            assert resolve_key(key.name) == path
        else:
            with pytest.raises(UserError, match="several sections"):
                resolve_key(key.name)


SPELLED = """
lora_r lora_alpha num_epochs epochs batch_size warmup_ratio learning_rate eval_batch_size
attn_implementation optim lr_scheduler_type bf16 fp16 save_total_limit logging_steps
eval_steps save_steps max_seq_length max_length model_name_or_path output_dir
group_by_length num_train_epochs per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps lora_dropout target_modules weight_decay max_grad_norm
gradient_checkpointing seed warmup_steps max_steps run_name early_stopping_patience
load_best_model_at_end
"""


@pytest.mark.parametrize("name", SPELLED.split())
def test_every_spelling_of_the_seeds_is_known(name: str) -> None:
    try:
        assert resolve_key(name) in KEYS
    except UserError as error:
        assert "is spelled" in str(error) or "could mean several keys" in str(error)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learnin_rate", "did you mean 'optimizer.learning_rate'"),
        ("lora.rr", "did you mean 'lora.r'"),
        ("optimizr.name", "did you mean 'optimizer.name'"),
        ("train.learning_rate", "learning_rate is spelled optimizer.learning_rate here"),
        ("xyzzy", "--show default"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(name: str, hint: str) -> None:
    assert hint in error_of({name: "1"})


def test_alpha_may_be_a_fraction_and_stays_what_was_written() -> None:
    assert repr(load_config(overrides={"lora_alpha": "16"}).lora.lora_alpha) == "16"
    assert repr(load_config(overrides={"lora_alpha": "7.5"}).lora.lora_alpha) == "7.5"
    assert repr(load_config(overrides={"learning_rate": "1"}).optimizer.learning_rate) == "1.0"


# --- contradictions ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"completion_only": "true"}, ["data.completion_only", "data.format=text"]),
        ({"train_on": "last"}, ["data.train_on=last", "data.format=messages"]),
        (
            {"train_on": "last", "data.format": "messages", "completion_only": "false"},
            ["data.train_on=last", "without data.completion_only=false"],
        ),
        ({"data.format": "template"}, ["data.completion_template"]),
        ({"split_column": "split", "data.valid": "v.jsonl"}, ["data.split_column", "data.valid"]),
        ({"split_column": "split", "data.test": "t.jsonl"}, ["data.split_column", "data.test"]),
        ({"group_by_length": "true", "shuffle": "false"}, ["data.group_by_length", "data.shuffle"]),
        ({"early_stopping_patience": "2"}, ["eval.steps"]),
        ({"method": "full", "init_from": "adapter"}, ["lora.init_from", "train.method=full"]),
    ],
)
def test_contradictions_are_refused(overrides: dict, words: list[str]) -> None:
    message = error_of(overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[data]\nformat = 'text'\ncompletion_only = true\n", 3),
        ("data.completion_only = true\n", 1),
        ("[data]\nmax_length = 64\nformat = 'template'\n", 3),
        ("[data]\nsplit_column = 'split'\nvalid = 'v.jsonl'\n", 2),
        ("[data]\nshuffle = false\ngroup_by_length = true\n", 3),
        ("[eval]\n\nearly_stopping_patience = 2\n", 3),
        ("[train]\nmethod = 'full'\n[lora]\ninit_from = 'adapter'\n", 4),
    ],
)
def test_a_contradiction_names_the_file_and_line_that_made_it(
    text: str, line: int, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^{file}:{line}: "):
        load_config(file=file)


def test_a_contradiction_between_layers_names_the_later_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[data]\ngroup_by_length = true\n")
    with pytest.raises(UserError, match=r"^on the command line: data.group_by_length"):
        load_config(file=file, overrides={"shuffle": "false"})
    file.write_text("preset = 'codellama-7b'\n[data]\nshuffle = false\n")
    with pytest.raises(UserError, match=rf"^{file}:3: data.group_by_length"):
        load_config(file=file)


def test_the_keys_that_the_user_wrote_are_known(tmp_path: Path) -> None:
    assert load_config("llama2-7b").given == frozenset()
    file = tmp_path / "mine.toml"
    file.write_text("preset = 'llama2-7b'\n[lora]\nr = 8\n")
    config = load_config(file=file, overrides={"max_length": 64})
    assert config.given == {"lora.r", "data.max_length"}
    # It is no setting: two configurations that ask for the same are equal.
    assert config == load_config("llama2-7b", overrides={"max_length": 64})


# --- files ---


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[train]\nseed = \n", 2, ["TOML"]),
        ("[train]\n\nseeed = 1\n", 3, ["train.seeed", "did you mean 'train.seed'"]),
        ("[lora]\n# rank\nr = 0\n", 3, ["lora.r", "≥ 1"]),
        ("train.seed = 1\nlora.r = 'x'\n", 2, ["lora.r"]),
        ("[train]\nseed = 1\n[optimiser]\nname = 'adamw'\n", 3, ["did you mean 'optimizer'"]),
        ("[train]\nseed = [1]\n", 2, ["train.seed"]),
        ("[data]\ntrain = 2024-01-01\n", 2, ["data.train"]),
        ("batch_size = 4\n", 1, ["train.per_device_train_batch_size"]),
        ("[data]\n[deepspeed]\nstage = 3\n", 2, ["'deepspeed' is not supported"]),
    ],
)
def test_errors_in_a_file_name_its_line(
    text: str, line: int, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file=file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: ")
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: No such file"):
        load_config(file=tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"[train]\nseed = 1 # \xff\n")
    with pytest.raises(UserError, match=r"bytes\.toml:2: not UTF-8"):
        load_config(file=tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.max_steps = " + "9" * 5000, "too many digits"),
        ("train.max_steps = 0x" + "f" * 5000, "an integer of 20000 bits is out of range"),
        ("train.max_steps = 1e308", "train.max_steps = 1e+308 is out of range"),
        ("optimizer.learning_rate = 0x" + "f" * 500, "an integer of 2000 bits is out of range"),
        ("optimizer.betas = [0x" + "f" * 500 + ", 1]", "an integer of 2000 bits, which is out of"),
        ("train.max_steps = " + "[" * 20_000, "nested too deeply"),
        ("train.seed = 1979-99-27", "not valid TOML"),
        ("train.seed = 1979-05-27", "train.seed = datetime.date(1979, 5, 27) is of the wrong type"),
        ("train.seed = inf", "train.seed = inf is of the wrong type"),
        ("train.seed = {a = 0x" + "f" * 5000 + "}", "train.seed = a table is of the"),
        ("lora.r = [{a = 0x" + "f" * 5000 + "}]", "lora.r = [a table] is of the wrong"),
        ("lora.r = [[0x" + "f" * 5000 + "]]", "lora.r = [a list] is of the wrong type"),
        ("train.seed." + "a." * 400 + "a = 1", "train.seed = a table"),
        ("preset = 0x" + "f" * 5000, "not an integer of 20000 bits"),
        ("preset = [{a = 0x" + "f" * 5000 + "}]", "not [a table]"),
        ("preset = 'no'", "mine.toml:1: unknown preset 'no'"),
    ],
)
def test_values_that_pythons_reader_chokes_on(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file=path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "[" * 20_000 + "]" * 20_000,
        "0x" + "f" * 5000,
        "{a = 0x" + "f" * 5000 + "}",
        "[[0x" + "f" * 5000 + "]]",
        "1979-05-27",
        "nan",
    ],
)
def test_such_values_on_the_command_line(text: str) -> None:
    for key in ("train.max_steps", "optimizer.learning_rate", "optimizer.betas"):
        assert f"on the command line: {key} = " in error_of({key: text})


def test_presets_that_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.config.layers.PRESET_FOLDER", tmp_path)
    (tmp_path / "a.toml").write_text("extends = 'b'")
    (tmp_path / "b.toml").write_text("extends = 'a'")
    with pytest.raises(UserError, match=r"extends itself \(a → b → a\)"):
        read_preset("a")
    (tmp_path / "a.toml").write_text("[[claims]]\nstatment = 'x'")
    with pytest.raises(UserError, match=r"a\.toml: not a claim: .* its keys are statement, where"):
        read_preset("a")
    huge = "0x" + "f" * 5000
    for text in (f"claims = [{{value = {huge}}}]", f"claims = [[[{huge}]]]", f"claims = [{huge}]"):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(UserError, match=r"a\.toml: not a claim: "):
            read_preset("a")


def test_a_file_and_the_command_line_must_agree_on_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "llama2-7b"\n')
    assert load_config("llama2-7b", file) == load_config(file=file) == load_config("llama2-7b")
    with pytest.raises(UserError, match=r"run\.toml:1: .*'llama2-7b' but 'demo'"):
        load_config("demo", file)


@pytest.mark.parametrize("name", [None, *preset_names()])
@pytest.mark.parametrize("comments", [True, False])
def test_what_is_written_reads_back_the_same(
    name: str | None, comments: bool, tmp_path: Path
) -> None:
    config = load_config(name, overrides={"prompt_template": 'a "b"\\\n\t{c}\x7f é'})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config, comments=comments), encoding="utf-8")
    assert load_config(file=file) == config
    written = tomllib.loads(file.read_text(encoding="utf-8"))
    assert set(written) - {"preset"} == set(SECTIONS)
    assert sum(len(written[section]) for section in SECTIONS) == len(KEYS)


# --- presets ---


def test_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'starcoder2-3'; did you mean 'starcoder2-3b'"):
        load_config("starcoder2-3")


def test_the_demo_lies_with_the_package_wherever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo")
    for path in (config.model.path, config.data.train, config.data.valid, config.data.test):
        assert isinstance(path, str)
        assert Path(path).is_relative_to(PACKAGE_ROOT / "data" / "demo")


def test_a_preset_extends_another() -> None:
    parent, child = read_preset("starcoder2-3b"), read_preset("starcoder2-3b-lora")
    assert (child.seed, child.num_examples) == (parent.seed, parent.num_examples)
    assert child.departures[: len(parent.departures)] == parent.departures
    assert child.claims == ()
    assert child.config.schedule == parent.config.schedule
    assert child.config.train == dataclasses.replace(parent.config.train, method="lora")


# --- resume ---


def test_only_length_cadence_and_logging_may_change_on_resume() -> None:
    assert set(resume_keys()) == {
        "model.gradient_checkpointing",
        "model.stream_layers",
        "train.num_train_epochs",
        "train.max_steps",
        "train.profile_steps",
        "train.sharding",
        "eval.steps",
        "eval.per_epoch",
        "checkpoint.steps",
        "checkpoint.minutes",
        "checkpoint.per_epoch",
        "log.steps",
        "log.per_epoch",
        "log.tensorboard",
        "log.progress",
    }
    check_resume_overrides({"max_steps": "10", "log.steps": "5"})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate cannot change with --resume"):
        check_resume_overrides({"learning_rate": "1e-3"})
