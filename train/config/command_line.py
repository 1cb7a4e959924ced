"""The command line of a run: what was asked, as data. Nothing here imports torch.

`--help`, `--list-presets` and `--show` are answered from text and arithmetic alone, so that looking
around is instant.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from files.errors import UserError, counted, did_you_mean, note
from train.config.completion import completion
from train.config.layers import preset_names
from train.config.presets import read_preset
from train.config.schema import KEYS
from train.config.spellings import keys_of, unsupported
from train.config.toml import to_toml
from train.process.command import CommandParser, command, other_parsers

EMBEDDED_PRESET = "demo"
STEPS_BEFORE_KILL = 3
SETTINGS = "section.key=value"
_ENDINGS_OF_ROWS = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")

DESCRIPTION = """\
Fine-tune a code model (LoRA or full) in plain PyTorch: one run, from a preset, a file and key=value
settings (each over the one before) to an adapter, its curves and its report.
Without any argument the embedded demo runs: about a minute on two CPU cores, nothing downloaded.
"""
EPILOG = """\
settings: section.key=value, or key=value where the key is unique; values are TOML or bare words;
none unsets a key. `--show default` prints every key with its meaning, range and default.

examples:
  LATHE --list-presets
  LATHE --preset demo
  LATHE --preset qwen2.5-coder-1.5b data.train=my.jsonl --plan
  LATHE --preset starcoder2-3b-lora data.train=src/ lora.r=16 train.output_dir=runs/a
  LATHE --config my.toml learning_rate=1e-4 'data.prompt_template="Q: {question}\\n"'
  LATHE --resume runs/demo-20250101-120000
  LATHE --preset demo --prove-resume

other commands (each with --help):
OTHER_COMMANDS

exit codes:
  0    done (also: stopped by a signal under torchrun, saved, status.json says preempted)
  1    --prove-resume: the resumed run does not end in the same bits
  2    bad input: one sentence says what, where, and what to do
  3    too many steps in a row without a finite loss
  130  stopped by Ctrl-C (SIGINT) after saving; --resume goes on
  143  stopped by SIGTERM after saving; --resume goes on
