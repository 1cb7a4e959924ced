"""What bf16 masters cost on the demo: by chance about nothing, rounded to the nearest very much.

    python -m pytest -q -s -m slow tests/train/test_masters_on_the_demo.py

prints the valid losses of each run: full fine-tuning at a rate that suits it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import rows_of, train

from train.config.load import load_config
from train.config.toml import flat
from train.optim import rounded

STEPS, EVERY = 45, 15


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Keep tokenised rows out of the user's cache."""


def to_nearest(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return values.bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 3e-5), ("adafactor", 3e-5)])
def test_rounded_by_chance_they_train_as_fp32_ones_and_to_the_nearest_they_do_not(
    optimizer: str,
    rate: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    def losses(name: str, masters: str, seed: int = 42) -> list[float]:
        """Return the valid losses of a run, in the order of their steps."""
        changes = {
            "train.method": "full",
            "train.masters": masters,
            "train.precision": "bf16",
            "train.seed": seed,
            "train.max_steps": STEPS,
            "train.output_dir": str(tmp_path / name),
            "optimizer.name": optimizer,
            "optimizer.learning_rate": rate,
            "model.dropout": 0.0,
            "eval.steps": EVERY,
            "eval.per_epoch": None,
            "eval.early_stopping_patience": None,
            "eval.samples": 0,
            "data.max_length": 64,
            "train.per_device_train_batch_size": 4,
            "train.gradient_accumulation_steps": 1,
            "data.test": None,
            "checkpoint.per_epoch": None,
            "checkpoint.load_best_at_end": False,
            "log.tensorboard": False,
            "log.progress": False,
        }
        run = train(flat(load_config("demo", overrides=changes))).folder
        found = [row["loss"] for row in rows_of(run, "eval") if row["split"] == "valid"]
        record_property(name, found)
        print(f"{optimizer} {name}: {' '.join(f'{loss:.4f}' for loss in found)}")
        return found

    exact = losses("fp32", "fp32")
    noise = [abs(a - b) for a, b in zip(exact, losses("fp32-other-order", "fp32", 43), strict=True)]
    by_chance = losses("by-chance", "bf16")
    monkeypatch.setattr(rounded, "round_to_bf16", to_nearest)
    nearest = losses("to-nearest", "bf16")
    gain = exact[0] - exact[-1]
    assert gain > 0
    # The order of the rows moves a loss by so much; bf16 activations are in it too.
    assert abs(by_chance[-1] - exact[-1]) <= max(max(noise), 0.05 * gain)
    # What is dropped at each update is most of the way.
    assert exact[0] - nearest[-1] < 0.7 * gain
