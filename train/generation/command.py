"""`lathe generate`: one prompt, the rows of a file, or a chat.

What is cheap to refuse is refused before torch is imported, and a file's rows before weights are
read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from files.errors import UserError, counted, no_such_folder
from train.generation.rows import complete_rows, rows_to_complete
from train.generation.sampling import Sampling
from train.plan.decide import PRECISIONS, decide_device, decide_precision
from train.process.command import CommandParser
from train.saving.artifact import run_and_trained

if TYPE_CHECKING:
    from train.generation.loaded import Generator

# What goes with some way of being asked alone: option → the ways.
_GOES_WITH = {
    "out": ("prompts",),
    "column": ("prompts",),
    "batch_size": ("prompts",),
    "system": ("chat",),
}


def answer(options: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit code."""
    sampling = _checked(options)
    if options.prompts is not None:
        return _answer_rows(options, sampling)
    if options.chat:
        from train.generation.chat import Chat, talk

        loaded = _load(options)
        form = loaded.chat_format(options.system)
        talk(Chat(loaded, form, replace(sampling, stop_ids=loaded.stop_ids)))
        return 0
    values = "" if options.fim else _read_prompt(options)
    loaded = _load(options, adapted=not options.compare)
    if options.compare:
        from lora import load_adapter

        print("--- without the adapter")
        _complete(loaded, options, values, sampling)
        load_adapter(loaded.model, loaded.trained)
        print("--- with the adapter")
    _complete(loaded, options, values, sampling)
    return 0


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "generate",
        description="Complete prompts with a run's final model, an adapter, or a model folder. "
        "The likeliest token is taken each time unless --temperature is given, whatever "
        "generation_config.json says; which tokens end a text is read from there too. "
        "The base lies whole on the device, also of a run that streamed its layers.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a run's folder, or one of its checkpoints")
    source.add_argument("--adapter", type=Path, help="an adapter's folder")
    source.add_argument("--model", help="a model's folder or hub id")
    parser.add_argument("--base", help="the adapter's base, if not as adapter_config.json says")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the prompt; without any, standard input is read")
    prompt.add_argument("--prompt-file", type=Path, help="a file with the prompt")
    columns = "one column of the prompt's template; may be given several times"
    prompt.add_argument("--field", action="append", metavar="NAME=VALUE", help=columns)
    prompt.add_argument(
        "--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="fill the hole between two texts"
    )
    rows = "complete every row of a file, as data.train names rows (.jsonl, .json, .csv, .parquet)"
    prompt.add_argument("--prompts", metavar="FILE", help=rows)
    prompt.add_argument(
        "--chat", action="store_true", help="talk: a line is a turn; /reset begins anew"
    )
    parser.add_argument("--raw", action="store_true", help="feed the prompt as it stands")
    parser.add_argument("--system", metavar="TEXT", help="the system's turn of --chat")
    parser.add_argument(
        "--compare", action="store_true", help="without the run's adapter first, then with it"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the text as it is made (default: on a terminal)",
    )
    out = "rows with their completions, as JSON Lines (default: standard output)"
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help=out)
    column = "the completion's column in --out (default: completion)"
    parser.add_argument("--column", metavar="NAME", help=column)
    batch = "rows of --prompts that are completed together (default: 16)"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    top_k = "draw from the K likeliest tokens (0, the default: all)"
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help=top_k)
    top_p = "of these, from the likeliest that have this probability together (default: 1)"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *PRECISIONS])
    return parser


