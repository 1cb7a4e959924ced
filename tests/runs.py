"""What tests of whole runs share: the settings of a small one, how it is done, what it leaves."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from files.atomic import sha256_file
from files.faults import listening
from train.config.load import load_config
from train.run import Outcome, execute
from train.saving.resume import find_run

# State that tells of the process or the clock, not of what was computed.
OF_THE_PROCESS = ("seconds", "resumed_from", "peak_memory_bytes")
Listener = Callable[[str], None]
Refused = Callable[..., str]  # the fixture of that name


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run's settings: steps of 3 × 2 examples, in fp32, without dropout of its own."""
    return {
        "model.path": str(model),
        "data.train": str(rows / "train.jsonl"),
        "data.valid": str(rows / "valid.jsonl"),
        "data.max_length": 48,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 3,
        "train.precision": "fp32",
        "train.output_dir": str(output),
        "lora.r": 4,
        "optimizer.learning_rate": 1e-2,
        "log.tensorboard": False,
        "log.progress": False,
        **changes,
    }


def spelled(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Return settings as arguments of the command line."""
    return [f"{key}={spelled(value)}" for key, value in values.items()]


def changed(given: Sequence[str], *changes: str) -> list[str]:
    """Return settings with others in the place of those of the same key."""
    over = {setting.partition("=")[0] for setting in changes}
    return [*(one for one in given if one.partition("=")[0] not in over), *changes]


def train(values: Mapping[str, Any], listener: Listener | None = None) -> Outcome:
    """Do a run; `listener` hears of every fault point that it passes."""
    with listening(listener) if listener else nullcontext():
        return execute(load_config(overrides=dict(values)))


def resume(run: Path, listener: Listener | None = None, **changes: Any) -> Outcome:
    """Do what is left of a run."""
    with listening(listener) if listener else nullcontext():
        return execute(*find_run(run, changes))


def in_step(number: int, act: Callable[[], object]) -> Listener:
    """Return a listener that acts in the middle of the `number`-th step that it hears of."""
    steps = itertools.count(1)

    def listen(name: str) -> None:
        if name == "step.gradient" and next(steps) == number:
            act()

    return listen


def signalled(number: int, *signals: signal.Signals) -> Listener:
    """Return a listener that sends the process signals in the middle of its `number`-th step."""
    return in_step(number, lambda: [os.kill(os.getpid(), one) for one in signals])


def rows_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl (of one kind), without the times they took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in rows
        if kind in (None, row["kind"])
    ]


def checkpoints_of(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def trained_bits(run: Path) -> dict[str, str]:
    """Return the hashes of the last checkpoint's tensors and of what the run hands out."""
    return {
        f"{folder.name}/{path.name}": sha256_file(path)
        for folder in (checkpoints_of(run)[-1], run / "best", run / "final")
        for path in sorted(folder.glob("*.safetensors"))
    }
