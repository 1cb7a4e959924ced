"""Completions of a few held-out prompts, before and after: what the losses mean in text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.examples import IGNORED, Examples
from data.tokenizer import Tokenizer

MOST_NEW_TOKENS = 200


@dataclass
class Sample:
    """A prompt, what the row says comes next, and what the model says before and after training."""

    prompt: str
    reference: str
    before: str | None = None
    after: str | None = None


def prompt_length(labels: np.ndarray) -> int:
    """Return where an example's first trained token is; half of it where all of it is trained."""
    first = int(np.argmax(labels != IGNORED))
    return first if first > 1 else max(1, len(labels) // 2)


def choose_samples(
    examples: Examples, tokenizer: Tokenizer, count: int
) -> list[tuple[Sample, list[int]]]:
    """Return the first `count` examples as samples, each with its prompt's ids."""
    chosen = []
    for index in range(min(count, len(examples))):
        example = examples[index]
        cut = prompt_length(example.labels)
        ids = example.input_ids.tolist()
        chosen.append((Sample(tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])), ids[:cut]))
    return chosen
