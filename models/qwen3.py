"""Qwen3, the dense ones: a Qwen2 without biases, whose queries and keys are normalised by head.

Legend: see `models.layers`. `head_dim` is a key of its own: heads · d may differ from H.
Source: transformers 5.23, `configuration_qwen3.py`; Qwen3 Technical Report 2025, §2 (QK-Norm).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.dispatch import Operations
from kernels.operands import Made
from kernels.segments import Segments
from models.keys import TOKEN_IDS, DecoderConfig, Reader, window_of_later_layers
from models.layers import Attention, CausalLM, DecoderLayer, Family, GatedMLP, RMSNorm


class NormedAttention(Attention):
    """Attention whose queries and keys go through a norm of width d before they are rotated."""

    def __init__(
        self, config: DecoderConfig, layer: int, operations: Operations, implementation: str
    ):
        bias = config.attention_bias
        super().__init__(config, layer, operations, implementation, qkv_bias=bias, output_bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, operations)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, operations)

    def project(self, x: Made, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised queries and keys, and values: (M, H) → (M, heads or kv, d) each."""
        q, k, v = super().project(x, segments)
        # A norm takes rows: each head of each token is one.
        q, k = (
            norm(heads.flatten(0, 1)).value.view_as(heads)
            for norm, heads in ((self.q_norm, q), (self.k_norm, k))
        )
        return q, k, v


class Qwen3(CausalLM):
    """A Qwen3 decoder with its head."""

    def norm(self) -> RMSNorm:
        """Make a root-mean-square norm."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, self.operations)

    def layer(self, index: int) -> DecoderLayer:
        """Make decoder layer number `index`."""
        config, operations = self.config, self.operations
        attention = NormedAttention(config, index, operations, self.attention_implementation)
        mlp = GatedMLP(config, operations, bias=False)
        return DecoderLayer(attention, mlp, self.norm(), self.norm())


def _special_fields(read: Reader, layers: int) -> dict[str, Any]:
    return {
        "rms_norm_eps": read.number("rms_norm_eps", 0.0, 1.0),
        "attention_bias": read.flag("attention_bias"),
        **window_of_later_layers(read, layers),
    }


def _attention_values(config: DecoderConfig) -> int:
    """What the norms of queries and keys read."""
    return (config.num_attention_heads + config.num_key_value_heads) * config.head_dim


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    network=Qwen3,
    activations=("silu", "swish"),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
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
    attention_values=_attention_values,
)
