"""PEFT's adapter files both ways: ours load in PEFT, PEFT's load here, and the logits are the same.

Logits are compared at 1e-5 of the largest: the two sides do the same sums in fp32 (6e-8 an
operation) over a few dozen terms in another order, while a wrong scale or a bias left out moves
them by more than 1e-3.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from torch import nn
from transformers import AutoModelForCausalLM

from files.errors import UserError
from files.hub import ModelSource
from files.tensors import TensorFile, write_tensors
from lora import (
    LoraConfig,
    adapter_tensors,
    fill_adapter,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
    saved_config,
)
from models import load_model

Maker = Callable[..., Any]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama all-linear": ("llama", {"target_modules": "all-linear"}),
    "qwen2 list": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "starcoder2 all-linear": ("starcoder2", {"target_modules": "all-linear"}),
    "mistral all-linear": ("mistral", {"target_modules": "all-linear"}),
    "qwen3 all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    "full names": ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj"]}),
    "rslora": ("llama", {"target_modules": ["o_proj"], "use_rslora": True}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "bias all": ("starcoder2", {"target_modules": ["q_proj", "c_fc"], "bias": "all"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 5},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True, "bias": "lora_only"}),
    "dora rslora": (
        "starcoder2",
        {"target_modules": ["c_fc", "q_proj"], "use_dora": True, "use_rslora": True},
    ),
}


def shake(model: nn.Module) -> None:
    """Move every trained parameter away from its start, so that B and the biases count."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft_and_gives_our_logits(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    family, options = CASES[case]
    theirs = make_theirs(family)
    model = make_ours(theirs)
    inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **options))
    shake(model)
    save_adapter(model, tmp_path, base_model="somewhere/base", revision="abc")
    with torch.no_grad():
        before = theirs(tokens).logits
        peft = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
        logits = peft(tokens).logits
        assert_same(model(tokens), logits)
    assert not torch.allclose(logits, before, rtol=1e-3), "the adapter must matter in this test"
    config: Any = peft.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("somewhere/base", "abc")
    assert config.lora_dropout == 0.1
    # PEFT would warn of missing tensors and go on: it must adapt what we did and nothing more, and
    # leave none at its start.
    factors = [p for name, p in peft.named_parameters() if "lora_B" in name]
    assert len(factors) == len(lora_layers(model))
    assert all(factor.any() for factor in factors)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_loads_here_and_gives_its_logits(
    case: str, tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    family, options = CASES[case]
    theirs = make_theirs(family)
    model = make_ours(theirs)
    peft = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    shake(peft)
    peft.save_pretrained(str(tmp_path))
    config = load_adapter(model, tmp_path)
    with torch.no_grad():
        assert_same(model(tokens), peft.eval()(tokens).logits)
    assert (config.r, config.lora_alpha) == (4, 8)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "selection",
    [
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*layers\.0.*"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": 0},
        {"layers_to_transform": 1},
    ],
    ids=str,
)
def test_targets_that_peft_narrowed_are_read_from_the_tensors(
    selection: dict[str, Any],
    tmp_path: Path,
    make_theirs: Maker,
    make_ours: Maker,
    tokens: torch.Tensor,
) -> None:
    theirs = make_theirs("llama")
    model = make_ours(theirs)
    peft = get_peft_model(theirs, PeftConfig(r=4, target_modules=["q_proj", "v_proj"], **selection))
    shake(peft)
    peft.save_pretrained(str(tmp_path))
    load_adapter(model, tmp_path)
    with torch.no_grad():
        assert_same(model(tokens), peft.eval()(tokens).logits)
    assert 0 < len(lora_layers(model)) < 4


