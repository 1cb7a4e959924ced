"""PEFT's adapter files, in and out: `adapter_config.json` and `adapter_model.safetensors`.

Source: peft 0.21 `get_peft_model_state_dict` and `LoraConfig`; what it writes loads here, and what
is written here loads there and in vLLM.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from files.atomic import write_json
from files.errors import UserError, did_you_mean
from files.strict_json import read_json_object
from files.tensors import TensorFile, write_tensors
from lora.config import ALL_LINEAR, LoraConfig
from lora.injection import (
    adapter_config,
    inject,
    lora_layers,
    target_names,
)
from lora.pissa import of_file
from lora.saved_modules import is_tied, whole_weights
from lora.tensors import (
    MAGNITUDE,
    PREFIX,
    TOKEN_ROWS,
    adapter_tensors,
    fill_adapter,
    fitted,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Keys that become `LoraConfig` fields of the same name and meaning.
_FIELDS = tuple(
    field.name for field in dataclasses.fields(LoraConfig) if field.name != "init_lora_weights"
)
# Keys that narrow the targets; the tensors in the file say exactly what they left over. So they do
# where the targets are a regular expression, which is not run: it is a stranger's, and may take
# forever to match.
_SELECTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Keys that do not change what a trained adapter computes.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Linear layers are adapted here, by factors of low rank; whatever else there is, PEFT merges.
_FACTORS = (".lora_A.weight", ".lora_B.weight", MAGNITUDE, TOKEN_ROWS)
_MERGE_IT = "merge the adapter into its base with PEFT and start from the merged model"
# What is matched of a file's own expressions: enough for a name for each module of any model.
_MOST_REPETITIONS = 2
_MOST_PATTERNS = 4096
# Starting values after which the base model is what it was; others (PiSSA, OLoRA, ...) change it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write a model's adapter as PEFT's two files, each whole or not at all.

    Args:
        model: A model with adapters.
        folder: Made if missing; files of these names are replaced.
        base_model: Hub id or folder of the base model, for those who load the adapter; None writes
            where the model was loaded from (its `name_or_path`), if it was.
        revision: The base model's commit; without `base_model` None writes the loaded one.
        tensors: What `adapter_tensors` gave at an earlier moment; None is the present.

    Returns:
        File name → sha256 (hex) of the weights file.

    Raises:
        UserError: The model carries no adapter.
        OSError: The disk is full.
    """
    folder = Path(folder)
    document = _document(model, base_model, revision)
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_tensors(folder / WEIGHTS_FILE, tensors or adapter_tensors(model))
    write_json(folder / CONFIG_FILE, document)
    return {WEIGHTS_FILE: digest}


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    trainable: bool = False,
    lora_dropout: float | None = None,
) -> LoraConfig:
    """Inject the adapter in `folder` into a base model and fill it; return its configuration.

    Args:
        model: The base model, without adapters.
        folder: What `save_adapter` or PEFT wrote.
        trainable: Whether the adapter is to be trained on; otherwise the whole model is frozen.
        lora_dropout: Dropout to go on with, which is no property of the weights; None takes that of
            the file.

    Raises:
        UserError: A file is missing or damaged, the configuration asks for what is not supported,
            or the adapter does not fit the model: all missing, unexpected and misshapen tensors are
            listed. The model may hold a part of the adapter then: load it anew.
    """
    folder = Path(folder)
    document = read_adapter_config(folder)
    with TensorFile(folder / WEIGHTS_FILE) as file:
        tensors = {name: file.read(name) for name in file.names}
        try:
            config = _lora_config(document, tensors)
            _check_targets(model, config, tensors)
            if lora_dropout is not None:
                config = dataclasses.replace(config, lora_dropout=lora_dropout)
            inject(model, config)
            fill_adapter(model, tensors)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    if not trainable:
        model.requires_grad_(False)
    return config


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Return the `adapter_config.json` of an adapter's folder, which must hold its weights as well.

    Raises:
        UserError: The folder or one of the two files is missing, or the JSON is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{folder}: no such folder{did_you_mean(folder.name, names)}")
    if not (folder / CONFIG_FILE).exists():
        kind = "a model, not an adapter" if (folder / "config.json").exists() else "no adapter"
        raise UserError(
            f"{folder}: holds {kind}: there is no {CONFIG_FILE}; give the folder "
            "that PEFT wrote, or final/ of a run"
        )
    if not (folder / WEIGHTS_FILE).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            f"{folder}: there is no {WEIGHTS_FILE}"
            + (
                "; adapter_model.bin is pickle, which can run code and is never read: load and "
                "save the adapter once with a current PEFT"
                if pickled
                else "; complete the download"
            )
        )
    return read_json_object(folder / CONFIG_FILE)


def saved_config(folder: str | Path, model: nn.Module | None = None) -> LoraConfig:
    """Return what `load_adapter` would inject from an adapter's folder.

    Args:
        folder: What `save_adapter` or PEFT wrote.
        model: The base model, which may be on the meta device, where the adapter is to fit it; it
            stays as it is.

    Raises:
        UserError: As `load_adapter`; without a model, as far as the configuration goes.
    """
    document = read_adapter_config(folder)
    with TensorFile(Path(folder) / WEIGHTS_FILE) as file:
        tensors = {name: file.read(name) for name in file.names}
        try:
            config = _lora_config(document, tensors)
            if model is not None:
                _check_targets(model, config, tensors)
                model = copy.deepcopy(model)
                inject(model, config)
                fitted(model, tensors)
            return config
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None


