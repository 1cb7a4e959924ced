"""Runs over ranks, real processes that meet over gloo: the same run, resumed, killed, stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from infilling import write_model, write_rows
from ranks import ended, said, start_program, start_ranks, train_on_ranks
from runs import arguments, rows_of
from safetensors.torch import load_file
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from trials import MAX_SECONDS, attempt, begin_or_resume, killed_at, outcome, settings

from files.errors import UserError
from files.faults import listening
from train.config.command_line import parse
from train.config.load import load_config
from train.process.world import World
from train.run import _answer, run


def slow(value: object) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def values(one_layer: Path, few_rows: Path) -> dict[str, Any]:
    """Return a run of 8 steps of 5 examples each, the last of an epoch of 1; dropout, rotation."""
    return settings(
        one_layer,
        few_rows,
        **{"train.max_steps": 8, "train.effective_batch_size": 5, "eval.on_start": False},
    )


@pytest.fixture(scope="module")
def alone(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert begin_or_resume({**values, "train.output_dir": str(folder)}) == 0
    return folder


@pytest.fixture(scope="module")
def over_two(alone: Path, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run over two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert train_on_ranks(2, {**values, "train.output_dir": str(folder)}) == [0, 0]
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_like(folder: Path, alone: Path) -> None:
    """Compare two runs of the same batches: equal counts, losses to fp32's rounding."""
    one, other = rows(alone), rows(folder)
    assert len(one) == len(other)
    for row, expected in zip(other, one, strict=True):
        for name, value in expected.items():
            if name in ("loss", "grad_norm", "train_loss") and value is not None:
                assert row[name] == pytest.approx(value, rel=1e-5)
            elif name != "seconds":
                assert row[name] == value, name


def at(folder: Path, values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, "train.output_dir": str(folder / "run"), **changes}


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_run_over_ranks(
    size: int, values: dict[str, Any], alone: Path, over_two: Path, tmp_path: Path
) -> None:
    """Three ranks have none to do in the last step of an epoch, which holds one example."""
    folder = over_two
    if size == 3:
        folder = tmp_path / "run"
        assert train_on_ranks(3, at(tmp_path, values)) == [0, 0, 0]
    assert_like(folder, alone)
    expected = load_file(alone / "final" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "final" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert "step 8/8" in said(folder.parent, 0)
    assert all(said(folder.parent, rank) == "" for rank in range(1, size))
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["world_size"] == size


@pytest.mark.parametrize(
    "changes", [{"model.quantization": "nf4"}, {"lora.init_lora_weights": "pissa"}]
)
def test_a_changed_base_is_the_same_whole_one_on_every_rank(
    changes: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    """PiSSA's residue too, though each rank takes the base apart for itself."""
    values = {**values, **changes, "train.max_steps": 3}
    folders = tmp_path / "alone" / "run", tmp_path / "two" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(folders[0])}) == 0
    assert train_on_ranks(2, {**values, "train.output_dir": str(folders[1])}) == [0, 0]
    assert_like(folders[1], folders[0])
    assert json.loads((folders[1] / "plan.json").read_text())["sharding"] == "replicate"


@pytest.mark.parametrize("sharding", ["replicate", slow("shard")])
def test_holes_are_the_same_over_ranks(sharding: str, tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows")
    asked = {"data.fim_rate": 0.7, "data.fim_unit": "syntax", "data.max_length": 64}
    size = {"train.effective_batch_size": 5, "train.max_steps": 4, "eval.on_start": False}
    values = settings(model, rows, **asked, **size, **{"eval.holes": 3})
    folders = tmp_path / "alone" / "run", tmp_path / "two" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(folders[0])}) == 0
    over_two = {"train.output_dir": str(folders[1]), "train.sharding": sharding}
    assert train_on_ranks(2, {**values, **over_two}) == [0, 0], said(folders[1].parent, 1)
    assert_like(folders[1], folders[0])
    assert {row.get("holes") for row in rows_of(folders[0], "eval")} == {3}


