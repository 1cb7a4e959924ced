"""An adapter folded into its base model, for good.

The base is loaded in the dtype of its checkpoint, each adapted weight is summed in fp32 and rounded
once, and OUT becomes a Hugging Face model folder with the tokenizer's files. OUT appears whole or
not at all. What was trained over quantised weights is folded into the original ones, unless asked
otherwise or there are no others; what it was folded into is said.

A receipt lies beside the weights: on rows of the run's valid set, or on given ones, how far the
merged model's logits and loss are from the adapted model's, before a byte is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from data.batch import MicroBatch
from data.chat_templates import SETTINGS_FILE, TEMPLATE_FILE, in_one_folder, named_files
from data.examples import Examples
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.atomic import write_json
from files.errors import UserError, counted
from files.folders import replace_folder
from files.strict_json import read_json_object
from files.tensors import read_header
from lora import load_adapter, merge
from models import load_model
from models.config import read_config
from models.quantised import dequantise
from models.weights import save_model, weights_files
from train.config.load import load_config
from train.config.schema import DataSettings, RunConfig
from train.evaluation.receipt import Receipt, outputs, receipt, rows_to_compare
from train.inputs.dataset import examples_of, load_data, prompt_format
from train.saving.artifact import adapter_folder, base_of

# What makes a model folder usable beside its weights; the adapter's own copies come first.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
RECEIPT_FILE = "merge_receipt.json"
_OTHER_FILES = ("generation_config.json", "prompt_format.json")


def merge_adapter(
    run_or_adapter: Path,
    out: Path,
    base: str | None = None,
    quantization: str | None = None,
    *,
    data: str | None = None,
    tolerance: float | None = None,
) -> str:
    """Write the model that an adapter makes of its base; return what was done, in a line or two.

    Args:
        run_or_adapter: An adapter's folder, or a run's, whose `final/` is taken, else its `best/`.
        out: A folder that is empty or not there.
        base: Folder or hub id of the base model; None takes the one that the adapter names.
        quantization: `nf4` or `int8`: the base's weights are quantised so and made numbers again
            before; None takes the ones that lie there.
        data: Rows for the receipt, as `data.train` names them; None takes the run's valid set, else
            its test or train set. There is no receipt of an adapter without either.
        tolerance: The largest difference that any logit may have; None allows all.

    Raises:
        UserError: `out` is in use, there is no adapter or base, they do not fit, a merged weight is
            not finite, or a logit differs by more than allowed; nothing has been written then.
        OSError: The disk is full.
    """
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"--tolerance {tolerance}: must be a logit's difference, 0 or more")
    _require_vacant(out)
    adapter = adapter_folder(run_or_adapter)
    source = base_of(adapter, base)
    config = read_config(source.folder)
    dtype = checkpoint_dtype(source.folder)
    if config.quantization is not None and config.torch_dtype is not None:
        dtype = getattr(torch, config.torch_dtype)  # what the packed numbers stand for
    model = load_model(source.folder, dtype=dtype, quantization=quantization)
    kind = dequantise(model)
    load_adapter(model, adapter)
    rows, lacking = _rows(adapter, source.folder, data, needed=tolerance is not None)
    adapted = outputs(model, rows)
    names = merge(model)
    found = receipt(adapted, outputs(model, rows), rows) if rows else None
    _check(found, tolerance)

    def fill(folder: Path) -> dict[str, str]:
        hashes = save_model(model, folder, config=model.config)
        _copy_companions(adapter, source.folder, folder)
        if found is not None:
            document = {"adapter": str(adapter), "base": source.repository or str(source.folder)}
            document |= {"tolerance": tolerance, **dataclasses.asdict(found)}
            write_json(folder / RECEIPT_FILE, document)
        return hashes

    replace_folder(out, fill)
    weights = str(dtype).removeprefix("torch.")
    if kind is not None:
        weights += f", of its weights in {kind}"
    elif trained_over := _trained_over(adapter):
        weights += f", its original weights, not those in {trained_over} that it was trained over"
    return (
        f"merged {counted(len(names), 'layer')} of {adapter} into "
        f"{source.repository or source.folder} ({weights}): {out}"
        f"\n{_text(found) if found else f'no receipt: {lacking}; --data FILE names rows for one'}"
    )


def _run_of(adapter: Path) -> RunConfig | None:
    """Return the configuration of the run that the adapter lies in, if it lies in one."""
    for folder in list(adapter.resolve().parents)[:2]:
        if (folder / "config.toml").is_file():
            with contextlib.suppress(UserError):  # another program's
                return load_config(file=folder / "config.toml")
    return None


def _trained_over(adapter: Path) -> str | None:
    """Return what the base was quantised as in the run that the adapter lies in, if it was."""
    run = _run_of(adapter)
    return None if run is None else run.model.quantization


def _rows(
    adapter: Path, base: Path, data: str | None, *, needed: bool
) -> tuple[list[MicroBatch], str]:
    """Return the rows that both models are given, or none and why there are none to be had.

    Raises:
        UserError: Rows that were asked for, or that are needed, cannot be read.
    """
    config = _run_of(adapter)
    try:
        if data is not None:
            return rows_to_compare(_examples(adapter, base, data, None, config)), ""
        if config is None:
            raise UserError(f"{adapter} lies in no run whose rows could be taken")
        for split, spec in (("valid", config.data.valid), ("test", config.data.test)):
            if spec is not None:
                return rows_to_compare(_examples(adapter, base, spec, split, config)), ""
        sets = load_data(config, base, read_config(base))
        return rows_to_compare(sets.valid or sets.test or sets.train), ""
    except UserError as error:
        if data is not None or needed:
            raise UserError(f"{error}; the receipt needs rows, which --data FILE names") from None
        return [], str(error)


def _examples(
    adapter: Path,
    base: Path,
    spec: str | Sequence[str],
    split: str | None,
    config: RunConfig | None,
) -> Examples:
    """Return rows in the adapter's own format, by the tokenizer beside it or its base's."""
    settings = DataSettings() if config is None else config.data
    stored, own = adapter / "prompt_format.json", (adapter / "tokenizer.json").is_file()
    form = prompt_format(settings)
    if stored.is_file():
        form = PromptFormat.from_dict(read_json_object(stored))
    tokenizer = Tokenizer.load(adapter) if own else Tokenizer.load(base, settings.chat_template)
    return examples_of(spec, split, settings, tokenizer, form)


def _check(found: Receipt | None, tolerance: float | None) -> None:
    if found is None or tolerance is None:
        return
    # A logit that is no number is beyond every tolerance.
    if not found.largest_logit_difference <= tolerance:
        raise UserError(
            f"the merged model is beyond --tolerance {tolerance:g}, and nothing was written: "
            f"{_text(found)}; allow more, or use the adapter over its base as it is"
        )


def _text(found: Receipt) -> str:
    return (
        f"receipt: over {counted(found.rows, 'row')} ({counted(found.tokens, 'token')}), in fp32, "
        f"a logit differs by {found.largest_logit_difference:.3g} at most (the largest is "
        f"{found.largest_logit:.3g}), the likeliest token is the same for "
        f"{found.top_1_agreement:.2%}, and the loss of {found.adapted_loss:.4f} changes by "
        f"{found.loss_difference:+.2e}"
    )


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that most of the numbers in a model folder's weights have.

    The files are asked, not config.json, which may name the dtype of another moment.

    Raises:
        UserError: A file is damaged.
    """
    elements: Counter[torch.dtype] = Counter()
    for path in weights_files(folder):
        for info in read_header(path).tensors.values():
            if info.dtype.is_floating_point:
                elements[info.dtype] += info.num_bytes // info.dtype.itemsize
    # Without any, loading says what is wrong with the folder.
    return elements.most_common(1)[0][0] if elements else torch.float32


def _require_vacant(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already and is not an empty folder; choose another OUT")


def _copy_companions(adapter: Path, base: Path, out: Path) -> None:
    """Copy tokenizer files, all from one place, and what else belongs beside the weights."""
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base
    places = [tokenizer / name for name in _TOKENIZER_FILES]
    for name in _OTHER_FILES:
        places.append(adapter / name if (adapter / name).is_file() else base / name)
    for place in places:
        if place.is_file():
            shutil.copyfile(place, out / place.name)
    if named := named_files(tokenizer):
        names = [SETTINGS_FILE, TEMPLATE_FILE, *named]
        there = [name for name in names if (tokenizer / name).is_file()]
        files = {name: (tokenizer / name).read_bytes() for name in there}
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
        (out / SETTINGS_FILE).write_bytes(in_one_folder(files, tokenizer)[SETTINGS_FILE])
