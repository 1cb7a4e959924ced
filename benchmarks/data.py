"""Data: tokenisation beside the stack, and the plan of an epoch.

    python -m benchmarks.data [tokenise] [plan] [--rows 4000] [--rounds 3]

Sides take turns, each in a process of its own, and must have made the same tokens. The stack's side
is what `datasets.map` calls: its tokenizer over batches of 1,000 rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.fixtures import DEMO, MAX_LENGTH, examples_of, ragged_rows
from benchmarks.harness import Fault, timed

LATHE, LATHE_AGAIN = "lathe, file to cache", "lathe, from the cache"
LIBRARY = "tokenizers, encode_batch_fast alone"
STACK = "transformers, batches of 1,000"


def report(part: str, side: str, figures: Sequence[float], unit: str, **more: Any) -> None:
    """Print a line and append its record: the median, the least and the most."""
    middle = median(figures)
    print(f"{part:<12} {side:<52} {middle:12,.3f} {unit}", flush=True)
    spread = [min(figures), max(figures)]
    row = {"part": part, "side": side, "median": middle, "spread": spread, "unit": unit}
    harness.append("data", {**row, "rounds": len(figures), **more})


def tokenise(rounds: int, rows: int) -> None:
    """Rows a second from a .jsonl file to tokens, and the second time from Lathe's cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [text for text, _ in ragged_rows(1000)]
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows):
                text = f"# {number}\n{texts[number % len(texts)]}"
                file.write(json.dumps({"text": text}) + "\n")

        def measure(side: str, number: int) -> dict[str, Any]:
            task = {"side": side, "number": number}
            return harness.in_process("data:make_tokens", folder, 600, **task)

        measured = harness.in_turns(_SIDES, rounds, measure)
    digests = {side: figure["digest"] for side, found in measured.items() for figure in found}
    if len(set(digests.values())) > 1:
        raise Fault(f"the sides made different tokens: {digests}")
    for side, figures in measured.items():
        rates = [rows / figure["seconds"] for figure in figures]
        report("tokenise", side, rates, "rows/s", rows=rows)
    again = [rows / figure["again"] for figure in measured[LATHE]]
    report("tokenise", LATHE_AGAIN, again, "rows/s", rows=rows)


def make_tokens(folder: Path, side: str, number: int) -> dict[str, Any]:
    """Be one side of `tokenise`: return seconds and a digest of the tokens of texts.jsonl."""
    call = _SIDES[side](folder / "texts.jsonl", folder / f"cache-{number}")
    seconds, made = timed(call)
    figures = {"seconds": seconds}
    if side == LATHE:
        figures["again"], again = timed(call)
        assert again.fingerprint == made.fingerprint
        made = [example.input_ids for example in made]
    tokens = b"|".join(np.asarray(row, dtype=np.int32).tobytes() for row in made)
    return {**figures, "digest": hashlib.sha256(tokens).hexdigest()}


def _with_lathe(path: Path, cache: Path) -> Callable[[], Any]:
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO / "base")
    prompt_format = PromptFormat(text_field="text", append_eos=False)
    return lambda: examples_of(path, tokenizer, prompt_format, cache_root=cache)


def _with_library(path: Path, _: Path) -> Callable[[], Any]:
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json")).encode_batch_fast
    texts = _texts(path)
    return lambda: [encoding.ids[:MAX_LENGTH] for encoding in encode(texts)]


def _with_stack(path: Path, _: Path) -> Callable[[], Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    encode = functools.partial(tokenizer, truncation=True, max_length=MAX_LENGTH)

    def encode_all() -> list[list[int]]:
        texts = _texts(path)
        batches = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
        return [row for batch in batches for row in encode(batch)["input_ids"]]

    return encode_all


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


_SIDES = {LATHE: _with_lathe, LIBRARY: _with_library, STACK: _with_stack}


def plan(rounds: int, _: int) -> None:
    """Milliseconds to plan an epoch of 100,000 rows, and to cut it into micro-batches."""
    from benchmarks import product

    random, ids = np.random.default_rng(0), np.ones(MAX_LENGTH, dtype=np.int32)
    examples = product.Documents(ids[:n] for n in random.integers(16, MAX_LENGTH, 100_000))
    settings = {"train.num_train_epochs": 1, "train.micro_batch_tokens": 4096}
    settings |= {"data.group_by_length": True, "data.max_length": MAX_LENGTH}
    config = product.load_config(overrides=settings)
    planned = product.plan_run(config, len(examples), num_valid=0)
    read: Any = SimpleNamespace(train=examples, tokenizer=SimpleNamespace(pad_id=0))
    batches = product.StepBatches.of(config, planned, read)

    def cut(number: int) -> int:
        steps = (planned.batch(step)[1:] for step in range(1, planned.steps_per_epoch + 1))
        return sum(part.num_tokens for span in steps for part in batches.cut(number, *span))

    calls: dict[str, Callable[[int], Any]] = {
        "plan": lambda _: product.plan_run(config, len(examples), num_valid=0),
        "order, grouped by length": batches.order,
        "cut": cut,
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):  # in this order: an epoch is cut in the order that was made
        for name, call in calls.items():
            seconds, found = timed(functools.partial(call, number))
            taken[name].append(1000 * seconds)
            if name == "cut" and found != examples.lengths.sum():
                raise Fault(f"the epoch's micro-batches hold {found} tokens, not all")
    for name, figures in taken.items():
        report("plan", f"{name}, 100,000 rows", figures, "ms")


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each part and side as README's lines."""
    parts = list(dict.fromkeys(row["part"] for row in records))
    rows = []
    for row in sorted(records, key=lambda row: parts.index(row["part"])):
        digits = 0 if row["unit"] == "rows/s" else 3
        cell = harness.spread(row["median"], row["spread"], digits, f" {row['unit']}")
        rows.append([row["part"], row["side"], cell])
    return harness.table("what|side|>median (spread)", rows)


PARTS = {"tokenise": tokenise, "plan": plan}


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: both")
    parser.add_argument("--rows", type=int, default=4000, help="rows to tokenise")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.rounds, options.rows)


if __name__ == "__main__":
    main()
