"""How many held-out holes (`data/fim.py`) the model fills exactly: `eval.holes`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import islice

from data.examples import Example, Examples
from data.fim import ROOM, FimTokens
from models.layers import CausalLM
from train.generate import generate
from train.generation.decode import room
from train.generation.loaded import find_stop_ids
from train.state import EvalResult, Run


def with_holes(run: Run, examples: Examples, result: EvalResult) -> EvalResult:
    """Return an evaluation with how many of the set's first `eval.holes` holes are filled."""
    asked, world = run.config.eval.holes, run.world
    if asked == 0:
        return result
    fim = run.data.fim
    assert fim is not None  # `refuse_with_holes` saw to it
    started = time.perf_counter()
    chosen = list(islice((example for example in examples if example.has_hole), asked))
    stop_ids = find_stop_ids(run.model.config, run.data.tokenizer, run.source.folder)
    stop_ids |= {fim.tokens.end_id}
    # A shared model's passes are collectives: there every rank fills every hole.
    own = chosen if world.shards else chosen[world.rank :: world.size]
    if not math.isfinite(result.loss):  # a text of such numbers is none
        own = []
    with run.precision.autocast():
        filled = sum(is_filled(run.model, example, fim.tokens, stop_ids) for example in own)
    if not world.shards:
        filled = int(world.sums(filled)[0])
    seconds = result.seconds + time.perf_counter() - started
    whole = len(chosen) if math.isfinite(result.loss) else 0
    rate = filled / whole if whole else math.nan
    return replace(result, holes=len(chosen), rates={"exact_match": rate}, seconds=seconds)


def is_filled(
    model: CausalLM, example: Example, tokens: FimTokens, stop_ids: frozenset[int]
) -> bool:
    """Return whether the likeliest text is that of the hole, and ends by itself."""
    ids = example.input_ids.tolist()
    prompt, middle = ids[: example.prompt_length], ids[example.prompt_length : -1]
    # The same text may have more tokens than ours.
    most = min(len(middle) + ROOM, room(model.config, prompt))
    said = generate(model, prompt, max_new_tokens=most, stop_ids=stop_ids)
    return len(said) < most and tokens.text(said) == tokens.text(middle)
