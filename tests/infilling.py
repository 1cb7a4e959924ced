"""Tokenizers of three families with the tokens of fill-in-the-middle, a model, and rows."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from small import small_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from models.weights import save_model

CORPUS = [
    "def add(first, second):\n    return first + second\n\n\nclass Stack:\n",
    "    def push(self, item):\n        self.items.append(item)\n",
    "    def pop(self):\n        return self.items.pop()\n",
    'import os\n\nif __name__ == "__main__":\n    for name in os.listdir("."):\n',
] * 3
STARCODER = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CODELLAMA = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
FAMILIES = ("starcoder2", "qwen2.5-coder", "codellama")
_WORDS = Regex(r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def write_tokenizer(folder: Path, family: str, corpus: list[str] | None = None) -> Path:
    """Write a tokenizer of a family, with pieces of the corpus, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _llama(corpus or CORPUS) if family == "codellama" else _bytes(family, corpus or CORPUS)
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>" if family == "codellama" else "<|endoftext|>"}
    if family == "codellama":
        settings |= {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}
    if family == "qwen2.5-coder":  # as the instructed models have it
        settings = {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _bytes(family: str, corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if family == "starcoder2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        special = ["<|endoftext|>", *STARCODER]
    else:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(_WORDS, "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        special = ["<|endoftext|>", "<|im_end|>", *QWEN]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _llama(corpus: list[str]) -> Tokenizer:
    """Return a tokenizer as CodeLlama's tokenizer.json has it: SentencePiece's BPE, over bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(split=True, prepend_scheme="never")
    learned.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece not in pieces]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *CODELLAMA])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *CODELLAMA]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def library_files() -> Iterator[str]:
    """Yield the text of each file of the standard library that is UTF-8, tests included."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue


def write_model(folder: Path, family: str = "starcoder2", **changes: Any) -> Path:
    """Write a small StarCoder2 with a family's tokenizer, and return its folder."""
    write_tokenizer(folder, family)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    model = small_model("starcoder2", vocab_size=vocabulary, **changes)
    save_model(model, folder, config=model.config)
    return folder


def write_rows(folder: Path) -> Path:
    """Write train.jsonl (14 rows), valid.jsonl (5) and test.jsonl (3) of small programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 14), ("valid", 5), ("test", 3)):
        texts = [f"def f{n}(a, b):\n    c = a + {n}\n    return b * c\n" for n in range(count)]
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder
