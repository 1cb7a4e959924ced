"""`lathe lint`: what is wrong with rows before they are trained on, found in one pass.

It takes the arguments of `train.run`, and reads, renders, encodes and cuts rows by the same
functions; of the model it needs the tokenizer alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.arrays import NoRowsError
from data.examples import check_settings
from data.lint.document import lint_document, lint_text
from data.lint.picture import draw_lengths, require_matplotlib
from data.lint.scan import SETS, Scan, Scanner, Settings
from data.locate import HUB_PREFIX, has_wildcards, open_source
from data.row_files import OnFault
from data.source import Row, read_rows
from data.splits import split_labels
from data.tokenizer import Tokenizer
from files.errors import UserError, listed
from train.config.load import load_config
from train.config.schema import DataSettings, RunConfig
from train.inputs.asked import add_run_arguments, asked_configuration, run_arguments
from train.inputs.dataset import held_out_rows, prompt_format, tell_split_column
from train.inputs.model_files import tokenizer_folder
from train.process.command import CommandParser, run_command

DESCRIPTION = """\
Find what would spoil a run: rows that cannot be read, have nothing to train, are cut or do not end
in a trained EOS; duplicates, and rows of valid or test that stand in train, word for word or
nearly; traces of wrong encodings; secrets and personal data. And count what helps to decide:
lengths and what each data.max_length would lose, languages, scripts, labels.

FILE is what data.train takes: a file, a folder, a glob or hub:owner/name. Files whose names speak
of valid or test (valid.jsonl) are those sets, and of a folder or a data set of the Hub all its
splits are read; data.train, data.valid and data.test say it outright. Everything else is given as
to train.run; no weights are needed.
"""
EPILOG = """\
exit codes:
  0    nothing found that would spoil a run
  1    problems found
  2    bad input: one sentence says what, where, and what to do
  130  stopped by Ctrl-C
"""
Spec = str | tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line and return its exit code."""
    return run_command(lambda: _answer(sys.argv[1:] if argv is None else list(argv)))


def lint(config: RunConfig) -> tuple[Scan, Settings, dict[str, str]]:
    """Return what is found in a configuration's rows, how they were read, and each set's source.

    Raises:
        UserError: There are no such rows, or none of them can be read.
    """
    data = config.data
    if data.train is None:
        raise UserError(
            "no rows are named: give a file, a folder, a glob or hub:owner/name, or data.train=FILE"
        )
    settings = Settings(
        Tokenizer.load(tokenizer_folder(config), data.chat_template),
        prompt_format(data),
        data.max_length,
        data.on_overflow,
        data.weight_field,
    )
    check_settings(settings.tokenizer, settings.prompt_format, data.max_length, data.on_overflow)
    scanner = Scanner(settings)
    tell_split_column(data)
    sources: dict[str, str] = {}
    with tqdm(unit=" rows", disable=None, leave=False, file=sys.stderr) as bar:
        for name in SETS:
            spec = getattr(data, name) or (data.train if data.split_column else None)
            if spec is None:
                continue
            sources[name] = spec if isinstance(spec, str) else listed(spec)
            bar.set_description(name)
            bar.reset(None if bar.disable else _lines_in(data, spec, name))
            # A file that holds all sets is read for each of them, and its faults told of once.
            tell = name == "train" or getattr(data, name) is not None
            for rows in scanner.read(name, _reader(data, spec, name), tell=tell):
                bar.update(rows)
            if tell and not scanner.scan.rows[name] and not scanner.scan.unreadable:
                raise NoRowsError(f"{sources[name]}: no rows")
        bar.set_description("comparing")
        return scanner.close(_held_out(config, scanner.scan)), settings, sources


def _lines_in(data: DataSettings, spec: Spec, split: str) -> int | None:
    """Return how many rows are to come, for the bar; None where lines do not tell."""
    files = open_source(spec, split).files
    if data.split_column or any(file.path.suffix.lower() != ".jsonl" for file in files):
        return None
    lines = 0
    for file in files:
        with suppress(OSError), open(file.path, "rb") as opened:  # reading the rows will say so
            lines += sum(part.count(b"\n") for part in iter(lambda: opened.read(2**20), b""))
    return lines


def _reader(data: DataSettings, spec: Spec, split: str) -> Callable[[OnFault], Iterator[Row]]:
    def read(on_fault: OnFault) -> Iterator[Row]:
        return read_rows(
            spec,
            fields=prompt_format(data).columns(),
            split_column=data.split_column,
            split=split,
            every_column=True,
            on_fault=on_fault,
        )

    return read


def _held_out(config: RunConfig, scan: Scan) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return what chooses the valid rows of `data.valid_fraction`, None where there are others."""
    fraction = config.data.valid_fraction
    if fraction == 0 or scan.rows.get("valid"):
        return None
    return lambda rows: held_out_rows(rows, fraction, config.train.seed)


def _with_files(config: RunConfig, files: Sequence[str]) -> RunConfig:
    """Return the configuration with the files of the command line as its sets.

    Raises:
        UserError: A set is given by name and by a setting.
    """
    if not files:
        return config
    named: dict[str, list[str]] = {name: [] for name in SETS}
    for file in files:
        for name in _sets_of(file, by_column=config.data.split_column is not None):
            named[name].append(file)
    for name, found in named.items():
        if found and f"data.{name}" in config.given and getattr(config.data, name) is not None:
            raise UserError(
                f"{found[0]} and data.{name} both name the {name} rows; leave one of them out"
            )
    if not named["train"] and "data.train" not in config.given:
        named = {"train": list(files)}
    # What a preset says of the sets counts no longer.
    given = {name: getattr(config.data, name) for name in SETS if f"data.{name}" in config.given}
    sets = {name: tuple(named.get(name, ())) or given.get(name) for name in SETS}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **sets))


def _sets_of(spec: str, *, by_column: bool) -> list[str]:
    """Return the sets that a file is of by its name, or that a folder or a data set has."""
    path = Path(spec).expanduser()
    if by_column:
        return ["train"]
    if path.is_file() or not (path.is_dir() or has_wildcards(spec) or spec.startswith(HUB_PREFIX)):
        named = split_labels(path.name)[1]
        return list(named) if len(named) == 1 else ["train"]
    found = ["train"]
    for name in ("valid", "test"):
        try:
            source = open_source(spec, name)
        except UserError:  # it has no such split
            continue
        if all(file.below is None and name in split_labels(file.name)[1] for file in source.files):
            found.append(name)
    return found


def parser() -> CommandParser:
    """Return the options of the command."""
    parser = CommandParser(
        "lint",
        usage="%(prog)s FILE… [arguments of train.run] [--picture FILE.png] [--json]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, "FILE or section.key=value")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the lengths of the rows")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _answer(argv: Sequence[str]) -> int:
    asked, rest = parser().parse_known_intermixed_args(argv)
    files = [word for word in asked.settings if "=" not in word or os.path.exists(word)]
    rest += run_arguments(asked, [word for word in asked.settings if word not in files])
    if asked.picture is not None:
        require_matplotlib()
    config = asked_configuration(rest, "lint") if rest else load_config()
    scan, settings, sources = lint(_with_files(config, files))
    document = lint_document(scan, settings, sources)
    if asked.picture is not None:
        marks = {"data.max_length": settings.max_length}
        if document["recommended_max_length"] is not None:
            marks["recommended"] = document["recommended_max_length"]
        draw_lengths(Path(asked.picture), scan.lengths, marks)
        document["picture"] = asked.picture
    print(json.dumps(document, ensure_ascii=False) if asked.json else lint_text(document))
    return 1 if document["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
