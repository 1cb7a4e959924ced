"""The loop that writes: one prompt or several together, a token to each in a pass.

Which prompts stand together changes speed and memory. Draws are a function of the seed and of what
is completed, made on the host in fp64, so that neither batch nor device changes them; products of
other shapes may round otherwise in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from files.errors import UserError, counted
from kernels.dropout import fold
from kernels.segments import Segments
from models.cache import BatchCache, KeyValueCache
from models.config import DecoderConfig
from models.layers import CausalLM
from train.generation.sampling import Sampling, next_tokens
from train.process.memory import does_not_fit, within_memory

# How often a completion's text is asked whether it has come to an end of its own.
_LOOK_EVERY = 8


@dataclass
class Asked:
    """One completion that is asked for, and what has come of it.

    Attributes:
        prompt_ids: Ids of the prompt, special tokens included.
        key: What tells its draws from others' of one seed, such as (row, sample); may be empty.
        is_over: Whether a text of these ids has come to its end; asked now and then.
        ids: The completion.
        ended: Whether it came to an end by itself.
    """

    prompt_ids: Sequence[int]
    key: tuple[int, ...] = ()
    is_over: Callable[[list[int]], bool] | None = None
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, sampling: Sampling) -> bool:
        """Take in the next token; return whether it is part of the text."""
        if token in sampling.stop_ids:
            self.ended = True
            return False
        self.ids.append(token)
        if self.is_over and len(self.ids) % _LOOK_EVERY == 0 and self.is_over(self.ids):
            self.ended = True
        return True

    def seed(self, sampling: Sampling) -> int:
        """Return the seed of its draws: of an empty key, the one that was given."""
        if not self.key:
            return sampling.seed
        seed = fold(0, sampling.seed)
        for number in self.key:
            seed = fold(seed, number)
        return seed


@torch.no_grad()
def decode(
    model: CausalLM,
    batch: Sequence[Asked],
    sampling: Sampling,
    cache: KeyValueCache | None = None,
) -> Iterator[None]:
    """Complete prompts together, from their beginnings; yield after each pass.

    Args:
        model: The decoder; it computes in the dtype of its weights, or in the caller's autocast.
        batch: What is asked for. Several need a model whose rotary frequencies do not depend on
            the length.
        sampling: How tokens are chosen.
        cache: Of a single prompt, what is remembered of its first tokens, at least one of them
            left out.

    Raises:
        UserError: A prompt is empty or fills the context, or logits are not finite.
    """
    device = model.head_weight().device
    left = [min(sampling.max_new_tokens, room(model.config, one.prompt_ids)) for one in batch]
    generators = [torch.Generator().manual_seed(one.seed(sampling)) for one in batch]
    for one in batch:
        one.ids, one.ended = [], False
    lengths = [len(one.prompt_ids) for one in batch]
    capacity = max(length + count for length, count in zip(lengths, left, strict=True))
    if len(batch) > 1:
        past = BatchCache(lengths, capacity, device)
        fed = torch.tensor([token for one in batch for token in one.prompt_ids])
        segments = Segments.build(lengths, device=device)
        last = torch.tensor(lengths).cumsum(0) - 1
    else:
        past = cache or KeyValueCache(capacity)
        past.reserve(capacity)
        fed = torch.tensor(batch[0].prompt_ids[past.length :])
        segments = Segments.build([len(fed)], device=device, offset=past.length)
        last = torch.tensor([len(fed) - 1])
    writing = list(range(len(batch)))  # who stands in each row
    while True:
        hidden = model.hidden_states(fed.to(device), segments, past)
        if last is not None:
            hidden = hidden[last.to(device)]
        head = model.head_weight()  # of ranks that share it, whole by now
        logits = F.linear(hidden, head.to(hidden.dtype)).cpu()
        tokens = next_tokens(logits, sampling, [generators[number] for number in writing])
        staying = []
        for row, number in enumerate(writing):
            one = batch[number]
            if one.take(tokens[row], sampling) and not one.ended and len(one.ids) < left[number]:
                staying.append(row)
        yield
        if not staying:
            return
        if len(staying) < len(writing):
            assert isinstance(past, BatchCache)
            past.keep(staying)
            writing = [writing[row] for row in staying]
        fed = torch.tensor([tokens[row] for row in staying])
        last = None
        segments = _one_more(past, len(staying), device)


def _one_more(past: KeyValueCache | BatchCache, count: int, device: torch.device) -> Segments:
    """Return the segments of one token behind each document."""
    if isinstance(past, KeyValueCache):
        positions = torch.tensor([past.length], device=device)
    else:
        positions = past.lengths.clone()
    return Segments(
        lengths=(1,) * count,
        padded_length=None,
        positions=positions,
        boundaries=torch.arange(count + 1, dtype=torch.int32, device=device),
        dropout_rows=None,
        dropout_seed=0,
    )


def write(
    model: CausalLM,
    batch: Sequence[Asked],
    sampling: Sampling,
    cache: KeyValueCache | None = None,
) -> Sequence[Asked]:
    """Complete prompts together, as `decode` does, and return them."""
    for _ in decode(model, batch, sampling, cache):
        pass
    return batch


def complete_all(
    model: CausalLM, asked: Sequence[Asked], sampling: Sampling, batch_size: int
) -> Iterator[list[Asked]]:
    """Complete every prompt, the longest first; yield each batch when it is done.

    Where memory does not suffice, batches of half the size are taken from there on. The caller's
    autocast is what is computed in.

    Raises:
        UserError: A prompt is empty or fills the context, memory does not suffice for one, or
            logits are not finite.
    """
    if model.config.rope.rope_type == "dynamic":  # frequencies of its own for every length
        batch_size = 1
    order = sorted(asked, key=lambda one: -len(one.prompt_ids))
    device = model.head_weight().device
    done = 0
    while done < len(order):
        batch = order[done : done + batch_size]
        if within_memory(partial(write, model, batch, sampling), device) is None:
            if len(batch) == 1:
                raise does_not_fit("a completion", len(batch[0].prompt_ids))
            batch_size = len(batch) // 2
            continue
        done += len(batch)
        yield batch


def room(config: DecoderConfig, prompt_ids: Sequence[int]) -> int:
    """Return how many tokens the context has left after a prompt.

    Raises:
        UserError: The prompt is empty, or fills the context.
    """
    context = context_length(config)
    if not prompt_ids:
        raise UserError("the prompt is empty: give at least one token to continue")
    if len(prompt_ids) >= context:
        raise UserError(
            f"the prompt has {counted(len(prompt_ids), 'token')} and the model's context "
            f"{context}: shorten the prompt"
        )
    return context - len(prompt_ids)


def context_length(config: DecoderConfig) -> int:
    """Return the number of positions that the model knows, those of a stretched context included.

    `linear` and `llama3` name the stretched length themselves; `yarn` may and `dynamic` does not.
    """
    length, rope = config.max_position_embeddings, config.rope
    if rope.rope_type == "dynamic":
        return int(length * rope.factor)
    if rope.rope_type == "yarn":
        original = rope.original_max_position_embeddings or length
        return max(length, int(original * rope.factor))
    return length
