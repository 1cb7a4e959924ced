"""Text from a model: greedy or sampled, with a key-value cache.

`python -m train.generate (--run RUN | --adapter FOLDER | --model FOLDER) --prompt TEXT` completes a
prompt with what a run has trained, an adapter over its base, or a model folder. The prompt is put
into the format that the training rows had, which lies beside the weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.fim import FimTokens
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.errors import UserError, counted, no_such_folder
from files.hub import resolve_model
from files.strict_json import read_json_object
from kernels.segments import Segments
from lora import load_adapter
from models import build, load_model
from models.cache import KeyValueCache
from models.config import DecoderConfig, read_config
from models.layers import CausalLM
from models.weights import fill
from train.config.load import load_config
from train.config.schema import DataSettings
from train.inputs.base_model import find_model, load_base
from train.inputs.dataset import prompt_format
from train.plan.decide import decide_device, decide_precision
from train.precision import COMPUTE_DTYPES
from train.process.command import CommandParser, run_command
from train.saving.artifact import base_of, run_and_trained


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
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
        top_p: Tokens are drawn from the likeliest ones that have this probability together.
        seed: Seed of the draws.

    Raises:
        UserError: A setting out of its range, a prompt that is empty or fills the whole context, or
            logits that are not finite.
    """
    check_settings(max_new_tokens, temperature, top_p)
    count = min(max_new_tokens, room(model.config, prompt_ids))
    device = model.head_weight().device
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(len(prompt_ids) + count)
    ids: list[int] = []
    fed = list(prompt_ids)
    while len(ids) < count:
        segments = Segments.build([len(fed)], device=device, offset=cache.length)
        hidden = model.hidden_states(torch.tensor(fed, device=device), segments, cache)
        logits = F.linear(hidden[-1], model.head_weight().to(hidden.dtype)).cpu()
        token = next_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        if token in stop_ids:
            break
        ids.append(token)
        fed = [token]
    return ids


