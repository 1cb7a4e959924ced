"""What several test files share: ragged examples, small networks, and a model folder on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.examples import Counts, Example
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
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
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


def small_config(family: str, **changes: Any) -> DecoderConfig:
    """Return the configuration of a two-layer network."""
    return parse_config({**SMALL, **FAMILIES[family], **changes}, "test")


def small_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> CausalLM:
    """Return a two-layer network whose biases and norms are away from their initial values."""
    config = small_config(family, **changes)
    model = build(config, device="meta")
    initialise(model, seed, dtype, "cpu", initializer_range=0.2)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise.to(dtype)
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tokenised rows out of the user's cache."""
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a StarCoder2-style folder: config.json with dropout 0.1, a byte tokenizer, weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from models.weights import save_model

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    special = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    dropouts = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.1)
    model = small_model("starcoder2", vocab_size=257, **dropouts)
    save_model(model, folder, config=model.config)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.jsonl (22 rows), valid.jsonl (5) and test.jsonl (3), ragged."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(1)
    for name, count in (("train", 22), ("valid", 5), ("test", 3)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                letters = random.integers(97, 110, random.integers(6, 40))
                file.write(json.dumps({"text": "".join(map(chr, letters))}) + "\n")
    return folder
