"""A key-value cache changes no token: alone, in batches, and behind what a cache holds."""

from typing import Any

import pytest
import torch
from small import FAMILIES, small_model

from models.cache import KeyValueCache
from models.layers import CausalLM
from train.generate import generate
from train.generation.decode import Asked, write
from train.generation.sampling import Sampling

LENGTHS = (11, 3, 7, 1)
COUNT = 14
CHANGES: dict[str, dict[str, Any]] = {"starcoder2": {"sliding_window": 6}}


@torch.no_grad()
def without_cache(model: CausalLM, prompt: list[int], count: int = COUNT) -> list[int]:
    """Return the likeliest tokens, each by a pass over the whole text."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_is_written_without(family: str) -> None:
    model = small_model(family, **CHANGES.get(family, {}))
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = [without_cache(model, prompt) for prompt in prompts]
    assert len({token for ids in expected for token in ids}) > 10
    for prompt, ids in zip(prompts, expected, strict=True):
        assert generate(model, prompt, max_new_tokens=COUNT) == ids
    together = write(model, [Asked(prompt) for prompt in prompts], Sampling(COUNT))
    assert [one.ids for one in together] == expected
    # Behind a past that forgot its end: the next turn of a chat whose history has changed.
    cache = KeyValueCache(0)
    (one,) = write(model, [Asked(prompts[0])], Sampling(COUNT), cache)
    assert (one.ids, cache.length) == (expected[0], len(prompts[0]) + COUNT - 1)
    turn = [*prompts[0], *expected[0][:5], *prompts[2]]
    cache.length = len(prompts[0]) + 5
    (one,) = write(model, [Asked(turn)], Sampling(COUNT), cache)
    assert one.ids == without_cache(model, turn)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_without_gradients_has_the_bits_of_one_with(family: str) -> None:
    """It goes through fewer calls."""
    ids = torch.arange(40).unsqueeze(0)
    for dtype, lowered in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        model = small_model(family, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            expected = model(ids)
            with torch.no_grad():
                assert torch.equal(model(ids), expected)
