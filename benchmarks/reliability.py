"""What README promises about kills, corruption and broken input, shown by one command.

    python -m benchmarks.reliability [--gibibytes 1]

Runs tests/reliability with 200 runs killed at random, and the test that looks for pickle (`make
test-slow` kills at every single point); then measures what a checkpoint costs beside its bytes.
Prints the figures beside what is promised, appends one record to
benchmarks/results/reliability.jsonl, and ends with an error where a test failed. The tests do their
runs two at a time.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness, product
from benchmarks.fixtures import Fixture, write_base, write_rows
from benchmarks.harness import ROOT, timed
from files.folders import damage
from files.tensors import write_tensors

KILLS = "tests/reliability/test_kill.py::test_a_run_killed"
FUZZ = "tests/reliability/test_fuzz.py::test_mutated_files_end_in_one_sentence_or_are_read"
RUNS = ("lora, adamw, fp32, tensorboard", "full, adafactor, fp16")
# Of each test the case is taken that the promise speaks of; what else is slow takes too long here.
LEFT_OUT = (
    *(f"{KILLS}_at_a_point_loses_nothing[{run}-{n}]" for run in RUNS for n in ("few", "every")),
    f"{KILLS}_again_and_again_loses_nothing[{RUNS[0]}-10]",
    f"{KILLS}_again_and_again_loses_nothing[{RUNS[1]}-200]",
    *(f"{FUZZ}[{number}]" for number in (1_000, 100_000)),
    "tests/reliability/test_command_line.py::"
    "test_the_command_killed_by_the_clock_ends_in_the_same_bits[1]",
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
    figures = Figures()
    left_out = [argument for test in LEFT_OUT for argument in ("--deselect", test)]
    chosen = ["tests/reliability", "tests/test_floors.py", "-q", "-m", "not gpu", *left_out]
    arguments = [*chosen, "-p", "no:cacheprovider"]
    seconds, code = timed(lambda: pytest.main(arguments, plugins=[figures]))
    figures.values["tests failed"] += code not in (0, 1)  # none found, or not even begun
    return {**figures.values, "seconds of the tests": round(seconds, 1)}


def write_plainly(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the tensors' bytes and sync them."""
    with open(path, "wb") as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def disk_speed(gibibytes: float) -> dict[str, float]:
    """Return what writing and verifying a checkpoint cost beside its bytes; the sides take turns.

    Beside the repository's files, as a temporary folder may lie in memory.
    """
    count = max(1, round(gibibytes * 16))
    tensors = {f"layers.{i}.weight": torch.randn(4096, 4096) for i in range(count)}
    size = count / 16
    state = product.TrainState(product.EarlyStopping(None), step=1).to_dict()
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".tmp-") as name:
        plain, checkpoints = Path(name) / "plain", product.Checkpoints(Path(name) / "run", None)
        target = checkpoints.path(1)

        def write(folder: Path) -> dict[str, Any]:
            return {"model.safetensors": write_tensors(folder / "model.safetensors", tensors)}

        def save() -> None:
            checkpoints.save(state, {}, write, expected_bytes=int(size * 2**30))

        def verify() -> None:
            assert damage(target) is None

        sides: dict[str, Callable[[], object]] = {
            "write": lambda: write_plainly(tensors, plain),
            "save": save,
            "verify": verify,
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, act in sides.items():
                taken[side].append(timed(act)[0])
            plain.unlink()
            shutil.rmtree(target)
    seconds = {side: median(times) for side, times in taken.items()}
    figures = {
        "writing a checkpoint / its bytes": seconds["save"] / seconds["write"],
        "verifying a checkpoint / writing its bytes": seconds["verify"] / seconds["write"],
        "GiB/s written": size / seconds["save"],
        "GiB/s verified": size / seconds["verify"],
    }
    return {name: round(figure, 2) for name, figure in figures.items()}


def stall() -> dict[str, float]:
    """Return how long a save keeps the training thread beside copying the same tensors once more.

    Every weight of 24 million is trained with AdamW: 290 MB are copied at each of the steps.
    """
    copying: list[float] = []
    saving: list[float] = []
    steps = 6
    plain = product.Saver.save

    def watched(saver: product.Saver, **what: bool) -> None:
        saver.writer.wait()
        trained = product.trained_tensors(saver.run)
        live = [*trained.values(), *saver.run.optimizer.state_tensors().values()]
        copying.append(timed(lambda: [tensor.clone() for tensor in live])[0])
        saving.append(timed(lambda: plain(saver, **what))[0])

    with (
        tempfile.TemporaryDirectory(dir=ROOT, prefix=".tmp-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(product.Saver, "save", watched)
        patch.setenv("LATHE_CACHE", f"{name}/cache")
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
        fixture = Fixture(sizes, method="full")
        write_base(fixture, Path(name))
        write_rows(Path(name), 0, steps)
        settings = {"train.precision": "fp32", "optimizer.name": "adamw", "data.max_length": 32}
        settings |= {"checkpoint.steps": 1, "checkpoint.total_limit": 1}
        config = product.configuration(fixture, Path(name), "rows", steps, settings)
        with contextlib.redirect_stdout(io.StringIO()):
            product.run(config)
    # The first save makes the optimizer's state and the pages of the first copy.
    return {
        "stall of a save / copying its tensors": round(median(saving[1:]) / median(copying[1:]), 2),
        "milliseconds a save stalls the training": round(1000 * median(saving[1:]), 1),
    }


def main() -> int:
    """Run, measure, print and record; return 1 where a test failed."""
    parser = harness.parser(__doc__)
    parser.add_argument("--gibibytes", type=float, default=1.0, help="size of the checkpoint")
    options = parser.parse_args()
    os.chdir(ROOT)
    figures = {**run_tests(), **disk_speed(options.gibibytes), **stall()}
    print(f"\n| figure | measured | promised |\n|{'---|' * 3}")
    for name, promise in PROMISED.items():
        print(f"| {name} | {figures.get(name, 'not shown')} | {promise} |")
    harness.append("reliability", figures)
    return 1 if figures["tests failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
