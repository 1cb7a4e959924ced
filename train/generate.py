"""`python -m train.generate`: text from a run, an adapter or a model; the door to it.

(--run RUN | --adapter FOLDER | --model FOLDER) --prompt TEXT completes a prompt, --prompts FILE
those of a file's rows, and --chat talks; prompts are put into the format that the training rows
had, which lies beside the weights. Nothing here imports torch until something is generated.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from train.generation.command import answer, parser
from train.generation.sampling import Sampling
from train.process.command import run_command

if TYPE_CHECKING:
    from models.layers import CausalLM


def generate(
    model: CausalLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Return the token ids that continue a prompt, the one that stopped it left out.

    The draws are a function of the seed alone: they are made on the host in fp64, so that the
    device does not change them.

    Args:
        model: The decoder; it computes in the dtype of its weights, or in the caller's autocast.
        prompt_ids: Ids of the prompt, special tokens included.
        max_new_tokens: Tokens after which to stop; the end of the model's context may come first.
        stop_ids: Ids of which each ends the text.
        temperature: 0 takes the likeliest token each time; else logits are divided by it.
        top_k: Tokens are drawn from so many likeliest; 0 is all.
        top_p: Of these, from the likeliest ones that have this probability together.
        seed: Seed of the draws.

    Raises:
        UserError: A setting out of its range, a prompt that is empty or fills the whole context, or
            logits that are not finite.
    """
    from train.generation.decode import Asked, write

    sampling = Sampling(max_new_tokens, stop_ids, temperature, top_k, top_p, seed)
    (one,) = write(model, [Asked(prompt_ids)], sampling)
    return one.ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit code."""
    return run_command(lambda: answer(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
