"""Micro-batches: shifted targets, budgets, padding, and that all cuts hold the same."""

import itertools

import numpy as np
import pytest
from tokenised import tokenise

from data.batch import LAYOUTS, Batching, MicroBatch, micro_batches
from data.examples import Examples
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer

MAX_LENGTH = 48


@pytest.fixture
def examples(tokenizer_folder) -> Examples:
    """Forty examples of 4 to 48 tokens, prompts masked; pad is EOS (id 0)."""
    tokenizer = Tokenizer.load(tokenizer_folder())
    assert tokenizer.pad_id == tokenizer.eos_id == 0
    draw = np.random.default_rng(0)
    rows = [
        {"prompt": "ab " * int(draw.integers(1, 9)), "completion": "xyz" * int(n)}
        for n in draw.integers(1, 16, 40)
    ]
    prompt_format = PromptFormat(format="completion")
    return tokenise(rows, tokenizer, prompt_format, max_length=MAX_LENGTH)


def cut(
    examples: Examples,
    indices,
    *,
    size: int = 4,
    tokens: int | None = None,
    batching: str = "unpadded",
) -> list[MicroBatch]:
    return micro_batches(
        examples,
        indices,
        Batching(
            micro_batch_size=size,
            micro_batch_tokens=tokens,
            layout=batching,
            max_length=MAX_LENGTH,
            pad_id=0,
        ),
    )


def documents(batches: list[MicroBatch]) -> list[tuple[int, list[int], list[int]]]:
    """Take the micro-batches apart again: (example, ids, targets) of each document."""
    found = []
    for batch in batches:
        starts = itertools.accumulate(
            (batch.padded_length or length for length in batch.lengths), initial=0
        )
        for example, start, length in zip(batch.examples, starts, batch.lengths, strict=False):
            rows = slice(start, start + length)
            found.append((example, batch.input_ids[rows].tolist(), batch.targets[rows].tolist()))
    return found


def test_targets_are_the_next_token_of_the_same_document(examples):
    (batch,) = cut(examples, [3, 1], size=2)
    first, second = examples[3], examples[1]
    expected_ids = [*first.input_ids, *second.input_ids]
    expected = [*first.labels[1:], -100, *second.labels[1:], -100]
    assert batch.input_ids.tolist() == expected_ids
    assert batch.targets.tolist() == expected
    assert batch.examples == (3, 1)
    assert batch.lengths == (len(first.input_ids), len(second.input_ids))
    assert batch.padded_length is None
    assert batch.num_tokens == len(expected_ids)
    assert batch.num_targets == sum(target != -100 for target in expected)
    assert str(batch.input_ids.dtype) == str(batch.targets.dtype) == "torch.int64"


def test_eos_is_a_target_though_the_pad_has_its_id(examples):
    for batching in LAYOUTS:
        for batch in cut(examples, range(40), batching=batching):
            for example, ids, targets in documents([batch]):
                assert ids[-1] == 0 or len(ids) == MAX_LENGTH, example
                assert targets[-2] == ids[-1]


@pytest.mark.parametrize("batching", ["longest", "max_length"])
def test_padding_is_the_pad_token_without_targets(examples, batching):
    for batch in cut(examples, range(40), size=7, batching=batching):
        longest = max(batch.lengths)
        assert batch.padded_length == (longest if batching == "longest" else MAX_LENGTH)
        assert batch.padded_length is not None
        assert len(batch.input_ids) == len(batch.lengths) * batch.padded_length
        for document, length in enumerate(batch.lengths):
            start = document * batch.padded_length
            pads = slice(start + length, start + batch.padded_length)
            assert (batch.input_ids[pads] == 0).all()
            assert (batch.targets[pads] == -100).all()
            assert batch.targets[start + length - 1] == -100


CUTS = [
    *({"size": size, "batching": b} for size in (1, 3, 8, 40, 100) for b in LAYOUTS),
    *({"tokens": tokens, "batching": b} for tokens in (1, 60, 200, 10**6) for b in LAYOUTS),
]


def test_all_cuts_hold_the_same_examples_in_the_same_order(examples):
    indices = np.random.default_rng(1).permutation(40)[:33]
    expected = [
        (int(i), examples[int(i)].input_ids.tolist(), [*examples[int(i)].labels[1:].tolist(), -100])
        for i in indices
    ]
    for settings in CUTS:
        batches = cut(examples, indices, **settings)
        assert documents(batches) == expected, settings
        assert sum(batch.num_targets for batch in batches) == examples.num_targets[indices].sum()
        assert sum(batch.num_tokens for batch in batches) == examples.lengths[indices].sum()


def test_cut_by_examples(examples):
    batches = cut(examples, range(10), size=4)
    assert [batch.examples for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert cut(examples, []) == []


@pytest.mark.parametrize("batching", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 48, 100, 250])
def test_cut_by_tokens_takes_as_many_as_fit(examples, batching, budget):
    indices = list(range(40))
    batches = cut(examples, indices, tokens=budget, batching=batching)
    for batch, following in itertools.pairwise([*batches, None]):
        assert batch is not None
        assert len(batch.input_ids) <= budget or len(batch.examples) == 1
        if following is not None:
            one_more = [*batch.examples, following.examples[0]]
            (larger,) = cut(examples, one_more, size=len(one_more), batching=batching)
            assert len(larger.input_ids) > budget


def test_a_subset_keeps_the_index_that_keys_dropout(examples):
    subset = examples.subset([30, 2, 17])
    (batch,) = cut(subset, [2, 0])
    assert batch.examples == (17, 30)
    assert batch.input_ids.tolist() == [*examples[17].input_ids, *examples[30].input_ids]


def test_impossible_requests(examples):
    with pytest.raises(ValueError, match="layout 'packed'"):
        cut(examples, [0], batching="packed")
    with pytest.raises(ValueError, match="at least one example"):
        cut(examples, [0], size=0)
    with pytest.raises(ValueError, match="at least one example"):
        cut(examples, [0], tokens=0)
    longest = int(np.argmax(examples.lengths))
    with pytest.raises(ValueError, match="in rows of 3"):
        micro_batches(
            examples,
            [longest],
            Batching(micro_batch_size=1, layout="max_length", max_length=3, pad_id=0),
        )
