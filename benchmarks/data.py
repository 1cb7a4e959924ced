"""Data: tokenisation beside the stack, the plan of an epoch, and lint.

    python -m benchmarks.data [tokenise] [plan] [lint] [--rows 4000] [--rounds 3]

Sides take turns, each in a process of its own, and must have made the same tokens. The stack's side
is what `datasets.map` calls: its tokenizer over batches of 1,000 rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.fixtures import (
    DEMO,
    MAX_LENGTH,
    examples_of,
    ragged_rows,
    standard_library_functions,
)
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


_BLOCK, _BLOCKS = 160, 3  # characters of the standard library at a stretch, and how many a row has


def lint(rounds: int, rows: int) -> None:
    """Rows a second of `lathe lint`, and its memory; what is planted twice must be found."""
    text = "".join(standard_library_functions())
    blocks = [text[start : start + _BLOCK] for start in range(0, len(text) - _BLOCK, _BLOCK)]
    draw = random.Random(0)
    planted = {"duplicate": 0, "near_duplicate": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
            made = ""
            for number in range(rows):
                if number % 50 == 24:  # the row before, once more
                    planted["duplicate"] += 1
                elif number % 50 == 49:
                    planted["near_duplicate"] += 1
                    made = f"# copy {number}\n{made}"
                else:
                    made = "".join(draw.choices(blocks, k=_BLOCKS))
                file.write(json.dumps({"text": made}) + "\n")
        found = [harness.in_process("data:lint_rows", folder) for _ in range(rounds)]
    for kind, count in planted.items():
        if any(figures[kind] < count for figures in found):
            raise Fault(f"{count} rows are each a {kind}: not all were found ({found})")
    side = f"lathe lint, {rows:,} rows"
    report("lint", side, [rows / figures["seconds"] for figures in found], "rows/s", rows=rows)
    report("lint", f"{side}, CPU", [figures["cpu_seconds"] for figures in found], "s", rows=rows)
    peaks = [figures["peak_bytes"] / 2**20 for figures in found]
    report("lint", f"{side}, peak", peaks, "MiB", rows=rows)


def lint_rows(folder: Path) -> dict[str, Any]:
    """Lint texts.jsonl; return the seconds, those of all its threads, and what was found twice."""
    from benchmarks import product
    from train.inputs.lint import lint as lint_of

    settings = {"data.train": str(folder / "texts.jsonl"), "model.path": str(DEMO / "base")}
    config = product.load_config(overrides=settings)
    seconds, (scan, *_) = timed(lambda: lint_of(config))
    counts = {kind: found.count for kind, found in scan.findings}
    kinds = ("duplicate", "near_duplicate")
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        **{kind: counts.get(kind, 0) for kind in kinds},
    }


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each part and side as README's lines."""
    parts = list(dict.fromkeys(row["part"] for row in records))
    rows = []
    for row in sorted(records, key=lambda row: parts.index(row["part"])):
        digits = 0 if row["unit"] == "rows/s" else 3
        cell = harness.spread(row["median"], row["spread"], digits, f" {row['unit']}")
        rows.append([row["part"], row["side"], cell])
    return harness.table("what|side|>median (spread)", rows)


PARTS = {"tokenise": tokenise, "plan": plan, "lint": lint}


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--rows", type=int, default=4000, help="rows to tokenise, or to lint")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.rounds, options.rows)


if __name__ == "__main__":
    main()
