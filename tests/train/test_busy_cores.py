"""That others want the cores is said once, from the kernel's own count."""

from pathlib import Path

import pytest

from train import busy
from train.busy import WINDOW_SECONDS, BusyCores


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(busy.time, "monotonic", lambda: self.now)


def write(tasks: Path, **threads: tuple[float, float]) -> None:
    """Write each thread's seconds on a core and waiting for one."""
    for name, (ran, waited) in threads.items():
        (tasks / name).mkdir(exist_ok=True)
        (tasks / name / "schedstat").write_text(f"{ran * 1e9:.0f} {waited * 1e9:.0f} 7\n")


def test_it_is_said_once_and_names_both_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    write(tmp_path, t1=(100, 100), t2=(0, 0))
    cores = BusyCores(tmp_path)
    write(tmp_path, t1=(110, 110), t2=(10, 10))
    assert cores.observe() is None, "not before the window is over"
    clock.now = WINDOW_SECONDS
    sentence = cores.observe()
    assert sentence is not None and "50% of the time" in sentence
    assert "OMP_WAIT_POLICY=passive" in sentence and "OMP_NUM_THREADS" in sentence
    clock.now *= 3
    write(tmp_path, t1=(120, 140), t2=(20, 40))
    assert cores.observe() is None


def test_a_machine_of_one_s_own_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    write(tmp_path, t1=(100, 1000), t2=(0, 0))
    cores = BusyCores(tmp_path)
    clock.now = WINDOW_SECONDS
    # What was waited before does not count, nor a thread that came or went.
    write(tmp_path, t1=(120, 1001), t3=(0, 500))
    (tmp_path / "t2" / "schedstat").unlink()
    (tmp_path / "t2").rmdir()
    assert cores.observe() is None
    clock.now = 2 * WINDOW_SECONDS
    write(tmp_path, t1=(120, 1021), t3=(20, 520))
    assert cores.observe() is not None, "each window counts for itself"


def test_where_the_system_does_not_count_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    cores = BusyCores(tmp_path / "none")
    clock.now = WINDOW_SECONDS
    assert cores.observe() is None
