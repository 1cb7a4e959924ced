"""Qwen2 and Qwen2.5: a Llama whose q, k and v have biases, and whose later layers may see a window.

Legend: see `models.layers`. The window of a layer is `config.window(layer)`.
Source: transformers 5.23, `configuration_qwen2.py`.
"""

from __future__ import annotations

from typing import Any

from models.keys import TOKEN_IDS, Reader, window_of_later_layers
from models.layers import Attention, CausalLM, DecoderLayer, Family, GatedMLP, RMSNorm


class Qwen2(CausalLM):
    """A Qwen2 decoder with its head."""

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
            qkv_bias=True,
            output_bias=False,
        )
        mlp = GatedMLP(config, operations, bias=False)
        return DecoderLayer(attention, mlp, self.norm(), self.norm())


def _special_fields(read: Reader, layers: int) -> dict[str, Any]:
    return {
        "rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0),
        **window_of_later_layers(read, layers),
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    network=Qwen2,
    activations=("silu", "swish"),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    null_is_a_value=TOKEN_IDS | {"num_key_value_heads", "sliding_window"},
    special_fields=_special_fields,
    mlp_values=lambda config: 2 * config.intermediate_size,  # gate and up
)
