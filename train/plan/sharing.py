"""What ranks hold and send where they share a step: the messages, and the weights gathered.

The plan and `python -m benchmarks.scaling` count with the same messages. A few numbers that all
agree on (counts, losses, norms, Adafactor's sums of columns) are left out: below a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.plan.decide import decide_micro_batch_tokens

if TYPE_CHECKING:
    from models.config import DecoderConfig
    from train.config.schema import RunConfig
    from train.plan.sizes import ModelSizes

# Of a tensor's bytes a rank sends so many times (N - 1)/N, in a ring.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Message:
    """A collective of a step.

    Attributes:
        kind: `all-reduce`, `all-gather` or `reduce-scatter`.
        bytes: Of the whole tensor.
        times: How often a step has it.
    """

    kind: str
    bytes: int
    times: int

    def sent(self, ranks: int) -> float:
        """Return the bytes that a rank sends in one, and receives: what a ring needs at least."""
        return _ROUNDS[self.kind] * (ranks - 1) / ranks * self.bytes


def communication_bytes(messages: Sequence[Message], ranks: int) -> int:
    """Return the bytes that a rank sends in a step."""
    return round(sum(message.times * message.sent(ranks) for message in messages))


def messages_of_a_step(
    config: RunConfig,
    decoder: DecoderConfig,
    sizes: ModelSizes,
    sharding: str,
    micro_batches: int,
    widths: tuple[int, int],
) -> list[Message]:
    """Return the collectives of a step.

    - Replicas: one all-reduce of the trained parameters' fp32 gradients.
    - A shared model: in every micro-batch each layer is gathered forward and once more backward,
      what is outside the layers once; where all is trained, each layer's gradient and the rest's
      are summed in fp32. Beside adapters, which every rank has, theirs are summed once a step.

    Args:
        config: What is asked.
        decoder: The architecture.
        sizes: `model_sizes` of the two.
        sharding: `replicate` or `shard`.
        micro_batches: Of a step, on the rank that has most of them.
        widths: Bytes of a number that is computed with, and of a stored weight.
    """
    full = config.train.method == "full"
    gradients = Message("all-reduce", 4 * sizes.trainable, 1)
    if sharding == "replicate":
        return [gradients]
    compute, stored = widths
    layers, rest = decoder.num_hidden_layers, sizes.outside_layers
    gathers = [
        Message(
            "all-gather", sizes.layer * (compute if full else stored), 2 * layers * micro_batches
        ),
        Message("all-gather", rest * stored, micro_batches),
    ]
    if not full:
        return [*gathers, gradients]
    return [
        *gathers,
        Message("reduce-scatter", 4 * sizes.layer, layers * micro_batches),
        Message("reduce-scatter", 4 * rest, micro_batches),
    ]


def micro_batches_of(config: RunConfig, tokens: float, examples: int) -> int:
    """Return the micro-batches of a rank's part of a step; cut by tokens, about so many."""
    budget = decide_micro_batch_tokens(config)
    if budget is None:
        return math.ceil(examples / min(config.train.per_device_train_batch_size, examples))
    return max(1, math.ceil(tokens / budget))


def gathered_bytes(
    config: RunConfig, decoder: DecoderConfig, sizes: ModelSizes, widths: tuple[int, int]
) -> int:
    """Return the bytes of a shared model that a rank holds at most beside its own rows.

    - what is outside the layers (embedding, norm, head), whole from the first use to the last;
    - the layer that computes and the next one, already on its way;
    - where all is trained: the layer's gradient, once as it is computed and once in fp32, as it is
      sent; or the rest's gradients so, where they are more (but the head's, which is the loss's);
      and the head in the precision that is computed in.
    """
    compute, stored = widths
    rest = sizes.outside_layers
    if config.train.method != "full":
        return 2 * sizes.layer * stored + rest * stored
    head = decoder.vocab_size * decoder.hidden_size
    lowered = head * compute if compute != stored else 0
    of_layers = 2 * sizes.layer * compute + sizes.layer * (compute + 4)
    return rest * stored + lowered + max(of_layers, 4 * (2 * rest - head))


def rank_facts(
    config: RunConfig,
    lengths: Sequence[int] | None,
    document: Mapping[str, Any],
    decoder: DecoderConfig | None,
    sizes: ModelSizes | None,
    widths: tuple[int, int],
) -> dict[str, Any]:
    """Return of the document what a rank does and sends in a step; null where it is not known."""
    ranks, shares = document["world_size"], document["rank_shares"]
    mean = config.data.max_length
    if lengths is not None and len(lengths):
        mean = sum(int(length) for length in lengths) / len(lengths)
    tokens = mean * document["effective_batch_size"] / ranks
    sent = None
    if decoder is not None and sizes is not None and ranks > 1:
        count = micro_batches_of(config, tokens, shares[0])
        sharding = document["sharding"]
        messages = messages_of_a_step(config, decoder, sizes, sharding, count, widths)
        sent = communication_bytes(messages, ranks)
    return {"tokens_per_rank": round(tokens), "communication_bytes": sent}
