"""Each family from config.json to what a user takes away: one step, a run, its plan, its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from children import python
from peft import PeftModel
from runs import settings, train
from small import FAMILIES, RaggedExamples, small_config, small_model
from steps import cut, one_step
from transformers import AutoConfig, AutoModelForCausalLM

from lora import load_adapter
from models import families, load_model
from models.config import parse_config
from models.layers import CausalLM
from models.weights import save_model
from train.config import load_config
from train.config.schema import LoraSettings
from train.optim.adamw import AdamW
from train.plan.ledger import memory_ledger
from train.plan.sizes import model_sizes


def transformers_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_logits(theirs: torch.nn.Module, model: CausalLM) -> None:
    """Compare the logits of 40 tokens, more than any window here holds."""
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, actual = theirs(ids).logits, model(ids)
    # fp32: two orders of summation, 6e-8 an operation over some hundred terms.
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_tests_know_every_family_that_is_listed() -> None:
    assert FAMILIES.keys() == families.FAMILIES.keys()
    for name, family in families.FAMILIES.items():
        assert AutoConfig.for_model(name).model_type == family.model_type == name
        theirs = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))]
        assert family.architecture == theirs.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_step_gives_the_weights_of_transformers_and_torch(
    family: str, tmp_path: Path
) -> None:
    model = small_model(family)
    save_model(model, tmp_path / "base", config=model.config)
    theirs = transformers_model(tmp_path / "base")
    examples = RaggedExamples([40])
    ids = torch.from_numpy(examples[0].input_ids).long()[None]
    labels = torch.from_numpy(examples[0].labels).long()[None]
    # An epsilon of the gradients' size: AdamW divides by their size, and would make a whole step
    # of the rounding of a gradient that is zero, such as that of a key's bias.
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)
    theirs(ids, labels=labels).loss.backward()
    reference.step()

    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters, eps=1e-3)
    batch = cut(1, examples=examples)
    one_step(model, optimizer, batch, learning_rate=1e-3, max_grad_norm=0.0)
    for name, before in load_model(tmp_path / "base").named_parameters():
        assert not torch.equal(parameters[name], before), name
    assert_same_logits(theirs, model)
    save_model(model, tmp_path / "after", config=model.config)
    assert_same_logits(transformers_model(tmp_path / "after"), model)


def test_a_network_is_made_without_loading_torch_s_compiler() -> None:
    """It would be most of the time that a short command takes."""
    code = (
        "import sys; from models import build; from models.config import read_config;"
        "build(read_config('data/demo/base')); sys.exit('torch._dynamo' in sys.modules)"
    )
    python("-c", code)


# A preset runs each of the others, in tests/train/test_decide.py.
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "qwen2", "starcoder2"}))
def test_a_run_s_result_is_what_others_load(
    family: str, method: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    base, output = tmp_path / "base", tmp_path / "run"
    start = small_model(family, vocab_size=257)
    save_model(start, base, config=start.config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, base)
    changes = {"train.method": method, "train.device": "cpu", "train.max_steps": 2}
    train(settings(base, rows_file, output, **changes))
    plan = json.loads((output / "plan.json").read_text())
    trained = load_model(base if method == "lora" else output / "final")
    if method == "lora":
        load_adapter(trained, output / "final", trainable=True)
        theirs = PeftModel.from_pretrained(transformers_model(base), str(output / "final")).eval()
    else:
        theirs = transformers_model(output / "final")
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad or method == "full")
    assert plan["trainable_parameters"] == count
    assert_same_logits(theirs, trained)
    assert not torch.equal(trained(torch.arange(9)[None]), start(torch.arange(9)[None]))


def test_the_plan_counts_the_masks_of_residual_dropouts() -> None:
    """One byte for each number that o_proj and c_proj add to a token, in 2 layers of width 32."""

    def activations(family: str, **keys: float) -> int:
        config = load_config(overrides={"max_length": 100, "per_device_train_batch_size": 4})
        return memory_ledger(config, small_config(family, **keys))["activations"]

    plain = activations("starcoder2")
    assert activations("starcoder2", residual_dropout=0.1) - plain == 2 * 2 * 32 * 400
    assert activations("llama", residual_dropout=0.1) == activations("llama")


# The published models; sizes as their makers and the safetensors headers on the Hub give them.
PUBLISHED = {
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
        7_241_732_096,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3",
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
        8_190_735_360,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    raw, parameters = PUBLISHED[name]
    sizes = model_sizes(parse_config(raw, name), "full", LoraSettings())
    assert sizes.base == sizes.trainable == parameters
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert sizes.base == theirs.num_parameters()
