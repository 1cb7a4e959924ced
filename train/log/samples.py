"""Completions of a few held-out prompts, before and after: what the losses mean in text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.examples import Examples
from data.labels import IGNORED
from data.tokenizer import Tokenizer
from files.errors import UserError
from files.strict_json import read_json_object
from train.state import Sample

MOST_NEW_TOKENS = 200


def samples_so_far(folder: Path) -> list[Sample]:
    """Return the samples that a run's status.json holds; none where it holds none."""
    try:
        status = read_json_object(folder / "status.json")
        samples = [Sample(**sample) for sample in status["samples"]]
    except (UserError, KeyError, TypeError):
        return []
    texts = [(one.prompt, one.reference, one.before or "", one.after or "") for one in samples]
    return samples if all(isinstance(text, str) for each in texts for text in each) else []


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
        untrained = np.flatnonzero(example.labels[cut:] == IGNORED)
        stop = cut + int(untrained[0]) if len(untrained) and untrained[0] else len(ids)
        reference = tokenizer.decode(ids[cut:stop])
        # Without the tokens of its format, a prompt with a hole would not show where it is.
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=not example.has_hole)
        chosen.append((Sample(prompt, reference), ids[:cut]))
    return chosen
