"""Llama, Llama 2 and 3, CodeLlama: RMSNorm, a gated MLP, biases only where the config asks.

Legend: see `models.layers`.
"""

from __future__ import annotations

from models.layers import Attention, CausalLM, DecoderLayer, GatedMLP, RMSNorm


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
