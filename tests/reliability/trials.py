"""Small runs that are killed, taken up again, and compared with one that nobody touched."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs
from runs import OF_THE_PROCESS, rows_of

from files.atomic import sha256_file
from files.faults import listening
from files.folders import damage
from train import loop
from train.config.load import load_config
from train.process.command import run_command
from train.run import execute
from train.saving.resume import find_run

# A child that takes longer than this hangs, however busy the machine is; its alarm ends it.
MAX_SECONDS = 300
Point = tuple[str, int]


def settings(model: Path, rows: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of 5 steps whose epoch has 4: dropout, accumulation, evaluations, rotation."""
    wanted = {
        "data.test": str(rows / "test.jsonl"),
        "train.per_device_train_batch_size": 1,
        "train.max_steps": 5,
        "lora.r": 2,
        "lora.target_modules": ["q_proj", "c_proj"],
        "lora.lora_dropout": 0.1,
        "optimizer.learning_rate": 0.05,
        "schedule.name": "constant",
        "eval.on_start": True,
        "eval.steps": 2,
        "eval.per_device_batch_size": 4,
        "checkpoint.steps": 2,
        "checkpoint.total_limit": 1,
        "checkpoint.load_best_at_end": True,
        **changes,
    }
    return runs.settings(model, rows, Path(), **wanted)


def begin_or_resume(values: Mapping[str, Any]) -> int:
    """Do what is left of a run and return its exit code: `--resume`, or the same command again."""
    folder = Path(values["train.output_dir"])
    if not (folder / "config.toml").is_file():
        return execute(load_config(overrides=values)).exit_code
    config, resume = find_run(folder, {})
    return 0 if resume is None else execute(config, resume).exit_code


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a finished run is, but for times and process numbers."""
    temporary = [
        str(path) for path in folder.rglob(".t*") if path.name.startswith((".tmp-", ".tr"))
    ]
    assert not temporary, f"left over: {temporary}"
    checkpoints = sorted((folder / "checkpoints").iterdir())
    places = [*checkpoints, folder / "best", folder / "final"]
    for place in places:
        assert damage(place) is None, damage(place)
    state = json.loads((checkpoints[-1] / "state.json").read_text())["state"]
    status = json.loads((folder / "status.json").read_text())
    return {
        "tensors": {
            f"{place.name}/{path.name}": sha256_file(path)
            for place in places
            for path in sorted(place.glob("*.safetensors"))
        },
        "rows": rows_of(folder),
        "state": {k: v for k, v in state.items() if k not in OF_THE_PROCESS},
        "status": {k: status[k] for k in ("state", "reason", "step", "best", "tokens", "targets")},
    }


def noted(path: Path) -> Callable[[str], None]:
    """Return a listener that writes the name of each point passed into a file, one a line."""

    def listen(name: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(name + "\n")

    return listen


def killed_at(name: str, occurrence: int) -> Callable[[str], None]:
    """Return a listener that kills the process when it passes a point that many times."""
    counts = defaultdict(lambda: itertools.count(1))

    def listen(passed: str) -> None:
        if passed == name and next(counts[passed]) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def killed_after(number: int) -> Callable[[str], None]:
    """Return a listener that kills the process when it passes the `number`-th point of any name."""
    count = itertools.count(1)

    def listen(_: str) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def in_child(log: Path, work: Callable[[], int]) -> int:
    """Do `work` in a forked child, its words into `log`; return its exit code, -9 when killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.alarm(MAX_SECONDS)
            with open(log, "a", encoding="utf-8") as sys.stdout:
                sys.stderr = sys.stdout
                try:
                    code = work()
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(values: Mapping[str, Any], listener: Callable[[str], None] | None = None) -> int:
    """Begin or resume a run in a child and return the child's exit code.

    Beside the run's folder lie `log.txt`, and `ledger.jsonl` with step and example ids of every
    step that any of its processes did.
    """
    folder = Path(values["train.output_dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    plain = loop.train_step

    def entered(model: Any, optimizer: Any, batch: Any, **rest: Any) -> Any:
        ids = [int(example) for cut in batch for example in cut.examples]
        with open(folder.with_name("ledger.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps([rest["draw"][1], ids]) + "\n")
        return plain(model, optimizer, batch, **rest)

    def work() -> int:
        loop.train_step = entered
        with listening(listener or (lambda _: None)):
            return run_command(lambda: begin_or_resume(values))

    return in_child(folder.with_name("log.txt"), work)


def ledger(folder: Path) -> set[tuple[int, tuple[int, ...]]]:
    """Return (step, example ids) of every step done in a run, by whichever of its processes."""
    lines = folder.with_name("ledger.jsonl").read_text().splitlines()
    return {(step, tuple(ids)) for step, ids in map(json.loads, lines)}


@dataclass(frozen=True)
class Reference:
    """A run that nobody touched.

    Attributes:
        values: Its settings, without a folder.
        points: Every point it passed, as (name, occurrence), in order.
        outcome: What it came to.
        ledger: The examples of its steps.
    """

    values: Mapping[str, Any]
    points: tuple[Point, ...]
    outcome: Mapping[str, Any]
    ledger: set[tuple[int, tuple[int, ...]]]

    def at(self, folder: Path) -> dict[str, Any]:
        """Return the settings of the same run in another folder."""
        return {**self.values, "train.output_dir": str(folder / "run")}

    def differences(self, folder: Path) -> str:
        """Return in what the finished run in `folder` differs, empty where in nothing."""
        try:
            found = outcome(folder / "run")
        except (AssertionError, OSError, LookupError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        differing = [name for name, value in self.outcome.items() if found[name] != value]
        if ledger(folder / "run") != self.ledger:
            differing.append("ledger")
        return ", ".join(f"{name} differs" for name in differing)


def reference(values: Mapping[str, Any], folder: Path) -> Reference:
    """Do a run that nobody touches, and note what it passes."""
    # Once in this process, so that no child has to import anything.
    begin_or_resume({**values, "train.output_dir": str(folder / "first")})
    run = folder / "untouched" / "run"
    assert attempt({**values, "train.output_dir": str(run)}, noted(folder / "points")) == 0
    counts: Counter[str] = Counter()
    points = []
    for name in (folder / "points").read_text().splitlines():
        counts[name] += 1
        points.append((name, counts[name]))
    return Reference(values, tuple(points), outcome(run), ledger(run))


def side_by_side(work: Callable[[Any], Any], cases: Sequence[Any]) -> list[Any]:
    """Return what `work` returns for every case; two are done at a time."""
    # Forked, so that nothing is imported again; frozen, so that no collector writes to every page.
    gc.freeze()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(work, cases, chunksize=1)
