"""The base model of a run: loaded, and made trainable."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from files.hub import ModelSource
from files.tensors import TensorFile
from kernels.dispatch import operations
from lora import adapter_factors, draw_adapters, fill_adapter, inject, load_adapter
from lora.adapter import WEIGHTS_FILE
from lora.tensors import PREFIX
from models import build, load_model
from models.config import DecoderConfig, read_config
from models.layers import CausalLM, set_dropout
from models.quantised import refuse_other_kind
from models.weights import fill, initialise
from train.config.schema import RunConfig
from train.inputs.adapters import lora_config
from train.inputs.known import Unknown
from train.inputs.sharding import place, share_weights
from train.precision import COMPUTE_DTYPES, Precision
from train.process.world import ALONE, World


def with_stored_quantization(config: RunConfig, decoder: DecoderConfig | Unknown) -> RunConfig:
    """Return the configuration with `model.quantization` as the weights at `model.path` have it.

    Drawn weights (`model.random_init`) are nobody's. Doing it twice changes nothing.

    Raises:
        UserError: Another kind is asked for.
    """
    stored = None if isinstance(decoder, Unknown) else decoder.quantization
    if stored is None or config.model.random_init:
        return config
    refuse_other_kind(config.model.path, stored, config.model.quantization)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=stored))


def base_dtype(config: RunConfig) -> torch.dtype:
    """Return what the base's weights are stored in: their masters where they are trained."""
    if config.train.method == "full":
        return COMPUTE_DTYPES[config.train.masters]
    return COMPUTE_DTYPES[config.model.dtype or config.train.precision]


def load_base(
    config: RunConfig,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    on_host: bool = False,
) -> CausalLM:
    """Return the base model on its device, from its files or, with `model.random_init`, drawn.

    `on_host` leaves it in host memory, with the operations of its device, to be streamed from there
    (`train.inputs.streaming`).
    """
    backend = operations(config.train.kernels, device)
    if on_host:
        device = torch.device("cpu")
    if not config.model.random_init:
        model = load_model(
            source.folder,
            dtype=dtype,
            device=device,
            attention=config.model.attention,
            operations=backend,
            quantization=config.model.quantization,
        )
    else:
        decoder = read_config(source.folder)
        model = build(decoder, operations=backend, attention=config.model.attention, device="meta")
        initialise(
            model,
            config.train.seed,
            dtype,
            device,
            initializer_range=decoder.initializer_range,
            quantization=config.model.quantization,
        )
    _configure(model, config)
    return model


def load_shared(
    config: RunConfig, source: ModelSource, precision: Precision, world: World
) -> CausalLM:
    """Return the model of a run whose ranks share its weights, trainable as `make_trainable` does.

    No rank holds more than its rows, beside one tensor of the files while it is read.
    """
    decoder, seed, device = read_config(source.folder), config.train.seed, precision.device
    backend, dtype = operations(config.train.kernels, device), base_dtype(config)
    model = build(decoder, operations=backend, attention=config.model.attention, device="meta")
    model.to(dtype)
    _configure(model, config)
    make_trainable(model, config)
    share_weights(model, world, precision)
    if config.model.random_init:
        initialise(
            model, seed, dtype, device, initializer_range=decoder.initializer_range, place=place
        )
    else:
        fill(model, source.folder, dtype, device, place, beside=adapter_factors(model))
        model.name_or_path = source.repository or os.path.abspath(source.folder)
        model.revision = source.commit
    if config.train.method == "lora":
        draw_adapters(model, seed)
    if config.lora.init_from is not None:
        with TensorFile(Path(config.lora.init_from) / "adapter_model.safetensors") as file:
            fill_adapter(model, {name: file.read(name) for name in file.names})
    return model


def _configure(model: CausalLM, config: RunConfig) -> None:
    if config.model.dropout is not None:
        set_dropout(model, config.model.dropout)
    policy = config.model.gradient_checkpointing
    model.gradient_checkpointing = "none" if policy == "auto" else policy  # outside of a run
    if config.train.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)


def make_trainable(
    model: CausalLM, config: RunConfig, world: World = ALONE, checkpoint: Path | None = None
) -> None:
    """Inject adapters, new or from `lora.init_from`, and freeze the rest; or train every weight.

    Where a start is made of the weights (`lora.init_lora_weights`), all ranks have that of rank 0,
    or that of the `checkpoint` that the run goes on from.
    """
    settings = config.lora
    if config.train.method == "full":
        model.requires_grad_(True)
    elif settings.init_from is not None:
        load_adapter(model, settings.init_from, trainable=True, lora_dropout=settings.lora_dropout)
    else:
        start = None
        if checkpoint is not None and settings.init_lora_weights == "pissa":
            with TensorFile(checkpoint / WEIGHTS_FILE) as file:
                start = {name.removeprefix(PREFIX): file.read(name) for name in file.names}
        inject(
            model,
            lora_config(settings),
            seed=config.train.seed,
            start=start,
            agree=lambda factor: world.sum_(factor if world.first else factor.zero_()),
        )