def next_token(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Return the token that the logits, (V,), choose: the likeliest, or a draw from them."""
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or too large for the "
            "computation's range (--dtype fp32 has the widest)"
        )
    if temperature == 0:
        return int(logits.argmax())
    probabilities = token_probabilities(logits, temperature, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def token_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the probabilities, (V,) fp64, that a token is drawn with.

    They are softmax(logits / temperature), cut to the smallest set of likeliest tokens that have
    `top_p` or more together, and scaled back to a sum of 1. The likeliest token always stays.

    Source: Holtzman et al. 2020, nucleus sampling.
    """
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        probabilities[order[likelier >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


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


def find_stop_ids(config: DecoderConfig, tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """Return every id that ends a text, as tokenizer, config.json and generation_config.json say.

    Raises:
        UserError: generation_config.json is not a JSON object, or its eos_token_id no ids.
    """
    path = folder / "generation_config.json"
    beside = read_json_object(path).get("eos_token_id") if path.is_file() else None
    found: set[int] = set()
    for ids in (tokenizer.eos_id, config.eos_token_id, beside):
        tokens = ids if isinstance(ids, list | tuple) else [ids]
        if any(type(token) not in (int, type(None)) for token in tokens):
            raise UserError(
                f"{path}: eos_token_id is {ids!r}, but must be a token id or a list of them"
            )
        found |= {token for token in tokens if token is not None}
    return frozenset(found)


@dataclass(frozen=True)
class Generator:
    """A model with all that turns a prompt into its completion."""

    model: CausalLM  # the decoder
    tokenizer: Tokenizer  # its tokenizer
    # The format of the rows that it was trained on, None where it is not known.
    prompt_format: PromptFormat | None
    stop_ids: frozenset[int]  # ids that end a text
    name: str  # what was loaded, for people

    def prompt_ids(self, values: str | Mapping[str, Any], *, raw: bool = False) -> list[int]:
        """Return the ids of a prompt or of its columns, in the training rows' format unless `raw`.

        Raises:
            UserError: Columns where there is no format, or a text where several columns are needed.
        """
        form = None if raw else self.prompt_format
        if form is not None:
            columns = form.prompt_columns() if form.format == "template" else ["prompt"]
            if isinstance(values, str) and len(columns) != 1:
                needed = " ".join(f"--field {column}=…" for column in columns) or "--raw"
                raise UserError(
                    f"the prompt's template has {len(columns) or 'no'} columns, which one text "
                    f"cannot fill: use {needed}"
                )
            return form.prompt_ids(values, self.tokenizer)
        if isinstance(values, str):
            return self.tokenizer.encode(values)
        raise UserError("--field needs a prompt format to fill, and there is none: use --prompt")

    def hole_ids(self, prefix: str, suffix: str, *, raw: bool = False) -> list[int]:
        """Return the ids that ask for the middle between two texts, in the tokenizer's own format.

        What stands before every text that was trained on (`data.system_prompt`) stands before the
        prefix too, unless `raw`.

        Raises:
            UserError: The tokenizer has no tokens for it.
        """
        form = self.prompt_format
        if not raw and form is not None and form.format == "text":
            prefix = form.generation_prompt(prefix)
        return FimTokens(self.tokenizer).prompt_ids(prefix, suffix)


def load_run(run: Path, device: torch.device, dtype: torch.dtype) -> Generator:
    """Return what a run has trained: its final model, else its best one, else its last checkpoint.

    `run` may be one of a run's folders too: a checkpoint, `best/` or `final/`.

    Raises:
        UserError: The folder is no run's, nothing is trained yet, or files are missing or damaged.
    """
    run, trained = run_and_trained(run)
    config = load_config(file=run / "config.toml")
    if config.train.method == "lora":
        base = find_model(config, weights=True)
        source = base.folder
        model = load_base(config, base, dtype, device)
        load_adapter(model, trained)
    elif (trained / "config.json").is_file():
        # A checkpoint has no tokenizer of its own.
        whole = (trained / "tokenizer.json").is_file()
        source = trained if whole else find_model(config, weights=False).folder
        model = load_model(trained, dtype=dtype, device=device)
    else:
        source = find_model(config, weights=False).folder
        model = build(read_config(source), attention=config.model.attention)
        fill(model, trained, dtype, device)
    return _generator(model, source, trained, str(trained), config.data)


def load_from_adapter(
    adapter: Path, base: str | None, device: torch.device, dtype: torch.dtype
) -> Generator:
    """Return an adapter over its base, which is `base` or what adapter_config.json names.

    Raises:
        UserError: The folder is no adapter's, no base is named, or files are missing or damaged.
    """
    if not adapter.is_dir():
        raise UserError(f"--adapter {adapter}: {no_such_folder(adapter)}")
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: not an adapter, which has an adapter_config.json; "
            "for a run use --run, for a model --model"
        )
    found = base_of(adapter, base)
    source = found.folder
    model = load_model(source, dtype=dtype, device=device)
    load_adapter(model, adapter)
    name = f"{adapter} over {base or found.repository or source}"
    return _generator(model, source, adapter, name)


def load_from_model(path: str, device: torch.device, dtype: torch.dtype) -> Generator:
    """Return a model from its folder or hub id.

    Raises:
        UserError: Files are missing or damaged, or the hub id cannot be had.
    """
    source = resolve_model(path).folder
    model = load_model(source, dtype=dtype, device=device)
    return _generator(model, source, source, path)


def _generator(
    model: CausalLM, source: Path, trained: Path, name: str, data: DataSettings | None = None
) -> Generator:
    """Join a model with what lies beside the trained weights, else beside their base.

    `data` are the settings of the run that trained it. The tokenizer beside what was trained holds
    their chat template already.
    """

    def holder(name: str) -> Path:
        return trained if (trained / name).is_file() else source

    place, stored = holder("tokenizer.json"), trained / "prompt_format.json"
    template = data.chat_template if data is not None and place != trained else None
    form = None if data is None else prompt_format(data)
    if stored.is_file():
        form = PromptFormat.from_dict(read_json_object(stored))
    tokenizer = Tokenizer.load(place, template)
    stop_ids = find_stop_ids(model.config, tokenizer, holder("generation_config.json"))
    return Generator(model, tokenizer, form, stop_ids, name)


def check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse settings of generation that are out of their range."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}, but must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, but must be above 0 and at most 1")


def _parser() -> CommandParser:
    parser = CommandParser(
        "generate",
        description="Complete a prompt with a run's final model, an adapter, or a model folder. "
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
    parser.add_argument("--raw", action="store_true", help="feed the prompt as it stands")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *COMPUTE_DTYPES])
    return parser


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


def _complete(options: argparse.Namespace) -> int:
    # What is cheap to refuse is refused before weights are read.
    check_settings(options.max_new_tokens, options.temperature, options.top_p)
    if options.base is not None and options.adapter is None:
        raise UserError("--base goes with --adapter alone")
    values = "" if options.fim else _read_prompt(options)
    device = torch.device(decide_device(options.device))
    dtype = COMPUTE_DTYPES[decide_precision(options.dtype, device.type)]
    if options.run is not None:
        loaded = load_run(options.run, device, dtype)
    elif options.adapter is not None:
        loaded = load_from_adapter(options.adapter, options.base, device, dtype)
    else:
        loaded = load_from_model(options.model, device, dtype)
    stop_ids, decode = loaded.stop_ids, loaded.tokenizer.decode
    if options.fim:
        prompt_ids = loaded.hole_ids(*options.fim, raw=options.raw)
        tokens = FimTokens(loaded.tokenizer)
        stop_ids, decode = stop_ids | {tokens.end_id}, tokens.text
    else:
        prompt_ids = loaded.prompt_ids(values, raw=options.raw)
    started = time.perf_counter()
    ids = generate(
        loaded.model,
        prompt_ids,
        max_new_tokens=options.max_new_tokens,
        stop_ids=stop_ids,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    seconds = time.perf_counter() - started
    print(decode(ids), flush=True)
    ended, left = "ended by itself", room(loaded.model.config, prompt_ids)
    if len(ids) == left:
        context = counted(left + len(prompt_ids), "token")
        ended = f"stopped at the end of the model's context of {context}"
    elif len(ids) == options.max_new_tokens:
        ended = f"stopped at --max-new-tokens {len(ids)}"
    speed = f"{len(ids) / seconds:.1f} tokens/s"
    print(f"[{loaded.name}: {counted(len(ids), 'token')}, {ended}, {speed}]", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Complete the prompt that the command line names; return the exit code."""
    return run_command(lambda: _complete(_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
