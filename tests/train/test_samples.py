"""Samples: where a row is cut into what is given and what should come."""

import numpy as np
import pytest
from shown import DEMO_MODEL

from data.examples import Example
from data.tokenizer import Tokenizer
from train.log.samples import choose_samples


@pytest.mark.parametrize(
    ("prompt", "trained", "reference"),
    [
        (2, "--cdef", "cdef"),
        (0, "abcdef", "def"),
        (2, "--cd--", "cd"),  # the turns behind an answer are not what comes next
        (0, "ab---f", "def"),  # the middle of a piece without a prompt may be untrained
    ],
)
def test_what_comes_next_is_trained(prompt: int, trained: str, reference: str) -> None:
    tokenizer = Tokenizer.load(DEMO_MODEL)
    ids = np.array([tokenizer.encode(letter)[0] for letter in "abcdef"], dtype=np.int32)
    labels = np.where(np.array(list(trained)) == "-", np.int32(-100), ids)
    examples = [Example(0, ids, labels, prompt)]
    ((sample, prompt_ids),) = choose_samples(examples, tokenizer, 3)  # type: ignore[arg-type]
    assert (sample.prompt, sample.reference) == (tokenizer.decode(prompt_ids), reference)
    assert len(prompt_ids) == (prompt or 3)