def _checked(options: argparse.Namespace) -> Sampling:
    """Return how tokens are chosen.

    Raises:
        UserError: Options contradict each other, or a value is out of its range.
    """
    sampling = Sampling(
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    sampling.refuse_to_choose_of_one()
    if options.base is not None and options.adapter is None:
        raise UserError("--base goes with --adapter alone")
    for name, ways in _GOES_WITH.items():
        if getattr(options, name) is not None and not any(getattr(options, way) for way in ways):
            raise UserError(f"--{name.replace('_', '-')} goes with --{ways[0]} alone")
    if options.compare and (options.prompts or options.chat):
        raise UserError("--compare sets two completions of one prompt side by side: give --prompt")
    if options.compare and options.model is not None:
        raise UserError(
            "--compare leaves an adapter out, and --model has none: give --run or --adapter"
        )
    if options.chat and options.raw:
        raise UserError("--raw feeds a text as it stands, and --chat turns: leave one of them out")
    if options.prompts and options.stream:
        raise UserError("--stream shows one text as it is made: leave it out with --prompts")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: {no_such_folder(options.out.parent)}")
    if options.out is not None and options.out.exists():
        raise UserError(f"--out {options.out}: is there already; choose another file")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise UserError(f"--out {options.out}: rows are written as JSON Lines; name it .jsonl")
    return sampling


def _read_prompt(options: argparse.Namespace) -> str | dict[str, str]:
    """Return the prompt or its columns."""
    if options.field:
        for field in options.field:
            if "=" not in field:
                raise UserError(f"--field {field}: must be NAME=VALUE")
        return dict(field.split("=", 1) for field in options.field)
    if options.prompt is not None:
        return options.prompt
    where = options.prompt_file or "standard input"
    try:
        data = options.prompt_file.read_bytes() if options.prompt_file else sys.stdin.buffer.read()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    # The last line end is the editor's or the shell's, unless the prompt is fed as it stands.
    return text if options.raw else text.removesuffix("\n").removesuffix("\r")


def _load(options: argparse.Namespace, *, adapted: bool = True) -> Generator:
    if options.run is not None:
        run_and_trained(options.run)  # what is not there is refused before torch is imported
    import torch

    from train.generation.loaded import load_from_adapter, load_from_model, load_run
    from train.precision import COMPUTE_DTYPES

    device = torch.device(decide_device(options.device))
    dtype = COMPUTE_DTYPES[decide_precision(options.dtype, device.type)]
    if options.run is not None:
        return load_run(options.run, device, dtype, adapted=adapted)
    if options.adapter is not None:
        return load_from_adapter(options.adapter, options.base, device, dtype, adapted=adapted)
    return load_from_model(options.model, device, dtype)


def _complete(
    loaded: Generator,
    options: argparse.Namespace,
    values: str | dict[str, str],
    sampling: Sampling,
) -> None:
    """Print what comes next, and on standard error how it ended."""
    from data.fim import FimTokens
    from train.generation.decode import Asked, decode, room
    from train.generation.stream import TextStream

    stop_ids = loaded.stop_ids
    text: Callable[[Sequence[int]], str] = loaded.tokenizer.decode
    if options.fim:
        prompt_ids = loaded.hole_ids(*options.fim, raw=options.raw)
        tokens = FimTokens(loaded.tokenizer)
        stop_ids, text = stop_ids | {tokens.end_id}, tokens.text
    else:
        prompt_ids = loaded.prompt_ids(values, raw=options.raw)
    shows = sys.stdout.isatty() if options.stream is None else options.stream
    one, stream = Asked(prompt_ids), TextStream(loaded.tokenizer, text)
    started = time.perf_counter()
    for _ in decode(loaded.model, [one], replace(sampling, stop_ids=stop_ids)):
        if shows and (piece := stream.new(one.ids)):
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(stream.rest(one.ids), flush=True)
    ended, count = "ended by itself", len(one.ids)
    if count == room(loaded.model.config, prompt_ids):
        context = counted(count + len(prompt_ids), "token")
        ended = f"stopped at the end of the model's context of {context}"
    elif count == sampling.max_new_tokens:
        ended = f"stopped at --max-new-tokens {count}"
    speed = f"{count / seconds:.1f} tokens/s"
    print(f"[{loaded.name}: {counted(count, 'token')}, {ended}, {speed}]", file=sys.stderr)


def _answer_rows(options: argparse.Namespace, sampling: Sampling) -> int:
    column = options.column or "completion"
    rows = rows_to_complete(options.prompts, column)
    loaded = _load(options)
    prompts = [loaded.ids_of_row(row, raw=options.raw) for row in rows]
    started = time.perf_counter()
    lengths = complete_rows(
        loaded,
        rows,
        prompts,
        replace(sampling, stop_ids=loaded.stop_ids),
        batch_size=options.batch_size or 16,
        column=column,
        out=options.out,
    )
    speed = f"{sum(lengths) / (time.perf_counter() - started):.1f} tokens/s"
    done = f"{counted(len(rows), 'row')}, {counted(sum(lengths), 'token')}"
    print(f"[{loaded.name}: {done}, {speed}]", file=sys.stderr)
    return 0
