"""What README promises about kills, corruption and broken input, shown by one command.

    python -m benchmarks.reliability [--gibibytes 1]

Runs tests/reliability with 200 runs killed at random, and the test that looks for pickle (`make
test-slow` kills at every single point); then measures what a checkpoint costs beside its bytes.
Prints the figures beside what is promised, appends one record to
benchmarks/results/reliability.jsonl, and ends with an error where a test failed. The tests do their
runs two at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import record
from files.folders import damage
from files.tensors import write_tensors
from train.config.load import load_config
from train.run import run
from train.saving.checkpoints import Checkpoints
from train.saving.folder import trained_tensors
from train.saving.saver import Saver
from train.state import EarlyStopping, TrainState

ROOT = Path(__file__).resolve().parent.parent
KILLS = "tests/reliability/test_kill.py::test_a_run_killed"
# Of each pair the one is taken that the promise speaks of; what else is slow takes too long here.
LEFT_OUT = (
    f"{KILLS}_at_a_point_loses_nothing[lora, adamw, fp32, tensorboard-every]",
    f"{KILLS}_at_a_point_loses_nothing[full, adafactor, fp16-every]",
    f"{KILLS}_again_and_again_loses_nothing[lora, adamw, fp32, tensorboard-10]",
    f"{KILLS}_again_and_again_loses_nothing[full, adafactor, fp16-200]",
    "tests/reliability/test_fuzz.py::test_many_mutated_files",
)
# Figure → what is promised of it.
PROMISED = {
    "kill points": "≥ 80",
    "kill points, bit-equal": "all of them",
    "runs killed at random points": "≥ 200",
    "kills in them": "",
    "such runs, bit-equal": "all of them",
    "kills of the command by the clock": "3, bit-equal",
    "corruptions of a checkpoint": "250 in each of two",
    "corruptions noticed": "all of them",
    "bits flipped in safetensors files": "",
    "of them noticed by the safetensors library": "",
    "uses of pickle": "0",
    "fuzz cases": "≥ 2,000",
    "fuzz failures": "0",
    "tests failed": "0",
    "seconds of the tests": "≤ 120 on two cores",
    "writing a checkpoint / its bytes": "≤ 2",
    "verifying a checkpoint / writing its bytes": "≤ 2",
    "verifying a checkpoint / reading its bytes": "",
    "GiB/s written": "",
    "GiB/s verified": "",
    "stall of a save / copying its tensors": "1, but for noise",
    "milliseconds a save stalls the training": "",
}
ROUNDS = 3


class Figures:
    """A pytest plugin that adds up what the tests record as properties."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in the report of one test's phase."""
        if report.when == "call":
            self.values.update({str(name): int(str(n)) for name, n in report.user_properties})
        self.values["tests failed"] += report.failed


def run_tests() -> dict[str, Any]:
    """Run the tests and return their figures."""
    figures, started = Figures(), time.perf_counter()
    left_out = [argument for test in LEFT_OUT for argument in ("--deselect", test)]
    chosen = ["tests/reliability", "tests/test_floors.py", "-q", "-m", "not gpu", *left_out]
    code = pytest.main([*chosen, "-p", "no:cacheprovider"], plugins=[figures])
    figures.values["tests failed"] += code not in (0, 1)  # none found, or not even begun
    seconds = round(time.perf_counter() - started, 1)
    return {**figures.values, "seconds of the tests": seconds}


