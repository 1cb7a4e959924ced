"""Every optimizer with every method: two steps, stopped between, go on bit for bit; the ledger."""

import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import checkpoints_of, resume, rows_of, signalled, train, trained_bits
from small import DROPOUTS, small_model

from files.tensors import TensorFile
from models.weights import save_model
from train.config.load import load_config
from train.optim import OPTIMIZERS
from train.plan.ledger import memory_ledger


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


@pytest.fixture(scope="module")
def wider(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose matrices, and adapters of rank 64, are kept in 8 bits."""
    folder = tmp_path_factory.mktemp("wider")
    model = small_model("starcoder2", vocab_size=257, hidden_size=64, **DROPOUTS)
    save_model(model, folder, config=model.config)
    for path in model_folder.glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


BF16 = {"train.masters": "bf16", "train.precision": "bf16"}
COMBINATIONS: list[tuple[str, str, dict[str, Any]]] = [
    *(("lora", optimizer, {}) for optimizer in OPTIMIZERS),
    *(("full", optimizer, {}) for optimizer in OPTIMIZERS),
    *(("full", optimizer, BF16) for optimizer in OPTIMIZERS if optimizer != "adamw_8bit"),
]
# Every optimizer and every method; test_combinations.py has some of the others.
QUICK = [COMBINATIONS[OPTIMIZERS.index(name)] for name in ("adamw", "adamw_8bit")]
QUICK += [("full", "paged_adamw", {}), ("full", "adafactor", {}), ("full", "adafactor", BF16)]


@pytest.mark.parametrize(
    ("method", "optimizer", "more"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in COMBINATIONS],
    ids=str,
)
def test_two_steps_stopped_between_and_the_bytes_of_the_state(
    method: str,
    optimizer: str,
    more: dict[str, Any],
    wider: Path,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    changes = {
        "train.method": method,
        "optimizer.name": optimizer,
        "optimizer.weight_decay": 0.1,
        "lora.r": 64,
        "train.max_steps": 2,
        "schedule.warmup_steps": 0,
        "checkpoint.steps": 1,
        **more,
    }
    whole = train(runs.settings(wider, rows_file, tmp_path / "whole", **changes))
    values = runs.settings(wider, rows_file, tmp_path / "stopped", **changes)
    assert train(values, signalled(1, signal.SIGTERM)).reason == "sigterm"
    resume(tmp_path / "stopped")
    assert trained_bits(tmp_path / "stopped") == trained_bits(whole.folder)
    assert rows_of(tmp_path / "stopped") == rows_of(whole.folder)
    last = checkpoints_of(whole.folder)[-1]
    if method == "full":
        with TensorFile(last / "model.safetensors") as file:
            stored = {file.info(name).dtype for name in file.names}
        assert stored == {torch.bfloat16 if more else torch.float32}
    with TensorFile(last / "optimizer.safetensors") as file:
        state = {name: file.read(name) for name in file.names if name != "steps"}
    eight = {name for name, tensor in state.items() if tensor.dtype == torch.uint8}
    assert bool(eight) == (optimizer == "adamw_8bit")
    config = load_config(overrides=values)
    decoder = small_model("starcoder2", vocab_size=257, hidden_size=64, **DROPOUTS).config
    ledger = memory_ledger(config, decoder, precision=config.train.precision, device="cpu")
    assert ledger["optimizer"] == sum(tensor.nbytes for tensor in state.values())
