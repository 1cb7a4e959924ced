"""Checkpoint folder ↔ module, by name: our parameter names are the checkpoint's, with no map.

Loading builds the network on the meta device (no memory), compares names, shapes and types of every
tensor with the files' headers, and only then brings the tensors in one by one, each straight to its
device and dtype: the host never holds more than the model and the one shard that is mapped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files.atomic import write_json
from files.errors import UserError, listed
from files.hub import INDEX_FILE, SINGLE_FILE, choose_weights, read_index, resolve_model
from files.tensors import Rows, TensorFile, read_header, write_tensors
from kernels.dispatch import Operations
from models.config import DecoderConfig, parse_config, read_config
from models.families import FAMILIES, build
from models.layers import CausalLM
from models.quantised import put, quantisable, quantise, refuse_other_kind
from models.stored import Places, Stored, take_stored
from models.strangers import strangers

# (parameter, a file's whole tensor) → the parameter is filled.
Place = Callable[[nn.Parameter, Tensor], object]
# `write_tensors`, or what shares the writing of a file: (path, tensors, dtype=…) → sha256.
Write = Callable[..., str]

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    operations: Operations | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> CausalLM:
    """Return the model that `path` holds, its weights on `device` in `dtype`.

    Args:
        path: a folder with config.json and safetensors weights, or a hub id.
        dtype: type of every parameter, whatever the files hold.
        device: where the parameters go.
        attention: `auto`, `sdpa` or `eager`.
        operations: the kernels to build with; None takes the reference.
        revision: branch, tag or commit of a hub id; None takes its main branch.
        quantization: `nf4` or `int8`, as which the weights of the linear layers but the head are
            kept, each quantised as it is read; None keeps them as the folder has them.

    Raises:
        UserError: the folder, its config.json or its weights are not what they must be, or lie
            there quantised otherwise.
    """
    source = resolve_model(path, revision)
    folder = source.folder
    model = build(read_config(folder), operations=operations, attention=attention, device="meta")
    fill(model, folder, dtype, device, quantization=quantization)
    model.name_or_path = source.repository or os.path.abspath(folder)
    model.revision = source.commit
    return model


def fill(
    model: CausalLM,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    place: Place = torch.Tensor.copy_,
    beside: Collection[str] = (),
    quantization: str | None = None,
) -> None:
    """Fill every parameter of `model` from the safetensors files in `folder`.

    A parameter on the meta device is made on `device` in `dtype`; one that has memory already
    keeps it, with its type, so that an optimizer that refers to it stays right: `place` puts the
    file's tensor into it, all or some of which is read from the disk then. Parameters named
    `beside` are no part of the folder's model. `quantization` is as of `load_model`.

    Raises:
        UserError: names (missing and unexpected ones, the latter with a remedy), shapes or types
            differ from the model's; a tied model's stray lm_head differs from its embedding; a file
            is damaged or missing; there are pickle files alone.
    """
    folder = Path(folder)
    refuse_other_kind(folder, model.config.quantization, quantization)
    parameters = {n: p for n, p in model.named_parameters() if n not in beside}
    places = _find_tensors(folder)
    stored = _take_stored(folder, model, parameters, places)
    _check_tensors(folder, model.config, parameters, places)
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        by_file.setdefault(places[name][0], []).append(name)
    for path, names in by_file.items():
        with TensorFile(path) as file:
            for name in sorted(names, key=lambda name: file.info(name).begin):
                _set_parameter(model, name, file.read(name), dtype, device, place, quantization)
    for name, weight in stored.items():
        put(model, name, weight.kind, weight.read(), dtype, device)


def check_weights(folder: Path, model: CausalLM) -> Places:
    """Return where each tensor of `folder` lies, or raise as `fill`: headers alone are read."""
    places, parameters = _find_tensors(folder), dict(model.named_parameters())
    _take_stored(folder, model, parameters, places)
    _check_tensors(folder, model.config, parameters, places)
    return places


def initialise(
    model: nn.Module,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    initializer_range: float,
    place: Place = torch.Tensor.copy_,
    quantization: str | None = None,
) -> None:
    """Give every parameter its starting value: matrices N(0, initializer_range), norms 1, biases 0.

    Each tensor is a pure function of (seed, its name): drawn in fp32 on the host, whatever the
    device, dtype and order. Parameters are placed as `fill` places them, quantised ones too.
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
        _set_parameter(model, name, value, dtype, device, place, quantization)


