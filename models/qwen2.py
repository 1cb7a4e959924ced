"""Qwen2 and Qwen2.5: a Llama whose q, k and v have biases, and whose later layers may see a window.

Legend: see `models.layers`. The window of a layer is `config.window(layer)`.
"""

from __future__ import annotations

from models.layers import Attention, CausalLM, DecoderLayer, GatedMLP, RMSNorm


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
