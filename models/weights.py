"""Checkpoint folder ↔ module, by name: our parameter names are the checkpoint's, with no map.

Loading builds the network on the meta device (no memory), compares names, shapes and types of every
tensor with the files' headers, and only then brings the tensors in one by one, each straight to its
device and dtype: the host never holds more than the model and the one shard that is mapped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files.atomic import write_json
from files.errors import UserError
from files.hub import resolve_model
from files.strict_json import read_json_object
from files.tensors import TensorFile, TensorInfo, read_header, write_tensors
from kernels.dispatch import Operations
from models.config import DecoderConfig, parse_config, read_config
from models.families import build
from models.layers import CausalLM

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    operations: Operations | None = None,
    revision: str | None = None,
) -> CausalLM:
    """Return the model that `path` holds, its weights on `device` in `dtype`.

    Args:
        path: a folder with config.json and safetensors weights, or a hub id.
        dtype: type of every parameter, whatever the files hold.
        device: where the parameters go.
        attention: `auto`, `sdpa` or `eager`.
        operations: the kernels to build with; None takes the reference.
        revision: branch, tag or commit of a hub id; None takes its main branch.

    Raises:
        UserError: the folder, its config.json or its weights are not what they must be.
    """
    folder = resolve_model(path, revision).folder
    model = build(read_config(folder), operations=operations, attention=attention, device="meta")
    fill(model, folder, dtype, device)
    return model


def fill(
    model: CausalLM,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Fill every parameter of `model` from the safetensors files in `folder`.

    A parameter on the meta device is made on `device` in `dtype`; one that has memory already
    keeps it, with its type, so that an optimizer that refers to it stays right.

    Raises:
        UserError: names (all missing and all unexpected ones), shapes or types differ from the
            model's; a tied model's stray lm_head differs from its embedding; a file is damaged or
            missing; there are pickle files alone.
    """
    folder = Path(folder)
    places = check_weights(folder, model)
    parameters = dict(model.named_parameters())
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        by_file.setdefault(places[name][0], []).append(name)
    for path, names in by_file.items():
        with TensorFile(path) as file:
            for name in sorted(names, key=lambda name: file.info(name).begin):
                _set_parameter(model, name, file.read(name), dtype, device)


def check_weights(folder: Path, model: CausalLM) -> dict[str, tuple[Path, TensorInfo]]:
    """Return where each tensor of `folder` lies, or raise as `fill`: headers alone are read."""
    places = _find_tensors(folder)
    _check_tensors(folder, model, places)
    return places


