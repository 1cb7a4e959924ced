"""The rows of a run as examples: train, valid and test, tokenised or mapped from the cache.

Cheap failures come first: files, rows and tokens are checked before a weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import NoRowsError
from data.examples import Examples, cache_root, check_vocabulary, load_examples
from data.fim import FillInTheMiddle, FimTokens
from data.mixture import Mixture
from data.order import epoch_order
from data.prompt import PromptFormat
from data.row_files import without_absent
from data.rows_in_memory import keep_rows
from data.source import Row, read_rows
from data.splits import SPLIT_NAMES
from data.tokenizer import Tokenizer
from files.errors import UserError, counted, note
from models.config import DecoderConfig
from train.config.schema import DataSettings, RunConfig

# The column that data sets name their splits in.
SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class Data:
    """The rows of a run as examples, and what made them so."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    train: Examples
    valid: Examples | None
    test: Examples | None
    mixture: Mixture | None = None
    # Of each held-out set the first rows as they are, where `eval.metrics` asks for their tests.
    tested: Mapping[str, tuple[Row, ...]] = dataclasses.field(default_factory=dict)

    @property
    def num_valid(self) -> int:
        """Examples of the valid set, 0 without one."""
        return 0 if self.valid is None else len(self.valid)

    @property
    def num_targets(self) -> np.ndarray:
        """(N,) targets of each training example."""
        return self.train.num_targets

    @property
    def fim(self) -> FillInTheMiddle | None:
        """Which examples have a hole, and where; None: none has."""
        return self.train.fim

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """The hash of each set's ids and labels: equal where training sees the same data."""
        sets = {"train": self.train, "valid": self.valid, "test": self.test}
        hashes = {name: None if rows is None else rows.fingerprint for name, rows in sets.items()}
        if self.mixture is not None:
            hashes["train"] = self.mixture.fingerprint(self.train.fingerprint)
        return hashes


def with_rows(
    config: RunConfig, rows: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
) -> RunConfig:
    """Return the configuration with rows of memory as its data.

    Args:
        config: A configuration; what a preset says of the sets given here no longer counts.
        rows: Dictionaries to train on; or split (`train`, `valid`, `test`) → dictionaries. A
            `datasets.Dataset` or `DatasetDict` is such a thing.

    Raises:
        UserError: A row is no dictionary of what JSON holds, a split has an unknown name, or the
            configuration was given rows of its own for it.
    """
    sets: dict[str, str] = {}
    by_split: Mapping[Any, Any] = rows if isinstance(rows, Mapping) else {"train": rows}
    for name, some in by_split.items():
        split = SPLIT_NAMES.get(name)
        if split is None or split in sets:
            raise UserError(
                f"rows: '{name}' is {'no split' if split is None else 'a split given twice'}; give "
                "a list of dictionaries, or a dictionary of such lists with the keys train, valid "
                "and test"
            )
        if f"data.{split}" in config.given and getattr(config.data, split) is not None:
            raise UserError(
                f"rows and data.{split} both name the {split} rows; leave one of them out"
            )
        if hasattr(some, "features"):  # a `datasets.Dataset` is made of columns
            some = (without_absent(row) for row in some)
        sets[split] = keep_rows(some, f"rows['{name}']" if by_split is rows else "rows")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **sets))


def prompt_format(settings: DataSettings) -> PromptFormat:
    """Return how rows become text, from the `data.*` keys of the same names."""
    names = [field.name for field in dataclasses.fields(PromptFormat)]
    return PromptFormat(**{name: getattr(settings, name) for name in names})


def weight_field(settings: DataSettings, split: str) -> str | None:
    """Return the column of a split's weights: only what is trained on is weighed."""
    return settings.weight_field if split == "train" else None


def fill_in_the_middle(config: RunConfig, tokenizer: Tokenizer) -> FillInTheMiddle | None:
    """Return which examples have a hole, and where; None where `data.fim_rate` is 0.

    Raises:
        UserError: The tokenizer has no tokens for it.
    """
    data = config.data
    if data.fim_rate == 0:
        return None
    return FillInTheMiddle(
        FimTokens(tokenizer),
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        unit=data.fim_unit,
        targets=data.fim_targets,
        seed=config.train.seed,
        max_length=data.max_length,
    )


def examples_of(
    spec: str | Sequence[str],
    split: str | None,
    settings: DataSettings,
    tokenizer: Tokenizer,
    form: PromptFormat,
    *,
    column: str | None = None,
    fim: FillInTheMiddle | None = None,
    weight_column: str | None = None,
    by_source: bool = False,
    near_duplicates: str = "keep",
) -> Examples:
    """Return the examples of rows, cut as `settings` say, as `data.examples.load_examples` does."""
    return load_examples(
        spec,
        split_column=column,
        split=split,
        tokenizer=tokenizer,
        prompt_format=form,
        max_length=settings.max_length,
        on_overflow=settings.on_overflow,
        cache_root=cache_root(),
        fim=fim,
        weight_field=weight_column,
        by_source=by_source,
        near_duplicates=near_duplicates,
    )