def test_a_step_keeps_its_examples_on_another_number_of_ranks(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """A batch that was said a rank, not as a whole."""
    said_a_rank = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2}
    values = {**values, **said_a_rank, "train.max_steps": 6, "train.effective_batch_size": None}
    alone = tmp_path / "alone" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(alone)}) == 0
    here = at(tmp_path, values)
    assert attempt(here, stopping_at(3, signal.SIGTERM)) == 143
    assert train_on_ranks(2, here) == [0, 0], said(tmp_path, 0)
    assert "a step keeps the 4 examples that it had before, on 2 ranks now" in said(tmp_path, 0)
    assert_like(tmp_path / "run", alone)
    # And the other way: 8 examples a step over two ranks, on one after that.
    two = at(tmp_path / "two", values)
    assert train_on_ranks(2, two, {1: stopping_at(2, signal.SIGTERM)}) == [143, 143]
    assert begin_or_resume(two) == 0
    plan = json.loads((tmp_path / "two" / "run" / "plan.json").read_text())
    assert (plan["effective_batch_size"], plan["world_size"]) == (8, 1)


@pytest.mark.slow
def test_steps_of_tokens_are_the_same_over_ranks(values: dict[str, Any], tmp_path: Path) -> None:
    """Of a step of one example a rank has none; stopped on two ranks, it goes on on one."""
    by_tokens = {"train.effective_batch_size": None, "train.effective_batch_tokens": 30}
    values = {**values, **by_tokens, "train.max_steps": 12}
    alone = tmp_path / "alone" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(alone)}) == 0
    two = at(tmp_path / "two", values)
    assert train_on_ranks(2, two, {1: stopping_at(7, signal.SIGTERM)}) == [143, 143]
    assert begin_or_resume(two) == 0
    assert_like(tmp_path / "two" / "run", alone)


def stopping_at(step: int, number: signal.Signals) -> Callable[[str], None]:
    """Return a listener that sends its own process a signal in a step."""
    passed = []

    def listen(name: str) -> None:
        if name == "step.gradient":
            passed.append(name)
            if len(passed) == step:
                os.kill(os.getpid(), number)

    return listen


