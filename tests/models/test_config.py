"""config.json in both dialects, against transformers' own reading of it; bad values by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from children import python
from transformers import AutoConfig

from files.errors import UserError
from models.config import DecoderConfig, RopeConfig, parse_config, read_config
from models.families import FAMILIES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 4},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, all keys": {
        **YARN,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
}


def parsed(**changes: Any) -> DecoderConfig:
    return parse_config({**LLAMA, **changes}, "folder/config.json")


def theirs(raw: dict[str, Any]) -> Any:
    """Return transformers' config of the same file."""
    return AutoConfig.for_model(**json.loads(json.dumps(raw)))


# --- agreement with transformers ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    ours, oracle = parse_config({"model_type": family}, "x"), theirs({"model_type": family})
    shared = [
        name
        for name in ours.__dataclass_fields__
        if hasattr(oracle, name)
        and name not in ("layer_types", "use_sliding_window", "torch_dtype")
    ]
    assert {"vocab_size", "num_key_value_heads", "tie_word_embeddings"} <= set(shared)
    expected = {name: getattr(oracle, name) for name in shared}
    assert {name: getattr(ours, name) for name in shared} == expected
    assert ours.rope_theta == oracle.rope_parameters["rope_theta"] == 10000.0
    assert ours.rope == RopeConfig()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_are_one_config_and_agree_with_transformers(
    family: str, scaling: str
) -> None:
    old = {**LLAMA, "model_type": family, "rope_scaling": SCALINGS[scaling]}
    if family == "starcoder2":
        old["hidden_act"] = "gelu_pytorch_tanh"
    oracle = theirs(old)
    new = oracle.to_dict()
    assert "rope_theta" not in new
    assert "torch_dtype" not in new
    ours = parse_config(old, "old")
    assert parse_config(new, "new") == ours
    assert ours.torch_dtype == "bfloat16"
    assert ours.rope_theta == new["rope_parameters"]["rope_theta"] == 1e6
    for name, value in SCALINGS[scaling].items():
        assert getattr(ours.rope, "rope_type" if name == "type" else name) == value


def test_a_theta_in_the_dictionary_rules_over_the_top_level_one() -> None:
    assert parsed(rope_parameters={"rope_theta": 5e5}, rope_theta=1e4).rope_theta == 5e5
    assert parsed(rope_parameters={"rope_type": "default"}, rope_theta=2e4).rope_theta == 2e4
    assert parsed(rope_theta=None).rope_theta == 1e4


