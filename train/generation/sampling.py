"""How the next token is chosen: the likeliest, or a draw from the likeliest ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from files.errors import UserError

if TYPE_CHECKING:  # a command's settings are checked before torch is imported
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a completion ends.

    Attributes:
        max_new_tokens: Tokens after which to stop; the end of the model's context may come first.
        stop_ids: Ids that each end a text; they are not part of it.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: Tokens are drawn from so many likeliest; 0 is all.
        top_p: Of these, from the likeliest that have this probability together.
        seed: Seed of the draws.

    Raises:
        UserError: A value out of its range.
    """

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1")

    def refuse_to_choose_of_one(self) -> None:
        """Refuse what says how to draw where nothing is drawn."""
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError(
                "--top-k and --top-p say among which tokens to draw, and the likeliest is taken: "
                "give a --temperature above 0, such as 0.8"
            )


def next_tokens(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """Return the tokens that logits, (D, V) on the host, choose; each row has its own generator.

    Raises:
        UserError: Logits that are not finite.
    """
    import torch

    likeliest = logits.argmax(-1)
    # What is NaN counts as the largest.
    if not all(map(math.isfinite, logits.gather(-1, likeliest[:, None]).flatten().tolist())):
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or too large for the "
            "computation's range (--dtype fp32 has the widest)"
        )
    if sampling.temperature == 0:
        return likeliest.tolist()
    return [
        int(torch.multinomial(token_probabilities(row, sampling), 1, generator=generator))
        for row, generator in zip(logits, generators, strict=True)
    ]


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities, (V,) fp64, that a token is drawn with.

    They are softmax(logits / temperature), cut to the `top_k` likeliest (all that are as likely as
    the last of them stay), then to the smallest set of likeliest tokens that have `top_p` or more
    of what is left together, and scaled back to a sum of 1. The likeliest token always stays.

    Source: transformers' order of `TopKLogitsWarper` and `TopPLogitsWarper`; Holtzman et al. 2020,
    nucleus sampling.
    """
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -math.inf
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        probabilities[order[likelier >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities
