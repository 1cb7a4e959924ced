"""A look at a run before anything large is read: what would end it at once, and `--plan`.

The run and `--plan` refuse alike, so that what is planned can be started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.duplicates import first_alike
from data.source import Row, read_rows
from data.weights import row_weight
from files.errors import UserError
from files.hub import resolve_model
from models import build
from models.config import DecoderConfig
from models.weights import check_weights
from train.config.command_line import Arguments
from train.config.paths import with_whole_paths
from train.config.schema import RunConfig
from train.evaluation.rated import refuse_uncompleted
from train.inputs.adapters import with_starting_adapter
from train.inputs.base_model import with_stored_quantization
from train.inputs.dataset import Data, load_data, prompt_format, refuse_without_valid, weight_field
from train.inputs.known import NO_DATA, KnownData, Unknown
from train.inputs.model_files import find_model
from train.log.metrics import require_tensorboard
from train.plan.decide import Machine, decide, machine_elsewhere, machine_to_plan_for, this_machine
from train.plan.document import plan_document
from train.plan.ledger import find_decoder_config, is_hub_id
from train.plan.rent import render_rent, rent_document
from train.plan.text import render_plan
from train.report.speeds import speeds
from train.saving.folder import run_folder
from train.show_data import first_example


def refuse_early(config: RunConfig, machine: Machine, *, new: bool) -> None:
    """Refuse what the settings, the machine and the disk say by themselves.

    A run that is not `new` is resumed, and has its folder.

    Raises:
        UserError: Settings that contradict each other there, kernels that cannot run, no
            TensorBoard, or a folder that is in use.
    """
    decide(config, machine)
    if config.log.tensorboard:
        require_tensorboard()
    if new:
        run_folder(config)


def refuse_model(config: RunConfig, decoder: DecoderConfig | Unknown) -> None:
    """Refuse weights of this machine that cannot be loaded; of the Hub's nothing is known yet.

    Of an unknown architecture it is checked alone that the weights are there.

    Raises:
        UserError: They are not there or are pickles, or their names, shapes or types are not those
            of the architecture.
    """
    path = config.model.path
    if path is None or config.model.random_init or not Path(path).expanduser().is_dir():
        return
    folder = resolve_model(path, config.model.revision, weights=True).folder
    if not isinstance(decoder, Unknown):
        check_weights(folder, build(decoder, device="meta"))


def data_of(config: RunConfig, folder: Path, decoder: DecoderConfig) -> Data:
    """Return the rows of all sets as examples (`load_data`), which serve for `eval.metrics` too.

    Raises:
        UserError: As `load_data` and `refuse_uncompleted`.
    """
    data = load_data(config, folder, decoder)
    refuse_uncompleted(config, data, decoder)
    return data


def answer_plan(config: RunConfig, asked: Arguments, ranks: int) -> int:
    """Answer `--plan` of a command line as `print_plan` does; `ranks` are those started."""
    gpu = next(iter(asked.gpu), None)
    machine = machine_elsewhere(config, gpu, asked.memory) if gpu or asked.memory else None
    cards = asked.gpu if len(asked.gpu) > 1 or asked.price or asked.records else ()
    return print_plan(
        config,
        as_json=asked.json,
        ranks=asked.ranks or ranks,
        machine=machine,
        cards=cards,
        prices=asked.price,
        records=asked.records,
    )


def print_plan(
    config: RunConfig,
    *,
    as_json: bool = False,
    ranks: int | None = None,
    machine: Machine | None = None,
    cards: Sequence[str] = (),
    prices: Sequence[float] = (),
    records: Sequence[Path] = (),
) -> int:
    """Answer `--plan`: print the plan as text, or as one JSON object and nothing else.

    Returns the exit code: 2 where the memory that is known does not suffice (of several cards on
    none), else 0.

    Data and tokenizer are read where they can be had; where the hub cannot be reached, the plan
    counts with the rows that the seed states, and says what to pass instead. It is a plan for
    `machine`, or for this one (`machine_to_plan_for`); with `cards`, for each of these, at their
    `prices` an hour, with the speed of like runs among `records` (`train.plan.rent`).

    Raises:
        UserError: What would end the run before its first step, or a row or config.json that is not
            what it must be.
    """
    known = speeds(records)
    refuse_early(config, machine or this_machine(config), new=True)
    config = with_whole_paths(config)
    decoder = find_decoder_config(config)
    refuse_model(config, decoder)
    config = with_stored_quantization(with_starting_adapter(config, decoder), decoder)
    data = _look_at_data(config, decoder)
    ranks = ranks or 1
    if cards:
        document = rent_document(config, data, decoder, cards, prices, ranks, known)
        fit = [row["fits"] for row in document["cards"]]
        text = render_rent(document)
    else:
        machine = machine or machine_to_plan_for(config, ranks)
        document = plan_document(config, data, decoder, machine, ranks)
        fit = [document["fits"]]
        text = render_plan(document)
    code = 2 if all(there is False for there in fit) else 0
    if as_json:
        print(json.dumps(document, allow_nan=False, indent=2))
        return code
    print(text)
    if not cards and isinstance(data, KnownData) and not isinstance(data.lengths, Unknown):
        print(f"An example, as it will be trained\n{first_example(config)}")
    return code


def _look_at_data(config: RunConfig, decoder: DecoderConfig | Unknown) -> KnownData | Unknown:
    """Tokenise the rows or, where model or tokenizer cannot be had today, count them."""
    specs = config.data.train
    if specs is None:
        return NO_DATA
    try:
        folder = _tokenizer_folder(config)
        if isinstance(folder, Unknown):
            return _counted_rows(config, folder)
        if isinstance(decoder, Unknown):
            return _counted_rows(config, decoder)
        data = data_of(config, folder, decoder)
        return KnownData.of(data)
    except UserError as error:
        named = [specs] if isinstance(specs, str) else specs
        if not any(spec.startswith("hub:") for spec in named):
            raise
        return Unknown(str(error))


def _tokenizer_folder(config: RunConfig) -> Path | Unknown:
    """Return the folder of the model's small files, where it can be had today."""
    path = config.model.path
    try:
        return find_model(config, weights=False).folder
    except UserError as error:
        if path is not None and not is_hub_id(path):
            raise
        return Unknown(str(error))


def _counted_rows(config: RunConfig, why: Unknown) -> KnownData:
    """Count the rows of each set, which cannot be tokenised."""
    data = config.data
    columns = prompt_format(data).columns()

    def read(spec: str | Sequence[str], split: str) -> Iterator[Row]:
        return read_rows(
            spec,
            fields=columns,
            split_column=data.split_column,
            split=split,
            weight_field=weight_field(data, split),
        )

    def count(spec: str | Sequence[str] | None, split: str) -> int:
        weights = weight_field(data, split)
        rows = () if spec is None else read(spec, split)
        return sum(weights is None or row_weight(row, weights) > 0 for row in rows)

    by_column = data.train if data.split_column is not None else None
    rows = train = count(data.train, "train")
    counts = {"rows": rows}
    if data.train is not None and data.near_duplicates == "drop":
        weights = weight_field(data, "train")
        first = first_alike(read(data.train, "train"), prompt_format(data), weights)
        counts["near_duplicates"] = int(np.count_nonzero(first != np.arange(len(first))))
        train -= counts["near_duplicates"]
    valid = count(data.valid or by_column, "valid")
    if not valid and data.valid_fraction:
        valid = math.ceil(train * data.valid_fraction)
        train -= valid
    if not valid:
        refuse_without_valid(config)
    return KnownData(train, valid, count(data.test or by_column, "test"), why, counts)