def save_model(
    model_or_state: nn.Module | Mapping[str, Tensor | Rows],
    folder: str | Path,
    *,
    config: DecoderConfig,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    write: Write = write_tensors,
    leads: bool = True,
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
        write: what writes a file of tensors.
        leads: whether this process writes all else; of several that share the writing, one does.

    Returns:
        File name → sha256 (hex) of each weights file.

    Raises:
        UserError: the folder holds weights under names that would not be replaced.
        ValueError: the names or shapes are not those of `config`.
        OSError: the disk is full.
    """
    folder = Path(folder)
    if isinstance(model_or_state, nn.Module):
        state: Mapping[str, Tensor | Rows] = dict(model_or_state.named_parameters())
    else:
        state = model_or_state
    _check_complete(state, config)
    shards = _split(state, max_shard_bytes, dtype)
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_weights(folder, {*shards, *((INDEX_FILE,) if len(shards) > 1 else ())})
    hashes = {
        file_name: write(folder / file_name, {name: state[name] for name in names}, dtype=dtype)
        for file_name, names in shards.items()
    }
    if not leads:
        return hashes
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
    return [folder / name for name in _weights_names(folder)[0]]


def _find_tensors(folder: Path) -> Places:
    """Return name → (file, place in it) for every tensor of the folder's weights."""
    places: Places = {}
    file_names, weight_map = _weights_names(folder)
    for file_name in file_names:
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


def _weights_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the weights' files, and the index's map where it was the index's word."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    index = read_index(folder) if INDEX_FILE in names else {}
    chosen = choose_weights(names, str(folder), index)
    return chosen, index if set(chosen) == set(index.values()) else {}


def _weights_file(folder: Path, file_name: str) -> Path:
    """Return the file's path, which must lie in the folder or in the hub cache's own blobs."""
    path = folder / file_name
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


def _take_stored(
    folder: Path, model: CausalLM, parameters: dict[str, nn.Parameter], places: Places
) -> dict[str, Stored]:
    """Take out of both what lies quantised in the folder."""
    shapes = {n: tuple(p.shape) for n, p in parameters.items() if quantisable(model, n)}
    stored = take_stored(folder, model.config.quantization, shapes, places)
    for name in stored:
        del parameters[name]
    return stored


def _check_tensors(
    folder: Path,
    config: DecoderConfig,
    parameters: Mapping[str, Tensor],
    places: Places,
) -> None:
    """Compare names as sets, then shapes and types; refuse with everything that differs at once."""
    expected = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    unexpected = places.keys() - expected.keys()
    if HEAD in unexpected and config.tie_word_embeddings and EMBEDDING in places:
        _check_stray_head(folder, places)
        unexpected -= {HEAD}
    missing = expected.keys() - places.keys()
    faults = strangers(unexpected, config.num_hidden_layers)
    if missing:
        faults.append(f"missing are {listed(sorted(missing))}")
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


def _check_stray_head(folder: Path, places: Places) -> None:
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


def _set_parameter(
    model: nn.Module,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
    place: Place,
    quantization: str | None,
) -> None:
    """Put `value` into parameter `name`, making it on `device` in `dtype` if it is on meta."""
    if quantization is not None and isinstance(model, CausalLM) and quantisable(model, name):
        quantise(model, name, value, quantization, dtype, device)
        return
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = getattr(module, leaf)
    with torch.no_grad():
        if not parameter.is_meta:
            place(parameter, value)
            return
        # copy_ converts on the way, so that no second copy of the tensor ever exists.
        placed = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
    setattr(module, leaf, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _check_complete(state: Mapping[str, Tensor | Rows], config: DecoderConfig) -> None:
    expected = dict(build(config, device="meta").named_parameters())
    if expected.keys() != state.keys():
        raise ValueError(
            f"names are not the model's: {listed(sorted(expected.keys() ^ state.keys()))}"
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            raise ValueError(f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}")


def _split(
    state: Mapping[str, Tensor | Rows], max_shard_bytes: int, dtype: torch.dtype | None
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


def _stored_bytes(tensor: Tensor | Rows, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _refuse_other_weights(folder: Path, written: set[str]) -> None:
    """A leftover shard or index beside the new files would make the folder two models."""
    others = {path.name for path in folder.glob("model*.safetensors*") if path.name not in written}
    if others:
        raise UserError(
            f"{folder}: already holds other weights ({listed(sorted(others))}); choose an empty "
            "folder"
        )


def _config_document(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json for both dialects.

    `auto_map` goes, since its code is not copied, and so does what weights were quantised as.
    """
    gone = ("auto_map", "quantization_config")
    document = {key: value for key, value in config.raw.items() if key not in gone}
    name = str(dtype).removeprefix("torch.")
    document.setdefault("architectures", [FAMILIES[config.model_type].architecture])
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
