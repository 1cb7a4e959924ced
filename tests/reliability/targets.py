"""What the program does with each kind of file: the good files, how they break, and their use."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from byte_tokenizer import write_byte_tokenizer
from mutations import (
    Mutator,
    mutate_bytes,
    mutate_csv,
    mutate_json,
    mutate_json_lines,
    mutate_json_or_bytes,
    mutate_toml,
    one_of,
)
from small import FAMILIES, SMALL, small_model

import data.chat
import train.config.layers as config_layers
from data.examples import Examples, load_examples
from data.limited import LimitedChild
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.errors import UserError
from files.folders import damage, replace_folder
from files.hub import INDEX_FILE, resolve_model
from files.tensors import TensorFile, write_tensors
from lora import LoraConfig, inject, load_adapter, save_adapter
from models import build
from models.config import read_config
from models.weights import fill, initialise, save_model
from train.config.command_line import parse
from train.config.load import load_config
from train.config.presets import read_preset
from train.config.toml import to_toml
from train.log.metrics import Metrics, read_metrics
from train.log.samples import samples_so_far
from train.report.record import read_record
from train.saving.checkpoints import read_state
from train.saving.resume import _is_finished
from train.state import EarlyStopping, TrainState


@dataclass(frozen=True)
class Target:
    """One kind of file and what the program does with it.

    Attributes:
        files: The files below the target's folder of which a case changes one.
        mutate: How it changes.
        prepare: Writes the good files into a folder.
        use: Gets the folder and the changed file: reads it and uses what it holds as the program
            does. Raises UserError, or returns where the file was accepted; raises AssertionError
            where it should not have been.
        named: What a message must name; empty: the changed file.
        share: How many cases it gets for each case of another target: fewer where each starts a
            process.
    """

    files: tuple[str, ...]
    mutate: Mutator
    prepare: Callable[[Path], None]
    use: Callable[[Path, Path], None]
    named: str = ""
    share: float = 1.0


# --- models --------------------------------------------------------------------------------------

TINY = {**SMALL, "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_theta": 1e6},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1}},
)


def _prepare_configs(folder: Path) -> None:
    for family, keys in FAMILIES.items():
        for number, rope in enumerate(_ROPES):
            place = folder / f"{family}-{number}"
            place.mkdir()
            (place / "config.json").write_text(json.dumps({**TINY, **keys, **rope}))


def _use_config(_: Path, path: Path) -> None:
    config = read_config(path.parent)
    model = build(config, device="meta")
    if sum(parameter.numel() for parameter in model.parameters()) > 100_000:
        return
    initialise(model, 0, initializer_range=config.initializer_range)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))


_CONFIGS = tuple(f"{family}-{number}/config.json" for family in FAMILIES for number in range(5))


def _prepare_tensors(folder: Path) -> None:
    tensors = {
        "model.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }
    write_tensors(folder / "x.safetensors", tensors, {"format": "pt"})


def _mutate_header(random: Random, content: bytes) -> bytes:
    """Change the JSON of a safetensors header, mostly with the length that goes with it."""
    length = int.from_bytes(content[:8], "little")
    mutate = random.choice((mutate_json, mutate_json, mutate_json, mutate_bytes))
    header, data = mutate(random, content[8 : 8 + length]), content[8 + length :]
    if random.random() < 0.9:
        length = len(header)
    return length.to_bytes(8, "little") + header + data


def _use_tensors(_: Path, path: Path) -> None:
    size = path.stat().st_size
    with TensorFile(path) as file:
        for name in file.names:
            info, tensor = file.info(name), file.read(name)
            assert 0 <= info.begin <= info.end <= size
            assert tensor.shape == info.shape
            assert tensor.numel() * tensor.itemsize == info.num_bytes
            tensor.clone()


_TINY_KEYS = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}


def _prepare_shards(folder: Path) -> None:
    model = small_model("llama", **_TINY_KEYS)
    save_model(model, folder, config=model.config, max_shard_bytes=4000)


def _prepare_single(folder: Path) -> None:
    model = small_model("llama", **_TINY_KEYS)
    save_model(model, folder, config=model.config)


def _fill(folder: Path, _: Path) -> None:
    model = build(read_config(folder), device="meta")
    fill(model, folder)
    assert not any(parameter.is_meta for parameter in model.parameters())


def _fill_from_index(folder: Path, path: Path) -> None:
    resolve_model(folder)
    _fill(folder, path)


# --- adapters ------------------------------------------------------------------------------------


def _prepare_adapter(folder: Path) -> None:
    model = small_model("llama", **_TINY_KEYS)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={".*up_proj": 16},
    )
    inject(model, config)
    save_adapter(model, folder, base_model="owner/base")


def _use_adapter(folder: Path, _: Path) -> None:
    model = small_model("llama", **_TINY_KEYS)
    load_adapter(model, folder)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))


# --- rows ----------------------------------------------------------------------------------------

_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TOKENIZERS: dict[Path, Tokenizer] = {}


def write_tokenizer(folder: Path) -> None:
    """Write a byte tokenizer with a chat template."""
    write_byte_tokenizer(folder, "<|endoftext|>", chat_template=_TEMPLATE)


def _tokenizer(folder: Path) -> Tokenizer:
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = Tokenizer.load(folder / "tokenizer")
    return _TOKENIZERS[folder]


_ROWS = [{"prompt": f"add {i} to\n{i}", "completion": f"return {i} + {i}  # é"} for i in range(6)]
_CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"add {i}"},
            {"role": "assistant", "content": f"{i} + 1"},
        ],
        "tools": None,
    }
    for i in range(4)
]


def _prepare_rows(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(_ROWS, indent=1, ensure_ascii=False))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _CHATS))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(_ROWS)
    (folder / "rows.csv").write_text(text.getvalue(), encoding="utf-8")
    for name, rows in (("rows", _ROWS), ("chats", _CHATS)):
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")


def _use_rows(folder: Path, path: Path) -> None:
    prompt_format = PromptFormat(format="messages" if path.stem == "chats" else "completion")
    examples = _load(folder, path, prompt_format, None)
    assert len(examples) == examples.counts.examples > 0
    for example in examples:
        assert len(example.input_ids) == len(example.labels) <= 64
        assert 0 <= int(example.input_ids.min()) <= int(example.input_ids.max()) <= 256


def _load(folder: Path, path: Path, prompt_format: PromptFormat, cache: Path | None) -> Examples:
    return load_examples(
        str(path),
        split_column=None,
        split=None,
        tokenizer=_tokenizer(folder),
        prompt_format=prompt_format,
        max_length=64,
        on_overflow="truncate",
        cache_root=cache,
    )


_GOOD_EXAMPLES: dict[Path, Examples] = {}


def _prepare_cache(folder: Path) -> None:
    """Fill a cache, and give its folder a name that is known."""
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    _load(folder, folder / "rows.jsonl", PromptFormat("completion"), folder / "cache")
    (made,) = (folder / "cache").iterdir()
    (folder / "key").symlink_to(made)


def _use_cache(folder: Path, _: Path) -> None:
    rows, prompt_format = folder / "rows.jsonl", PromptFormat("completion")
    if folder not in _GOOD_EXAMPLES:
        _GOOD_EXAMPLES[folder] = _load(folder, rows, prompt_format, None)
    good = _GOOD_EXAMPLES[folder]
    examples = _load(folder, rows, prompt_format, folder / "cache")
    assert examples.fingerprint == good.fingerprint
    assert examples.counts == good.counts
    for ours, theirs in zip(examples, good, strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.labels.tolist() == theirs.labels.tolist()


_CACHE_FILES = tuple(
    f"key/{name}"
    for name in (
        "meta.json",
        "meta.json",
        "input_ids.npy",
        "labels.npy",
        "offsets.npy",
        "targets.npy",
        "rows.npy",
        "prompts.npy",
        "flags.npy",
    )
)


# --- tokenizers ----------------------------------------------------------------------------------


def _prepare_tokenizer(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    document = json.loads(path.read_bytes())
    document |= {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "\\w+|[^\\w\\s]+|\\s+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                document["pre_tokenizer"],
            ],
        },
    }
    path.write_text(json.dumps(document))


def _use_tokenizer(folder: Path, _: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    ids = tokenizer.encode("def add(a, b):\n    return a + b  # é漢\n")
    assert all(isinstance(token, int) and 0 <= token < 2**31 for token in ids)
    assert isinstance(tokenizer.decode(ids), str)


_HOSTILE_TEMPLATES = (
    b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    b"{{ 'a' * 10**10 }}",
    b"{{ '%9999999999d' % 1 }}",
    b"{{ messages | tojson(indent=10**9) }}",
    b"{{ ''.__class__.__mro__ }}",
    b"{{ messages.append(1) }}",
    b"{{ 10 ** 10 ** 10 }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    b"{% include '/etc/passwd' %}",
    b"{{ raise_exception('no\nno\x1b[2J') }}",
    b"{{ cycler.__init__.__globals__ }}",
    b"{{" + b"(" * 500 + b"1" + b")" * 500 + b"}}",
    b"{% if true %}",
    b"{{ strftime_now('%' * 9999) }}",
)


def _prepare_template(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    (folder / "tokenizer" / "chat_template.jinja").write_text(settings.pop("chat_template"))
    path.write_text(json.dumps(settings))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _CHATS))
    # The limit itself is the same, and a case that meets it is over sooner.
    data.chat._CHILD = LimitedChild("data.chat", seconds=1.0)


def _mutate_template(random: Random, content: bytes) -> bytes:
    """Put a hostile expression somewhere, or damage the text."""
    if random.random() < 0.5:
        return mutate_bytes(random, content)
    place = random.choice((0, len(content), random.randint(0, len(content))))
    return content[:place] + random.choice(_HOSTILE_TEMPLATES) + content[place:]


def _use_template(folder: Path, _: Path) -> None:
    _TOKENIZERS[folder] = Tokenizer.load(folder / "tokenizer")
    _load(folder, folder / "chats.jsonl", PromptFormat("messages"), None)


# --- configuration -------------------------------------------------------------------------------


def _prepare_run_config(folder: Path) -> None:
    (folder / "config.toml").write_text(to_toml(load_config(preset="default"), comments=False))
    (folder / "mine.toml").write_text(
        'preset = "demo"\n\n[train]\nmax_steps = 3\n\n[lora]\nr = 4\ntarget_modules = ["q_proj"]\n'
        "[optimizer]\nbetas = [0.9, 0.95]\nlearning_rate = 1e-4\n[eval]\nsteps = 2\n"
    )


def _use_run_config(folder: Path, path: Path) -> None:
    config = load_config(file=path)
    again = folder / "again.toml"
    again.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file=again) == config


def _prepare_overrides(folder: Path) -> None:
    (folder / "arguments").write_text(
        "--preset\0demo\0train.max_steps=3\0lora.r=4\0optimizer.learning_rate=1e-4\0"
        "lora.target_modules=['q_proj', 'v_proj']\0data.max_length=64\0optimizer.betas=[0.9, 0.99]"
        "\0eval.steps=epoch\0log.progress=auto\0data.valid=none\0data.text_field=text"
    )


def _mutate_arguments(random: Random, content: bytes) -> bytes:
    """Give one setting another value or key; or damage the bytes."""
    if random.random() < 0.4:
        return mutate_bytes(random, content)
    words = content.decode().split("\0")
    place = random.randrange(2, len(words))
    lines = mutate_toml(random, words[place].encode()).decode().split("\n")
    words[place : place + 1] = [line.replace("= ", "=") for line in lines]
    return "\0".join(words).encode()


def _use_overrides(_: Path, path: Path) -> None:
    # As the operating system hands them over: bytes that are not UTF-8 become surrogates.
    argv = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")]
    try:
        arguments = parse(argv)
    except SystemExit as error:
        assert error.code in (0, 2)
        return
    if arguments.config_file is None:
        load_config(preset=arguments.preset, overrides=arguments.overrides)


def _prepare_preset(folder: Path) -> None:
    for name in ("codellama-7b", "codellama-7b-improved"):
        text = (config_layers.PRESET_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def _use_preset(folder: Path, path: Path) -> None:
    shipped = config_layers.PRESET_FOLDER
    config_layers.PRESET_FOLDER = folder
    try:
        read_preset(path.stem)
    finally:
        config_layers.PRESET_FOLDER = shipped


# --- a run's folder ------------------------------------------------------------------------------


def _prepare_metrics(folder: Path) -> None:
    metrics = Metrics(folder, tensorboard=False)
    for step in range(1, 6):
        row = {"step": step, "epoch": step / 5, "loss": 1 / step, "learning_rate": 1e-4}
        metrics.train({**row, "grad_norm": 0.5, "targets": 9, "tokens": 9, "seconds": 0.1}, False)
    metrics.eval({"step": 5, "split": "valid", "loss": 1.0, "targets": 9, "best": True})
    metrics.close()


def _use_metrics(folder: Path, _: Path) -> None:
    for row in read_metrics(folder):
        assert isinstance(row["kind"], str) and isinstance(row["step"], int)
    Metrics(folder, tensorboard=False, resume_step=3).close()
    assert all(row["step"] <= 3 for row in read_metrics(folder))


def _prepare_checkpoint(folder: Path) -> None:
    state = TrainState(
        EarlyStopping(2, best_step=2, best_loss=1.5),
        step=3,
        resumed_from=[1],
        scaler={"scale": 1024.0},
    )
    identity = {"config": {"train.seed": 42}, "data": {"train": "0f"}, "versions": {"torch": "2"}}

    def write(target: Path) -> dict[str, str]:
        (target / "state.json").write_text(
            json.dumps({"state": state.to_dict(), "identity": identity})
        )
        return {"x.safetensors": write_tensors(target / "x.safetensors", {"x": torch.ones(3)})}

    replace_folder(folder / "step-00000003", write, step=3)


def _use_checkpoint(_: Path, path: Path) -> None:
    """A changed file must be noticed: what `damage` accepts says the same as before."""
    before = _GOOD_CHECKPOINT.get(path)
    assert before is not None
    problem = damage(path.parent)
    if path.read_bytes() == before:
        assert problem is None
    elif path.name != "manifest.json":
        assert problem is not None
    elif problem is None:
        assert json.loads(path.read_bytes()) == json.loads(before)
    if problem is not None:
        raise UserError(problem)


_GOOD_CHECKPOINT: dict[Path, bytes] = {}


def _prepare_damage(folder: Path) -> None:
    _prepare_checkpoint(folder)
    for path in (folder / "step-00000003").iterdir():
        _GOOD_CHECKPOINT[path] = path.read_bytes()


def _use_state(_: Path, path: Path) -> None:
    state, identity = read_state(path.parent)
    stopping = state.stopping
    assert isinstance(state.step, int) and isinstance(identity, dict)
    assert stopping.should_stop in (True, False)
    stopping.observe(state.step + 1, 1.0)
    assert math.isfinite(state.seconds + state.loss_since_eval + state.targets_since_eval)
    assert all(isinstance(step, int) for step in state.resumed_from)


def _prepare_status(folder: Path) -> None:
    (folder / "config.toml").write_text(to_toml(load_config(preset="default"), comments=False))
    status = {
        "state": "finished",
        "reason": "completed",
        "step": 5,
        "total_steps": 5,
        "best": {"step": 3, "loss": 1.0},
        "seconds": 1.0,
        "samples": [{"prompt": "a", "reference": "b", "before": "c", "after": "d"}],
    }
    (folder / "status.json").write_text(json.dumps(status))


def _use_status(folder: Path, _: Path) -> None:
    _is_finished(folder, 3)
    for sample in samples_so_far(folder):
        assert isinstance(sample.prompt, str) and isinstance(sample.reference, str)
    read_record(folder)


_JSON = one_of(mutate_json, mutate_json, mutate_json, mutate_bytes)
_LINES = one_of(mutate_json_lines, mutate_json_lines, mutate_bytes)
_TOML = one_of(mutate_toml, mutate_toml, mutate_bytes)

TARGETS = {
    "tokenizer": Target(
        tuple(f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
        _JSON,
        _prepare_tokenizer,
        _use_tokenizer,
        named="tokenizer",
        share=0.1,
    ),
    "chat-template": Target(
        ("tokenizer/chat_template.jinja",),
        _mutate_template,
        _prepare_template,
        _use_template,
        named="chat",
        share=0.1,
    ),
    "config": Target(_CONFIGS, _JSON, _prepare_configs, _use_config),
    "tensors": Target(
        ("x.safetensors",),
        one_of(_mutate_header, _mutate_header, mutate_bytes),
        _prepare_tensors,
        _use_tensors,
    ),
    "weights": Target(
        ("model.safetensors",),
        one_of(_mutate_header, mutate_bytes),
        _prepare_single,
        _fill,
        named="weights",
    ),
    "index": Target((INDEX_FILE,), _JSON, _prepare_shards, _fill_from_index, named="index"),
    "adapter-config": Target(
        ("adapter_config.json",), _JSON, _prepare_adapter, _use_adapter, named="adapter"
    ),
    "adapter-weights": Target(
        ("adapter_model.safetensors",),
        one_of(_mutate_header, mutate_bytes),
        _prepare_adapter,
        _use_adapter,
        named="adapter",
    ),
    "rows": Target(("rows.jsonl", "chats.jsonl", "chats.jsonl"), _LINES, _prepare_rows, _use_rows),
    "rows-json": Target(("rows.json",), _JSON, _prepare_rows, _use_rows),
    "rows-csv": Target(
        ("rows.csv",), one_of(mutate_csv, mutate_csv, mutate_bytes), _prepare_rows, _use_rows
    ),
    "rows-parquet": Target(
        ("rows.parquet", "chats.parquet"), mutate_bytes, _prepare_rows, _use_rows
    ),
    "cache": Target(
        _CACHE_FILES,
        one_of(mutate_bytes, mutate_bytes, mutate_json_or_bytes),
        _prepare_cache,
        _use_cache,
    ),
    "run-config": Target(("config.toml", "mine.toml"), _TOML, _prepare_run_config, _use_run_config),
    "overrides": Target(
        ("arguments",), _mutate_arguments, _prepare_overrides, _use_overrides, named=" "
    ),
    "preset": Target(
        ("codellama-7b.toml", "codellama-7b-improved.toml"),
        _TOML,
        _prepare_preset,
        _use_preset,
        named="preset",
    ),
    "metrics": Target(("metrics.jsonl",), _LINES, _prepare_metrics, _use_metrics),
    "checkpoint": Target(
        tuple(f"step-00000003/{name}" for name in ("manifest.json", "state.json", "x.safetensors")),
        one_of(mutate_json_or_bytes, mutate_bytes),
        _prepare_damage,
        _use_checkpoint,
        named="step-00000003",
    ),
    "state": Target(("step-00000003/state.json",), _JSON, _prepare_checkpoint, _use_state),
    "status": Target(("status.json",), _JSON, _prepare_status, _use_status),
}
