"""Tokens are drawn as transformers draws them: its warpers, in its order."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from train.generation.sampling import Sampling, token_probabilities


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 7, 96, 200])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_top_k_and_top_p_are_transformers(temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    for _ in range(5):
        logits = 3 * torch.randn(96, generator=generator, dtype=torch.float64)
        scores = TemperatureLogitsWarper(temperature)(None, logits[None])  # type: ignore[arg-type]
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)  # type: ignore[arg-type]
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
        sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
        probabilities = token_probabilities(logits, sampling)
        torch.testing.assert_close(probabilities, scores.softmax(-1)[0], rtol=1e-12, atol=0)


def test_those_as_likely_as_the_last_of_top_k_stay() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0])
    probabilities = token_probabilities(logits, Sampling(1, temperature=1.0, top_k=2))
    assert TopKLogitsWarper(2)(None, logits[None]).isfinite().tolist() == [  # type: ignore[arg-type]
        (probabilities > 0).tolist()
    ]
    assert (probabilities > 0).tolist() == [False, True, True, True]
