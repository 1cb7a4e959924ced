"""Null in config.json is "not given" and zero is a value: every key, against transformers.

Null counts as the absent key, except where transformers' config class reads it as a value (no such
token, no window, as many key-value heads as heads): there it is that value. Zero is taken where
transformers can compute with it, and else refused by name: it never counts as absent.
"""

from typing import Any

import pytest
from transformers import AutoConfig

from files.errors import UserError
from models.config import DecoderConfig, parse_config

SIZES = {
    "vocab_size": 60000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ANY = (
    *SIZES,
    "head_dim",
    "hidden_act",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
)
KEYS = {
    "llama": (*ANY, "rms_norm_eps", "attention_bias", "mlp_bias"),
    "mistral": (*ANY, "rms_norm_eps", "sliding_window"),
    "qwen2": (
        *ANY,
        "rms_norm_eps",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
    ),
    "qwen3": (
        *ANY,
        "rms_norm_eps",
        "attention_bias",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
    ),
    "starcoder2": (
        *ANY,
        "norm_epsilon",
        "use_bias",
        "residual_dropout",
        "embedding_dropout",
        "sliding_window",
    ),
}
CASES = [(family, key) for family, keys in KEYS.items() for key in keys]
# What zero means here; every other key has none that a decoder could be built with.
ZEROS = {
    "initializer_range": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "rms_norm_eps": 0.0,
    "norm_epsilon": 0.0,
    "max_window_layers": 0,
}
ABSENT = object()


def raw_config(family: str, key: str, value: object) -> dict[str, Any]:
    raw: dict[str, Any] = {**SIZES, "model_type": family}
    if family in ("qwen2", "qwen3") and key != "use_sliding_window":
        raw["use_sliding_window"] = True
    raw.pop(key, None)
    return raw if value is ABSENT else {**raw, key: value}


def ours(family: str, key: str, value: object) -> DecoderConfig:
    return parse_config(raw_config(family, key, value), "folder/config.json")


def theirs(family: str, key: str, value: object) -> Any:
    """Return what transformers makes of the key; its default where it refuses the value."""
    try:
        config = AutoConfig.for_model(**raw_config(family, key, value))
    except Exception:  # the library's own validation errors
        assert value is None
        return theirs(family, key, ABSENT)
    found = getattr(config, key, None)
    if key == "head_dim" and found is None:  # what each of its attention layers falls back to
        return config.hidden_size // config.num_attention_heads
    if key.endswith("dropout") and found is None:  # its layers could not compute with it
        return theirs(family, key, ABSENT)
    return tuple(found) if isinstance(found, list) else found


@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
@pytest.mark.parametrize(("family", "key"), CASES)
def test_an_absent_or_null_key_is_what_transformers_makes_of_it(
    family: str, key: str, value: object
) -> None:
    if (key, family, value) in {
        ("num_attention_heads", "starcoder2", ABSENT),
        ("num_attention_heads", "starcoder2", None),
        ("num_key_value_heads", "qwen2", ABSENT),
        ("num_key_value_heads", "qwen3", ABSENT),
    }:
        # 64 over 24 heads, and 8 heads over 32: the family's default does not fit these sizes.
        with pytest.raises(UserError, match="must be a multiple"):
            ours(family, key, value)
        return
    assert getattr(ours(family, key, value), key) == theirs(family, key, value)


@pytest.mark.parametrize("zero", [0, 0.0])
@pytest.mark.parametrize(("family", "key"), CASES)
def test_zero_is_a_value_or_refused_by_name(family: str, key: str, zero: float) -> None:
    takes_fractions = isinstance(ZEROS.get(key), float)
    if key in ZEROS and (isinstance(zero, int) or takes_fractions):
        assert getattr(ours(family, key, zero), key) == ZEROS[key]
    else:
        with pytest.raises(UserError, match=rf"^folder/config\.json: {key} is 0"):
            ours(family, key, zero)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_of_zero_is_only_refused_where_it_is_used(family: str) -> None:
    raw = {**SIZES, "model_type": family, "sliding_window": 0, "use_sliding_window": False}
    config = parse_config(raw, "x")
    assert config.sliding_window is None
    assert config.layer_types == tuple(AutoConfig.for_model(**raw).layer_types)


@pytest.mark.parametrize("family", KEYS)
def test_the_null_of_one_token_is_no_token_and_changes_no_other(family: str) -> None:
    raw = {**SIZES, "model_type": family, "bos_token_id": 0, "eos_token_id": [0, 7]}
    config = parse_config({**raw, "pad_token_id": None}, "x")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, (0, 7), None)
    config = parse_config({**raw, "eos_token_id": None, "pad_token_id": 0}, "x")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, None, 0)


# --- the rotary dictionary, the types, the rest ---------------------------------------------------

LLAMA = {**SIZES, "model_type": "llama"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "key",
    [
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "auto_map",
        "layer_types",
        "sliding_window",
        "architectures",
    ],
)
def test_null_in_what_else_config_json_says_is_absence(key: str) -> None:
    assert parse_config({**LLAMA, key: None}, "x") == parse_config(LLAMA, "x")


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        (YARN, ("rope_theta", "partial_rotary_factor", "type", "beta_fast", "beta_slow")),
        (YARN, ("attention_factor", "mscale", "mscale_all_dim", "truncate")),
        (YARN, ("low_freq_factor", "high_freq_factor")),
        (LLAMA3, ("rope_theta", "partial_rotary_factor", "type")),
    ],
    ids=["yarn", "yarn's size", "keys of another type", "llama3"],
)
def test_null_in_the_rotary_dictionary_is_absence(
    rope: dict[str, Any], keys: tuple[str, ...]
) -> None:
    expected = parse_config({**LLAMA, "rope_scaling": rope}, "x")
    for key in keys:
        assert parse_config({**LLAMA, "rope_scaling": {**rope, key: None}}, "x") == expected, key
    # Both dialects at once, one of them empty: what transformers writes beside what it read.
    for empty in (None, {}):
        raw = {**LLAMA, "rope_scaling": empty, "rope_parameters": rope}
        assert parse_config(raw, "x") == expected


def test_the_zeros_of_the_rotary_dictionary() -> None:
    def read(**keys: object) -> DecoderConfig:
        return parse_config({**LLAMA, "rope_scaling": {**YARN, **keys}}, "x")

    assert read(attention_factor=0.0).rope.attention_factor == 0.0
    # transformers' `or`: a ramp cannot begin or end at no rotation at all.
    assert read(beta_fast=0, beta_slow=0) == read()
    for key in ("rope_theta", "partial_rotary_factor", "factor"):
        with pytest.raises(UserError, match=f"rope_scaling: {key} is 0"):
            read(**{key: 0})
    with pytest.raises(UserError, match="original_max_position_embeddings is 0"):
        read(original_max_position_embeddings=0)
    for key in ("rope_theta", "partial_rotary_factor"):
        with pytest.raises(UserError, match=f"x: {key} is 0"):
            parse_config({**LLAMA, key: 0}, "x")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [0, False, "", []])
def test_a_rotary_dictionary_that_is_none_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"x: {key} must be an object or null"):
        parse_config({**LLAMA, key: value}, "x")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", "model_type"])
def test_zero_is_no_name(key: str) -> None:
    with pytest.raises(UserError, match=f"x: {key} is 0, but must be a string"):
        parse_config({**LLAMA, key: 0}, "x")