def _document(model: nn.Module, base_model: str | None, revision: str | None) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    config = adapter_config(model)
    targets = _shortest_targets(model)
    whole = whole_weights(model, config.modules_to_save)
    rows = config.trainable_token_indices
    if config.init_lora_weights == "pissa":
        config = of_file(config)
    if base_model is None:
        # transformers' models have the first of the two as well; an empty one names nothing.
        base_model = getattr(model, "name_or_path", None) or None
        revision = revision or getattr(model, "revision", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "modules_to_save": [name.rpartition(".")[2] for name in whole] or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "lora_bias": False,
        # Few keys: an older PEFT fails on one that it does not know.
        **({"trainable_token_indices": list(rows)} if rows else {}),
        # Readers that do not know the key untie what they are given twice.
        **({"ensure_weight_tying": True} if is_tied(model, config.modules_to_save) else {}),
    }


def _shortest_targets(model: nn.Module) -> list[str]:
    """Return the last parts of the adapted names where they mean no other module, else full names.

    Lists of last parts are what every reader of the format understands.
    """
    adapted = set(lora_layers(model))
    suffixes = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if meant == adapted else adapted)


def _check_targets(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse targets that take no adapter, and a rank beyond the tensors': it would take memory."""
    largest = max(
        (max(tensor.shape) for tensor in tensors.values() if 0 not in tensor.shape), default=0
    )
    for name in target_names(model, config, remedy=_MERGE_IT):
        if config.rank(name) > largest:
            raise UserError(
                f"{CONFIG_FILE}: the rank of {name} is {config.rank(name)}, but no tensor in "
                f"{WEIGHTS_FILE} is that large; the two files do not belong together"
            )


def _lora_config(document: Mapping[str, Any], tensors: Iterable[str]) -> LoraConfig:
    """Return the configuration that adapter_config.json means, refusing what it cannot express."""
    kind = document.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{CONFIG_FILE}: peft_type is {kind!r:.80}, but only 'LORA' is supported")
    known = {*_FIELDS, *_SELECTIONS, *_INERT, "init_lora_weights"}
    unsupported = [key for key in document if key not in known and _is_given(document, key)]
    start = document.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        unsupported.append("init_lora_weights")
    if unsupported:
        listed = ", ".join(f"{key}={document[key]!r:.80}" for key in sorted(unsupported))
        raise UserError(f"{CONFIG_FILE}: {listed} is not supported; {_MERGE_IT}")
    values = {key: document[key] for key in _FIELDS if document.get(key) is not None}
    whole = values.get("modules_to_save")
    if isinstance(whole, list) and all(isinstance(name, str) for name in whole):
        values["modules_to_save"] = [*dict.fromkeys(name.rpartition(".")[2] for name in whole)]
    rows = values.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        if [name.rpartition(".")[2] for name in rows] != ["embed_tokens"]:
            given = f"trainable_token_indices={rows!r:.80}"
            raise UserError(f"{CONFIG_FILE}: {given} is not supported; {_MERGE_IT}")
        (values["trainable_token_indices"],) = rows.values()
    _refuse_other_tensors(tensors, weights=bool(whole))
    targets = values.get("target_modules")
    by_expression = isinstance(targets, str) and targets != ALL_LINEAR
    if targets is None or by_expression or any(_is_given(document, key) for key in _SELECTIONS):
        values["target_modules"] = _adapted_names(tensors)
    try:
        for key in ("rank_pattern", "alpha_pattern"):
            _check_patterns(key, values.get(key, {}))
        return LoraConfig(**values)
    except UserError as error:
        raise UserError(f"{CONFIG_FILE}: {error}") from None


def _is_given(document: Mapping[str, Any], key: str) -> bool:
    """Whether a key says something: null, false and what is empty do not; zero does."""
    value = document.get(key)
    return value is not None and value is not False and value not in ("", [], {})


def _refuse_other_tensors(names: Iterable[str], *, weights: bool) -> None:
    """Refuse what is neither a factor of a linear layer nor a bias, nor one of the `weights` named.

    An adapted embedding has factors of another kind, and PEFT writes whole layers beside the
    factors where the vocabulary was resized.
    """
    known = (*_FACTORS, "bias", *([".weight"] if weights else []))
    others = sorted(name for name in names if not name.endswith(known))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{WEIGHTS_FILE}: holds {', '.join(others[:3])}{more}, no low-rank factors of linear "
            f"layers; {_MERGE_IT}"
        )


def _check_patterns(key: str, patterns: Any) -> None:
    """Refuse expressions that can take forever to match: a file of a stranger's brings them.

    A repeated group may take time exponential in a name's length, and every further repetition
    multiplies it by that length.
    """
    if not isinstance(patterns, Mapping):
        return  # LoraConfig says what it must be
    for pattern in patterns:
        repetitions = len(re.findall(r"[*+{]", pattern))
        if repetitions > _MOST_REPETITIONS or re.search(r"\)[*+{]", pattern):
            raise UserError(
                f"{key}: '{pattern:.200}' repeats a group, or repeats more than "
                f"{_MOST_REPETITIONS} times, which can take forever to match; write module names"
            )
    if len(patterns) > _MOST_PATTERNS:
        raise UserError(
            f"{key}: holds {len(patterns)} patterns, more than the {_MOST_PATTERNS} that are read"
        )


def _adapted_names(tensors: Iterable[str]) -> Sequence[str]:
    """Return the modules that have an A factor among the tensors."""
    ending = ".lora_A.weight"
    return [
        name.removeprefix(PREFIX).removesuffix(ending)
        for name in tensors
        if name.startswith(PREFIX) and name.endswith(ending)
    ]
