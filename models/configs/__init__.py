"""The config.json of the families' models on the Hub, so that a plan needs no network.

Each file beside this one holds the architecture alone, as its repository describes it: of a size's
variants (base, Instruct, Python, chat) those that have the same weights' shapes share one. A run
reads the config.json of the folder that its weights come from, never these.
"""

from __future__ import annotations

from pathlib import Path


def _variants(
    start: str, sizes: tuple[str, ...], ends: tuple[str, ...], file: str
) -> dict[str, str]:
    """Return hub id → file: `start`, a size and an end make an id, the file's `*` is the size."""
    return {
        f"{start}{size}{end}": file.replace("*", size.lower()) for size in sizes for end in ends
    }


_QWEN2_5_CODER = ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
SHIPPED = {
    **_variants("codellama/CodeLlama-", ("7b", "13b"), ("-hf", "-Instruct-hf"), "codellama-*.json"),
    **_variants("codellama/CodeLlama-", ("7b", "13b"), ("-Python-hf",), "codellama-*-python.json"),
    **_variants(
        "codellama/CodeLlama-34b",
        ("",),
        ("-hf", "-Instruct-hf", "-Python-hf"),
        "codellama-34b.json",
    ),
    **_variants("meta-llama/Llama-2-", ("7b", "13b", "70b"), ("-hf", "-chat-hf"), "llama-2-*.json"),
    **_variants(
        "Qwen/Qwen2.5-Coder-", _QWEN2_5_CODER, ("", "-Instruct"), "qwen2.5-coder-*-instruct.json"
    ),
    **_variants("Qwen/Qwen3-", ("0.6B", "1.7B", "4B", "8B", "14B"), ("", "-Base"), "qwen3-*.json"),
    "Qwen/Qwen3-32B": "qwen3-32b.json",
    **_variants("mistralai/Mistral-7B-", ("v0.1", "v0.3"), ("",), "mistral-7b-*.json"),
    **_variants(
        "mistralai/Mistral-7B-Instruct-", ("v0.1", "v0.2", "v0.3"), ("",), "mistral-7b-*.json"
    ),
    **_variants("bigcode/starcoder2-", ("3b", "7b", "15b"), ("",), "starcoder2-*.json"),
}


def shipped_config(hub_id: str) -> Path | None:
    """Return the shipped config.json of a model on the hub, or None where there is none."""
    by_lower_case = {name.lower(): file for name, file in SHIPPED.items()}
    file = by_lower_case.get(hub_id.lower())
    return Path(__file__).resolve().parent / file if file else None