def test_a_round_trip_through_our_own_files_is_exact(
    tmp_path: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    theirs = make_theirs("starcoder2")
    options: dict[str, Any] = {"bias": "all", "rank_pattern": {"c_fc": 2}, "use_rslora": True}
    one, other = make_ours(theirs).bfloat16(), make_ours(theirs).bfloat16()
    inject(one, LoraConfig(r=3, lora_alpha=7.5, lora_dropout=0.25, **options))
    shake(one)
    save_adapter(one, tmp_path / "deep" / "folder")
    config = load_adapter(other, tmp_path / "deep" / "folder", trainable=True)
    assert config.lora_dropout == 0.25
    assert config.lora_alpha == 7.5
    written, read = adapter_tensors(one), adapter_tensors(other)
    assert written.keys() == read.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, read[name]), name
    assert [n for n, p in one.named_parameters() if p.requires_grad] == [
        n for n, p in other.named_parameters() if p.requires_grad
    ]


def test_the_files_themselves(tmp_path: Path, make_theirs: Maker, make_ours: Maker) -> None:
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"]))
    save_adapter(model, tmp_path, base_model="a/b", revision=None)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a/b",
        "revision": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "lora_bias": False,
    }
    with TensorFile(tmp_path / "adapter_model.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.names) == {
            f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{factor}.weight"
            for layer in (0, 1)
            for target in ("q_proj", "v_proj")
            for factor in "AB"
        }


