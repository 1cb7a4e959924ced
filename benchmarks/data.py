"""Start-up and data: imports, tokenisation, conversations, the plan, the time to the first step.

    python -m benchmarks.data [imports] [tokenise] [conversations] [plan] [first-step]
                              [--rows 4000] [--rounds 3]

Sides take turns, each in a process of its own, and must have made the same tokens. `datasets.map`
runs with as many processes as there are cores where `datasets` is installed; what it calls, the
stack's tokenizer over batches of 1,000 rows, runs in any case, in one process and in as many.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.fixtures import (
    DEMO,
    MAX_LENGTH,
    MODELS,
    ROOT,
    ChildError,
    answer,
    child,
    ragged_rows,
    write_base,
    write_rows,
)

_BATCH_ROWS = 1000  # what `datasets.map(batched=True)` hands to its function
# What a run imports once it begins (`train.run` itself imports none of it).
_RUN_IMPORTS = "from train import finish, loop"


def report(part: str, side: str, figures: Sequence[float], unit: str, **more: Any) -> None:
    """Print a line and append its record: the median, the least and the most."""
    middle = median(figures)
    print(f"{part:<12} {side:<52} {middle:12,.3f} {unit}", flush=True)
    spread = [min(figures), max(figures)]
    row = {"part": part, "side": side, "median": middle, "spread": spread, "unit": unit}
    record.append("data", {**row, "rounds": len(figures), **more})


# --- imports -------------------------------------------------------------------------------------


def imports(rounds: int) -> None:
    """Seconds of a whole process that answers or imports, and which modules take them."""
    commands = {
        "python": ["-c", "pass"],
        "train.run --help": ["-m", "train.run", "--help"],
        "train.run --list-presets": ["-m", "train.run", "--list-presets"],
        "import torch": ["-c", "import torch"],
        "imports of a run": ["-c", _RUN_IMPORTS],
        "imports of transformers Trainer + PEFT": [
            "-c",
            "import peft; from transformers import Trainer",
        ],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            _python(*command)
            taken[name].append(time.perf_counter() - started)
    for name, command in commands.items():
        slowest = slowest_imports(_python("-X", "importtime", *command).stderr)
        report("imports", name, taken[name], "s", slowest=slowest)
        print(" " * 13 + ", ".join(f"{module} {seconds:.2f}" for module, seconds in slowest))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"python {' '.join(arguments)}:\n{done.stderr}")
    return done


def slowest_imports(text: str, count: int = 6) -> list[tuple[str, float]]:
    """Return the packages whose modules take longest, in seconds of their own, from -X importtime.

    A line is `import time: OWN | CUMULATIVE | MODULE`, in microseconds.
    """
    own: dict[str, float] = {}
    for line in text.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            package = parts[2].strip().partition(".")[0]
            own[package] = own.get(package, 0.0) + int(parts[0]) / 1e6
    return sorted(own.items(), key=lambda pair: -pair[1])[:count]


# --- tokenisation --------------------------------------------------------------------------------

LATHE, LATHE_AGAIN = "lathe, file to cache", "lathe, from the cache"
LIBRARY = "tokenizers, encode_batch_fast alone"
STACK = "transformers, batches of 1,000"
STACK_PROCESSES = "transformers, batches of 1,000, a process a core"
DATASETS = "datasets.map, batched, a process a core"


def write_texts(path: Path, count: int) -> None:
    """Write `count` different rows of real functions."""
    texts = [text for text, _ in ragged_rows(1000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"# {number}\n{texts[number % len(texts)]}"
            file.write(json.dumps({"text": text}) + "\n")


def tokenise(rounds: int, rows: int) -> None:
    """Rows a second from a .jsonl file to tokens, and the second time from Lathe's cache."""
    sides = [LATHE, LIBRARY, STACK, STACK_PROCESSES]
    if importlib.util.find_spec("datasets") is not None:
        sides.append(DATASETS)
    taken: dict[str, list[float]] = {side: [] for side in [*sides, LATHE_AGAIN]}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", rows)
        for number in range(rounds):
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                arguments = ["--worker", side, str(folder), str(number)]
                try:
                    figures = child("benchmarks.data", arguments, folder, 600)
                except ChildError as error:
                    sys.exit(str(error))
                digests[side] = figures["digest"]
                taken[side].append(rows / figures["seconds"])
                if side == LATHE:
                    taken[LATHE_AGAIN].append(rows / figures["again"])
    if len(set(digests.values())) > 1:
        sys.exit(f"the sides made different tokens: {digests}")
    for side, figures in taken.items():
        report("tokenise", side, figures, "rows/s", rows=rows)


