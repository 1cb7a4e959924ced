"""The parts of a decoder that all families share; a family's file says only what differs.

Legend: M token rows · H hidden size · I intermediate size · d head size · V vocabulary
        heads query heads · kv key/value heads · N rows seen by a cache, the new M included

Parameter names are the checkpoint's, so there is no converter. Modules hold weights and sizes; the
arithmetic is that of the `Operations` they are given. Dropout happens where the segments carry row
keys, and nowhere else: train() and eval() play no part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.errors import UserError, did_you_mean
from kernels.attention import attend_last
from kernels.dispatch import Operations
from kernels.dispatch import operations as choose_operations
from kernels.dropout import Draw, module_id
from kernels.operands import Made, Operands
from kernels.segments import Segments
from kernels.streamed import StreamedWeight
from models.cache import BatchCache, KeyValueCache
from models.keys import DecoderConfig, Reader
from models.recompute import POLICIES, HostRing, itself, recomputed
from models.rotary import rotary_tables

# `flash_attention_2` is what the old stack's configurations say; the fused kernel is sdpa's.
ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "flash_attention_2": "sdpa", "eager": "eager"}


class Linear(nn.Linear):
    """A linear layer that offers its tensors to `Operations.linears`.

    `streamed` stands for a weight that lies in host memory while it is not multiplied by.
    """

    streamed: StreamedWeight | None = None

    def operands(self) -> Operands:
        """Return weight and bias; an adapted layer returns its factors as well."""
        return Operands(self.streamed or self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight: (M, H) → (M, H)."""

    def __init__(self, size: int, eps: float, operations: Operations):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.operations = operations

    def forward(self, x: Tensor) -> Made:
        """Normalise each row."""
        return self.operations.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, change: Tensor, draw: Draw | None) -> tuple[Tensor, Made]:
        """Return x + dropout(change), and it normalised."""
        return self.operations.add_rms_norm(x, change, self.weight, self.eps, draw)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias: (M, H) → (M, H)."""

    def __init__(self, size: int, eps: float, operations: Operations):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.operations = operations

    def forward(self, x: Tensor) -> Made:
        """Normalise each row."""
        return self.operations.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, change: Tensor, draw: Draw | None) -> tuple[Tensor, Made]:
        """Return x + dropout(change), and it normalised."""
        return self.operations.add_layer_norm(x, change, self.weight, self.bias, self.eps, draw)


class Dropout(nn.Module):
    """A place where elements are dropped; its name keys the masks it draws."""

    def __init__(self, name: str, p: float):
        super().__init__()
        self.id = module_id(name)
        self.p = p

    def draw(self, segments: Segments) -> Draw | None:
        """Return which elements are dropped, or None where this pass drops nothing."""
        rows = segments.dropout_rows
        return None if rows is None or self.p == 0 else Draw(rows, self.id, self.p)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set the probability of every dropout that the architecture has (adapters keep their own)."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal inside each document.

    `attention_dropout` is keyed by its own name, so that it never shares a mask with an adapter.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        operations: Operations,
        implementation: str,
        *,
        qkv_bias: bool,
        output_bias: bool,
    ):
        super().__init__()
        hidden, d = config.hidden_size, config.head_dim
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(hidden, heads * d, bias=qkv_bias)
        self.k_proj = Linear(hidden, kv * d, bias=qkv_bias)
        self.v_proj = Linear(hidden, kv * d, bias=qkv_bias)
        self.o_proj = Linear(heads * d, hidden, bias=output_bias)
        name = f"model.layers.{layer}.self_attn.attention_dropout"
        self.attention_dropout = Dropout(name, config.attention_dropout)
        self.layer = layer
        self.head_dim = d
        self.window = config.window(layer)
        self.operations = operations
        self.implementation = implementation

    def project(self, x: Made, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values before rotation: (M, H) → (M, heads or kv, d) each."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        outputs = self.operations.linears(x, [p.operands() for p in projections], segments)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs)
        return q, k, v

    def forward(
        self,
        x: Made,
        tables: tuple[Tensor, Tensor],
        segments: Segments,
        cache: KeyValueCache | BatchCache | None = None,
    ) -> Tensor:
        """Return the attended rows, (M, H) → (M, H); `tables` are cos and sin, (M, d) each."""
        run = self.operations
        q, k, v = self.project(x, segments)
        q, k = run.rotary(q, k, *tables)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        held, scale = 0 if cache is None else cache.length, self.head_dim**-0.5
        if isinstance(cache, BatchCache) and held:
            attended = attend_last(q, k, v, cache.lengths, scale=scale, window=self.window)
        elif held and len(q) == 1 and self.implementation == "sdpa":
            attended = attend_last(q, k[None], v[None], None, scale=scale, window=self.window)
        else:
            attended = run.attention(
                q,
                k,
                v,
                segments,
                scale=scale,
                window=self.window,
                dropout=self.attention_dropout.p,
                module=self.attention_dropout.id,
                implementation=self.implementation,
                cache_length=held,
            )
        return run.linears(attended, [self.o_proj.operands()], segments)[0]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)): (M, H) → (M, I) → (M, H)."""

    def __init__(self, config: DecoderConfig, operations: Operations, *, bias: bool):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)
        self.operations = operations

    def forward(self, x: Made, segments: Segments) -> Tensor:
        """Transform each row."""
        run = self.operations
        pair = [self.gate_proj.operands(), self.up_proj.operands()]
        gate, up = run.linears(x, pair, segments)
        activation = run.swiglu(gate, up).like(x)
        return run.linears(activation, [self.down_proj.operands()], segments)[0]


