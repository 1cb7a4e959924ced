"""Mistral: a Llama without biases, all of whose layers see a window where there is one.

Source: transformers 5.23, `configuration_mistral.py`.
"""

from __future__ import annotations

from typing import Any

from models.keys import TOKEN_IDS, Reader, window_of_all_layers
from models.layers import Family
from models.llama import Llama


class Mistral(Llama):
    """A Mistral decoder with its head; `config.window` gives attention its window."""


def _special_fields(read: Reader, layers: int) -> dict[str, Any]:
    fields = window_of_all_layers(read, layers)
    # Read by Ministral, whose layers differ; transformers' Mistral would pass over it.
    asked = read.value("layer_types")
    if asked is not None and asked != list(fields["layer_types"]):
        kind = fields["layer_types"][0]
        raise read.refuse(
            "layer_types", f"absent or {layers} times {kind}, as sliding_window says for all layers"
        )
    return {"rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0), **fields}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    network=Mistral,
    activations=("silu", "swish"),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    null_is_a_value=TOKEN_IDS | {"sliding_window"},
    special_fields=_special_fields,
    mlp_values=lambda config: 2 * config.intermediate_size,  # gate and up
)
