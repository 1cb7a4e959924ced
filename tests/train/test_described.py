"""The JSON schema and the shells' completion: made from the keys, and as the keys are."""

import json
import math
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from runs import Refused

from files.errors import UserError
from train.config.command_line import OTHER_COMMANDS, completion_text, show_text
from train.config.json_schema import json_schema
from train.config.layers import preset_names
from train.config.load import load_config
from train.config.schema import KEYS, SECTIONS
from train.run import main

TYPES = {"string": str, "boolean": bool, "object": dict, "array": list}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value fits a schema: the part of draft 2020-12 that ours is written in."""
    known = {"anyOf", "enum", "const", "type", "minimum", "maximum", "exclusiveMinimum"}
    known |= {"exclusiveMaximum", "items", "minItems", "maxItems", "properties"}
    known |= {"additionalProperties", "description", "default", "title", "$schema"}
    assert set(schema) <= known
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if value not in schema.get("enum", [value]) or schema.get("const", value) != value:
        return False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema.get("type"):
        case None:
            pass
        case "number" | "integer" as kind:
            if not number or (kind == "integer" and value != math.floor(value)):
                return False
        case kind:
            if not isinstance(value, TYPES[kind]):
                return False
    if number and not (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", -math.inf)
        and value < schema.get("exclusiveMaximum", math.inf)
    ):
        return False
    if isinstance(value, list) and "items" in schema:
        few, many = schema["minItems"], schema.get("maxItems", len(value))
        return few <= len(value) <= many and all(fits(one, schema["items"]) for one in value)
    if isinstance(value, dict) and "additionalProperties" in schema:
        others, named = schema["additionalProperties"], schema.get("properties", {})
        return all(
            fits(one, named[name]) if name in named else (others is not False and fits(one, others))
            for name, one in value.items()
        )
    return True


def test_every_key_has_its_meaning_its_default_and_what_it_takes() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == ["preset", *SECTIONS]
    found = {
        f"{section}.{name}": one
        for section in SECTIONS
        for name, one in schema["properties"][section]["properties"].items()
    }
    assert found.keys() == KEYS.keys()
    for path, one in found.items():
        assert one["description"].startswith(KEYS[path].rule.doc)
        assert {"type", "enum", "anyOf"} & one.keys(), path
        assert fits(one["default"], one), path
    assert found["optimizer.betas"]["default"] == [0.9, 0.999]
    assert found["train.max_steps"] == {
        "anyOf": [{"type": "integer", "minimum": 1}, {"const": "none"}],
        "description": "optimizer steps; rules over num_train_epochs if set",
        "default": "none",
    }
    assert found["optimizer.learning_rate"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_the_schema(name: str) -> None:
    assert fits(tomllib.loads(show_text(name)), json_schema())


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "r", 16),
        ("lora", "r", 0),
        ("lora", "r", "eight"),
        ("lora", "r", "none"),
        ("lora", "rank_pattern", {"q_proj": 4}),
        ("lora", "rank_pattern", {"q_proj": 0}),
        ("lora", "rank_pattern", {"q_proj": 1.5}),
        ("lora", "target_modules", ["q_proj"]),
        ("lora", "target_modules", []),
        ("lora", "modules_to_save", ["lm_head"]),
        ("lora", "trainable_token_indices", [-1]),
        ("lora", "lora_dropout", 1.0),
        ("lora", "lora_dropout", 0.99),
        ("model", "attention", "flash_attention_2"),
        ("model", "attention", "flesh"),
        ("model", "gradient_checkpointing", True),
        ("model", "gradient_checkpointing", "mlp"),
        ("model", "dropout", "none"),
        ("train", "seed", -1),
        ("train", "compile", "yes"),
        ("train", "compile", False),
        ("train", "micro_batch_tokens", "auto"),
        ("train", "micro_batch_tokens", "automatic"),
        ("train", "profile_steps", "10-12"),
        ("train", "profile_steps", 0),
        ("eval", "steps", "epoch"),
        ("eval", "steps", 0),
        ("optimizer", "betas", [0.9, 0.95]),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "betas", [0.9, 1.0]),
        ("log", "progress", "auto"),
        ("log", "progress", 3),
        ("data", "train", ["a.jsonl", "b.jsonl"]),
        ("data", "nothing", 1),
    ],
)
def test_the_schema_takes_what_a_file_may_hold(
    section: str, key: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    text = json.dumps(value).replace('{"q_proj": ', "{q_proj = ")
    path.write_text(f"[{section}]\n{key} = {text}\n")
    try:
        load_config(file=path)
        taken = True
    except UserError:
        taken = False
    assert fits({section: {key: value}}, json_schema()) == taken


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    assert main(["--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["--completion", "bash"]) == 0
    assert capsys.readouterr().out == completion_text("bash") + "\n"
    assert "bash, zsh, fish; did you mean 'zsh'?" in refused(main, "--completion", "zssh")


def completed(*words: str, split: bool = True) -> set[str]:
    """Return what bash offers for the last of some words.

    With `split` a word with `=` is three words, as bash's own COMP_WORDBREAKS makes of it.
    """
    parts = [part for word in words for part in re.split("(=)", word) if part or not split]
    if not split:
        parts = list(words)
    elif not words[-1]:
        parts.append("")
    quoted = " ".join(f"'{part}'" for part in parts)
    script = (
        f"{completion_text('bash')}\n"
        "compopt() { :; }  # wants a completion in flight\n"
        f"COMP_WORDS=({quoted}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        '_lathe; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_bash_offers_commands_options_keys_and_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    keys = {f"{path}=" for path in KEYS}
    options = {"--plan", "--preset", "--resume", "--completion", "--help"}
    assert completed("lathe", "") > {"run", *OTHER_COMMANDS, *options, *keys}
    assert completed("lathe", "run", "lora.r") == {k for k in keys if k.startswith("lora.r")}
    assert completed("lathe", "train.method=") == {"lora", "full"}
    assert completed("lathe", "--plan", "optimizer.name=ad") == {
        *("adamw", "adamw_8bit", "adafactor")
    }
    assert completed("lathe", "deterministic=") == {"true", "false"}  # bare, where it is unique
    assert completed("lathe", "train.method=f", split=False) == {"train.method=full"}
    assert completed("lathe", "model.quantization=") == {"nf4", "int8", "none"}
    assert completed("lathe", "--preset", "qwen") == {
        name for name in preset_names() if name.startswith("qwen")
    }
    assert completed("lathe", "data.train=ro") == {"rows.jsonl"}
    assert completed("lathe", "merge", "r") == {"rows.jsonl"}
    assert completed("lathe", "--completion", "") == {"bash", "zsh", "fish"}


def test_bash_offers_each_command_s_own_options_and_what_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    assert completed("lathe", "merge", "--") == {
        *("--help", "--base", "--quantization", "--data", "--tolerance")
    }
    assert completed("lathe", "merge", "--quantization", "") == {"nf4", "int8"}
    assert completed("lathe", "merge", "--tolerance", "") == set()
    assert completed("lathe", "evaluate", "--data", "") == {"rows.jsonl"}
    assert completed("lathe", "evaluate", "x", "lora.") == set()
    assert completed("lathe", "evaluate", "x", "data.fo") == {"data.format="}
    assert completed("lathe", "export-metrics", "x", "--to", "m") == {"mlflow"}
    assert completed("lathe", "report", "--to", "r") == {"rows.jsonl"}
    assert completed("lathe", "lint", "ro") == {"rows.jsonl"}
    assert completed("lathe", "lint", "--p") == {"--preset", "--picture"}
    assert completed("lathe", "show-data", "--sp") == {"--split"}
    assert completed("lathe", "show-data", "--pl") == set()  # that is a run's
    # A command's name behind another argument is none.
    assert "--plan" in completed("lathe", "--preset", "demo", "--")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_read_its_script_which_knows_every_key(shell: str) -> None:
    script = completion_text(shell)
    assert all(f"{path}=" in script for path in KEYS)
    assert all(command in script for command in OTHER_COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