class Stream(NamedTuple):
    """The residual stream between two norms, x + dropout(change).

    The sum is made in the norm that reads it, so that it costs no pass over memory of its own.
    """

    x: Tensor  # (M, H)
    change: Tensor | None = None  # (M, H); None behind the embeddings
    draw: Draw | None = None

    def normed(self, norm: RMSNorm | LayerNorm) -> tuple[Tensor, Made]:
        """Return the sum, and it normalised, (M, H) each."""
        if self.change is None:
            return self.x, norm(self.x)
        return norm.add(self.x, self.change, self.draw)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); some families drop elements of either sum."""

    def __init__(
        self,
        self_attn: Attention,
        mlp: nn.Module,
        input_layernorm: RMSNorm | LayerNorm,
        post_attention_layernorm: RMSNorm | LayerNorm,
        residual_dropouts: tuple[Dropout, Dropout] | None = None,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.attention_residual, self.mlp_residual = residual_dropouts or (None, None)

    def forward(
        self,
        stream: Stream,
        tables: tuple[Tensor, Tensor],
        segments: Segments,
        cache: KeyValueCache | BatchCache | None = None,
        policy: str = "none",
        ring: HostRing | None = None,
    ) -> Stream:
        """Return the residual stream after this layer.

        It keeps what `policy` says (`models.recompute`), of which `offload` needs the `ring`. Where
        the layer is computed again, the stream that comes in and goes out is one tensor, not two.
        """
        if policy in ("layers", "offload"):
            add = self.self_attn.operations.add
            kept = None if ring is None else ring.send(self.self_attn.layer, stream.x)

            def whole(x: Made) -> Tensor:
                return add(*self._run(Stream(x.value), tables, segments))

            x = Made.by(itself, stream.x)
            return Stream(recomputed(whole, x, self.parameters(), kept))
        return self._run(stream, tables, segments, cache, policy)

    def _run(
        self,
        stream: Stream,
        tables: tuple[Tensor, Tensor],
        segments: Segments,
        cache: KeyValueCache | BatchCache | None = None,
        policy: str = "none",
    ) -> Stream:
        remake = policy in ("norms", "mlp")
        x, normed = stream.normed(self.input_layernorm)
        change = self.self_attn(normed._replace(remake=remake), tables, segments, cache)
        stream = _changed(x, change, self.attention_residual, segments)
        x, normed = stream.normed(self.post_attention_layernorm)
        if policy == "mlp":
            mlp = partial(self.mlp, segments=segments)
            change = recomputed(mlp, normed, self.mlp.parameters())
        else:
            change = self.mlp(normed._replace(remake=remake), segments)
        return _changed(x, change, self.mlp_residual, segments)


def _changed(x: Tensor, change: Tensor, dropout: Dropout | None, segments: Segments) -> Stream:
    return Stream(x, change, None if dropout is None else dropout.draw(segments))


class Decoder(nn.Module):
    """Holds what the checkpoint calls `model`: embeddings, layers and the final norm."""

    def __init__(
        self, embed_tokens: nn.Embedding, layers: nn.ModuleList, norm: RMSNorm | LayerNorm
    ):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm


class CausalLM(nn.Module, ABC):
    """A decoder and its head; a family fills in its norm and its layer.

    `gradient_checkpointing` says what layers keep for the backward pass: a policy of
    `models.recompute`, of which gradients do not depend; True stands for `layers`, False for
    `none`.

    `name_or_path` and `revision` say where the weights were loaded from: a folder, or a hub id and
    its commit; None where they were not.

    Args:
        config: the architecture.
        operations: the arithmetic, from `kernels.dispatch.operations`; None takes `auto`'s.
        attention: `auto`, `sdpa` or `eager`.

    Raises:
        UserError: `attention` is none of these.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        operations: Operations | None = None,
        attention: str = "auto",
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise UserError(
                f"model.attention is '{attention}', but must be one of {', '.join(ATTENTION)}"
                f"{did_you_mean(attention, ATTENTION)}"
            )
        self.config = config
        self.operations = operations or choose_operations()
        self.attention_implementation = ATTENTION[attention]
        self.gradient_checkpointing = "none"
        self.name_or_path: str | None = None
        self.revision: str | None = None
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.model = Decoder(
            # Given its weight it draws none: on meta that would load torch's compiler, 2 s.
            nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding),
            nn.ModuleList(map(self.layer, range(config.num_hidden_layers))),
            self.norm(),
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def gradient_checkpointing(self) -> str:
        """The policy by which layers keep activations."""
        return self._policy[0]

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, policy: str | bool) -> None:
        if isinstance(policy, bool):
            policy = "layers" if policy else "none"
        assert policy in POLICIES, policy
        self._policy = policy, HostRing() if policy == "offload" else None

    @abstractmethod
    def norm(self) -> RMSNorm | LayerNorm:
        """Make one of the family's norms, (M, H) → (M, H)."""

    @abstractmethod
    def layer(self, index: int) -> DecoderLayer:
        """Make the family's decoder layer number `index`."""

    def embed(self, input_ids: Tensor, segments: Segments) -> Tensor:
        """Return the embeddings of the tokens, (M,) → (M, H)."""
        # Embeddings that are trained beside adapters are fp32, whatever the stream is in.
        return self.model.embed_tokens(input_ids).to(self.model.norm.weight.dtype)

    def hidden_states(
        self, input_ids: Tensor, segments: Segments, cache: KeyValueCache | BatchCache | None = None
    ) -> Tensor:
        """Return what the head reads.

        Args:
            input_ids: (M,) int64 tokens.
            segments: the documents of the M rows; behind a cache, one document whose `offset` is
                the cache's length, or one row of each document of a batch.
            cache: the documents' past, to which these rows are added.

        Returns:
            (M, H) hidden states after the final norm.
        """
        x = self.embed(input_ids, segments)
        offset = 0 if cache is None else cache.length
        tables = rotary_tables(self.config, segments, offset, x.dtype)
        policy, ring = self._policy if torch.is_grad_enabled() else ("none", None)
        stream = Stream(x)
        for layer in self.model.layers:
            stream = layer(stream, tables, segments, cache, policy, ring)
        if cache is not None:
            cache.advance(len(input_ids))
        return stream.normed(self.model.norm)[1].value

    def head_weight(self) -> Tensor:
        """Return the head's weight, (V, H): the embeddings where they are tied."""
        if not self.config.tie_word_embeddings:
            return self.lm_head.weight
        embedding = self.model.embed_tokens
        # One that has trained rows puts them in their places.
        return embedding.weight if isinstance(embedding, nn.Embedding) else embedding.table()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits without dropout: (B, T) int64 rows of T tokens → (B, T, V)."""
        count, length = input_ids.shape
        segments = Segments.build([length] * count, device=input_ids.device)
        x = self.hidden_states(input_ids.flatten(), segments)
        return F.linear(x, self.head_weight().to(x.dtype)).unflatten(0, (count, length))


@dataclass(frozen=True)
class Family:
    """What the file of a family says of it.

    Attributes:
        model_type: Its name in config.json.
        architecture: The class that config.json names under `architectures`.
        network: The decoder.
        activations: What `hidden_act` may be: all names of the one that the network computes.
        defaults: Keys of config.json → what they are where they are absent.
        null_is_a_value: Keys whose null says something: no such token, no window, as many
            key-value heads as heads. Any other null is an absent key.
        special_fields: (reader, number of layers) → those fields of `DecoderConfig` that not all
            families have; raises UserError where a key asks for what the network does not do.
        mlp_values: How many numbers, in the type that is computed in, a token leaves in an MLP for
            the backward pass, beside the linear layers' inputs.
        attention_values: The same of attention, beside q, k, v and its weights.
        residual_dropouts: Dropouts of width H in a layer; each leaves a mask, one byte a number.
    """

    model_type: str
    architecture: str
    network: type[CausalLM]
    activations: tuple[str, ...]
    defaults: Mapping[str, Any]
    null_is_a_value: frozenset[str]
    special_fields: Callable[[Reader, int], dict[str, Any]]
    mlp_values: Callable[[DecoderConfig], int]
    attention_values: Callable[[DecoderConfig], int] = lambda config: 0
    residual_dropouts: int = 0
