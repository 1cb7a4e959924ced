"""A model with all that turns a prompt into its completion, from a run, an adapter or a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.fim import FimTokens
from data.messages import CONVERSATION_COLUMNS
from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer
from files.errors import UserError, no_such_folder, note
from files.hub import resolve_model
from files.strict_json import read_json_object
from lora import load_adapter
from models import build, load_model
from models.config import DecoderConfig, read_config
from models.layers import CausalLM
from models.weights import fill
from train.config.load import load_config
from train.config.schema import DataSettings
from train.inputs.base_model import load_base
from train.inputs.dataset import prompt_format
from train.inputs.model_files import find_model
from train.saving.artifact import base_of, run_and_trained


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
    source: Path  # the folder of the model, of an adapter its base's
    trained: Path  # the folder of the weights that were trained: an adapter's, or a whole model's

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

    def ids_of_row(self, row: Row, *, raw: bool = False) -> list[int]:
        """Return the ids of a row's prompt, in the training rows' format unless `raw`.

        Where no format is known, and for `raw`, the column `prompt` stands as it is; a conversation
        goes through the tokenizer's chat template.

        Raises:
            UserError: The row lacks a column; the message begins with its file and line.
        """
        form = None if raw else self.prompt_format
        if form is None:
            is_chat = any(column in row.values for column in CONVERSATION_COLUMNS)
            form = PromptFormat(format="messages" if is_chat and not raw else "completion")
        try:
            return form.prompt_ids(row.values, self.tokenizer)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None

    def chat_format(self, system_prompt: str | None) -> PromptFormat:
        """Return the format that a chat is put into: the run's own, or the tokenizer's template.

        Raises:
            UserError: It was trained on rows without turns, and its tokenizer knows none either.
        """
        form = self.prompt_format
        if form is None or form.format != "messages":
            if not self.tokenizer.chat_templates:
                rows = "" if form is None else f" was trained on data.format={form.format} and"
                raise UserError(
                    f"--chat: {self.name}{rows} has no chat template, so it knows no turns: "
                    "complete a text with --prompt, or train on rows of data.format=messages"
                )
            if form is not None:
                note(
                    f"{self.name} was trained on data.format={form.format}; the chat goes through "
                    "its tokenizer's own template"
                )
            form = PromptFormat(format="messages")
        return form if system_prompt is None else replace(form, system_prompt=system_prompt)

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


def load_run(
    run: Path, device: torch.device, dtype: torch.dtype, *, adapted: bool = True
) -> Generator:
    """Return what a run has trained: its final model, else its best one, else its last checkpoint.

    `run` may be one of a run's folders too: a checkpoint, `best/` or `final/`. Where it is not to
    be `adapted`, it is the base that the adapter goes over (`load_adapter(model, trained)`).

    Raises:
        UserError: The folder is no run's, nothing is trained yet, or files are missing or damaged.
    """
    run, trained = run_and_trained(run)
    config = load_config(file=run / "config.toml")
    if config.train.method == "lora":
        base = find_model(config, weights=True)
        source = base.folder
        model = load_base(config, base, dtype, device)
        if adapted:
            load_adapter(model, trained)
    elif not adapted:
        raise UserError(
            f"--compare: {run} was trained in full and has no adapter to leave out: complete the "
            f"prompt once more with --model {config.model.path}"
        )
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
    adapter: Path,
    base: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapted: bool = True,
) -> Generator:
    """Return an adapter over its base, which is `base` or what adapter_config.json names.

    Where it is not to be `adapted`, it is the base alone, as in `load_run`.

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
    if adapted:
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
    their chat template already. Code Llama ends what fills a hole with a token of its own, and a
    run on texts with holes has learned it.
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
    if data is not None and data.fim_rate > 0:
        stop_ids |= {FimTokens(tokenizer).end_id}
    return Generator(model, tokenizer, form, stop_ids, name, source, trained)
