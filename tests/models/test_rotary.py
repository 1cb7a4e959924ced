"""Rotary frequencies at real sizes equal transformers'; a small model would hide a wrong ramp.

Tolerance 1e-6 relative: both make them in fp32, where one power and a few products cost some units
of 6e-8.
"""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.segments import Segments
from models.config import parse_config
from models.rotary import rotary_frequencies, rotary_tables

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 100),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 2.0}, 100),
    "dynamic, long": ({"rope_type": "dynamic", "factor": 2.0}, 200_000),
    "llama3": (LLAMA_3_1, 100),
    "yarn": (YARN, 100),
    "yarn, ramp not truncated": ({**YARN, "truncate": False}, 100),
    "yarn, other betas": ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, 100),
    "yarn, size given": ({**YARN, "attention_factor": 0.8}, 100),
    "yarn, mscales": ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, 100),
    "yarn, no stretch": ({**YARN, "factor": 1.0}, 100),
}


def raw_config(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 500000.0, **rope},
    }


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_size(name):
    rope, length = ROPES[name]
    raw = raw_config(rope)
    theirs = LlamaConfig(**{key: value for key, value in raw.items() if key != "model_type"})
    oracle: Any = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    expected, expected_size = oracle(theirs, None, seq_len=length)
    actual, size = rotary_frequencies(parse_config(raw, "test"), length)
    assert actual.dtype == torch.float32 and actual.shape == (64,)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert size == pytest.approx(expected_size, rel=1e-12)


def test_tables_of_the_first_positions():
    raw = {**raw_config({"rope_type": "default"}), "hidden_size": 128, "num_attention_heads": 32}
    segments = Segments.build([2], device="cpu", offset=3)
    cos, sin = rotary_tables(parse_config(raw, "test"), segments, 3, torch.float32)
    slow = 500000.0**-0.5  # head_dim 4: frequencies 1 and theta^(-2/4)
    angles = torch.tensor([[3.0, 3 * slow, 3.0, 3 * slow], [4.0, 4 * slow, 4.0, 4 * slow]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
