"""Llama, Llama 2 and 3, CodeLlama: RMSNorm, a gated MLP, biases only where the config asks.

Legend: see `models.layers`. Source: transformers 5.23, `configuration_llama.py`.
"""

from __future__ import annotations

from typing import Any

from models.keys import TOKEN_IDS, Reader
from models.layers import Attention, CausalLM, DecoderLayer, Family, GatedMLP, RMSNorm


class Llama(CausalLM):
    """A Llama decoder with its head."""

    def norm(self) -> RMSNorm:
        """Make a root-mean-square norm."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, self.operations)

    def layer(self, index: int) -> DecoderLayer:
        """Make decoder layer number `index`."""
        config, operations = self.config, self.operations
        attention = Attention(
            config,
            index,
            operations,
            self.attention_implementation,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        mlp = GatedMLP(config, operations, bias=config.mlp_bias)
        return DecoderLayer(attention, mlp, self.norm(), self.norm())


def _special_fields(read: Reader, layers: int) -> dict[str, Any]:
    return {
        "rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0),
        "attention_bias": read.flag("attention_bias"),
        "mlp_bias": read.flag("mlp_bias"),
        "layer_types": ("full_attention",) * layers,
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    network=Llama,
    activations=("silu", "swish"),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    null_is_a_value=TOKEN_IDS | {"num_key_value_heads"},
    special_fields=_special_fields,
    mlp_values=lambda config: 2 * config.intermediate_size,  # gate and up
)
