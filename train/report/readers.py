"""What vLLM makes of an adapter's file, where it is not what was trained, and what to give it.

This module never imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from files.strict_json import read_json_object
from train.process.command import command

# Keys of adapter_config.json that vLLM refuses a file for.
_REFUSED = ("use_dora", "modules_to_save", "trainable_token_indices")
# Keys that it passes over: modules of another rank or alpha get the scale of `lora_alpha` and `r`.
_IGNORED = ("rank_pattern", "alpha_pattern")


def note_on_readers(folder: Path) -> str:
    """Return what vLLM makes of a run's adapter, and what to give it instead; empty where it is so.

    Args:
        folder: The run's, with or without `final/`.
    """
    document = folder / "final" / "adapter_config.json"
    if not document.is_file():
        return ""
    makes = what_vllm_makes_of(read_json_object(document))
    merged = f"`{command('merge')} {shlex.quote(str(folder))} MERGED_MODEL`"
    return f"final/: {makes}; {merged} writes a model that it reads as trained" if makes else ""


def what_vllm_makes_of(document: Mapping[str, Any]) -> str:
    """Return what vLLM does not read as it is meant, in words; empty where it reads all.

    Source: vLLM's `vllm/lora/peft_helper.py`; it has no reader for the rows of an embedding.
    """
    refused = [key for key in _REFUSED if document.get(key)]
    if document.get("bias", "none") != "none":
        refused.append("bias")
    ignored = [key for key in _IGNORED if document.get(key)]
    parts = [f"refuses it for {' and '.join(refused)}"] if refused else []
    if ignored:
        parts.append(f"ignores {' and '.join(ignored)}, so that its scales are wrong, in silence")
    return "vLLM " + " and ".join(parts) if parts else ""