def test_the_original_context_comes_from_the_dictionary_the_top_or_the_context() -> None:
    without = {key: LLAMA3[key] for key in LLAMA3 if key != "original_max_position_embeddings"}
    for raw in (
        {**LLAMA, "rope_scaling": LLAMA3},
        {**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
        {**LLAMA, "rope_scaling": without},
    ):
        oracle = theirs(raw)
        oracle.standardize_rope_params()  # as its model does when it computes the frequencies
        expected = oracle.rope_parameters["original_max_position_embeddings"]
        assert parse_config(raw, "x").rope.original_max_position_embeddings == expected


def test_a_yarn_factor_that_is_null_is_the_ratio_of_the_contexts() -> None:
    assert parsed(rope_scaling={**YARN, "factor": None}).rope.factor == 512 / 128


QWEN_WINDOWS = [
    {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 28},
    {"use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": None},
    {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("keys", QWEN_WINDOWS)
def test_qwen_s_windows_are_those_of_transformers(keys: dict[str, Any], family: str) -> None:
    raw = {**LLAMA, "model_type": family, **keys}
    ours, oracle = parse_config(raw, "x"), theirs(raw)
    sliding = [kind == "sliding_attention" for kind in oracle.layer_types]
    assert [ours.window(layer) for layer in range(3)] == [
        oracle.sliding_window if slides else None for slides in sliding
    ]


def test_starcoder2_slides_in_every_layer_and_llama_in_none() -> None:
    keys = {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 16}
    starcoder2 = parsed(model_type="starcoder2", **keys)
    assert [starcoder2.window(layer) for layer in range(3)] == [16, 16, 16]
    assert parsed(model_type="starcoder2", hidden_act="gelu_pytorch_tanh").window(0) is None
    assert parsed(sliding_window=16).window(0) is None


def test_mistral_slides_in_every_layer_unless_its_window_is_null() -> None:
    def windows(**keys: Any) -> list[int | None]:
        config = parsed(model_type="mistral", **keys)
        return [config.window(layer) for layer in range(3)]

    assert windows(sliding_window=16) == [16] * 3
    assert windows() == [4096] * 3
    assert windows(sliding_window=None) == [None] * 3
    # What it says already may be said once more; transformers would pass over anything else.
    assert windows(layer_types=["sliding_attention"] * 3) == [4096] * 3
    assert windows(sliding_window=None, layer_types=["full_attention"] * 3) == [None] * 3


def test_starcoder2_keys() -> None:
    config = parse_config(
        {
            **LLAMA,
            "model_type": "starcoder2",
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-6,
            "use_bias": False,
            "attention_dropout": 0.1,
            "residual_dropout": 0.2,
            "embedding_dropout": 0.3,
        },
        "x",
    )
    assert (config.norm_epsilon, config.use_bias) == (1e-6, False)
    assert (config.attention_dropout, config.residual_dropout, config.embedding_dropout) == (
        0.1,
        0.2,
        0.3,
    )


def test_token_ids() -> None:
    config = parsed(eos_token_id=[2, 7], pad_token_id=-1)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2, 7), None)


def test_what_is_left_aside_is_said_and_raw_is_kept() -> None:
    config = parsed(auto_map={"AutoModel": "code.Model"}, unknown_key=1)
    assert "never run" in config.notes[0]
    assert config.raw["unknown_key"] == 1
    assert config == parsed()
    assert config != replace(config, rope_theta=5.0)


def test_no_torch_is_imported() -> None:
    code = "import sys, models.config; sys.exit('torch' in sys.modules)"
    python("-c", code)


# --- bad input ----------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown family": (
        {"model_type": "lama"},
        ["model_type 'lama'", "llama, mistral, qwen2, qwen3, starcoder2"],
    ),
    "near family": ({"model_type": "qwen3_moe"}, ["'qwen3_moe'", "did you mean 'qwen3'?"]),
    "no family": ({"model_type": None}, ["model_type is missing"]),
    "family is a number": ({"model_type": 3}, ["model_type is 3", "a string"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
    "rope type": ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling", "'longrope'", "yarn"]),
    "new rope type": (
        {"rope_parameters": {"rope_type": "proportional"}},
        ["rope_parameters", "'proportional'"],
    ),
    "rope is a string": ({"rope_scaling": "linear"}, ["rope_scaling must be an object", "str"]),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["rope_parameters", "full_attention"],
    ),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
    "factor below one": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor is 0.5"]),
    "factor is text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor is '2'"]),
    "llama3 frequencies": (
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        ["low_freq_factor", "high_freq_factor"],
    ),
    "llama3 without them": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        ["needs low_freq_factor"],
    ),
    "yarn shrinking": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}},
        ["yarn", "factor"],
    ),
    "yarn of no rotations": (
        {"rope_scaling": {**YARN, "beta_slow": 1e-320}},
        ["beta_slow is 1e-3"],
    ),
    "yarn of endless rotations": ({"rope_scaling": {**YARN, "beta_fast": 1e299}}, ["beta_fast is"]),
    "endless factor": (
        {"rope_scaling": {"type": "dynamic", "factor": 1e200}},
        ["factor is 1e+200"],
    ),
    "yarn truncate": ({"rope_scaling": {**YARN, "truncate": 1}}, ["truncate is 1"]),
    "dynamic of two": (
        {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
        ["head_dim above 2"],
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
    "theta": ({"rope_theta": 0}, ["rope_theta is 0"]),
    "kv heads": ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
    "heads": ({"num_attention_heads": 7, "num_key_value_heads": 7}, ["hidden_size 64", "7"]),
    "odd head_dim": ({"head_dim": 15}, ["head_dim 15 must be even"]),
    "negative size": ({"hidden_size": -64}, ["hidden_size is -64", "integer from 1"]),
    "zero layers": ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
    "huge size": ({"hidden_size": 10**9}, ["hidden_size is 1000000000", "integer from 1"]),
    "huge vocabulary": ({"vocab_size": 10**30}, ["vocab_size is 1000000", "16777216"]),
    "fractional size": ({"intermediate_size": 96.0}, ["intermediate_size is 96.0", "integer"]),
    "true as size": ({"num_hidden_layers": True}, ["num_hidden_layers is True"]),
    "text as size": ({"vocab_size": "320"}, ["vocab_size is '320'"]),
    "tie is text": (
        {"tie_word_embeddings": "no"},
        ["tie_word_embeddings is 'no'", "true or false"],
    ),
    "dropout of one": ({"attention_dropout": 1.0}, ["attention_dropout is 1.0", "below 1"]),
    "negative epsilon": ({"rms_norm_eps": -1e-6}, ["rms_norm_eps is -1e-06"]),
    "infinite epsilon": ({"rms_norm_eps": float("inf")}, ["rms_norm_eps is inf"]),
    "dtype": ({"torch_dtype": "float8"}, ["torch_dtype 'float8'", "bfloat16"]),
    "new dtype": ({"dtype": "int8"}, ["dtype 'int8'"]),
    "quantised": (
        {"quantization_config": {"bits": 4}},
        ["quantization_config", "original weights"],
    ),
    "eos list": ({"eos_token_id": [1, "2"]}, ["eos_token_id is [1, '2']"]),
    "eos id": ({"eos_token_id": -5}, ["eos_token_id is -5"]),
    "long value": ({"vocab_size": "x" * 500}, ["vocab_size is 'xxx", "..."]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_named(case: str) -> None:
    changes, parts = BAD[case]
    with pytest.raises(UserError, match=r"^folder/config\.json") as caught:
        parsed(**changes)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 250


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"layer_types": ["full_attention"]}, "num_hidden_layers = 3"),
        ({"layer_types": ["full_attn"] * 3}, "did you mean 'full_attention'?"),
        ({"layer_types": ["sliding_attention"] * 3}, "sets no window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_bad_windows_are_named(keys: dict[str, Any], part: str, family: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(model_type=family, **keys)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, "sliding_attention"),
        ({"layer_types": ["full_attention"] * 4}, "sliding_attention"),
        ({"layer_types": "sliding_attention"}, "sliding_attention"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "full_attention"),
    ],
)
def test_layers_of_a_mistral_that_differ_are_refused(keys: dict[str, Any], kind: str) -> None:
    with pytest.raises(UserError, match=rf"layer_types is .* must be absent or 4 times {kind}"):
        parsed(model_type="mistral", num_hidden_layers=4, **keys)


