"""Start-up and data: imports, tokenisation, conversations, the plan, the time to the first step.

    python -m benchmarks.data [imports] [tokenise] [conversations] [plan] [first-step]
                              [--rows 4000] [--rounds 3]

Sides take turns, each in a process of its own, and must have made the same tokens. `datasets.map`
runs with as many processes as there are cores where `datasets` is installed; what it calls, the
stack's tokenizer over batches of 1,000 rows, runs in any case.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.fixtures import (
    ACCUMULATION,
    BATCH,
    DEMO,
    FP32_BOUND,
    MAX_LENGTH,
    MODELS,
    RANK,
    examples_of,
    ragged_rows,
    write_base,
    write_rows,
)
from benchmarks.harness import ROOT, Fault, in_process, timed
from benchmarks.peer import PeftSide


def report(part: str, side: str, figures: Sequence[float], unit: str, **more: Any) -> None:
    """Print a line and append its record: the median, the least and the most."""
    middle = median(figures)
    print(f"{part:<12} {side:<52} {middle:12,.3f} {unit}", flush=True)
    spread = [min(figures), max(figures)]
    row = {"part": part, "side": side, "median": middle, "spread": spread, "unit": unit}
    harness.append("data", {**row, "rounds": len(figures), **more})


# --- imports -------------------------------------------------------------------------------------

_IMPORTS = {
    "python": "-c|pass",
    "train.run --help": "-m|train.run|--help",
    "train.run --list-presets": "-m|train.run|--list-presets",
    "import torch": "-c|import torch",
    "imports of a run": "-c|from benchmarks import product",
    "imports of transformers Trainer + PEFT": "-c|import peft; from transformers import Trainer",
}


def imports(rounds: int, _: int) -> None:
    """Seconds of a whole process that answers or imports (what it imports: -X importtime)."""

    def measure(name: str, _: int) -> float:
        command = [sys.executable, *_IMPORTS[name].split("|")]
        return timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))[0]

    for name, taken in harness.in_turns(_IMPORTS, rounds, measure).items():
        report("imports", name, taken, "s")


# --- tokenisation --------------------------------------------------------------------------------

_BATCH_ROWS = 1000  # what `datasets.map(batched=True)` hands to its function
LATHE, LATHE_AGAIN = "lathe, file to cache", "lathe, from the cache"
LIBRARY = "tokenizers, encode_batch_fast alone"
STACK = "transformers, batches of 1,000"
DATASETS = "datasets.map, batched, a process a core"


def tokenise(rounds: int, rows: int) -> None:
    """Rows a second from a .jsonl file to tokens, and the second time from Lathe's cache."""
    sides = [LATHE, LIBRARY, STACK]
    if importlib.util.find_spec("datasets") is not None:
        sides.append(DATASETS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [text for text, _ in ragged_rows(1000)]
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows):
                text = f"# {number}\n{texts[number % len(texts)]}"
                file.write(json.dumps({"text": text}) + "\n")

        def measure(side: str, number: int) -> dict[str, Any]:
            return in_process("data:make_tokens", folder, 600, side=side, number=number)

        measured = harness.in_turns(sides, rounds, measure)
    _same("made different tokens", measured, "digest")
    for side, figures in measured.items():
        rates = [rows / figure["seconds"] for figure in figures]
        report("tokenise", side, rates, "rows/s", rows=rows)
    again = [rows / figure["again"] for figure in measured[LATHE]]
    report("tokenise", LATHE_AGAIN, again, "rows/s", rows=rows)


def _same(fault: str, measured: Mapping[Any, Iterable[Mapping[str, Any]]], name: str) -> None:
    """End the benchmark unless all sides have one digest under a name."""
    digests = {side: figure[name] for side, figures in measured.items() for figure in figures}
    if len(set(digests.values())) > 1:
        raise Fault(f"the sides {fault}: {digests}")


def make_tokens(folder: Path, side: str, number: int) -> dict[str, Any]:
    """Be one side of `tokenise`: return seconds and a digest of the tokens of texts.jsonl."""
    make = {
        LATHE: _with_lathe,
        LIBRARY: _with_library,
        STACK: _with_stack,
        DATASETS: _with_datasets,
    }[side]
    call = make(folder / "texts.jsonl", folder / f"cache-{number}")
    seconds, made = timed(call)
    figures = {"seconds": seconds}
    if side == LATHE:
        figures["again"], again = timed(call)
        assert again.fingerprint == made.fingerprint
        made = [example.input_ids for example in made]
    return {**figures, "digest": _digest(np.asarray(row, dtype=np.int32) for row in made)}


def _digest(rows: Iterable[np.ndarray]) -> str:
    return hashlib.sha256(b"|".join(row.tobytes() for row in rows)).hexdigest()


def _with_lathe(path: Path, cache: Path) -> Callable[[], Any]:
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO / "base")
    prompt_format = PromptFormat(text_field="text", append_eos=False)
    return lambda: examples_of(path, tokenizer, prompt_format, cache_root=cache)


