"""Cores that something else keeps busy: noticed from the kernel's accounts, told once, in words."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from runs import settings, train

from train.log import busy_cores, records
from train.log.busy_cores import BusyCores, busy_text, thread_times, threads_spin

SECOND = 10**9


class Machine:
    """A process of two threads whose time goes by as a test says."""

    def __init__(self, spinning: bool = True) -> None:
        self.now = 0.0
        self.threads = {"1": [0, 0], "2": [0, 0]}
        self.cores = BusyCores(spinning, self.times, lambda: self.now)

    def times(self) -> dict[str, tuple[int, int]]:
        return {name: (ran, waited) for name, (ran, waited) in self.threads.items()}

    def passes(self, seconds: float, waiting: float) -> float | None:
        """Let time go by of which each thread waits a share; return what is told."""
        self.now += seconds
        for thread in self.threads.values():
            thread[0] += int(seconds * (1 - waiting) * SECOND)
            thread[1] += int(seconds * waiting * SECOND)
        return self.cores.waiting()


def test_it_is_told_once_how_long_threads_waited() -> None:
    machine = Machine()
    assert machine.passes(24, waiting=0.5) == pytest.approx(0.5)
    assert [machine.passes(24, waiting=0.9) for _ in range(5)] == [None] * 5


def test_a_little_waiting_is_no_matter_and_what_was_before_is_forgotten() -> None:
    machine = Machine()
    assert [machine.passes(60, waiting=0.15) for _ in range(5)] == [None] * 5
    assert machine.passes(22, waiting=0.4) == pytest.approx(0.4)


def test_a_short_while_says_nothing_and_counts_with_the_next() -> None:
    machine = Machine()
    assert machine.passes(12, waiting=0.8) is None
    assert machine.passes(12, waiting=0.0) == pytest.approx(0.4)


def test_what_the_run_s_own_writing_took_is_left_out() -> None:
    machine = Machine()
    machine.passes(18, waiting=0.9)
    machine.cores.restart()
    assert machine.passes(22, waiting=0.0) is None


def test_threads_that_come_and_go_do_not_count() -> None:
    """The ends of their accounts are not known."""
    machine = Machine()
    machine.threads["3"] = [0, 500 * SECOND]
    assert machine.passes(22, waiting=0.1) is None
    del machine.threads["3"]
    assert machine.passes(22, waiting=0.1) is None


def test_where_nothing_spins_or_is_accounted_for_nothing_is_said() -> None:
    assert Machine(spinning=False).passes(60, waiting=0.9) is None
    machine = Machine()
    machine.threads = {}
    assert machine.passes(60, waiting=0.9) is None


@pytest.mark.parametrize(
    ("device", "threads", "policy", "spin"),
    [
        ("cpu", 2, None, True),
        ("cpu", 2, "active", True),
        ("cpu", 2, " PASSIVE", False),
        ("cpu", 1, None, False),
        ("cuda", 8, None, False),
    ],
)
def test_who_spins(device: str, threads: int, policy: str | None, spin: bool) -> None:
    environment = {} if policy is None else {"OMP_WAIT_POLICY": policy}
    assert threads_spin(device, threads, environment) is spin


@pytest.mark.skipif(sys.platform != "linux", reason="schedstat is Linux's")
def test_the_kernel_accounts_for_every_thread_of_this_process() -> None:
    before = thread_times()
    assert str(threading.get_native_id()) in before
    sum(range(10**6))
    ran = thread_times()[str(os.getpid())][0] - before[str(os.getpid())][0]
    assert ran > 0


def test_a_run_says_it_once_and_names_what_to_type(
    model_folder: Path,
    rows_file: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the loop; metrics and what is trained know nothing of it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(busy_cores, "WINDOW_SECONDS", 0.0)
    ticks = iter(range(10**6))

    def busy(spinning: bool) -> BusyCores:
        return BusyCores(spinning, lambda: {"1": ((at := next(ticks)) * SECOND, at * SECOND)})

    monkeypatch.setattr(records, "BusyCores", busy)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    changes = {"train.max_steps": 4, "checkpoint.steps": None}
    folder = train(settings(model_folder, rows_file, tmp_path / "a run", **changes)).folder
    said = capsys.readouterr().out
    assert said.count("the cores are busy with something else") == 1
    assert "waited 50% of their time" in said
    assert f"--resume '{folder}'\n" in said
    for name in ("OMP_WAIT_POLICY=passive", "OMP_NUM_THREADS"):
        assert name in said and name not in (folder / "metrics.jsonl").read_text()


def test_the_words_hold_the_command() -> None:
    assert "\n  OMP_WAIT_POLICY=passive lathe --resume runs/a\n" in busy_text(
        0.5, "lathe --resume runs/a"
    )
