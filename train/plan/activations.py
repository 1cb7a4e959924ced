"""What activations take, by policy: the bytes that a token leaves in a layer, and those of a redo.

The table of what each policy keeps is `models.recompute`'s. Here c is the width in bytes of what is
computed with, s that of the residual stream between layers as it is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from train.config.schema import RunConfig
from train.plan.decide import decide_attention
from train.plan.sizes import ModelSizes

if TYPE_CHECKING:
    from models.config import DecoderConfig


class Activations(NamedTuple):
    """Bytes a token.

    Attributes:
        kept: Left in each layer until its backward pass.
        again: Held beside them while an activation, an MLP or a layer is computed again.
        host: Kept on the host in each layer, where that is other memory than the device's.
        passing: On their way from or to the host, for all layers together.
    """

    kept: float
    again: float = 0.0
    host: float = 0.0
    passing: float = 0.0


def activations_of(
    config: RunConfig,
    decoder: DecoderConfig,
    sizes: ModelSizes,
    widths: tuple[int, int],
    policy: str,
    device: str | None,
    longest: int,
) -> Activations:
    """Return what one token leaves behind under a policy.

    - two norms: their inputs (`saved_by_norm`);
    - attention: rotated q, k, v, and what it gives, which the layer behind it reads; in blocks the
      weights of the keys that a query's block can see; written out, those of all keys of the
      longest document, in fp32 and in c, and under dropout a mask and the dropped copy;
    - what the family's own layers keep (`Family.mlp_values`, `attention_values`), such as an
      activation's inputs;
    - inputs of linear layers that need them for a gradient of their own, each of the four once;
      with adapters on a GPU attention's output alone: the others are made again;
    - one byte an element for the masks of residual dropout, where Triton does not draw them again,
      and, on a CPU, of the adapters' inputs; and the adapters' low-rank outputs.

    Args:
        config: What is asked.
        decoder: The architecture.
        sizes: `model_sizes` of the two.
        widths: c, and the bytes of a stored base weight.
        policy: One of `models.recompute.POLICIES`.
        device: Type of the device; None where it is not known.
        longest: Rows of the longest document.
    """
    from models.families import FAMILIES

    compute, stored = widths
    family, layers = FAMILIES[decoder.model_type], decoder.num_hidden_layers
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    stream = hidden * max(stored, compute)
    makes_again = makes_inputs_again(config, device)

    norms = 2 * saved_by_norm(decoder, stored)
    masks = _residual_mask(config, decoder, device)
    mlp = family.mlp_values(decoder) * compute + sizes.mlp_ranks / layers * compute
    attention = _attention(config, decoder, compute, device, longest)
    attention += family.attention_values(decoder) * compute
    attention += (sizes.adapter_ranks - sizes.mlp_ranks) / layers * compute
    if device == "cpu" and config.train.method == "lora" and config.lora.lora_dropout:
        mlp += sizes.mlp_saved_linears / layers
        attention += (sizes.saved_linears - sizes.mlp_saved_linears) / layers
    norms_kept = norms + attention + mlp + family.residual_dropouts * masks
    everything = norms_kept + (0 if makes_again else (2 * hidden + intermediate) * compute)
    if policy == "none":
        return Activations(everything)
    if policy == "norms":
        return Activations(norms_kept, 0 if makes_again else intermediate * compute)
    if policy == "mlp":
        within = mlp + (hidden if makes_again else hidden + intermediate) * compute
        return Activations(norms_kept - mlp, within)
    if policy == "layers":
        return Activations(stream, everything)
    on_cpu = device == "cpu"
    return Activations(stream if on_cpu else 0, everything, 0 if on_cpu else stream, 2 * stream)


def _attention(
    config: RunConfig, decoder: DecoderConfig, compute: int, device: str | None, longest: int
) -> float:
    query = decoder.num_attention_heads * decoder.head_dim
    key = decoder.num_key_value_heads * decoder.head_dim
    heads, model_dropout = decoder.num_attention_heads, config.model.dropout
    dropped = decoder.attention_dropout if model_dropout is None else model_dropout
    kept: float = 2 * (query + key) * compute
    how = decide_attention(config, decoder, device, longest)
    if how == "blocks":
        from kernels.cpu.attention import BLOCK

        kept += heads * min(longest, (longest + BLOCK) / 2) * compute
    elif how == "written out":
        weight = 4 + (compute if compute != 4 else 0) + (1 + compute if dropped else 0)
        kept += heads * longest * weight
    return kept


def _residual_mask(config: RunConfig, decoder: DecoderConfig, device: str | None) -> int:
    model_dropout = config.model.dropout
    residual = decoder.residual_dropout if model_dropout is None else model_dropout
    drawn_again = device == "cuda" and config.train.kernels != "reference"
    return decoder.hidden_size if residual and not drawn_again else 0


def makes_inputs_again(config: RunConfig, device: str | None) -> bool:
    """Return whether linear layers keep what their input is made of, whatever the policy."""
    return config.train.method == "lora" and device not in (None, "cpu")


def saved_by_norm(decoder: DecoderConfig, stored: int) -> int:
    """Return the bytes that one token leaves in a norm: those of its input."""
    return decoder.hidden_size * stored