def tell_split_column(settings: DataSettings) -> None:
    """Note a column of a file that names splits, where all rows are trained on whatever it says."""
    specs = (settings.train,) if isinstance(settings.train, str) else settings.train or ("",)
    if settings.split_column is not None or not Path(specs[0]).expanduser().is_file():
        return
    with contextlib.suppress(UserError):  # reading all rows will say so
        row = next(read_rows(specs[0], every_column=True), None)
        named = row.values.get(SPLIT_COLUMN) if row else None
        if isinstance(named, str) and named.lower() in SPLIT_NAMES:
            note(
                f"rows have a column `{SPLIT_COLUMN}` (`{named}` in the first), which chooses "
                f"nothing: all are trained on; data.split_column={SPLIT_COLUMN} makes train, valid "
                "and test sets of them"
            )


def load_data(config: RunConfig, folder: Path, decoder: DecoderConfig | None) -> Data:
    """Tokenise the rows of all sets, or map those that were tokenised before.

    No token may lie beyond the vocabulary of `decoder`; without one that is left unchecked.

    Raises:
        UserError: No training data is named, or a file or row is not what it must be.
    """
    settings = config.data
    if settings.train is None:
        raise UserError(
            "data.train is not set: give a file (.jsonl, .json, .csv, .parquet), a folder, a glob, "
            "hub:owner/name, or a list of these"
        )
    tokenizer = Tokenizer.load(folder, settings.chat_template)
    form, fim = prompt_format(settings), fill_in_the_middle(config, tokenizer)
    tell_split_column(settings)

    def load(spec: str | Sequence[str], split: str, *, by_source: bool = False) -> Examples:
        examples = examples_of(
            spec,
            split,
            settings,
            tokenizer,
            form,
            column=settings.split_column,
            fim=fim,
            weight_column=weight_field(settings, split),
            by_source=by_source,
            near_duplicates=settings.near_duplicates if split == "train" else "keep",
        )
        if decoder is not None:
            check_vocabulary(
                examples, decoder.vocab_size, tokenizer, padded=settings.batching != "unpadded"
            )
        return examples

    def load_other(split: str) -> Examples | None:
        spec = held_out(settings, split)
        if spec is None:
            return None
        try:
            return load(spec, split)
        except NoRowsError:
            if getattr(settings, split) is None:  # a column need not name all three splits
                return None
            raise

    train = load(settings.train, "train", by_source=settings.weights is not None)
    valid, test = load_other("valid"), load_other("test")
    if valid is None and settings.valid_fraction > 0:
        train, valid = hold_out(train, settings.valid_fraction, config.train.seed)
    if valid is None:
        refuse_without_valid(config)
    mixture = None
    if settings.weights is not None:
        mixture = Mixture.of(train, settings.train, settings.weights)
    return Data(tokenizer, form, train, valid, test, mixture, _tested(config))


def held_out(settings: DataSettings, split: str) -> str | Sequence[str] | None:
    """Return what names the rows of `valid` or `test`; None where no file or column does."""
    named = getattr(settings, split)
    return settings.train if named is None and settings.split_column is not None else named


def _tested(config: RunConfig) -> dict[str, tuple[Row, ...]]:
    found: dict[str, tuple[Row, ...]] = {}
    for split in ("valid", "test") if "pass@1" in (config.eval.metrics or ()) else ():
        if (spec := held_out(config.data, split)) is not None:
            rows = read_rows(spec, split_column=config.data.split_column, split=split)
            found[split] = tuple(islice(rows, config.eval.complete))
    return found


def refuse_without_valid(config: RunConfig) -> None:
    """Refuse what a run without a valid set cannot do.

    Raises:
        UserError: It is asked to stop early.
    """
    if config.eval.early_stopping_patience is not None:
        raise UserError(
            "eval.early_stopping_patience needs a valid set: give data.valid, data.split_column or "
            "data.valid_fraction, or unset it (eval.early_stopping_patience=none)"
        )


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Return the examples without, and only, those of a random share of the rows.

    The share is a function of the seed. Pieces of one row (`data.on_overflow=split`) stay together.

    Raises:
        UserError: Nothing would be left to train on.
    """
    chosen = held_out_rows(np.unique(examples.rows), fraction, seed)
    held = np.isin(examples.rows, chosen)
    return examples.subset(np.flatnonzero(~held)), examples.subset(np.flatnonzero(held))


def held_out_rows(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return those of the rows (N,) that `hold_out` makes the valid set.

    Raises:
        UserError: Nothing would be left to train on.
    """
    count = math.ceil(len(rows) * fraction)
    if count >= len(rows):
        raise UserError(
            f"data.valid_fraction={fraction:g} of {counted(len(rows), 'row')} leaves none to train "
            "on; use a smaller share or a data.valid of its own"
        )
    return rows[epoch_order(len(rows), seed=seed, epoch=0)[:count]]
