"""Completions in batches: transformers' when greedy, and what each prompt has alone when drawn."""

from typing import Any

import pytest
import torch
from references import EOS, FAMILIES, reference_model
from small import small_model

from files.errors import UserError
from models import load_model
from models.config import RopeConfig
from train.generate import generate
from train.generation.decode import Asked, complete_all
from train.generation.sampling import Sampling
from train.process.memory import is_out_of_memory

LENGTHS = (11, 3, 30, 1, 12, 60)


def prompts(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def completed(model: Any, batch_size: int, given: list[list[int]], **sampling: Any) -> list[Asked]:
    asked = [Asked(ids, (row, 0)) for row, ids in enumerate(given)]
    done = list(complete_all(model, asked, Sampling(**sampling), batch_size))
    assert sorted(one.key for batch in done for one in batch) == [one.key for one in asked]
    return asked


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("Qwen2", "Starcoder2") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_greedy_batches_equal_transformers(family: str, tmp_path: Any) -> None:
    """Ragged prompts, windows of 8 among them, texts that end at different moments."""
    reference = reference_model(family)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    given = prompts(EOS)
    expected = []
    for ids in given:
        room = min(20, 64 - len(ids))
        made = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=room)
        expected.append([token for token in made[0, len(ids) :].tolist() if token != EOS])
    middle = expected[0][7]  # some token that ends texts in the middle
    cut = [ids[: ids.index(middle)] if middle in ids else ids for ids in expected]
    for batch_size in (1, 4, 6):
        asked = completed(model, batch_size, given, max_new_tokens=20, stop_ids=[EOS])
        assert [one.ids for one in asked] == expected
        asked = completed(model, batch_size, given, max_new_tokens=20, stop_ids=[EOS, middle])
        assert [one.ids for one in asked] == cut
        assert [one.ended for one in asked] == [
            len(ids) < min(20, 64 - len(prompt)) for ids, prompt in zip(cut, given, strict=True)
        ]


def test_draws_are_those_of_the_row_and_sample_whatever_the_batch() -> None:
    model = small_model("llama")
    given = prompts(96, (9, 4, 4, 7))
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    asked = [Asked(ids, (row, sample)) for row, ids in enumerate(given) for sample in range(2)]
    list(complete_all(model, asked, Sampling(**settings), 5))
    for one in asked:
        alone = Asked(one.prompt_ids, one.key)
        list(complete_all(model, [alone], Sampling(**settings), 1))
        assert alone.ids == one.ids
        seed = one.seed(Sampling(**settings))
        assert one.ids == generate(model, one.prompt_ids, **{**settings, "seed": seed})
    assert len({tuple(one.ids) for one in asked}) == len(asked)
    seeds = {Asked([1], key).seed(Sampling(5, seed=1)) for key in ((), (0, 1), (1, 0))}
    assert len(seeds) == 3 and 1 in seeds


def test_rotary_frequencies_that_depend_on_the_length_are_computed_alone() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = small_model("llama", max_position_embeddings=8, rope_scaling=scaling)
    assert model.config.rope == RopeConfig(rope_type="dynamic", factor=2.0)
    given = prompts(96, (5, 3))
    asked = completed(model, 2, given, max_new_tokens=9)
    assert [one.ids for one in asked] == [generate(model, ids, max_new_tokens=9) for ids in given]


def test_a_text_that_says_so_ends() -> None:
    model = small_model("llama")
    asked = [Asked([5], (0,), lambda ids: len(ids) >= 10), Asked([6, 7], (1,))]
    list(complete_all(model, asked, Sampling(30), 2))
    assert (len(asked[0].ids), asked[0].ended) == (16, True)  # it is asked every eighth token
    assert (len(asked[1].ids), asked[1].ended) == (30, False)


def test_batches_are_halved_where_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("llama")
    seen = []
    hidden_states = model.hidden_states

    def short_of_memory(ids: torch.Tensor, segments: Any, cache: Any) -> torch.Tensor:
        seen.append(segments.num_documents)
        if segments.num_documents > fits:
            error = MemoryError()
            assert is_out_of_memory(error)
            raise error
        return hidden_states(ids, segments, cache)

    given = prompts(96, (9, 4, 4, 7, 2))
    expected = [one.ids for one in completed(model, 5, given, max_new_tokens=3)]
    monkeypatch.setattr(model, "hidden_states", short_of_memory)
    fits = 2
    assert [one.ids for one in completed(model, 5, given, max_new_tokens=3)] == expected
    assert seen[:2] == [5, 2]
    fits = 0
    with pytest.raises(UserError, match="a completion: out of memory"):
        completed(model, 2, given, max_new_tokens=3)
