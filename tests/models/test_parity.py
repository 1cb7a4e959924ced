"""Logits equal transformers' for every family, rotary type, window and attention path (fp32).

Tolerance 1e-5, relative to the largest logit: fp32 rounding is 6e-8 an operation, and two correct
orders of summation over a few layers of width 48 differ by some tens of those; a wrong frequency,
mask, bias or norm differs by far more than 1e-3 (each was broken once to see it).
"""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.segments import Segments
from models import build
from models.cache import KeyValueCache
from models.config import parse_config
from models.families import FAMILIES as LISTED
from models.layers import CausalLM

FAMILIES = sorted(LISTED)
# What a test asks for unless it says otherwise, where the default of the family is not that.
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 12},
    "starcoder2": {"sliding_window": None},
}

# max_position_embeddings is 32, so that 50 tokens go beyond it.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
}


def oracle(family: str, rope: str = "default", attention: str = "sdpa", **options: Any) -> Any:
    """Return transformers' model with every parameter away from its initial value."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_theta": 1000.0, **ROPES[rope]},
            "bos_token_id": 0,
            "eos_token_id": 0,
            **OPTIONS.get(family, {}),
            **options,
        },
    )
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


def ours(theirs: Any, attention: str = "auto", **keys: Any) -> CausalLM:
    """Return our model with the same weights; every name must be the checkpoint's."""
    config = parse_config({**theirs.config.to_dict(), **keys}, "test")
    model = build(config, attention=attention, device="cpu")
    model.load_state_dict(dict(theirs.named_parameters()), strict=True)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def assert_same_logits(theirs: Any, model: CausalLM, input_ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = theirs(input_ids).logits
        actual = model(input_ids)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.shape == expected.shape
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_for_each_family_rope_and_attention(family, rope, attention):
    theirs = oracle(family, rope, attention)
    assert_same_logits(theirs, ours(theirs, attention), tokens(2, 50))


@pytest.mark.parametrize("rope", ["dynamic", "yarn"])
def test_short_documents_under_scaled_rope(rope):
    theirs = oracle("llama", rope)
    assert_same_logits(theirs, ours(theirs), tokens(2, 20))


CACHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("llama", "default", {}),
    "dynamic": ("llama", "dynamic", {}),
    "yarn": ("llama", "yarn", {}),
    "norms of queries and keys": ("qwen3", "default", {}),
    "a window": ("mistral", "default", {"sliding_window": 7}),
}


@pytest.mark.parametrize("case", CACHED)
def test_decoding_with_a_cache(case):
    """Beyond the 32 positions of training, where `dynamic` stretches with every token."""
    family, rope, options = CACHED[case]
    theirs = oracle(family, rope, **options)
    model = ours(theirs)
    input_ids = tokens(1, 50)
    past, cache = None, KeyValueCache(50)
    for part in input_ids.split([30, 1, 1, 1, 5, 12], dim=1):
        segments = Segments.build([part.shape[1]], device="cpu", offset=cache.length)
        with torch.no_grad():
            given = theirs(part, past_key_values=past, use_cache=True)
            hidden = model.hidden_states(part[0], segments, cache)
        past = given.past_key_values
        logits = hidden @ model.head_weight().T
        error = (logits - given.logits[0]).abs().max() / given.logits.abs().max()
        assert error <= 1e-5, f"{cache.length}: relative error {error:.2e}"


WINDOWS = {
    "mistral": {"sliding_window": 7},
    "starcoder2": {"sliding_window": 7},
    "qwen3 from max_window_layers": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2 from max_window_layers": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2 by layer_types": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WINDOWS)
def test_window_shorter_than_the_sequence(name, attention):
    theirs = oracle(name.split()[0], attention=attention, **WINDOWS[name])
    model = ours(theirs, attention)
    input_ids = tokens(2, 30)
    assert_same_logits(theirs, model, input_ids)
    unwindowed = ours(oracle(name.split()[0], attention=attention), attention)
    with torch.no_grad():
        assert (unwindowed(input_ids) - model(input_ids)).abs().max() > 0.1  # the window matters


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_switched_off(family):
    """Published files keep the window's size, which transformers makes null as it reads them."""
    theirs = oracle(family)
    keys = {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}
    model = ours(theirs, **keys, layer_types=None)
    assert_same_logits(theirs, model, tokens(1, 30))


VARIANTS = {
    "llama with every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with explicit head_dim": ("llama", {"head_dim": 12}),
    "qwen2 with explicit head_dim": ("qwen2", {"head_dim": 12}),
    "mistral with explicit head_dim": ("mistral", {"head_dim": 12}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True}),
    "mistral without sharing of keys": ("mistral", {"num_key_value_heads": 6}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with heads as wide as the model": ("qwen3", {"head_dim": 8}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 with one key head": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3 with a large epsilon": ("qwen3", {"rms_norm_eps": 0.1}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "starcoder2 untied": ("starcoder2", {"tie_word_embeddings": False}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}),
    "llama without sharing of keys": ("llama", {"num_key_value_heads": 6}),
    "starcoder2 with one key head": ("starcoder2", {"num_key_value_heads": 1}),
    "llama with a large epsilon": ("llama", {"rms_norm_eps": 0.1}),
    "starcoder2 with a large epsilon": ("starcoder2", {"norm_epsilon": 0.1}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    family, options = VARIANTS[name]
    theirs = oracle(family, **options)
    assert_same_logits(theirs, ours(theirs), tokens(2, 17))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter(family):
    theirs = oracle(family)
    model = ours(theirs)
    input_ids = tokens(2, 20)
    theirs(input_ids, labels=input_ids).loss.backward()
    targets = torch.cat((input_ids[:, 1:], torch.full((2, 1), -100)), 1).flatten()
    hidden = model.hidden_states(input_ids.flatten(), Segments.build([20, 20], device="cpu"))
    loss = model.operations.linear_cross_entropy(hidden, model.head_weight(), targets) / 38
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
