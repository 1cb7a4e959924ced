"""Small networks and ragged examples that several test files share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.examples import Counts, Example
from kernels.dispatch import Operations
from lora import LoraConfig, inject
from models import build
from models.config import DecoderConfig, parse_config
from models.layers import CausalLM
from models.weights import initialise

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 12},
    "starcoder2": {
        "model_type": "starcoder2",
        "tie_word_embeddings": True,
        "use_bias": True,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
}

DROPOUTS = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.1)


class RaggedExamples:
    """Examples of random ids with the first few labels masked, of the given lengths."""

    def __init__(self, lengths: Sequence[int], seed: int = 0, vocabulary: int = 96) -> None:
        random = np.random.default_rng(seed)
        self.examples = []
        for index, length in enumerate(lengths):
            ids = random.integers(1, vocabulary, length).astype(np.int32)
            labels = ids.copy()
            labels[: random.integers(0, max(1, length // 2))] = -100
            self.examples.append(Example(index, ids, labels))
        self.lengths = np.array(lengths)
        self.num_targets = np.array([(e.labels[1:] != -100).sum() for e in self.examples])
        self.fingerprint = f"ragged-{seed}"
        self.counts = Counts(
            rows=len(lengths),
            examples=len(lengths),
            tokens=sum(lengths),
            targets=int(self.num_targets.sum()),
            truncated=0,
            dropped=0,
            eos_lost=0,
            longest=max(lengths),
            longest_row=max(lengths),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def at_epoch(self, epoch: int) -> "RaggedExamples":
        return self


def small_config(family: str, **changes: Any) -> DecoderConfig:
    """Return the configuration of a two-layer network."""
    return parse_config({**SMALL, **FAMILIES[family], **changes}, "test")


def small_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    operations: Operations | None = None,
    **changes: Any,
) -> CausalLM:
    """Return a two-layer network whose biases and norms are away from their initial values."""
    config = small_config(family, **changes)
    model = build(config, device="meta", operations=operations)
    initialise(model, seed, dtype, "cpu", initializer_range=0.2)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise.to(dtype)
    return model


def adapted(
    dropout: float = 0.0,
    family: str = "starcoder2",
    dtype: torch.dtype = torch.float64,
    rank: int = 4,
    **given: Any,
) -> CausalLM:
    """Return such a network with adapters whose B is away from 0, or A would have no gradient."""
    model = small_model(family, dtype, **given)
    inject(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout), seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if name.endswith("lora_B"):
                parameter.data.normal_(0, 0.1, generator=generator)
    return model
