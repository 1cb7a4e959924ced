"""Runs with what LoRA has beside its two factors: planned, trained, saved as PEFT reads it."""

import itertools
import json
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from files.errors import UserError
from files.tensors import TensorFile
from lora import LoraConfig, inject, load_adapter
from models import load_model
from train.config.load import load_config
from train.config.toml import to_toml
from train.merge.fold import merge_adapter
from train.plan.decide import Machine, decide_sharding
from train.run import main

Refused = runs.Refused
TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


@pytest.fixture
def settings(model_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a run of two steps, saved after each."""
    values = runs.settings(model_folder, rows_file, tmp_path / "run")
    return {**values, "train.max_steps": 2, "checkpoint.steps": 1, "model.dropout": 0.0}


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def our_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = load_model(base)
    load_adapter(model, adapter)
    with torch.no_grad():
        return model(TOKENS)


def peft_count(base: Path, **options: Any) -> int:
    """Return how many parameters PEFT would train."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftConfig(**options))
    return model.get_nb_trainable_parameters()[0]


# Settings of a run → what PEFT's configuration says of the same.
FAMILY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patterns": (
        {
            "lora.rank_pattern": {"q_proj": 2, "layers.1.*c_fc": 5},
            "lora.alpha_pattern": {"c_proj": 3.5},
        },
        {
            "rank_pattern": {"q_proj": 2, "layers.1.*c_fc": 5},
            "alpha_pattern": {"c_proj": 3.5},
        },
    ),
    "dora": ({"lora.use_dora": True}, {"use_dora": True}),
    "dora, biases": (
        {"lora.use_dora": True, "lora.bias": "all", "lora.use_rslora": True},
        {"use_dora": True, "bias": "all"},
    ),
    "whole embedding and head": (
        {"lora.modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "token rows": (
        {"lora.trainable_token_indices": [70, 71, 72, 75]},
        {"trainable_token_indices": [70, 71, 72, 75]},
    ),
    "all at once": (
        {
            "lora.use_dora": True,
            "lora.use_rslora": True,
            "lora.trainable_token_indices": [70, 71, 72, 75],
            "lora.rank_pattern": {"q_proj": 2},
        },
        {
            "use_dora": True,
            "trainable_token_indices": [70, 71, 72, 75],
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "pissa": ({"lora.init_lora_weights": "pissa"}, {}),
}


@pytest.mark.parametrize("case", FAMILY)
def test_what_is_trained_is_counted_and_read_by_peft(
    case: str, settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    ours, theirs = FAMILY[case]
    outcome = runs.train({**settings, **ours})
    plan = json.loads((outcome.folder / "plan.json").read_text())
    status = json.loads((outcome.folder / "status.json").read_text())
    count = peft_count(
        model_folder, r=4, target_modules="all-linear", task_type="CAUSAL_LM", **theirs
    )
    assert plan["trainable_parameters"] == status["trainable_parameters"] == count
    final = outcome.folder / "final"
    there, here = peft_logits(model_folder, final), our_logits(model_folder, final)
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        base = load_model(model_folder)(TOKENS)
    assert (here - base).abs().max() > 1e-3  # or nothing was trained
    merge_adapter(outcome.folder, tmp_path / "merged")
    with torch.no_grad():
        merged = load_model(tmp_path / "merged")(TOKENS)
    torch.testing.assert_close(merged, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in FAMILY if "pissa" not in case])
def test_a_run_goes_on_from_any_of_them(
    case: str, settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    first = runs.train({**settings, **FAMILY[case][0]}).folder / "final"
    del settings["lora.r"]
    more = {"lora.init_from": str(first), "train.output_dir": str(tmp_path / "more")}
    # At a learning rate of nothing the run hands out what it began with.
    outcome = runs.train({**settings, **more, "optimizer.learning_rate": 1e-30})
    name = "adapter_model.safetensors"
    with TensorFile(first / name) as one, TensorFile(outcome.folder / "final" / name) as other:
        assert one.names == other.names
        for name in one.names:
            torch.testing.assert_close(one.read(name), other.read(name), rtol=0, atol=1e-25)
    toml = tomllib.loads((outcome.folder / "config.toml").read_text())["lora"]
    for key, value in FAMILY[case][0].items():
        if key != "lora.modules_to_save":  # of a tied pair a file names both
            assert toml[key.removeprefix("lora.")] == value


QUICK = (("adamw", "none"), ("adafactor", "all"))  # of each case one
POLICY = {
    "adamw": "layers",
    "paged_adamw": "offload",
    "adafactor": "norms",
    "adamw_8bit": "mlp",
}
WAYS = [
    pytest.param(
        case, *way, marks=() if way == QUICK[i % 2] else pytest.mark.slow, id="-".join((case, *way))
    )
    for i, case in enumerate(FAMILY)
    for way in itertools.product(
        ("adamw", "paged_adamw", "adafactor", "adamw_8bit"), ("none", "lora_only", "all")
    )
]


@pytest.mark.parametrize(("case", "optimizer", "bias"), WAYS)
def test_stopped_and_resumed_it_ends_in_the_same_bits(
    case: str, optimizer: str, bias: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With LoRA+'s rates, and with dropout; recomputed where the run is the stopped one."""
    ours, _ = FAMILY[case]
    values = {
        **settings,
        "lora.bias": bias,
        **ours,
        "optimizer.name": optimizer,
        "optimizer.loraplus_lr_ratio": 4,
        "model.dropout": 0.1,
    }
    whole = runs.train(values)
    values["train.output_dir"] = str(tmp_path / "stopped")
    values["model.gradient_checkpointing"] = POLICY[optimizer]
    stopped = runs.train(values, runs.signalled(1, signal.SIGTERM))
    assert stopped.reason == "sigterm"
    runs.resume(stopped.folder)
    assert runs.trained_bits(stopped.folder) == runs.trained_bits(whole.folder)


# --- other readers ---


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"lora.rank_pattern": {"q_proj": 2}},
            "ignores rank_pattern, so that its scales are wrong",
        ),
        ({"lora.use_dora": True}, "refuses it for use_dora"),
        (
            {"lora.modules_to_save": ["lm_head"], "lora.alpha_pattern": {"q_proj": 2}},
            "refuses it for modules_to_save and ignores alpha_pattern, so that",
        ),
        ({"lora.bias": "all"}, "refuses it for bias"),
        ({"lora.init_lora_weights": "pissa", "lora.use_rslora": True}, ""),
    ],
)
def test_what_vllm_does_not_read_is_said(
    given: dict[str, Any],
    words: str,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = runs.train({**settings, **given}).folder
    said, report = capsys.readouterr().out, (folder / "report.md").read_text()
    for text in (said, report):
        assert ("vLLM" in text) is bool(words)
        assert f"final/: vLLM {words}" in text or not words
        assert f"merge {folder} MERGED_MODEL` writes a model that it reads" in text or not words


# --- patterns ---


@pytest.mark.parametrize(
    "written",
    [
        "{q_proj = 2, 'layers.1.*c_fc' = 5}",
        '{"q_proj": 2, "layers.1.*c_fc": 5}',
        "q_proj=2,'layers.1.*c_fc'=5",
        {"q_proj": 2, "layers.1.*c_fc": 5},
    ],
)
def test_a_table_is_written_as_toml_json_or_bare(written: Any, tmp_path: Path) -> None:
    config = load_config(overrides={"lora.rank_pattern": written})
    assert config.lora.rank_pattern == (("q_proj", 2), ("layers.1.*c_fc", 5))
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(file=file).lora == config.lora


def test_a_table_of_a_file_has_a_header_and_bare_dots(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[lora]\nr = 4\n\n[lora.rank_pattern]\nmodel.layers.0.self_attn.q_proj = 2\n")
    names = (("model.layers.0.self_attn.q_proj", 2),)
    assert load_config(file=file).lora.rank_pattern == names
    file.write_text("[lora]\nr = 4\n[lora.rank_pattern]\nq_proj = 1.5\n")
    with pytest.raises(UserError, match=r"mine\.toml:3: lora\.rank_pattern = .* gives q_proj 1.5"):
        load_config(file=file)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rank_pattern=q_proj", "is of the wrong type (it takes a table of names, each with an in"),
        ("rank_pattern={q_proj=0}", "gives q_proj 0, which is out of range"),
        ("rank_pattern={q_proj=true}", "gives q_proj true"),
        ("alpha_pattern={q_proj=0}", "gives q_proj 0, which is out of range"),
        ("rank_pattern={q_porj=2}", "lora.rank_pattern: 'q_porj' matches the end of no adapted"),
        ("rank_pattern={q_porj=2}", "did you mean 'q_proj'?"),
        ("alpha_pattern={lm_head=2}", "lora.alpha_pattern: 'lm_head' matches the end of no"),
        ("rank_pattern={'q_(' = 2}", "'q_(' is no regular expression"),
    ],
)
def test_what_a_table_cannot_be_is_refused(
    setting: str, words: str, settings: dict[str, Any], refused: Refused
) -> None:
    assert words in refused(main, *runs.arguments(settings), setting)
    assert words in refused(main, *runs.arguments(settings), setting, "--plan")


# --- quantised weights ---


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("case", FAMILY)
def test_over_quantised_weights_it_is_trained_or_refused(
    case: str, kind: str, settings: dict[str, Any]
) -> None:
    values = {**settings, **FAMILY[case][0], "model.quantization": kind}
    setting = "lora.init_lora_weights" if case == "pissa" else "lora.use_dora"
    if setting not in FAMILY[case][0]:
        assert runs.train(values).reason == "completed"
        return
    with pytest.raises(
        UserError, match=rf"model\.quantization={kind} with {setting}=.* plain adapt"
    ):
        runs.train(values)


def test_a_quantised_weight_takes_plain_adapters_alone(model_folder: Path) -> None:
    model = load_model(model_folder, quantization="nf4")
    with pytest.raises(UserError, match="its weight is quantised, and lora"):
        inject(model, LoraConfig(use_dora=True))


# --- what needs adapters ---


@pytest.mark.parametrize("case", FAMILY)
def test_full_fine_tuning_has_none_of_it(case: str) -> None:
    given = FAMILY[case][0]
    with pytest.raises(UserError, match=r"lora\.\w+ is of adapters, and train\.method=full"):
        load_config(overrides={**given, "train.method": "full"})


def test_an_adapter_to_go_on_from_has_begun() -> None:
    with pytest.raises(
        UserError, match=r"goes on from an adapter, and lora\.init_lora_weights=pissa"
    ):
        load_config(overrides={"lora.init_from": "somewhere", "lora.init_lora_weights": "pissa"})


def test_a_rate_of_b_needs_adapters(refused: Refused) -> None:
    error = refused(main, "train.method=full", "loraplus_lr_ratio=16", "--plan")
    assert "optimizer.loraplus_lr_ratio is of the B factors of adapters" in error


# --- many ranks ---


@pytest.mark.parametrize("case", [case for case in FAMILY if case != "patterns"])
def test_a_shared_base_is_refused_in_words(case: str, settings: dict[str, Any]) -> None:
    values = {**settings, **FAMILY[case][0]}
    auto, shared = (
        load_config(overrides={**values, "train.sharding": x}) for x in ("auto", "shard")
    )
    machine = Machine("cpu", 1)
    assert decide_sharding(auto, 2, machine, 2) == "replicate"
    with pytest.raises(UserError, match=r"train\.sharding=shard with lora\.\w+=.*=replicate"):
        decide_sharding(shared, 2, machine, 2)
    assert decide_sharding(shared, 2, machine, 1) is None