def initialise(
    model: nn.Module,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    initializer_range: float,
) -> None:
    """Give every parameter its starting value: matrices N(0, initializer_range), norms 1, biases 0.

    Each tensor is a pure function of (seed, its name): drawn in fp32 on the host, whatever the
    device, dtype and order. Parameters are placed as `fill` places them.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim > 1:
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
            value = torch.empty(parameter.shape).normal_(
                0.0, initializer_range, generator=generator
            )
        else:
            value = torch.full(parameter.shape, 0.0 if name.endswith(".bias") else 1.0)
        _set_parameter(model, name, value, dtype, device)


def save_model(
    model_or_state: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    config: DecoderConfig,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Write a Hugging Face model folder: config.json and model.safetensors, or shards and index.

    config.json is the file that was read, with the stored type in it (both spellings) and rotary
    settings in both dialects, so that transformers 4 and 5 read the same model.

    Args:
        model_or_state: the model, or its tensors by name.
        folder: made if missing; must hold no other model's weights.
        config: the architecture; decides which names must be there.
        max_shard_bytes: beyond it a new file is begun; one tensor may exceed it alone.
        dtype: what floating-point tensors are stored as; None keeps their own.

    Returns:
        File name → sha256 (hex) of each weights file.

    Raises:
        UserError: the folder holds weights under names that would not be replaced.
        ValueError: the names or shapes are not those of `config`.
        OSError: the disk is full.
    """
    folder = Path(folder)
    if isinstance(model_or_state, nn.Module):
        state: Mapping[str, Tensor] = dict(model_or_state.named_parameters())
    else:
        state = model_or_state
    _check_complete(state, config)
    shards = _split(state, max_shard_bytes, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_other_weights(folder, {*shards, *((INDEX_FILE,) if len(shards) > 1 else ())})
    hashes = {
        file_name: write_tensors(
            folder / file_name, {name: state[name] for name in names}, dtype=dtype
        )
        for file_name, names in shards.items()
    }
    if len(shards) > 1:
        total = sum(_stored_bytes(tensor, dtype) for tensor in state.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    stored = dtype or state[EMBEDDING].dtype
    write_json(folder / "config.json", _config_document(config, stored))
    return hashes


def weights_files(folder: Path) -> list[Path]:
    """Return the files that hold a model folder's weights.

    Raises:
        UserError: there are none, or the index is not one.
    """
    return [folder / name for name in sorted({*_weight_map(folder).values()}) or [SINGLE_FILE]]


def _find_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Return name → (file, place in it) for every tensor of the folder's weights."""
    places: dict[str, tuple[Path, TensorInfo]] = {}
    weight_map = _weight_map(folder)
    for file_name in dict.fromkeys(weight_map.values()) or [SINGLE_FILE]:
        path = _weights_file(folder, file_name)
        for name, info in read_header(path).tensors.items():
            if name in places:
                raise UserError(
                    f"{folder}: tensor '{name}' stands in two files, {places[name][0].name} and "
                    f"{file_name}; fetch the folder again"
                )
            places[name] = (path, info)
    misplaced = [
        name
        for name, file_name in weight_map.items()
        if name not in places or places[name][0].name != file_name
    ]
    if misplaced:
        raise UserError(
            f"{folder / INDEX_FILE}: names tensors that are not in the files it gives for them: "
            f"{', '.join(misplaced)}; fetch the folder again"
        )
    return {
        name: place for name, place in places.items() if not name.endswith("rotary_emb.inv_freq")
    }


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name → file name from the index; empty where one file holds everything."""
    if (folder / SINGLE_FILE).exists():
        return {}
    path = folder / INDEX_FILE
    if not path.exists():
        raise _no_weights(folder)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map must map tensor names to file names")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not _PLAIN_NAME.fullmatch(file_name):
            raise UserError(
                f"{path}: names {file_name!r:.80}; it must be a plain *.safetensors file name in "
                f"the model folder"
            )
    return weight_map


def _weights_file(folder: Path, file_name: str) -> Path:
    """Return the file's path, which must lie in the folder or in the hub cache's own blobs."""
    path = folder / file_name
    if not path.is_file():
        raise UserError(
            f"{folder}: {file_name} is missing, though the index names it; complete the download"
        )
    home = folder.resolve()
    allowed = {home}
    if home.parent.name == "snapshots":
        allowed.add((home.parent.parent / "blobs").resolve())
    if path.resolve().parent not in allowed:
        raise UserError(
            f"{path}: is a link out of the model folder, to {path.resolve()}; put the file itself "
            f"there"
        )
    return path


def _no_weights(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if any(name.startswith("consolidated.") for name in pickles):
        return UserError(
            f"{folder}: holds Meta's original release ({pickles[0]}), which is pickle and in "
            f"another layout; use the repository's '-hf' version in safetensors"
        )
    if pickles:
        return UserError(
            f"{folder}: only pickle weights found ({', '.join(pickles)}), which can run code and "
            f"are never read; convert to safetensors first: load it once with transformers and "
            f"save_pretrained it to a new folder"
        )
    if "adapter_model.safetensors" in names:
        return UserError(
            f"{folder}: holds an adapter, not a model; give its base model as model.path and this "
            f"folder as lora.init_from"
        )
    return UserError(
        f"{folder}: holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; complete the "
        f"download, or set model.random_init=true to start from random weights"
    )


def _check_tensors(
    folder: Path, model: CausalLM, places: dict[str, tuple[Path, TensorInfo]]
) -> None:
    """Compare names as sets, then shapes and types; refuse with everything that differs at once."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    unexpected = places.keys() - expected.keys()
    if HEAD in unexpected and model.config.tie_word_embeddings and EMBEDDING in places:
        _check_stray_head(folder, places)
        unexpected -= {HEAD}
    missing = expected.keys() - places.keys()
    faults = []
    if missing:
        faults.append(f"missing are {_listed(missing)}")
    if unexpected:
        faults.append(f"unexpected are {_listed(unexpected)}")
    for name in sorted(expected.keys() & places.keys()):
        info = places[name][1]
        if info.shape != expected[name]:
            faults.append(
                f"{name} is {list(info.shape)} in {places[name][0].name}, but config.json makes it "
                f"{list(expected[name])}"
            )
        if not info.dtype.is_floating_point:
            faults.append(f"{name} holds {info.dtype}, so it is quantised, which is not supported")
    if HEAD in missing:
        faults.append(
            "if the output head is the embedding, config.json must say tie_word_embeddings true"
        )
    if faults:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(faults)}")


def _check_stray_head(folder: Path, places: dict[str, tuple[Path, TensorInfo]]) -> None:
    """Accept a tied model's own lm_head only where it is the embedding once more."""
    with TensorFile(places[HEAD][0]) as one, TensorFile(places[EMBEDDING][0]) as other:
        head, embedding = one.read(HEAD), other.read(EMBEDDING)
        wide = torch.promote_types(head.dtype, embedding.dtype)
        # Row blocks, so that a conversion never needs memory for the whole table.
        same = head.shape == embedding.shape and all(
            torch.equal(ours.to(wide), theirs.to(wide))
            for ours, theirs in zip(head.split(4096), embedding.split(4096), strict=True)
        )
    if not same:
        raise UserError(
            f"{folder}: config.json ties the output head to the embedding, but the weights hold "
            f"a {HEAD} that differs from {EMBEDDING}; set tie_word_embeddings to false in "
            f"config.json if the head is its own"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _set_parameter(
    model: nn.Module, name: str, value: Tensor, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Put `value` into parameter `name`, making it on `device` in `dtype` if it is on meta."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = getattr(module, leaf)
    with torch.no_grad():
        if not parameter.is_meta:
            parameter.copy_(value)
            return
        # copy_ converts on the way, so that no second copy of the tensor ever exists.
        placed = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
    setattr(module, leaf, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _check_complete(state: Mapping[str, Tensor], config: DecoderConfig) -> None:
    expected = dict(build(config, device="meta").named_parameters())
    if expected.keys() != state.keys():
        raise ValueError(f"names are not the model's: {_listed(expected.keys() ^ state.keys())}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}")


def _split(
    state: Mapping[str, Tensor], max_shard_bytes: int, dtype: torch.dtype | None
) -> dict[str, list[str]]:
    """Return file name → tensor names, filling one file after the other in the model's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        count = _stored_bytes(tensor, dtype)
        if shards[-1] and size + count > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    total = len(shards)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _stored_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _refuse_other_weights(folder: Path, written: set[str]) -> None:
    """A leftover shard or index beside the new files would make the folder two models."""
    others = {path.name for path in folder.glob("model*.safetensors*") if path.name not in written}
    if others:
        raise UserError(
            f"{folder}: already holds other weights ({_listed(others)}); choose an empty folder"
        )


def _config_document(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json for both dialects; `auto_map` goes, since its code is not copied."""
    document = {key: value for key, value in config.raw.items() if key != "auto_map"}
    name = str(dtype).removeprefix("torch.")
    document.setdefault("architectures", [_ARCHITECTURES[config.model_type]])
    document["tie_word_embeddings"] = config.tie_word_embeddings
    document["dtype"] = document["torch_dtype"] = name
    # transformers 4 knows only these two, and would fall back to a theta of 10000 in silence.
    document["rope_theta"] = config.rope_theta
    scaling = document.get("rope_scaling") or document.get("rope_parameters")
    if config.rope.rope_type != "default" and isinstance(scaling, dict):
        document["rope_scaling"] = scaling
    if parse_config(document, "config.json").rope != config.rope:
        raise ValueError("config was changed without its raw file")
    return document
