"""`lora.init_from`: the run goes on with that adapter, and its documents say so.

What the user wrote against the adapter's rank, scale, targets or biases ends the run before it
begins; what only a preset or a default says gives way; the dropout is the run's own.
"""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from data.tokenizer import Tokenizer
from files.errors import UserError
from files.tensors import TensorFile, write_tensors
from lora import LoraConfig, inject, save_adapter
from lora.adapter import WEIGHTS_FILE
from lora.tensors import PREFIX
from models import load_model
from models.config import read_config
from train.config.load import load_config
from train.config.toml import to_toml
from train.inputs.adapters import with_starting_adapter
from train.inputs.known import Unknown
from train.run import main, run
from train.saving import prove

# StarCoder2's layers, in two others' words than the defaults'.
TARGETS = ["q_proj", "c_fc"]
MIDDLE = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


def make_adapter(folder: Path, base: Path, **options: Any) -> Path:
    model = load_model(base)
    settings = {"r": 3, "lora_alpha": 7.5, "lora_dropout": 0.4, "target_modules": TARGETS}
    inject(model, LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    """Return an adapter whose every property differs from the defaults."""
    return make_adapter(tmp_path / "adapter", model_folder, use_rslora=True, bias="lora_only")


@pytest.fixture
def settings(model_folder: Path, rows_file: Path, adapter: Path, tmp_path: Path) -> list[str]:
    values = runs.settings(model_folder, rows_file, tmp_path / "run")
    for key in ("lora.r", "data.valid"):
        del values[key]
    return [*runs.arguments(values), f"lora.init_from={adapter}", "max_steps=2"]


def lora_section(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config.toml").read_text())["lora"]


def test_documents_hold_what_is_trained(
    settings: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings, "lora_dropout=0.0"]) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "run"
    assert lora_section(folder) == {
        "r": 3,
        "lora_alpha": 7.5,
        "lora_dropout": 0.0,
        "target_modules": ["c_fc", "q_proj"],
        "use_rslora": True,
        "bias": "lora_only",
        "init_lora_weights": "default",
        "use_dora": False,
        **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), "none"),
        "trainable_token_indices": "none",
        "init_from": str(adapter),
    }
    written = json.loads((folder / "final" / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules"):
        assert written[key] == lora_section(folder)[key], key
    # Two layers of 32: q_proj 32 → 32, c_fc 32 → 48, rank 3, and their biases.
    trained = 2 * (3 * (32 + 32) + 3 * (32 + 48) + 32 + 48)
    plan = json.loads((folder / "plan.json").read_text())
    status = json.loads((folder / "status.json").read_text())
    assert plan["trainable_parameters"] == status["trainable_parameters"] == trained
    line = (
        f"lora.init_from={adapter}: goes on from its adapter, with that one's r=3, lora_alpha=7.5, "
        'target_modules=["c_fc", "q_proj"], use_rslora=true, bias=lora_only; lora_dropout=0 is '
        "this run's"
    )
    assert line in plan["warnings"][0]
    assert output.count(f"note: {line}") == 1
    assert line in (folder / "report.md").read_text()


def test_the_dropout_is_the_runs_own_wherever_it_was_given(
    settings: list[str], tmp_path: Path
) -> None:
    assert main(settings) == 0
    assert lora_section(tmp_path / "run")["lora_dropout"] == 0.05  # the default, not the file's 0.4
    final = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert final["lora_dropout"] == 0.05


ADAPTED = '["c_fc", "q_proj"]'


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("setting", "has", "asked"),
    [
        ("lora.r=8", "r=3", "lora.r=8"),
        ("lora.r=4", "r=3", "lora.r=4"),
        ("lora_alpha=32", "lora_alpha=7.5", "lora.lora_alpha=32"),
        ("target_modules=all-linear", f"target_modules={ADAPTED}", "target_modules=all-linear"),
        ("target_modules=q_proj", f"target_modules={ADAPTED}", 'lora.target_modules=["q_proj"]'),
        ("use_rslora=false", "use_rslora=true", "lora.use_rslora=false"),
        ("lora.bias=none", "bias=lora_only", "lora.bias=none"),
    ],
)
def test_what_the_user_wrote_must_agree(
    setting: str,
    has: str,
    asked: str,
    plan: list[str],
    settings: list[str],
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*settings, setting, *plan]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: lora.init_from={adapter}: its adapter has {has}, but ")
    assert asked in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_in_a_file_too_and_all_of_it_at_once(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[lora]\nr = 8\nbias = 'all'\nlora_dropout = 0.1\n")
    assert main(["--config", str(file), *settings]) == 2
    error = capsys.readouterr().err
    assert "its adapter has r=3, bias=lora_only, but lora.r=8, lora.bias=all is asked" in error


def test_what_agrees_is_accepted_however_it_is_spelled(settings: list[str], tmp_path: Path) -> None:
    same = ["lora.r=3", "lora_alpha=7.5", "use_rslora=true", "lora.bias=lora_only"]
    names = r"target_modules=.*\.(q_proj|c_fc)"
    assert main([*settings, *same, names]) == 0
    assert lora_section(tmp_path / "run")["target_modules"] == r".*\.(q_proj|c_fc)"


@pytest.mark.parametrize("preset", ["qwen2.5-coder-1.5b", "demo"])
def test_a_presets_values_give_way(preset: str, settings: list[str], tmp_path: Path) -> None:
    """Even those that name layers of another family."""
    unset = [f"data.{key}=none" for key in ("valid", "test", "split_column")]
    more = ["data.format=text", "data.completion_template=none", "completion_only=none", *unset]
    more += ["valid_fraction=0.2", "eval.samples=0", "text_field=text", "random_init=false"]
    assert main(["--preset", preset, *settings, *more]) == 0
    trained = lora_section(tmp_path / "run")
    assert (trained["r"], trained["lora_alpha"]) == (3, 7.5)
    assert trained["target_modules"] == ["c_fc", "q_proj"]
    assert trained["lora_dropout"] == load_config(preset).lora.lora_dropout


def test_resuming_it_contradicts_nothing(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*settings, "checkpoint.steps=1"]) == 0
    before = lora_section(folder)
    assert main(["--resume", str(folder), "max_steps=3"]) == 0
    assert lora_section(folder) == before
    assert json.loads((folder / "status.json").read_text())["step"] == 3


def test_going_on_begins_where_the_adapter_ended(
    settings: list[str], adapter: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Before the first step the valid loss is that of the base with the adapter in PEFT."""
    valid = rows_file / "valid.jsonl"
    assert main([*settings, f"data.valid={valid}", "eval.on_start=true"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["kind"], first["step"]) == ("eval", 0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = Tokenizer.load(model_folder)

    def loss(model: Any) -> float:
        losses = []
        for line in valid.read_text().splitlines():
            ids = torch.tensor([[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id]])
            with torch.no_grad():
                logits = model.eval()(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        return float(torch.cat(losses).mean())

    plain = loss(base)
    # fp32, means over some hundred tokens: 1e-6 apart; without the adapter more than 1e-2.
    adapted = loss(PeftModel.from_pretrained(base, str(adapter)))
    assert abs(first["loss"] - adapted) < 1e-5 < 1e-2 < abs(plain - adapted)


def test_patterns_of_ranks_come_along(
    settings: list[str], model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    make_adapter(adapter, model_folder, rank_pattern={"c_fc": 2}, alpha_pattern={"q_proj": 3})
    assert main(settings) == 0
    written = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"c_fc": 2}
    assert written["alpha_pattern"] == {"q_proj": 3}


def test_from_python(settings: list[str], model_folder: Path, tmp_path: Path) -> None:
    overrides = dict(setting.split("=", 1) for setting in settings)
    config = load_config(overrides=overrides)
    decoder = read_config(model_folder)
    adopted = with_starting_adapter(config, decoder)
    assert (adopted.lora.r, adopted.lora.bias) == (3, "lora_only")
    # Twice is once, and so is reading it back, where every key counts as written.
    assert with_starting_adapter(adopted, decoder) == adopted
    file = tmp_path / "config.toml"
    file.write_text(to_toml(adopted))
    assert with_starting_adapter(load_config(file=file), decoder) == adopted
    # What was put into the dataclass counts as written, though no key of it was.
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, r=16))
    with pytest.raises(UserError, match=r"has r=3, but lora\.r=16 is asked for"):
        run(config)


def test_without_the_architecture_targets_are_not_compared(settings: list[str]) -> None:
    config = load_config(overrides=dict(setting.split("=", 1) for setting in settings))
    adopted = with_starting_adapter(config, Unknown("no network"))
    assert (adopted.lora.r, adopted.lora.target_modules) == (3, "all-linear")


def test_a_proof_of_resume_hands_on_the_adapters_values(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of the proof read all their settings from a file: none may contradict."""
    config = load_config(overrides=dict(setting.split("=", 1) for setting in settings))

    def look(whole: Path, *_: object) -> None:
        read = load_config(file=whole.parent / "config.toml")
        assert (read.lora.r, read.lora.target_modules) == (3, ("c_fc", "q_proj"))
        raise UserError("seen")

    monkeypatch.setattr(prove, "_make_runs", look)
    with pytest.raises(UserError, match="seen"):
        prove.prove_resume(config, 1)


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_an_adapter_for_the_head_is_told_so(
    plan: list[str],
    settings: list[str],
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = adapter / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "target_modules": ["q_proj", "c_fc", "lm_head"]}))
    assert main([*settings, *plan]) == 2
    error = capsys.readouterr().err
    assert f"error: {adapter}: lora.target_modules: 'lm_head' is the output head" in error
    assert "merge the adapter into its base with PEFT and start from the merged model" in error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{PREFIX}lm_head.weight"), "missing are base_model.model.lm_head.weight"),
        (lambda t: t[f"{PREFIX}lm_head.weight"].zero_(), "the adapter holds two that differ"),
        (lambda t: t.update({MIDDLE: t[MIDDLE][:, 1:]}), "is [3, 31], not [3, 32]"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused_by_the_plan_too(
    change: Any,
    told: str,
    settings: list[str],
    model_folder: Path,
    tmp_path: Path,
    refused: runs.Refused,
) -> None:
    """The head of a tied base, as PEFT writes it without ensure_weight_tying; another width."""
    folder = make_adapter(tmp_path / "tied", model_folder, modules_to_save=["embed_tokens"])
    with TensorFile(folder / WEIGHTS_FILE) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    change(tensors)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    asked = runs.changed(settings, f"lora.init_from={folder}")
    assert told in refused(main, *asked)
    assert told in refused(main, *asked, "--plan")
    assert not (tmp_path / "run").exists()


def test_rows_of_the_head_are_refused_with_a_way_out(
    settings: list[str], adapter: Path, refused: runs.Refused
) -> None:
    path = adapter / "adapter_config.json"
    rows = {"embed_tokens": [3], "lm_head": [3]}
    document = json.loads(path.read_text()) | {"trainable_token_indices": rows}
    path.write_text(json.dumps(document))
    error = refused(main, *settings, "--plan")
    assert "trainable_token_indices={'embed_tokens': [3], 'lm_head': [3]} is not supported" in error
    assert "merge the adapter into its base with PEFT" in error
