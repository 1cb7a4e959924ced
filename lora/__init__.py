"""Low-rank adapters for the linear layers of any `nn.Module`, in PEFT's format.

    config.py     what adapters are, in PEFT's words
    linear.py     the adapted layer
    injection.py  which layers get one, its starting value, what is trained
    saved_modules.py, token_rows.py   embedding and head, or rows, trained beside it
    pissa.py      a start from the principal directions of the weights
    tensors.py    an adapter's tensors under PEFT's names
    adapter.py    PEFT's files, in and out
    merging.py    folding an adapter into its base

`inject` starts an adapter, `load_adapter` goes on from one, `merge` ends it.
"""

from lora.adapter import load_adapter, read_adapter_config, save_adapter, saved_config
from lora.config import LoraConfig
from lora.injection import (
    ParameterCount,
    adapter_config,
    adapter_factors,
    count_parameters,
    draw_adapters,
    inject,
    lora_layers,
    target_names,
)
from lora.linear import LoraLinear
from lora.merging import merge
from lora.tensors import adapter_tensors, fill_adapter

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "ParameterCount",
    "adapter_config",
    "adapter_factors",
    "adapter_tensors",
    "count_parameters",
    "draw_adapters",
    "fill_adapter",
    "inject",
    "load_adapter",
    "lora_layers",
    "merge",
    "read_adapter_config",
    "save_adapter",
    "saved_config",
    "target_names",
]
