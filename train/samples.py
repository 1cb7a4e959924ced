"""Completions of a few held-out prompts, before and after: what the losses mean in text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data.examples import Examples
from data.tokenizer import Tokenizer

MOST_NEW_TOKENS = 200


@dataclass
class Sample:
    """A prompt, what the row says comes next, and what the model says before and after training."""

    prompt: str
    reference: str
    before: str | None = None
    after: str | None = None


def samples_so_far(folder: Path) -> list[Sample]:
    """Return the samples that a run's status.json holds; none where it holds none."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
        return [Sample(**sample) for sample in status["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def choose_samples(
    examples: Examples, tokenizer: Tokenizer, count: int
) -> list[tuple[Sample, list[int]]]:
    """Return the first `count` examples as samples, each with its prompt's ids."""
    chosen = []
    for index in range(min(count, len(examples))):
        example = examples[index]
        # A text without a prompt is cut in the middle.
        cut = example.prompt_length or max(1, len(example.input_ids) // 2)
        ids = example.input_ids.tolist()
        chosen.append((Sample(tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])), ids[:cut]))
    return chosen