def _with_library(path: Path, _: Path) -> Callable[[], Any]:
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json")).encode_batch_fast
    texts = _values(path, "text")
    return lambda: [encoding.ids[:MAX_LENGTH] for encoding in encode(texts)]


def _values(path: Path, key: str) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)[key] for line in file]


def _stack_tokenizer() -> Callable[[list[str]], list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    return lambda texts: tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def _with_stack(path: Path, _: Path) -> Callable[[], Any]:
    encode = _stack_tokenizer()

    def encode_all() -> list[list[int]]:
        texts = _values(path, "text")
        starts = range(0, len(texts), _BATCH_ROWS)
        return [row for start in starts for row in encode(texts[start : start + _BATCH_ROWS])]

    return encode_all


def _with_datasets(path: Path, cache: Path) -> Callable[[], Any]:
    import datasets  # pyright: ignore[reportMissingImports]  # compared where it is installed

    encode = _stack_tokenizer()
    files: dict[str, Any] = {"data_files": str(path), "cache_dir": str(cache)}
    settings: dict[str, Any] = {"num_proc": len(os.sched_getaffinity(0)), "batched": True}

    def encode_all() -> Any:
        rows = datasets.load_dataset("json", split="train", **files)
        made = rows.map(
            lambda batch: {"input_ids": encode(batch["text"])}, remove_columns=["text"], **settings
        )
        return made["input_ids"]

    return encode_all


# --- conversations -------------------------------------------------------------------------------

ANSWERS, ALL = "lathe, answers trained", "lathe, completion_only=false"
MASKS = "transformers apply_chat_template, with assistant masks"
CHAT = "transformers apply_chat_template, tokens alone"
CASES = {f"{pairs} pairs a row": (pairs, 1) for pairs in (5, 40, 200)}  # pairs of turns
CASES["40 pairs a row, 4 times the rows"] = (40, 4)
_CHARACTERS = 1_900_000  # of all rows, whatever their pairs
_CHAT_BATCH = 100
# The blocks are transformers' way to know what is trained; Lathe is given the template without.
_MARKED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_UNMARKED = _MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def write_conversations(folder: Path, pairs: int, times: int = 1) -> int:
    """Write rows of so many pairs of turns, and a tokenizer with ChatML; return the rows."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    marks = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in marks]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    settings["chat_template"] = _UNMARKED
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    texts = [text for text, _ in ragged_rows(1000)]
    rows = times * _CHARACTERS // (pairs * (150 + 380))
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            messages = []
            for pair in range(row * pairs, (row + 1) * pairs):
                asked, said = texts[pair % 997], texts[pair * 7 % 991]
                messages.append({"role": "user", "content": asked[:150]})
                messages.append({"role": "assistant", "content": said[:380]})
            file.write(json.dumps({"messages": messages}) + "\n")
    return rows


def conversations(rounds: int, _: int) -> None:
    """Seconds and memory from a .jsonl file of conversations to tokens and what is trained."""
    for case, (pairs, times) in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            rows = write_conversations(Path(name), pairs, times)

            def measure(side: str, _: int, folder: Path = Path(name)) -> dict[str, Any]:
                return in_process("data:make_chats", folder, 600, side=side)

            measured = harness.in_turns((ANSWERS, ALL, MASKS, CHAT), rounds, measure)
        _same("made different tokens", measured, "tokens")
        compared: dict[str, Any] = {side: measured[side] for side in (ANSWERS, MASKS)}
        _same("train different tokens", compared, "trained")
        for side, figures in measured.items():
            part = f"conversations, {case}"
            report(part, side, [figure["seconds"] for figure in figures], "s", rows=rows)
            peaks = [figure["peak_bytes"] / 2**20 for figure in figures]
            report(part, f"{side}: peak of the process", peaks, "MiB", rows=rows)


def make_chats(folder: Path, side: str) -> dict[str, Any]:
    """Be one side of `conversations`: return seconds, and digests of tokens and labels."""
    make = _chats_with_lathe if side in (ANSWERS, ALL) else _chats_with_stack
    ids, trained, seconds = make(folder, side in (ANSWERS, MASKS))
    return {"seconds": seconds, "tokens": _digest(ids), "trained": _digest(trained)}


def _chats_with_lathe(folder: Path, completion_only: bool) -> tuple[list[Any], list[Any], float]:
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    turns = PromptFormat("messages", completion_only=completion_only)
    path = folder / "chats.jsonl"
    seconds, examples = timed(lambda: examples_of(path, tokenizer, turns, max_length=10**6))
    ids = [example.input_ids for example in examples]
    return ids, [example.labels != -100 for example in examples], seconds


def _chats_with_stack(folder: Path, masks: bool) -> tuple[list[Any], list[Any], float]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    started = time.perf_counter()
    rows = _values(folder / "chats.jsonl", "messages")
    ids: list[Any] = []
    trained: list[Any] = []
    for start in range(0, len(rows), _CHAT_BATCH):
        made = tokenizer.apply_chat_template(
            rows[start : start + _CHAT_BATCH],
            chat_template=_MARKED if masks else _UNMARKED,
            return_dict=True,
            return_assistant_tokens_mask=masks,
        )
        ids += [np.array(row, dtype=np.int32) for row in made["input_ids"]]
        trained += [np.array(row, dtype=bool) for row in made["assistant_masks"]] if masks else []
    return ids, trained, time.perf_counter() - started


# --- plan and first step -------------------------------------------------------------------------


_ONE_STEP = (
    f"data.max_length={MAX_LENGTH} data.shuffle=false lora.r={RANK} lora.lora_dropout=0 "
    f"train.per_device_train_batch_size={BATCH} train.gradient_accumulation_steps={ACCUMULATION} "
    "train.max_steps=1 train.precision=fp32 log.tensorboard=false"
)


def plan(rounds: int, _: int) -> None:
    """Milliseconds to plan an epoch of 100,000 rows, and to cut it into micro-batches."""
    from benchmarks import product

    random, ids = np.random.default_rng(0), np.ones(MAX_LENGTH, dtype=np.int32)
    examples = product.Documents(ids[:n] for n in random.integers(16, MAX_LENGTH, 100_000))
    config = product.load_config(overrides={"train.num_train_epochs": 1})
    planned = product.plan_run(config, len(examples), num_valid=0)
    batches = product.StepBatches(
        examples=examples,  # pyright: ignore[reportArgumentType]  # of lengths alone
        seed=42,
        shuffle=True,
        group_by_length=True,
        effective_batch_size=planned.effective_batch_size,
        batching=product.Batching(
            micro_batch_size=8,
            micro_batch_tokens=4096,
            layout="unpadded",
            max_length=MAX_LENGTH,
            pad_id=0,
        ),
    )

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


def first_step(rounds: int, rows: int) -> None:
    """Seconds from the start of the process to the first step's metrics, and to the end of it.

    One step of the small model over 8 rows; the peer's process is that of `benchmarks.versus_peft`,
    to its end, and its loss must be the same.
    """
    names = ("lathe, cold", "lathe, tokens cached", "lathe, whole process", "peft, whole process")
    taken: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(MODELS["small"], folder)
        write_rows(folder, 0, 1)
        task = {"model": "small", "side": vars(PeftSide("longest")), "steps": 1}
        for number in range(rounds):
            cold, _, loss = _first_metrics(folder, f"cold-{number}", number)
            cached, whole, _ = _first_metrics(folder, f"warm-{number}", number)
            peer, figures = timed(lambda: in_process("peer:run_peft", folder, 600, **task))
            for name, seconds in zip(names, (cold, cached, whole, peer), strict=True):
                taken[name].append(seconds)
            theirs = figures["loss"][0]
            if abs(theirs - loss) > FP32_BOUND:
                raise Fault(f"the first loss is {loss} in one stack, {theirs} in the other")
    for side, seconds in taken.items():
        report("first step", side, seconds, "s")


def _first_metrics(folder: Path, run: str, number: int) -> tuple[float, float, float]:
    """Run one step; return seconds to its metrics, seconds of the process, and its loss."""
    output = folder / run
    arguments = [f"model.path={folder}", f"data.train={folder}/rows.jsonl", *_ONE_STEP.split()]
    arguments.append(f"train.output_dir={output}")
    metrics, log = output / "metrics.jsonl", folder / f"{run}.log"
    with log.open("w", encoding="utf-8") as sink:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "train.run", *arguments],
            cwd=ROOT,
            env=os.environ | {"LATHE_CACHE": str(folder / f"cache-{number}")},
            stdout=sink,
            stderr=sink,
        )
        seconds = 0.0
        while process.poll() is None:
            if not seconds and metrics.exists() and metrics.stat().st_size:
                seconds = time.perf_counter() - started
            time.sleep(0.005)
        whole = time.perf_counter() - started
    if process.returncode != 0 or not seconds:
        raise Fault(log.read_text(encoding="utf-8"))
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return seconds, whole, first["loss"]


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each part and side as README's lines."""
    parts = list(dict.fromkeys(row["part"] for row in records))
    rows = []
    for row in sorted(records, key=lambda row: parts.index(row["part"])):
        digits = 0 if row["unit"] == "rows/s" else 3
        cell = harness.spread(row["median"], row["spread"], digits, f" {row['unit']}")
        rows.append([row["part"], row["side"], cell])
    return harness.table("what|side|>median (spread)", rows)


PARTS = {
    "imports": imports,
    "tokenise": tokenise,
    "conversations": conversations,
    "plan": plan,
    "first-step": first_step,
}


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--rows", type=int, default=4000, help="rows to tokenise")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.rounds, options.rows)


if __name__ == "__main__":
    main()
