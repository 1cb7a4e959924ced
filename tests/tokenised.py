"""Rows that a test holds, as examples."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.examples import Examples, load_examples
from data.fim import FillInTheMiddle
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer


def tokenise(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    on_overflow: str = "truncate",
    fim: FillInTheMiddle | None = None,
) -> Examples:
    """Return the examples of rows, kept in memory; messages name them `rows.jsonl:1` and so on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(
            str(path),
            split_column=None,
            split=None,
            tokenizer=tokenizer,
            prompt_format=prompt_format,
            max_length=max_length,
            on_overflow=on_overflow,
            cache_root=None,
            fim=fim,
        )
