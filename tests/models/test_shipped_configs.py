"""The configurations that ship are those of the models on the Hub."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from files.strict_json import read_json_object
from models import build
from models.config import parse_config
from models.configs import SHIPPED, shipped_config

# The sum over `safetensors.parameters` that the Hub's page of each model states.
PARAMETERS = {
    "codellama/CodeLlama-7b-Instruct-hf": 6_738_546_688,
    "codellama/CodeLlama-7b-Python-hf": 6_738_415_616,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "codellama/CodeLlama-34b-Instruct-hf": 33_743_970_304,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "Qwen/Qwen2.5-Coder-0.5B": 494_032_768,
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-Coder-3B": 3_085_938_688,
    "Qwen/Qwen2.5-Coder-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-Coder-14B": 14_770_033_664,
    "Qwen/Qwen2.5-Coder-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "bigcode/starcoder2-15b": 15_957_889_024,
}


@pytest.mark.parametrize(("hub_id", "total"), PARAMETERS.items())
def test_a_model_has_as_many_parameters_as_the_hub_says(hub_id: str, total: int) -> None:
    file = shipped_config(hub_id)
    assert file is not None
    model = build(parse_config(read_json_object(file), str(file)), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_every_file_is_one_that_transformers_reads_and_some_id_names() -> None:
    files = {shipped_config(hub_id) for hub_id in SHIPPED}
    one = shipped_config("bigcode/starcoder2-3b")
    assert one is not None
    assert files == set(one.parent.glob("*.json"))
    for file in files:
        raw = read_json_object(file)
        read = AutoConfig.for_model(**raw)
        assert all(getattr(read, key) == raw[key] for key in ("hidden_size", "vocab_size"))


def test_ids_are_found_in_any_capitals_and_others_not() -> None:
    assert shipped_config("qwen/qwen2.5-coder-7b-instruct") is not None
    assert shipped_config("Qwen/Qwen2.5-Coder-7B-Instruct-GPTQ-Int4") is None
