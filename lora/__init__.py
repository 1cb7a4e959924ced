"""Low-rank adapters for the linear layers of any `nn.Module`, in PEFT's format.

    linear.py     the adapted layer
    injection.py  which layers get one, its starting value, what is trained
    adapter.py    PEFT's files, in and out
    merging.py    folding an adapter into its base

`inject` starts an adapter, `load_adapter` goes on from one, `merge` ends it.
"""

from lora.adapter import (
    adapter_tensors,
    fill_adapter,
    load_adapter,
    read_adapter_config,
    save_adapter,
    saved_config,
)
from lora.injection import (
    LoraConfig,
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