def work(side: str, folder: Path, number: str) -> None:
    """Be one side: make the tokens of texts.jsonl, and print seconds and a digest of them."""
    path = folder / "texts.jsonl"
    make = {
        LATHE: _with_lathe,
        LIBRARY: _with_library,
        STACK: _with_stack,
        STACK_PROCESSES: _with_stack_processes,
        DATASETS: _with_datasets,
    }[side]
    ids, seconds, more = make(path, folder / f"cache-{number}")
    digest = hashlib.sha256()
    for row in ids:
        digest.update(np.asarray(row, dtype=np.int32).tobytes() + b"|")
    answer({"seconds": seconds, "digest": digest.hexdigest(), **more})


Made = tuple[Sequence[Any], float, dict[str, float]]


def _with_lathe(path: Path, cache: Path) -> Made:
    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO / "base")

    def load() -> tuple[Any, float]:
        started = time.perf_counter()
        examples = load_examples(
            str(path),
            split_column=None,
            split=None,
            tokenizer=tokenizer,
            prompt_format=PromptFormat(text_field="text", append_eos=False),
            max_length=MAX_LENGTH,
            on_overflow="truncate",
            cache_root=cache,
        )
        return examples, time.perf_counter() - started

    examples, seconds = load()
    again, seconds_again = load()
    assert again.fingerprint == examples.fingerprint
    return [example.input_ids for example in examples], seconds, {"again": seconds_again}


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _with_library(path: Path, _: Path) -> Made:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    texts = _texts(path)
    started = time.perf_counter()
    ids = [encoding.ids[:MAX_LENGTH] for encoding in tokenizer.encode_batch_fast(texts)]
    return ids, time.perf_counter() - started, {}


def _stack_tokenizer() -> Callable[[list[str]], list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    return lambda texts: tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def _with_stack(path: Path, _: Path) -> Made:
    encode = _stack_tokenizer()
    started = time.perf_counter()
    texts = _texts(path)
    ids: list[list[int]] = []
    for start in range(0, len(texts), _BATCH_ROWS):
        ids += encode(texts[start : start + _BATCH_ROWS])
    return ids, time.perf_counter() - started, {}


def _with_stack_processes(path: Path, _: Path) -> Made:
    import multiprocessing

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the library asks for in forked processes
    global _encode
    _encode = _stack_tokenizer()
    cores = len(os.sched_getaffinity(0))
    started = time.perf_counter()
    texts = _texts(path)
    batches = [texts[start : start + _BATCH_ROWS] for start in range(0, len(texts), _BATCH_ROWS)]
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        ids = [row for batch in pool.map(_encode_batch, batches, chunksize=1) for row in batch]
    return ids, time.perf_counter() - started, {}


_encode: Callable[[list[str]], list[list[int]]]


def _encode_batch(texts: list[str]) -> list[list[int]]:
    return _encode(texts)


def _with_datasets(path: Path, cache: Path) -> Made:
    import datasets  # pyright: ignore[reportMissingImports]  # compared where it is installed

    encode = _stack_tokenizer()
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    made = rows.map(
        lambda batch: {"input_ids": encode(batch["text"])},
        batched=True,
        num_proc=len(os.sched_getaffinity(0)),
        remove_columns=["text"],
    )
    seconds = time.perf_counter() - started
    return made["input_ids"], seconds, {}


# --- conversations -------------------------------------------------------------------------------

ANSWERS, ALL = "lathe, answers trained", "lathe, completion_only=false"
MASKS = "transformers apply_chat_template, with assistant masks"
CHAT = "transformers apply_chat_template, tokens alone"
PAIRS = (5, 40, 200)  # of turns in a row
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
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<|im_start|>", "<|im_end|>")
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    settings["chat_template"] = _UNMARKED
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    texts = [text for text, _ in ragged_rows(1000)]
    question, reply = 150, 380
    rows = times * _CHARACTERS // (pairs * (question + reply))
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            messages = []
            for pair in range(row * pairs, (row + 1) * pairs):
                asked, said = texts[pair % 997], texts[pair * 7 % 991]
                messages.append({"role": "user", "content": asked[:question]})
                messages.append({"role": "assistant", "content": said[:reply]})
            file.write(json.dumps({"messages": messages}) + "\n")
    return rows


def conversations(rounds: int) -> None:
    """Seconds and memory from a .jsonl file of conversations to tokens and what is trained."""
    cases = [(f"{pairs} pairs a row", pairs, 1) for pairs in PAIRS]
    for case, pairs, times in [*cases, ("40 pairs a row, 4 times the rows", 40, 4)]:
        sides = (ANSWERS, ALL, MASKS, CHAT)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, list[float]] = {side: [] for side in sides}
        made: dict[str, dict[str, str]] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = write_conversations(folder, pairs, times)
            for number in range(rounds):
                for side in sides[:: 1 if number % 2 == 0 else -1]:
                    arguments = ["--worker", side, str(folder), str(number)]
                    try:
                        figures = child("benchmarks.data", arguments, folder, 600)
                    except ChildError as error:
                        sys.exit(str(error))
                    made[side] = figures["digests"]
                    taken[side].append(figures["seconds"])
                    peaks[side].append(figures["peak_bytes"] / 2**20)
        if len({digests["tokens"] for digests in made.values()}) > 1:
            sys.exit(f"the sides made different tokens: {made}")
        if made[ANSWERS]["trained"] != made[MASKS]["trained"]:
            sys.exit(f"the sides train different tokens: {made}")
        for side in sides:
            part = f"conversations, {case}"
            report(part, side, taken[side], "s", rows=rows)
            report(part, f"{side}: peak of the process", peaks[side], "MiB", rows=rows)


