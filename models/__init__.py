"""Decoder networks in plain PyTorch and their weights.

    keys.py        `DecoderConfig`, and how a key of config.json is read
    config.py      config.json → `DecoderConfig`
    configs/       the configurations of well-known models, for planning offline
    rotary.py      tables of cosines and sines, for each way of scaling them
    layers.py      what all families share, down to `CausalLM`
    llama.py  mistral.py  qwen2.py  qwen3.py  starcoder2.py
                   a family each: its keys, its layers, what it keeps
    families.py    the list of them; from a configuration to its network
    weights.py     checkpoint ↔ network, by name
    strangers.py   tensors of a checkpoint that are no part of the network
    quantised.py   weights in four or eight bits in the network
    stored.py      and as they lie in bitsandbytes' files

`load_model` gives a network with its weights, `build` one without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.families import build
    from models.weights import load_model

__all__ = ["build", "load_model"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `models.config` alone, for planning, does not import torch."""
    if name == "build":
        from models.families import build

        return build
    if name == "load_model":
        from models.weights import load_model

        return load_model
    raise AttributeError(f"module 'models' has no attribute {name!r}")