def test_all_linear_is_written_as_names_that_every_reader_understands(
    tmp_path: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    model = make_ours(make_theirs("starcoder2"))
    inject(model, LoraConfig())
    save_adapter(model, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["c_fc", "c_proj", "k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.fixture
def saved(tmp_path: Path, make_theirs: Maker, make_ours: Maker) -> Path:
    """Return the folder of a small adapter on a llama."""
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, model: nn.Module) -> str:
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_listed_at_once(
    saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    stem = "base_model.model.model.layers."
    del tensors[f"{stem}0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{stem}9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors[f"{stem}1.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 32)
    tensors[f"{stem}1.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4, dtype=torch.int32)
    write_tensors(path, tensors)
    message = refused(saved, make_ours(make_theirs("llama")))
    for part in (
        str(saved),
        f"missing are {stem}0.self_attn.q_proj.lora_A.weight",
        f"unexpected are {stem}9.self_attn.q_proj.lora_A.weight",
        f"{stem}1.self_attn.q_proj.lora_A.weight is [3, 32], not [4, 32]",
        f"{stem}1.self_attn.q_proj.lora_B.weight holds torch.int32",
    ):
        assert part in message


def test_nothing_is_copied_when_a_tensor_does_not_fit(make_theirs: Maker, make_ours: Maker) -> None:
    model = make_ours(make_theirs("llama"))
    inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    given = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    given.popitem()
    with pytest.raises(UserError, match="missing are"):
        fill_adapter(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def test_an_adapter_for_other_modules_is_refused(
    saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"q_proj"', '"c_fc"'))
    message = refused(saved, make_ours(make_theirs("llama")))
    assert f"{saved}: lora.target_modules: 'c_fc' matched no Linear in Llama" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("modules_to_save", 0),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("trainable_token_indices", 3),
        ("trainable_token_indices", {"lm_head": [3]}),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.weight"]),
        ("a_key_of_tomorrow", {"on": True}),
        ("r", 0),
        ("lora_alpha", "big"),
        ("lora_alpha", 1e300),
        ("a_key_of_tomorrow", 0),
        ("fan_in_fan_out", 0),
        ("target_modules", 0),
        ("target_modules", []),
        ("rank_pattern", 0),
        ("alpha_pattern", {"q_proj": 0}),
        ("lora_alpha", 0),
        ("use_rslora", 0),
        ("bias", 0),
        ("peft_type", None),
    ],
)
def test_what_is_not_supported_is_named(
    key: str, value: Any, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    model = make_ours(make_theirs("llama"))
    message = refused(saved, model)
    assert message.startswith(f"{saved}: adapter_config.json")
    assert key in message
    assert not lora_layers(model)


@pytest.mark.parametrize("key", [*PeftConfig(target_modules=["q_proj"]).to_dict(), "tomorrow"])
def test_null_under_any_key_of_peft_is_its_default(
    key: str, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    document = json.loads(path.read_text())
    if key in ("r", "peft_type"):  # this adapter's rank is not the default, and no type is no LoRA
        document |= {key: {"r": 4, "peft_type": "LORA"}[key]}
    else:
        document |= {key: None}
    path.write_text(json.dumps(document))
    config = load_adapter(make_ours(make_theirs("llama")), saved)
    default = PeftConfig(r=4, target_modules=["q_proj"])
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern"):
        assert getattr(config, name) == getattr(default, name)
    assert {name.rpartition(".")[2] for name in config.target_modules} == {"q_proj"}


def test_targets_that_are_not_given_are_those_of_the_tensors(
    tmp_path: Path, make_theirs: Maker, make_ours: Maker, tokens: torch.Tensor
) -> None:
    theirs = make_theirs("llama")
    ours = make_ours(theirs)
    peft = get_peft_model(theirs, PeftConfig(r=4, target_modules=["q_proj", "v_proj"]))
    shake(peft)
    peft.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    document = json.loads(path.read_text())
    del document["target_modules"]
    path.write_text(json.dumps(document))
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert_same(ours(tokens), peft.eval()(tokens).logits)


def test_zero_is_a_value(saved: Path, make_theirs: Maker, make_ours: Maker) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0}))
    assert load_adapter(make_ours(make_theirs("llama")), saved).lora_dropout == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets",
    [["lm_head"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]],
    ids=str,
)
def test_peft_on_the_head_or_the_embedding_gets_the_remedy_of_modules_to_save(
    targets: list[str], tied: bool, tmp_path: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    theirs = make_theirs("llama", tie_word_embeddings=tied)
    ours = make_ours(theirs)
    peft = get_peft_model(theirs, PeftConfig(r=4, target_modules=targets))
    peft.save_pretrained(str(tmp_path), save_embedding_layers=False)
    remedy = "merge the adapter into its base with PEFT and start from the merged model"
    message = refused(tmp_path, ours)
    assert message.startswith(f"{tmp_path}: ")
    assert message.endswith(remedy)
    assert ("embed_tokens" if "embed_tokens" in targets else "lm_head") in message
    assert not lora_layers(ours)
    with pytest.raises(UserError, match=remedy):
        saved_config(tmp_path, ours)
    peft.save_pretrained(str(tmp_path))  # with the layers themselves
    assert refused(tmp_path, ours).endswith(remedy)


@pytest.mark.parametrize(
    "extra",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
        "v_head.summary.weight",
    ],
)
def test_layers_that_were_trained_whole_get_it_too(
    extra: str, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    write_tensors(path, {**tensors, extra: torch.ones(3, 3)})
    message = refused(saved, make_ours(make_theirs("llama")))
    assert f"adapter_model.safetensors: holds {extra}, no low-rank factors" in message
    assert message.endswith(
        "merge the adapter into its base with PEFT and start from the merged model"
    )


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starting_values_that_leave_the_base_alone_are_accepted(
    start: Any, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    load_adapter(make_ours(make_theirs("llama")), saved)


def test_a_rank_beyond_the_tensors_takes_no_memory(
    saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    whole = json.loads(path.read_text())
    for change in ({"r": 2**40}, {"rank_pattern": {"q_proj": 2**40}}):
        path.write_text(json.dumps({**whole, **change}))
        model = make_ours(make_theirs("llama"))
        assert f"is {2**40}, but no tensor in adapter_model" in refused(saved, model)
        assert not lora_layers(model)


@pytest.mark.parametrize("targets", [r"(\w+\.?)+!", ".*" * 12 + "x", r".*\.q_proj"])
def test_a_strangers_expression_for_the_targets_is_not_run(
    targets: str, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": targets}))
    model = make_ours(make_theirs("llama"))
    load_adapter(model, saved)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj"}
    assert saved_config(saved).target_modules == tuple(lora_layers(model))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", "(a|a)*x", ".*.*.*x", "(a){9}"])
def test_patterns_that_can_take_forever_are_refused(
    key: str, pattern: str, saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    path = saved / "adapter_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, key: {pattern: 4}}))
    message = refused(saved, make_ours(make_theirs("llama")))
    assert f"{key}: '{pattern}'" in message
    assert "can take forever" in message
    path.write_text(json.dumps({**whole, key: {f"m{number}": 4 for number in range(5000)}}))
    assert f"{key}: holds 5000 patterns" in refused(saved, make_ours(make_theirs("llama")))
    path.write_text(json.dumps({**whole, key: {r".*layers\.[0-9]+.*q_proj": 10**4000}}))
    refused(saved, make_ours(make_theirs("llama")))


def test_wrong_folders_are_told_apart(tmp_path: Path, saved: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert "no such folder; did you mean 'adapter'?" in refused(tmp_path / "adaptor", model)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no adapter" in refused(empty, model)
    (empty / "config.json").write_text("{}")
    assert "holds a model, not an adapter" in refused(empty, model)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "adapter_model.bin is pickle" in refused(saved, model)
    (saved / "adapter_model.bin").unlink()
    assert "there is no adapter_model.safetensors" in refused(saved, model)


def test_the_dropout_to_go_on_with_may_be_another(
    saved: Path, make_theirs: Maker, make_ours: Maker
) -> None:
    model = make_ours(make_theirs("llama"))
    config = load_adapter(model, saved, trainable=True, lora_dropout=0.25)
    assert config.lora_dropout == 0.25
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.25}
    with pytest.raises(UserError, match=r"lora\.lora_dropout: 1\.5"):
        load_adapter(make_ours(make_theirs("llama")), saved, lora_dropout=1.5)


# --- where the base is ----------------------------------------------------------------------------


def base_of(folder: Path) -> tuple[str | None, str | None]:
    document = json.loads((folder / "adapter_config.json").read_text())
    return document["base_model_name_or_path"], document["revision"]


def test_an_adapter_names_the_base_that_was_loaded(
    tmp_path: Path, make_theirs: Maker, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_theirs("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = load_model("./base")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    save_adapter(model, "adapter")
    # Whole: it is to be found from anywhere.
    assert base_of(tmp_path / "adapter") == (str(tmp_path / "base"), None)
    monkeypatch.chdir("/")
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert_same(model(tokens), peft.eval()(tokens).logits)
    # An adapter that is loaded and saved again names it too.
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    save_adapter(again, tmp_path / "again")
    assert base_of(tmp_path / "again") == (str(tmp_path / "base"), None)
    save_adapter(again, tmp_path / "again", base_model="owner/name")
    assert base_of(tmp_path / "again") == ("owner/name", None)


def test_a_base_of_the_hub_is_named_with_its_commit(
    tmp_path: Path, make_theirs: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_theirs("llama").save_pretrained(tmp_path / "base")
    source = ModelSource(tmp_path / "base", "owner/name", "0" * 40)
    monkeypatch.setattr("models.weights.resolve_model", lambda *_: source)
    model = load_model("owner/name")
    inject(model, LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == ("owner/name", "0" * 40)
    # Another base's name is not joined with this one's commit.
    save_adapter(model, tmp_path / "adapter", base_model="owner/other")
    assert base_of(tmp_path / "adapter") == ("owner/other", None)


def test_a_model_of_transformers_names_itself_and_others_name_nothing(
    tmp_path: Path, make_theirs: Maker
) -> None:
    make_theirs("llama").save_pretrained(tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    inject(theirs, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(theirs, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == (str(tmp_path / "base"), None)
    built = make_theirs("llama")
    inject(built, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(built, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == (None, None)


def test_a_model_without_an_adapter_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="carries no adapter"):
        save_adapter(nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()
