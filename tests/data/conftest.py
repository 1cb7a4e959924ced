"""A small byte-level tokenizer, trained once, and folders that hold it with any settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "def add(first, second):\n    return first + second\n",
    "Problem:\nAdd two numbers.\n\nSolution:\ndef add(a, b):\n    return a + b\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
    "You are an expert Python programmer. user assistant system Hello, world! How are you?",
] * 3


@pytest.fixture(scope="session")
def tokenizer_json() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture
def tokenizer_folder(tokenizer_json: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Make a folder: `settings` is tokenizer_config.json, `changes` alter tokenizer.json."""

    def make(
        settings: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
        *,
        name: str = "tokenizer",
        files: dict[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        written = {
            "tokenizer.json": json.dumps(tokenizer_json | (changes or {})),
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast"}
                | ({"eos_token": "<|endoftext|>"} if settings is None else settings)
            ),
        }
        for file, text in (written | (files or {})).items():
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def bos_template() -> dict[str, Any]:
    """A post-processor that puts <s> (id 1) before every text."""
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    }