SIGUSR1 saves a checkpoint and goes on.
"""
OTHER_COMMANDS = {
    "show-data": "the rows as they will be trained, before a weight is read",
    "lint": "what is wrong with rows: lengths, duplicates, leakage, encodings, secrets",
    "generate": "complete a prompt with what a run has trained",
    "merge": "fold an adapter into its base model",
    "report": "write a run's report again; compare several",
    "push": "upload what a finished run trained to the Hub",
    "export-metrics": "give a run's metrics to another tracker, or as CSV",
    "evaluate": "measure a run or a model on rows: loss, accuracy, and what its code is worth",
}


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    preset: str | None = None  # name of the preset to start from
    config_file: str | None = None  # TOML file over the preset
    plan: bool = False  # print the plan and train nothing
    json: bool = False  # the plan as one JSON object
    ranks: int | None = None  # ranks to plan for; None is one
    memory: int | None = None  # bytes of the GPU to plan for
    gpu: tuple[str, ...] = ()  # names of the GPUs to plan for
    price: tuple[float, ...] = ()  # of one of them an hour: one for all, or one each
    records: tuple[Path, ...] = ()  # folders of runs whose speed is taken for a card's
    resume: str | None = None  # folder of a run or of one checkpoint to go on from
    # Steps before the kill of a proof that resume is exact; None proves nothing.
    prove_resume: int | None = None
    list_presets: bool = False  # print the presets
    show: str | None = None  # name of the preset to print in full
    schema: bool = False  # print the JSON schema of the configuration
    completion: str | None = None  # the shell to print completion for
    # `key=value` settings as written, in order.
    overrides: dict[str, str] = field(default_factory=dict)


def parser() -> CommandParser:
    """Return the options of a run."""
    commands = "\n".join(f"  {command(name)}  {what}" for name, what in OTHER_COMMANDS.items())
    parser = CommandParser(
        "run",
        description=DESCRIPTION,
        epilog=EPILOG.replace("OTHER_COMMANDS", commands).replace("LATHE", command()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar=SETTINGS, help="settings")
    parser.add_argument("--preset", metavar="NAME", help="start from a preset")
    parser.add_argument(
        "--config", dest="config_file", metavar="FILE.toml", help="settings of a file, over it"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print steps, warm-up, parameters, memory, disk and what is wrong; train nothing",
    )
    parser.add_argument("--json", action="store_true", help="with --plan: one JSON object")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --plan: plan for N ranks (default 1)"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="with --plan: for a GPU of so much memory, such as 24GB"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME[,NAME…]",
        help="with --plan: for a GPU by its name, such as 4090; of several, what each would take",
    )
    parser.add_argument(
        "--price",
        metavar="P[,P…]",
        help="with --gpu: what one costs an hour, one price for all or one each; says what a run "
        "costs",
    )
    parser.add_argument(
        "--records",
        metavar="RUN[,RUN…]",
        help="with --gpu: runs, or folders of runs; where one is like this one and was on that "
        "card, its speed takes the place of the prediction",
    )
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with a run, or from one of its checkpoints"
    )
    parser.add_argument(
        "--prove-resume",
        type=int,
        metavar="K",
        help=f"run 2K steps (K is {STEPS_BEFORE_KILL} if left out), and again with a kill and a "
        "resume after K; print the hashes of both, which must be equal",
    )
    parser.add_argument("--list-presets", action="store_true", help="print the presets and exit")
    parser.add_argument("--show", metavar="NAME", help="print a preset in full, as TOML, and exit")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of the configuration and exit"
    )
    parser.add_argument(
        "--completion", metavar="SHELL", help="print completion for bash, zsh or fish and exit"
    )
    return parser


def parse(argv: Sequence[str]) -> Arguments:
    """Read the command line (without the program's name).

    Raises:
        UserError: An unknown option, or options that exclude each other.
        SystemExit: After `--help`, with code 0.
    """
    asked, unknown = parser().parse_known_intermixed_args(_with_steps_before_kill(argv))
    if unknown:
        raise UserError(_about_option(unknown[0]))
    values = vars(asked)
    overrides = _overrides(values.pop("settings"))
    if not argv:
        note(f"no arguments: running the preset {EMBEDDED_PRESET} (--help shows what is possible)")
        values["preset"] = EMBEDDED_PRESET
    if values["memory"] is not None:
        values["memory"] = _bytes(values["memory"])
    cards = tuple(name.strip() for name in (values["gpu"] or "").split(",") if name.strip())
    if values["gpu"] is not None and not cards:
        raise UserError(f"--gpu {values['gpu']}: names no card, such as a100 or 4090")
    values["gpu"], values["price"] = cards, _prices(values["price"], len(cards))
    records = [place for place in (values["records"] or "").split(",") if place]
    values["records"] = tuple(Path(place).expanduser() for place in records)
    if records and not cards:
        raise UserError("--records is of cards: name those to plan for with --gpu")
    arguments = Arguments(**values, overrides=overrides)
    _check(arguments)
    return arguments


def _with_steps_before_kill(argv: Sequence[str]) -> list[str]:
    """Give `--prove-resume` its default where no number follows: argparse would take a setting."""
    given = list(argv)
    for place, argument in enumerate(argv):
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        if argument == "--prove-resume" and not re.fullmatch(r"[^-=][^=]*|-\d+", following):
            given[place] = f"{argument}={STEPS_BEFORE_KILL}"
    return given


def _check(arguments: Arguments) -> None:
    for option in ("json", "ranks", "memory", "gpu", "price", "records"):
        if getattr(arguments, option) and not arguments.plan:
            raise UserError(f"--{option} goes with --plan; add --plan")
    if arguments.memory and (arguments.gpu or arguments.price):
        option = "--price" if arguments.price else "--gpu, which says it by itself"
        raise UserError(f"--memory is one card's, and cannot be given with {option}")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UserError(f"--ranks {arguments.ranks}: a plan needs at least 1 rank")
    if arguments.prove_resume is not None:
        if arguments.prove_resume < 1:
            raise UserError(
                f"--prove-resume {arguments.prove_resume}: at least 1 step comes before the kill"
            )
        if arguments.plan or arguments.resume is not None:
            option = "--plan" if arguments.plan else "--resume"
            raise UserError(
                "--prove-resume makes two short runs of a configuration and compares them, so "
                f"{option} cannot be given with it"
            )
    if arguments.resume is not None:
        if arguments.preset or arguments.config_file:
            option = "--preset" if arguments.preset else "--config"
            raise UserError(
                f"--resume takes the run's own config.toml, so {option} cannot be given with it"
            )
        if arguments.plan:
            raise UserError("--plan plans a new run; the plan of a run stands in its plan.json")


def _bytes(text: str) -> int:
    """Return the bytes of a size such as `24GB`, `22.5 GiB` or `24` (GB, as cards are sold)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    number, prefix, binary = found.groups() if found else ("0", None, None)
    power = "KMGT".index((prefix or "G").upper()) + 1
    count = float(number) * (1024 if binary else 1000) ** power
    if not 1 <= count < 1e18:
        raise UserError(f"--memory {text}: must be a size such as 24GB, 22.5GiB or 24")
    return int(count)


def _prices(text: str | None, cards: int) -> tuple[float, ...]:
    """Return the prices of `1.5,0.35`, one for all cards or one each."""
    try:
        prices = tuple(float(price) for price in text.split(",")) if text is not None else ()
    except ValueError:
        prices = (math.nan,)
    if not all(0 <= price < math.inf for price in prices):
        raise UserError(f"--price {text}: must be numbers such as 1.50 or 1.50,0.35")
    if prices and not cards:
        raise UserError("--price is what one --gpu costs an hour; name the cards with --gpu")
    if len(prices) not in (0, 1, cards):
        raise UserError(
            f"--price {text}: has {len(prices)} prices for {counted(cards, 'card')}; give one for "
            "all, or one each"
        )
    return prices


def _overrides(settings: Sequence[str]) -> dict[str, str]:
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            setting.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the setting {key} holds bytes that are not UTF-8") from None
        if not equals or not key:
            meant = f" (or --preset {setting}?)" if setting in preset_names() else ""
            names = difflib.get_close_matches(setting.replace("_", "-"), OTHER_COMMANDS, n=1)
            meant = f" (or `{command(names[0])} …`?)" if names else meant
            is_rows = os.path.exists(setting) or setting.endswith(_ENDINGS_OF_ROWS)
            meant = f" (or data.train={setting}?)" if is_rows else meant
            raise UserError(f"'{setting}' is not a setting: write section.key=value{meant}")
        # A key given again comes later in the order too, so that the last one rules.
        if overrides.pop(key, value) != value:
            note(f"{key} is given more than once: the last one rules, {setting}")
        overrides[key] = value
    return overrides


def _about_option(option: str) -> str:
    """Say what to write instead of an unknown option."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    keys = keys_of(name) or tuple(path for path, key in KEYS.items() if name in (key.name, path))
    if keys:
        write = " or ".join(f"{key}=VALUE" for key in keys)
        return f"unknown option '{option}': settings have no dashes, write {write}"
    if sentence := unsupported(name):
        return f"'{option}' is not supported: {sentence}"
    known = [name for action in parser().actions() for name in action.option_strings]
    return f"unknown option '{option}'{did_you_mean(option, known)} (--help shows what is possible)"


def completion_text(shell: str) -> str:
    """Return the script that makes a shell complete the command line.

    Raises:
        UserError: There is none for this shell.
    """
    return completion(shell, {"run": parser(), **other_parsers()})


def show_text(name: str) -> str:
    """Return a preset with every key resolved, as TOML; what its seed says stands in comments.

    Raises:
        UserError: No preset has this name.
    """
    preset = read_preset(name)
    lines = [preset.description]
    if preset.seed:
        lines.append(f"From seed {preset.seed}.")
    if preset.num_examples is not None:
        lines.append(f"The seed states {preset.num_examples:,} training rows.")
    if preset.claims:
        lines += ["", "What the seed claims (✓ the formulas confirm it, ✗ they do not):"]
        lines += [
            f"  {'✓' if claim.holds else '✗'} {claim.statement} [{claim.where}]"
            + (f" → {claim.right:g}" if claim.right is not None else "")
            + (f"; {claim.note}" if claim.note else "")
            for claim in preset.claims
        ]
    if preset.departures:
        lines += ["", "Where it departs from the seed, or fills a gap:"]
        lines += [f"  - {departure}" for departure in preset.departures]
    comments = [
        f"# {piece}".rstrip()
        for line in lines
        for piece in textwrap.wrap(line, 96, subsequent_indent="    ") or [""]
    ]
    return "\n".join([*comments, "", to_toml(preset.config)])