def test_a_folder_is_read_and_its_faults_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; a model folder"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == parsed()
    path.write_text(json.dumps(LLAMA)[:-1] + ', "vocab_size": 5}')
    with pytest.raises(UserError, match="key 'vocab_size' stands twice") as caught:
        read_config(str(tmp_path))
    assert str(path) in str(caught.value)


ODD_VALUES = [None, -1, 0, 1, 3, 1.5, 1e308, 10**400, True, "", "x", [], [1], [None], {}, {"a": 1}]
ROPE_KEYS = [*RopeConfig.__dataclass_fields__, "type", "rope_theta", "partial_rotary_factor"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_under_any_key_gives_a_config_or_our_error(family: str) -> None:
    activation = "gelu_pytorch_tanh" if family == "starcoder2" else "silu"
    base = {**LLAMA, "model_type": family, "hidden_act": activation}
    keys = {*DecoderConfig.__dataclass_fields__, "dtype", "rope_scaling", "rope_parameters"}
    cases = [{**base, key: value} for key in sorted(keys) for value in ODD_VALUES]
    for scaling in SCALINGS.values():
        cases += [
            {**base, "rope_scaling": {**scaling, key: value}}
            for key in ROPE_KEYS
            for value in ODD_VALUES
        ]
    outcomes = {"read": 0, "refused": 0}
    for raw in cases:
        try:
            hash(parse_config(raw, "folder/config.json"))
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).startswith("folder/config.json")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 300, outcomes
