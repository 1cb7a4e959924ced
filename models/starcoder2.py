"""StarCoder2: LayerNorm, a plain MLP with tanh-GELU, biases, a window, and three dropouts.

Legend: see `models.layers`. The published configurations ship dropout 0.1 for attention, residual
and embedding; it is active in training, with adapters too.
Source: transformers 5.23, `configuration_starcoder2.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kernels.dispatch import Operations
from kernels.operands import Made
from kernels.segments import Segments
from models.keys import TOKEN_IDS, DecoderConfig, Reader, window_of_all_layers
from models.layers import Attention, CausalLM, DecoderLayer, Dropout, Family, LayerNorm, Linear


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x))): (M, H) → (M, I) → (M, H)."""

    def __init__(self, config: DecoderConfig, operations: Operations):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.c_fc = Linear(hidden, intermediate, bias=config.use_bias)
        self.c_proj = Linear(intermediate, hidden, bias=config.use_bias)
        self.operations = operations

    def forward(self, x: Made, segments: Segments) -> Tensor:
        """Transform each row."""
        run = self.operations
        widened = run.linear_gelu(x, self.c_fc.operands(), segments)
        return run.linears(widened.like(x), [self.c_proj.operands()], segments)[0]


class Starcoder2(CausalLM):
    """A StarCoder2 decoder with its head."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        operations: Operations | None = None,
        attention: str = "auto",
    ):
        super().__init__(config, operations=operations, attention=attention)
        self.embedding_dropout = Dropout("model.embedding_dropout", config.embedding_dropout)

    def norm(self) -> LayerNorm:
        """Make a layer norm."""
        return LayerNorm(self.config.hidden_size, self.config.norm_epsilon, self.operations)

    def layer(self, index: int) -> DecoderLayer:
        """Make decoder layer number `index`."""
        config, operations = self.config, self.operations
        name, p = f"model.layers.{index}", config.residual_dropout
        attention = Attention(
            config,
            index,
            operations,
            self.attention_implementation,
            qkv_bias=config.use_bias,
            output_bias=config.use_bias,
        )
        return DecoderLayer(
            attention,
            MLP(config, operations),
            self.norm(),
            self.norm(),
            residual_dropouts=(
                Dropout(f"{name}.self_attn.residual_dropout", p),
                Dropout(f"{name}.mlp.residual_dropout", p),
            ),
        )

    def embed(self, input_ids: Tensor, segments: Segments) -> Tensor:
        """Return the embeddings of the tokens with elements dropped, (M,) → (M, H)."""
        embedded, draw = super().embed(input_ids, segments), self.embedding_dropout.draw(segments)
        return self.operations.add(None, embedded, draw)


def _special_fields(read: Reader, layers: int) -> dict[str, Any]:
    return {
        "norm_epsilon": read.number("norm_epsilon", 0.0, 1.0),
        "use_bias": read.flag("use_bias"),
        "residual_dropout": read.number("residual_dropout", 0.0, 1.0),
        "embedding_dropout": read.number("embedding_dropout", 0.0, 1.0),
        **window_of_all_layers(read, layers),
    }


STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    network=Starcoder2,
    # The tanh form of GELU; nothing else was ever published.
    activations=("gelu_pytorch_tanh",),
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    null_is_a_value=TOKEN_IDS,
    special_fields=_special_fields,
    mlp_values=lambda config: config.intermediate_size,  # the input of the GELU
    residual_dropouts=2,
)
