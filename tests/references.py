"""Small random models of transformers', over a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import BYTES, write_byte_tokenizer

EOS = len(BYTES)
VOCABULARY = EOS + 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from uniform logits: the likeliest token leads by much more than fp32 rounding.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": False},
    "Mistral": {"sliding_window": 8, "tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "Starcoder2": {"sliding_window": 8, "tie_word_embeddings": True},
}


def reference_model(family: str) -> Any:
    """Return a small random model of transformers'."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def write_reference(folder: Path) -> Path:
    """Write a model of Qwen2 as transformers does, with the tokenizer; return the folder."""
    reference_model("Qwen2").save_pretrained(folder)
    write_byte_tokenizer(folder, "<eos>", [*BYTES, "<eos>"])
    return folder
