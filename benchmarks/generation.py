"""Generation: new tokens a second, beside transformers' `generate` of the same model.

    python -m benchmarks.generation [small] [base] [--rounds 5] [--tokens 64] [--dtype fp32]

Greedy, over random weights, with a key-value cache: one prompt of 128 tokens, and a batch of 8 of
16 to 128. Sides take turns in one process, after a round that does not count, and in fp32 must have
written the same tokens. transformers pads a batch on the left, and is told its mask.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.fixtures import MODELS, Fixture, write_base
from benchmarks.harness import Fault, timed

SIDES = LATHE, STACK = ("lathe", "transformers generate")
# 3.8 M parameters in the style of StarCoder2; 108 M in that of Qwen2, with a head of 32,000 tokens.
SUBJECTS = {
    "small": MODELS["small"],
    "base": Fixture(
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32_000,
        }
    ),
}
LENGTHS = {"one prompt": (128,), "a batch of 8": tuple(range(16, 129, 16))}
Write = Callable[[Sequence[list[int]], int], list[list[int]]]


def with_lathe(folder: Path, dtype: torch.dtype) -> Write:
    """Return what writes so many tokens behind prompts, with Lathe."""
    from models import load_model
    from train.generation.decode import Asked, write
    from train.generation.sampling import Sampling

    model: Any = load_model(folder, dtype=dtype)

    def run(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        return [one.ids for one in write(model, [Asked(p) for p in prompts], Sampling(tokens))]

    return run


def with_stack(folder: Path, dtype: torch.dtype) -> Write:
    """Return what writes so many tokens behind prompts, with transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None  # all tokens are written
    model.generation_config.pad_token_id = 0

    def run(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
        return made[:, longest:].tolist()

    return run


def measure(subject: str, dtype: str, rounds: int, tokens: int) -> None:
    """Measure a model, one prompt and a batch; print and append a record of each side."""
    with tempfile.TemporaryDirectory() as name:
        parameters = write_base(SUBJECTS[subject], Path(name))
        type_ = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        sides = {LATHE: with_lathe(Path(name), type_), STACK: with_stack(Path(name), type_)}
    random = np.random.default_rng(0)
    for case, lengths in LENGTHS.items():
        prompts = [random.integers(1, 4000, length).tolist() for length in lengths]
        texts: dict[str, list[list[int]]] = {}

        def once(
            side: str,
            number: int,
            prompts: list[list[int]] = prompts,
            texts: dict[str, list[list[int]]] = texts,
        ) -> float | None:
            seconds, texts[side] = timed(lambda: sides[side](prompts, tokens))
            return None if number == 0 else len(prompts) * tokens / seconds

        rates = harness.in_turns(sides, rounds + 1, once)
        if dtype == "fp32" and texts[LATHE] != texts[STACK]:
            raise Fault(f"{subject}, {case}: the sides wrote different tokens: {texts}")
        for side, found in rates.items():
            ratio = median(a / b for a, b in zip(found, rates[STACK], strict=True))
            middle, spread = median(found), [min(found), max(found)]
            print(
                f"{subject:<6} {dtype} {case:<13} {side:<22} {middle:9,.1f} tokens/s ×{ratio:.2f}"
            )
            row = {"model": subject, "case": f"{case}, {dtype}", "side": side, "median": middle}
            row |= {"spread": spread, "ratio": ratio, "rounds": rounds, "tokens": tokens}
            harness.append("generation", {**row, "parameters": parameters})


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each model and case as README's lines, both sides and their ratio."""
    cells: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in records:
        name = f"{row['model']}, {row['parameters'] / 1e6:.1f} M parameters"
        cells.setdefault((name, row["case"]), {})[row["side"]] = row
    rows = [
        [
            *key,
            *(harness.spread(sides[side]["median"], sides[side]["spread"]) for side in SIDES),
            f"{sides[LATHE]['ratio']:.2f}",
        ]
        for key, sides in cells.items()
    ]
    return harness.table("model|prompts|>lathe (tokens/s)|>transformers `generate`|>ratio", rows)


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("models", nargs="*", choices=[*SUBJECTS, []], help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    for subject in options.models or SUBJECTS:
        measure(subject, options.dtype, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
