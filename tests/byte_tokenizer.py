"""A tokenizer of single bytes: what one token is can be read off the text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_byte_tokenizer(
    folder: Path, eos: str, pieces: Sequence[str] | None = None, **settings: Any
) -> None:
    """Write a tokenizer of `pieces`: by default the EOS and every byte, in this order."""
    vocabulary = {piece: number for number, piece in enumerate(pieces or [eos, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([eos])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, **settings}))