def test_it_is_stopped_on_two_ranks_goes_on_on_one_and_then_on_three(
    values: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """A signal that one rank alone has stops all at the same step; no example is lost or twice."""
    here = at(tmp_path, values)
    assert train_on_ranks(2, here, {1: stopping_at(3, signal.SIGTERM)}) == [143, 143]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("preempted", "sigterm", 3)
    assert train_on_ranks(1, here, {0: stopping_at(2, signal.SIGINT)}) == [130]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 5
    assert train_on_ranks(3, here) == [0, 0, 0]
    assert_like(tmp_path / "run", alone)


def test_a_rank_that_is_killed_is_named_and_the_resumed_run_is_the_same_bit_for_bit(
    values: dict[str, Any], over_two: Path, tmp_path: Path
) -> None:
    here = at(tmp_path, values)
    codes = train_on_ranks(2, here, {1: killed_at("step.gradient", 5)})
    assert codes == [2, -9]
    assert "error: rank 1 of 2: no answer" in said(tmp_path, 0)
    assert "Traceback" not in said(tmp_path, 0)
    assert train_on_ranks(2, here) == [0, 0]
    assert outcome(tmp_path / "run") == outcome(over_two)


def test_a_rank_that_hangs_is_named_after_the_timeout(
    values: dict[str, Any], tmp_path: Path
) -> None:
    def hang(name: str) -> None:
        if name == "step.gradient":
            time.sleep(7)

    codes = train_on_ranks(2, at(tmp_path, values), {1: hang}, timeout=3)
    assert codes[0] == 2
    assert "error: rank 1 of 2: no answer" in said(tmp_path, 0)


def raising(error: Exception, name: str, times: int) -> Callable[[str], None]:
    passed = []

    def listen(point: str) -> None:
        if point == name:
            passed.append(point)
            if len(passed) == times:
                raise error

    return listen


def test_a_full_disk_ends_all_ranks_with_one_message(
    values: dict[str, Any], tmp_path: Path
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    codes = train_on_ranks(2, at(tmp_path, values), {0: raising(full, "folder.filled", 2)})
    assert codes == [2, 2]
    assert said(tmp_path, 0).count("error: ") == 1
    assert "cannot save" in said(tmp_path, 0)
    assert said(tmp_path, 1) == ""


def test_an_error_on_one_rank_is_told_by_it_and_ends_all(
    values: dict[str, Any], tmp_path: Path
) -> None:
    broken = UserError("the rows of rank 1 are gone")
    codes = train_on_ranks(2, at(tmp_path, values), {1: raising(broken, "step.micro_batch", 2)})
    assert codes == [2, 2]
    assert "error: the rows of rank 1 are gone" in said(tmp_path, 1)
    assert "error: " not in said(tmp_path, 0)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_out_of_memory_on_one_rank_halves_the_micro_batches_of_all(
    values: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    here = at(tmp_path, values, **{"train.per_device_train_batch_size": 2})
    memory = torch.OutOfMemoryError("out of memory")
    assert train_on_ranks(2, here, {1: raising(memory, "step.micro_batch", 3)}) == [0, 0]
    expected = [row["loss"] for row in rows(alone)]
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
    assert "micro-batches 1/2 of their configured size" in said(tmp_path, 0)


def test_what_the_ranks_say_to_each_other(tmp_path: Path) -> None:
    def work(world: World) -> int:
        assert world.sums(1.0, world.rank) == [3.0, 3.0]
        assert world.any(world.rank == 2, False) == [True, False]
        assert world.gathered(tuple(range(world.rank))) == (0, 0, 1)
        assert world.told("it", lambda: f"from {world.rank}") == "from 0"
        order = world.first_on_node("turn", lambda: time.monotonic())
        mine = torch.zeros(3, dtype=torch.float64)
        mine[world.rank] = order
        assert world.sum_(mine)[0] == mine.min()
        assert world.kept_folder() is None
        return 0

    assert ended(start_ranks(3, work, tmp_path)) == [0, 0, 0]


def test_ranks_meet_again_at_a_store_that_outlives_them(tmp_path: Path) -> None:
    """A node that saw none of its ranks fail counts no restart, and is started again all the same.

    What was said at the store before is of no start after it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agents = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    run = tmp_path / "run"

    def work(world: World) -> int:
        assert world.told("it", lambda: str(os.getpid())) != said_before
        if (kept := world.kept_folder()) is None:
            world.shared_folder(lambda: run)
        return 9 if kept else 0

    said_before = ""
    begun = start_ranks(2, work, tmp_path, timeout=10, environment=agents)
    assert ended(begun) == [0, 0]
    # Nothing was begun in the folder; then something was.
    said_before = str(begun[0])
    assert ended(start_ranks(2, work, tmp_path, timeout=10, environment=agents)) == [0, 0]
    run.mkdir()
    (run / "config.toml").touch()
    assert ended(start_ranks(2, work, tmp_path, timeout=10, environment=agents)) == [9, 9]


def test_a_process_that_does_two_runs_meets_the_others_twice(tmp_path: Path) -> None:
    words = [["first", "second"] for _ in range(2)]

    def work(world: World) -> int:
        word = words[world.rank].pop(0)
        return 0 if world.told("it", lambda: word) == word else 9

    assert ended(start_ranks(2, work, tmp_path, timeout=10, times=2)) == [0, 0]


@pytest.fixture(scope="module")
def whole(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same run with every weight trained, and with Adafactor."""
    return {**values, "train.method": "full", "optimizer.name": "adafactor"}


@pytest.fixture(scope="module")
def whole_alone(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of that run in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert begin_or_resume({**whole, "train.output_dir": str(folder)}) == 0
    return folder


def test_ranks_that_share_every_weight_train_as_one_process(
    whole: dict[str, Any], whole_alone: Path, tmp_path: Path
) -> None:
    """And go on with a checkpoint of another number of ranks."""
    here = at(tmp_path, whole)
    assert train_on_ranks(3, here, {2: stopping_at(3, signal.SIGTERM)}) == [143] * 3
    assert train_on_ranks(2, here, {0: stopping_at(2, signal.SIGTERM)}) == [143] * 2
    assert train_on_ranks(3, here) == [0, 0, 0]
    assert_like(tmp_path / "run", whole_alone)
    assert outcome(tmp_path / "run")["status"]["state"] == "finished"
    expected = load_file(whole_alone / "final" / "model.safetensors")
    found = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_a_shared_model_goes_on_bit_for_bit_after_a_kill_and_loads_in_transformers(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    values = {**whole, "optimizer.name": "adamw", "optimizer.learning_rate": 0.01}
    untouched = at(tmp_path / "untouched", values)
    assert train_on_ranks(2, untouched) == [0, 0]
    here = at(tmp_path / "killed", values)
    assert train_on_ranks(2, here, {1: killed_at("step.gradient", 5)}) == [2, -9]
    assert "error: rank 1 of 2: no answer" in said(tmp_path / "killed", 0)
    assert train_on_ranks(2, here) == [0, 0]
    assert outcome(tmp_path / "killed" / "run") == outcome(tmp_path / "untouched" / "run")
    final = tmp_path / "killed" / "run" / "final"
    theirs = AutoModelForCausalLM.from_pretrained(final)
    found = load_file(final / "model.safetensors")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.detach(), found[name])


def test_a_shared_model_computes_in_half_precision(whole: dict[str, Any], tmp_path: Path) -> None:
    """Its norms have their weights in bf16 beside fp32 input; one process has them in fp32."""
    values = {**whole, "train.precision": "bf16", "train.max_steps": 2, "eval.steps": None}
    alone = tmp_path / "alone" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(alone)}) == 0
    assert train_on_ranks(2, at(tmp_path, values)) == [0, 0]
    expected = [row["loss"] for row in rows(alone)]
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(expected, rel=2e-2)


def test_a_shared_model_with_bf16_masters_trains_as_one_process_and_goes_on_bit_for_bit(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    """As near as bf16 sums of gradients are; a checkpoint holds the masters as they are."""
    halves = {"train.masters": "bf16", "train.precision": "bf16", "eval.steps": None}
    values = {**whole, **halves, "train.max_steps": 4}
    alone = tmp_path / "alone" / "run"
    assert begin_or_resume({**values, "train.output_dir": str(alone)}) == 0
    assert train_on_ranks(2, at(tmp_path / "whole", values)) == [0, 0]
    here = at(tmp_path / "stopped", values)
    assert train_on_ranks(2, here, {1: stopping_at(2, signal.SIGTERM)}) == [143] * 2
    assert train_on_ranks(2, here) == [0, 0]
    assert outcome(tmp_path / "stopped" / "run") == outcome(tmp_path / "whole" / "run")
    expected = [row["loss"] for row in rows(alone)]
    found = [row["loss"] for row in rows(tmp_path / "whole" / "run")]
    assert found == pytest.approx(expected, rel=2e-2)


def test_adapters_beside_a_base_that_is_shared(
    values: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    here = at(tmp_path, values, **{"train.sharding": "shard"})
    assert train_on_ranks(3, here, {1: stopping_at(4, signal.SIGTERM)}) == [143] * 3
    assert train_on_ranks(2, here) == [0, 0]
    assert_like(tmp_path / "run", alone)


def test_a_rank_of_a_shared_model_that_runs_out_of_memory_ends_all_and_they_go_on_with_half(
    whole: dict[str, Any], whole_alone: Path, tmp_path: Path
) -> None:
    here = at(tmp_path, whole, **{"train.per_device_train_batch_size": 2})
    memory = torch.OutOfMemoryError("out of memory")
    assert train_on_ranks(2, here, {1: raising(memory, "step.micro_batch", 8)}) == [2, 2]
    told = [rank for rank in (0, 1) if "out of memory on rank 1 of 2" in said(tmp_path, rank)]
    assert len(told) == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["reason"] == "out_of_memory"
    assert train_on_ranks(2, here) == [0, 0]
    expected = [row["loss"] for row in rows(whole_alone)]
    found = rows(tmp_path / "run")
    assert [row["loss"] for row in found] == pytest.approx(expected, rel=1e-5)
    assert next(row.get("micro_batch_divisor") for row in found if row["step"] == 8) == 2
    assert "with micro-batches 1/2 of their configured size" in said(tmp_path, 0)


def test_a_disk_that_is_full_for_one_rank_ends_all_that_share_a_model(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    here = at(tmp_path, whole)
    assert train_on_ranks(2, here, {1: raising(full, "tensors.part", 30)}) == [2, 2]
    assert sum(said(tmp_path, rank).count("error: ") for rank in (0, 1)) == 1
    assert "No space left on device" in said(tmp_path, 0) + said(tmp_path, 1)
    assert train_on_ranks(2, here) == [0, 0]


def worker(torchrun: int, rank: int) -> int:
    """Return the process number of one of torchrun's ranks."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return child
    raise AssertionError(f"no rank {rank} among {children}")


def wait_for(there: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + MAX_SECONDS
    while not there():
        assert run.poll() is None, f"it ended with {run.returncode}"
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_torchrun_starts_a_killed_rank_again_and_a_signal_preempts_all(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """In one run: rank 1 is killed, all are started again by torchrun, and stopped by a signal."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    changes = {"train.max_steps": 400, "checkpoint.steps": 5, "eval.steps": None}
    changes["schedule.warmup_ratio"] = 0  # of the length, which is another below
    typed = arguments({**values, **changes, "train.output_dir": folder})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "-m", "train.run", *typed]
    with open(log, "wb") as file:
        run = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        wait_for(lambda: any(folder.glob("checkpoints/step-*")), run)
        os.kill(worker(run.pid, 1), signal.SIGKILL)
        wait_for(lambda: "resumed at step" in log.read_text(), run)
        resumed = len(rows(folder))  # a rank that has not begun would be ended by a signal
        wait_for(lambda: len(rows(folder)) > resumed, run)
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=MAX_SECONDS)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "sigterm")
    found = [row for row in rows(folder) if row["kind"] == "train"]
    assert [row["step"] for row in found] == list(range(1, status["step"] + 1))
    here = {**values, **changes, "train.output_dir": str(tmp_path / "untouched" / "run")}
    assert train_on_ranks(2, {**here, "train.max_steps": status["step"]}) == [0, 0]
    untouched = [row for row in rows(tmp_path / "untouched" / "run") if row["kind"] == "train"]
    for row, expected in zip(found, untouched, strict=True):
        assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"])


def two_runs(values: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the settings of a program's runs."""
    changes = {**values, "checkpoint.steps": 1, "eval.steps": None}
    return [
        changes | {"train.max_steps": steps, "train.output_dir": str(folder / name)}
        for name, steps in (("first", 2), ("second", 12))
    ]


def assert_both_whole(folder: Path) -> None:
    assert (folder / "died").exists()
    for name, steps in (("first", 2), ("second", 12)):
        found = [row["step"] for row in rows(folder / name) if row["kind"] == "train"]
        assert found == list(range(1, steps + 1))
    assert json.loads((folder / "first" / "status.json").read_text())["state"] == "finished"


def test_a_program_s_runs_each_go_on_when_its_ranks_are_started_again(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Of two runs that a program does, the first is done once, and the second is taken up."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agents = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def dies(_: str) -> None:
        saved = any((tmp_path / "second" / "checkpoints").glob("step-*"))
        if saved and os.environ["RANK"] == "1" and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def program() -> int:
        for one in two_runs(values, tmp_path):
            with listening(dies):
                print("run", run(load_config(overrides=one)).name)
        return 0

    assert ended(start_program(2, program, tmp_path, environment=agents)) == [2, -9]
    assert ended(start_program(2, program, tmp_path, environment=agents)) == [0, 0]
    assert [said(tmp_path, rank).count("run second\n") for rank in (0, 1)] == [1, 1]
    assert_both_whole(tmp_path)


@pytest.mark.slow
def test_a_program_s_runs_each_go_on_when_torchrun_starts_it_again(
    values: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "two_runs.py"
    script.write_text(
        f"""
import os, signal
from pathlib import Path
from files.faults import listening
from train.config import load_config
from train.run import run

def dies(point):
    once = Path({str(tmp_path / "died")!r})
    saved = any(Path({str(tmp_path / "second" / "checkpoints")!r}).glob("step-*"))
    if saved and os.environ["RANK"] == "1" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)

for values in {two_runs(values, tmp_path)!r}:
    with listening(dies):
        print("run", run(load_config(overrides=values)).name)
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    told = subprocess.run(
        [*command, "--max-restarts=1", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("run second") == 2  # ranks print what is outside of a run
    assert_both_whole(tmp_path)


def test_only_rank_0_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help, presets, a plan: once, not once a rank."""
    for number, asked in enumerate((["--help"], ["--list-presets"], ["--show", "demo"])):
        folder = tmp_path / str(number)

        def work(world: World, asked: list[str] = asked) -> int:
            print(asked)
            return _answer(parse(asked), world)

        assert ended(start_ranks(2, work, folder)) == [0, 0]
        assert str(asked) in said(folder, 0)
        assert said(folder, 1) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": "fp16", "optimizer.learning_rate": 1e-3},
        {"train.method": "lora", "train.sharding": "shard", "lora.bias": "all"},
        slow({"model.gradient_checkpointing": True, "train.micro_batch_tokens": 40}),
        slow({"model.gradient_checkpointing": "mlp"}),
        {
            "train.method": "lora",
            "train.sharding": "shard",
            "model.gradient_checkpointing": "offload",
        },
    ],
    ids=["fp16", "lora-biases", "recomputing-by-tokens", "mlp", "lora-offload"],
)
def test_what_else_a_shared_model_may_be_asked(
    changes: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    values = {**whole, **changes, "train.max_steps": 4}
    alone = at(tmp_path / "alone", values)
    assert begin_or_resume({**alone, "train.sharding": "auto"}) == 0
    assert train_on_ranks(3, at(tmp_path / "shared", values)) == [0, 0, 0]
    one, other = (rows(tmp_path / name / "run") for name in ("alone", "shared"))
    # fp16 keeps 11 bits: a loss of 6 moves by 3e-3 with each rounding of a logit.
    tolerance = 5e-3 if "train.precision" in changes else 1e-5
    for row, expected in zip(other, one, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert row.get("loss_scale") == expected.get("loss_scale")


def test_going_on_from_an_adapter_beside_a_shared_base(
    values: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    adapter = {k: v for k, v in values.items() if not k.startswith("lora.")}
    adapter |= {"lora.init_from": str(alone / "final"), "train.max_steps": 3}
    assert begin_or_resume(at(tmp_path / "one", adapter)) == 0
    assert train_on_ranks(2, at(tmp_path / "two", {**adapter, "train.sharding": "shard"})) == [0, 0]
    assert_like(tmp_path / "two" / "run", tmp_path / "one" / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_in_the_midst_of_a_shared_file_loses_nothing(
    rank: int, whole: dict[str, Any], whole_alone: Path, tmp_path: Path
) -> None:
    """Rank 0 has begun the file, and each has written some of its rows."""
    here = at(tmp_path, whole)
    codes = train_on_ranks(2, here, {rank: killed_at("tensors.part", 25)})
    assert sorted(codes) == [-9, 2]
    assert train_on_ranks(2, here) == [0, 0]
    assert_like(tmp_path / "run", whole_alone)
    assert outcome(tmp_path / "run")["status"]["state"] == "finished"


def test_a_best_that_is_lost_is_made_again_from_its_checkpoint_by_all_ranks(
    whole: dict[str, Any], whole_alone: Path, tmp_path: Path
) -> None:
    """Step 4 is the best when the run is stopped after it."""
    here = at(tmp_path, whole)
    assert train_on_ranks(2, here, {0: stopping_at(4, signal.SIGTERM)}) == [143, 143]
    before = load_file(tmp_path / "run" / "best" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "best")
    assert train_on_ranks(2, {**here}, {0: stopping_at(1, signal.SIGTERM)}) == [143, 143]
    after = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert train_on_ranks(3, here) == [0, 0, 0]
    assert_like(tmp_path / "run", whole_alone)
