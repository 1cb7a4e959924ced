"""Completions of many prompts, a batch at a time; each is what it would be alone.

A batch writes on together: its prompts go through the model in one pass, and each later pass adds a
token to each. Which prompts stand together changes speed and memory. Draws are a function of the
seed and of what is completed (row, sample), so that no batch changes them; products of other shapes
may round otherwise in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from kernels.dropout import fold
from kernels.segments import Segments
from models.cache import BatchCache
from models.layers import CausalLM
from train.generate import generate, next_token, room
from train.process.memory import does_not_fit, within_memory

# How often a completion's text is asked whether it has come to an end of its own.
_LOOK_EVERY = 8


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a completion ends.

    Attributes:
        max_new_tokens: Tokens after which to stop; the end of the model's context may come first.
        stop_ids: Ids that each end a text; they are not part of it.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: Tokens are drawn from the likeliest that have this probability together.
        seed: Seed of the draws.
    """

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, key: Sequence[int]) -> int:
        """Return the seed of one completion's draws: of (row, sample), as the caller counts."""
        seed = fold(0, self.seed)
        for number in key:
            seed = fold(seed, number)
        return seed


@dataclass
class Asked:
    """One completion that is asked for, and what has come of it.

    Attributes:
        prompt_ids: Ids of the prompt.
        key: What tells its draws from others': (row, sample).
        is_over: Whether a text of these ids has come to its end; asked now and then.
        ids: The completion.
        ended: Whether it came to an end by itself.
    """

    prompt_ids: Sequence[int]
    key: tuple[int, ...]
    is_over: Callable[[list[int]], bool] | None = None
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, sampling: Sampling) -> bool:
        """Take in the next token; return whether there is more to come."""
        if token in sampling.stop_ids:
            self.ended = True
            return False
        self.ids.append(token)
        if self.is_over and len(self.ids) % _LOOK_EVERY == 0 and self.is_over(self.ids):
            self.ended = True
        return not self.ended


def complete_all(
    model: CausalLM, asked: Sequence[Asked], sampling: Sampling, batch_size: int
) -> Iterator[int]:
    """Complete every prompt, the longest first; yield how many are done after each batch.

    Where memory does not suffice, batches of half the size are taken from there on. The caller's
    autocast is what is computed in.

    Raises:
        UserError: A prompt is empty or fills the context, memory does not suffice for one, or
            logits are not finite.
    """
    complete = _complete_together
    if model.config.rope.rope_type == "dynamic":  # frequencies of its own for every length
        complete, batch_size = _complete_alone, 1
    order = sorted(asked, key=lambda one: -len(one.prompt_ids))
    device = model.head_weight().device
    done = 0
    while done < len(order):
        batch = order[done : done + batch_size]
        if within_memory(partial(complete, model, batch, sampling), device) is None:
            if len(batch) == 1:
                raise does_not_fit("a completion", len(batch[0].prompt_ids))
            batch_size = len(batch) // 2
            continue
        done += len(batch)
        yield done


def _complete_alone(model: CausalLM, batch: Sequence[Asked], sampling: Sampling) -> bool:
    (one,) = batch
    one.ids, one.ended = [], False
    most = min(sampling.max_new_tokens, room(model.config, one.prompt_ids))
    ids = generate(
        model,
        one.prompt_ids,
        max_new_tokens=most,
        stop_ids=sampling.stop_ids,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed_of(one.key),
    )
    for token in ids:
        if not one.take(token, sampling):
            break
    one.ended |= len(ids) < most
    return True


@torch.no_grad()
def _complete_together(model: CausalLM, batch: Sequence[Asked], sampling: Sampling) -> bool:
    for one in batch:
        one.ids, one.ended = [], False
    head = model.head_weight()
    device = head.device
    generators = [torch.Generator().manual_seed(sampling.seed_of(one.key)) for one in batch]
    left = [min(sampling.max_new_tokens, room(model.config, one.prompt_ids)) for one in batch]
    lengths = [len(one.prompt_ids) for one in batch]
    longest = max(lengths)
    most = max(length + count for length, count in zip(lengths, left, strict=True))
    cache = BatchCache(lengths, max(most, longest), device)
    padded = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, one in zip(padded, batch, strict=True):
        row[: len(one.prompt_ids)] = torch.tensor(one.prompt_ids)
    fed = padded.flatten()
    segments = Segments.build(lengths, device=device, padded_length=longest)
    last = torch.arange(len(batch)) * longest + torch.tensor(lengths) - 1
    writing = list(range(len(batch)))  # who stands in each row
    while True:
        hidden = model.hidden_states(fed.to(device), segments, cache)[last.to(device)]
        logits = F.linear(hidden, head.to(hidden.dtype)).cpu()
        tokens, staying = [], []
        for row, number in enumerate(writing):
            one = batch[number]
            token = next_token(
                logits[row],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                generator=generators[number],
            )
            if one.take(token, sampling) and len(one.ids) < left[number]:
                tokens.append(token)
                staying.append(row)
        if not staying:
            return True
        if len(staying) < len(writing):
            cache.keep(staying)
            writing = [writing[row] for row in staying]
        fed = torch.tensor(tokens)
        count = len(tokens)
        last = torch.arange(count)
        segments = Segments(
            lengths=(1,) * count,
            padded_length=None,
            positions=cache.lengths.clone(),
            boundaries=torch.arange(count + 1, dtype=torch.int32, device=device),
            dropout_rows=None,
            dropout_seed=0,
        )
