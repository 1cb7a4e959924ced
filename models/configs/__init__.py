"""The config.json of the seeds' models, so that a plan needs no network.

Each file beside this one holds the architecture alone, as its repository on the hub describes it.
A run reads the config.json of the folder that its weights come from, never these.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = {
    "codellama/CodeLlama-7b-hf": "codellama-7b.json",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b.json",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "qwen2.5-coder-1.5b-instruct.json",
    "bigcode/starcoder2-3b": "starcoder2-3b.json",
    "bigcode/starcoder2-7b": "starcoder2-7b.json",
    "bigcode/starcoder2-15b": "starcoder2-15b.json",
}


def shipped_config(hub_id: str) -> Path | None:
    """Return the shipped config.json of a model on the hub, or None where there is none."""
    by_lower_case = {name.lower(): file for name, file in SHIPPED.items()}
    file = by_lower_case.get(hub_id.lower())
    return Path(__file__).resolve().parent / file if file else None