def _chats_with_lathe(folder: Path, completion_only: bool) -> tuple[list[Any], list[Any], float]:
    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    started = time.perf_counter()
    examples = load_examples(
        str(folder / "chats.jsonl"),
        split_column=None,
        split=None,
        tokenizer=tokenizer,
        prompt_format=PromptFormat("messages", completion_only=completion_only),
        max_length=10**6,
        on_overflow="truncate",
        cache_root=None,
    )
    seconds = time.perf_counter() - started
    ids = [example.input_ids for example in examples]
    return ids, [example.labels != -100 for example in examples], seconds


def _chats_with_stack(folder: Path, masks: bool) -> tuple[list[Any], list[Any], float]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    started = time.perf_counter()
    with (folder / "chats.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
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


def work_on_conversations(side: str, folder: Path) -> None:
    """Be one side of `conversations`: print seconds, and digests of the tokens and the labels."""
    if side in (ANSWERS, ALL):
        ids, trained, seconds = _chats_with_lathe(folder, side == ANSWERS)
    else:
        ids, trained, seconds = _chats_with_stack(folder, side == MASKS)
    digests = {
        name: hashlib.sha256(b"|".join(row.tobytes() for row in rows)).hexdigest()
        for name, rows in (("tokens", ids), ("trained", trained))
    }
    answer({"seconds": seconds, "digests": digests})


# --- plan ----------------------------------------------------------------------------------------


class Lengths:
    """Examples of given lengths, all of token 1, for what reads nothing else."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths
        self.ids = np.ones(int(lengths.max()), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> Any:
        from data.examples import Example

        ids = self.ids[: self.lengths[position]]
        return Example(position, ids, ids, 0)


def plan(rounds: int) -> None:
    """Milliseconds to plan an epoch of 100,000 rows, and to cut it into micro-batches."""
    from data.batch import Batching
    from train.batches import StepBatches
    from train.config.load import load_config
    from train.plan.steps import plan_run

    random = np.random.default_rng(0)
    examples = Lengths(random.integers(16, MAX_LENGTH, 100_000))
    config = load_config(overrides={"train.num_train_epochs": 1})
    planned = plan_run(config, len(examples), num_valid=0)
    batches = StepBatches(
        examples=examples,  # pyright: ignore[reportArgumentType]  # of lengths alone
        seed=42,
        shuffle=True,
        group_by_length=True,
        effective_batch_size=planned.effective_batch_size,
        batching=Batching(
            micro_batch_size=8,
            micro_batch_tokens=4096,
            layout="unpadded",
            max_length=MAX_LENGTH,
            pad_id=0,
        ),
    )
    taken: dict[str, list[float]] = {"plan": [], "order, grouped by length": [], "cut": []}
    for number in range(rounds):
        started = time.perf_counter()
        plan_run(config, len(examples), num_valid=0)
        taken["plan"].append(time.perf_counter() - started)
        started = time.perf_counter()
        batches.order(number)
        taken["order, grouped by length"].append(time.perf_counter() - started)
        started = time.perf_counter()
        tokens = 0
        for step in range(1, planned.steps_per_epoch + 1):
            _, start, stop = planned.batch(step)
            tokens += sum(part.num_tokens for part in batches.cut(number, start, stop))
        taken["cut"].append(time.perf_counter() - started)
        if tokens != examples.lengths.sum():
            sys.exit(f"the epoch's micro-batches hold {tokens} tokens, not all")
    for name, figures in taken.items():
        report("plan", f"{name}, 100,000 rows", [1000 * seconds for seconds in figures], "ms")


# --- first step ----------------------------------------------------------------------------------


def first_step(rounds: int) -> None:
    """Seconds from the start of the process to the first step's metrics, and to the end of it.

    One step of the small model over 8 rows; the peer's process is that of `benchmarks.versus_peft`,
    to its end, and its loss must be the same.
    """
    from benchmarks.fixtures import FP32_BOUND
    from benchmarks.versus_peft import PeftSide, description

    names = ("lathe, cold", "lathe, tokens cached", "lathe, whole process", "peft, whole process")
    taken: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(MODELS["small"], folder)
        write_rows(folder, 0, 1)
        peer = json.dumps(description("small", PeftSide("longest"), 1))
        for number in range(rounds):
            seconds, _, loss = _first_metrics(folder, f"cold-{number}", number)
            taken[names[0]].append(seconds)
            seconds, whole, _ = _first_metrics(folder, f"warm-{number}", number)
            taken[names[1]].append(seconds)
            taken[names[2]].append(whole)
            started = time.perf_counter()
            try:
                arguments = ["--worker", peer, str(folder)]
                figures = child("benchmarks.versus_peft", arguments, folder, 600)
            except ChildError as error:
                sys.exit(str(error))
            taken[names[3]].append(time.perf_counter() - started)
            if abs(figures["loss"][0] - loss) > FP32_BOUND:
                sys.exit(
                    f"the first loss is {loss} in one stack, {figures['loss'][0]} in the other"
                )
    for side, figures in taken.items():
        report("first step", side, figures, "s")


def _first_metrics(folder: Path, run: str, number: int) -> tuple[float, float, float]:
    """Run one step; return seconds to its metrics, seconds of the process, and its loss."""
    output = folder / run
    settings = {
        "model.path": folder,
        "data.train": folder / "rows.jsonl",
        "data.max_length": MAX_LENGTH,
        "data.shuffle": "false",
        "train.max_steps": 1,
        "train.precision": "fp32",
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.output_dir": output,
        "lora.r": 16,
        "lora.lora_dropout": 0,
        "log.tensorboard": "false",
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    metrics = output / "metrics.jsonl"
    log = folder / f"{run}.log"
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
        sys.exit(log.read_text(encoding="utf-8"))
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return seconds, whole, first["loss"]


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest record of each part and side as README's lines."""
    newest = {(row["part"], row["side"]): row for row in records}
    parts = list(dict.fromkeys(part for part, _ in newest))
    lines = ["| what | side | median (spread) |", "|---|---|---:|"]
    for (part, side), row in sorted(newest.items(), key=lambda item: parts.index(item[0][0])):
        figures = [row["median"], *row["spread"]]
        digits = 0 if row["unit"] == "rows/s" else 3
        middle, low, high = (f"{figure:,.{digits}f}" for figure in figures)
        lines.append(f"| {part} | {side} | {middle} {row['unit']} ({low} to {high}) |")
    return lines


def main() -> None:
    """Answer the command line."""
    parts = ("imports", "tokenise", "conversations", "plan", "first-step")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--rows", type=int, default=4000, help="rows to tokenise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, folder, number = options.worker
        if side in (ANSWERS, ALL, MASKS, CHAT):
            work_on_conversations(side, Path(folder))
        else:
            work(side, Path(folder), number)
        return
    for part in options.parts or parts:
        if part == "imports":
            imports(options.rounds)
        elif part == "tokenise":
            tokenise(options.rounds, options.rows)
        elif part == "conversations":
            conversations(options.rounds)
        elif part == "plan":
            plan(options.rounds)
        else:
            first_step(options.rounds)


if __name__ == "__main__":
    main()
