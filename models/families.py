"""The families, and from a configuration to the decoder of its own."""

from __future__ import annotations

import torch

from kernels.dispatch import Operations
from models.keys import DecoderConfig
from models.layers import CausalLM, Family
from models.llama import LLAMA
from models.mistral import MISTRAL
from models.qwen2 import QWEN2
from models.qwen3 import QWEN3
from models.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        STARCODER2,
    )
}


def build(
    config: DecoderConfig,
    *,
    operations: Operations | None = None,
    attention: str = "auto",
    device: torch.device | str = "meta",
) -> CausalLM:
    """Make the decoder that `config` describes, its parameters not yet filled.

    Args:
        config: the architecture; its `model_type` picks the family.
        operations: the arithmetic, from `kernels.dispatch.operations`; None takes `auto`'s.
        attention: `auto`, `sdpa` or `eager`.
        device: where parameters are made; on `meta` they take no memory until they are filled.

    Raises:
        UserError: `attention` is not one of the three.
    """
    network = FAMILIES[config.model_type].network
    with torch.device(device):
        return network(config, operations=operations, attention=attention)
