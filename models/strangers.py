"""Tensors in a checkpoint that the decoder does not have: what they are, and the way around."""

from __future__ import annotations

import re
from collections.abc import Iterable

from files.errors import listed

# Tensors that are no part of a decoder, what they are, and the way to a folder without them.
_STRANGERS: dict[str, tuple[str, str]] = {
    r"(.+\.)?(v_head|value_head)\..+": (
        "a value head, from reinforcement learning",
        "load the folder with transformers' AutoModelForCausalLM and save_pretrained it to a new "
        "one, which leaves the head out",
    ),
    r"(score|classifier|classification_head|qa_outputs|regression_head)\..+": (
        "a classifier's head",
        "this is no language model: use the model that it was made from",
    ),
    r"(.+\.)?(base_layer|modules_to_save|lora_[A-Za-z_]+)(\..+)?": (
        "an adapter that was not merged",
        "load it with PEFT, merge_and_unload and save that, or give the base as model.path and the "
        "adapter as lora.init_from",
    ),
    r".+\.(qweight|qzeros|g_idx|scales|SCB|weight_scale|weight_scale_inv|weight_zero_point"
    r"|weight_packed|weight_shape|weight_format|input_scale)|.+\.weight\.[A-Za-z_.0-9]+": (
        "parts of quantised weights",
        "read are those of bitsandbytes' nf4 and int8, where config.json has their "
        "quantization_config; use the model's original ones",
    ),
    r"(tok_embeddings|output|layers\.\d+\.(attention|feed_forward)\.w\w+)\.weight": (
        "named as in the maker's original release",
        "use the repository's version in Hugging Face layout",
    ),
    r"(module|_orig_mod|base_model|pretrained_model|policy|llm|language_model|_fsdp_wrapped_module"
    r"|model\.(model|language_model))\..+": (
        "named as a wrapper around the model names them",
        "save the wrapped model itself with save_pretrained",
    ),
    r"embed_tokens\.weight|norm\.weight|layers\.\d+\..+": (
        "of a decoder that was saved without its head",
        "save the AutoModelForCausalLM that it belongs to with save_pretrained",
    ),
}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..+")


def strangers(names: Iterable[str], num_hidden_layers: int) -> list[str]:
    """Return what the tensors are that the decoder does not have, each kind with its remedy."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in names:
        layer = _LAYER.fullmatch(name)
        kind = next((kind for form, kind in _STRANGERS.items() if re.fullmatch(form, name)), None)
        if kind is None and layer is not None and int(layer.group(1)) >= num_hidden_layers:
            kind = (
                f"of layers beyond num_hidden_layers = {num_hidden_layers}",
                "give config.json the right number, or, where they predict further tokens, load "
                "and save_pretrained the folder with transformers, which leaves them out",
            )
        if kind is None:
            kind = (
                "no part of the decoder",
                "load the folder with transformers' AutoModelForCausalLM and save_pretrained it to "
                "a new one, which keeps the decoder's alone",
            )
        kinds.setdefault(kind, []).append(name)
    return [
        f"unexpected are {listed(sorted(found))} ({what}: {remedy})"
        for (what, remedy), found in kinds.items()
    ]
