"""From a configuration to the decoder of its family."""

from __future__ import annotations

import torch

from kernels.dispatch import Operations
from models.config import DecoderConfig
from models.layers import CausalLM
from models.llama import Llama
from models.qwen2 import Qwen2
from models.starcoder2 import Starcoder2

_FAMILIES: dict[str, type[CausalLM]] = {"llama": Llama, "qwen2": Qwen2, "starcoder2": Starcoder2}


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
    with torch.device(device):
        return _FAMILIES[config.model_type](config, operations=operations, attention=attention)