def write_plainly(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the tensors' bytes and sync them."""
    with open(path, "wb") as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """Read a file's bytes."""
    buffer = bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def disk_speed(gibibytes: float) -> dict[str, float]:
    """Return what writing and verifying a checkpoint cost beside its bytes; the sides take turns.

    Beside the repository's files, as a temporary folder may lie in memory.
    """
    count = max(1, round(gibibytes * 16))
    tensors = {f"layers.{i}.weight": torch.randn(4096, 4096) for i in range(count)}
    size = count / 16
    state = TrainState(EarlyStopping(None), step=1).to_dict()
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".tmp-") as name:
        plain, checkpoints = Path(name) / "plain", Checkpoints(Path(name) / "run", None)
        target = checkpoints.path(1)

        def save() -> None:
            checkpoints.save(
                state,
                {},
                lambda folder: {
                    "model.safetensors": write_tensors(folder / "model.safetensors", tensors)
                },
                expected_bytes=int(size * 2**30),
            )

        def verify() -> None:
            assert damage(target) is None

        sides: dict[str, Callable[[], object]] = {
            "write": lambda: write_plainly(tensors, plain),
            "save": save,
            "read": lambda: read_plainly(target / "model.safetensors"),
            "verify": verify,
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, act in sides.items():
                started = time.perf_counter()
                act()
                taken[side].append(time.perf_counter() - started)
            plain.unlink()
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
    seconds = {side: median(times) for side, times in taken.items()}
    return {
        "writing a checkpoint / its bytes": round(seconds["save"] / seconds["write"], 2),
        "verifying a checkpoint / writing its bytes": round(
            seconds["verify"] / seconds["write"], 2
        ),
        "verifying a checkpoint / reading its bytes": round(seconds["verify"] / seconds["read"], 2),
        "GiB/s written": round(size / seconds["save"], 2),
        "GiB/s verified": round(size / seconds["verify"], 2),
    }


def stall() -> dict[str, float]:
    """Return how long a save keeps the training thread beside copying the same tensors once more.

    Every weight of 24 million is trained with AdamW: 290 MB are copied at each of the steps.
    """
    copying: list[float] = []
    saving: list[float] = []
    plain = Saver.save

    def timed(saver: Saver, **what: bool) -> None:
        saver.writer.wait()
        live = [trained_tensors(saver.model, saver.config), saver.optimizer.state_tensors()]
        started = time.perf_counter()
        copies = [tensor.clone() for tensors in live for tensor in tensors.values()]
        copying.append(time.perf_counter() - started)
        del copies
        started = time.perf_counter()
        plain(saver, **what)
        saving.append(time.perf_counter() - started)

    demo = ROOT / "data" / "demo"
    with (
        tempfile.TemporaryDirectory(dir=ROOT, prefix=".tmp-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Saver, "save", timed)
        patch.setenv("LATHE_CACHE", f"{name}/cache")
        base = Path(shutil.copytree(demo / "base", f"{name}/base"))
        (base / "model.safetensors").unlink()
        config = json.loads((base / "config.json").read_text())
        config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
        (base / "config.json").write_text(json.dumps(config))
        settings = {
            "model.path": str(base),
            "model.random_init": True,
            "train.method": "full",
            "train.precision": "fp32",
            "train.max_steps": 6,
            "train.per_device_train_batch_size": 1,
            "train.output_dir": f"{name}/run",
            "data.train": str(demo / "train.jsonl"),
            "data.text_field": "solution",
            "data.max_length": 32,
            "checkpoint.steps": 1,
            "checkpoint.total_limit": 1,
            "log.tensorboard": False,
            "log.progress": False,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            run(load_config(overrides=settings))
    # The first save makes the optimizer's state and the pages of the first copy.
    return {
        "stall of a save / copying its tensors": round(median(saving[1:]) / median(copying[1:]), 2),
        "milliseconds a save stalls the training": round(1000 * median(saving[1:]), 1),
    }


def main() -> int:
    """Run, measure, print and record; return 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability")
    parser.add_argument("--gibibytes", type=float, default=1.0, help="size of the checkpoint")
    options = parser.parse_args()
    os.chdir(ROOT)
    figures = {**run_tests(), **disk_speed(options.gibibytes), **stall()}
    print(f"\n| figure | measured | promised |\n|{'---|' * 3}")
    for name, promise in PROMISED.items():
        print(f"| {name} | {figures.get(name, 'not shown')} | {promise} |")
    record.append("reliability", figures)
    return 1 if figures["tests failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
