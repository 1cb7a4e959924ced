"""Broken and hostile files: whatever they hold, they are read or refused in one sentence."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import targets
from fuzzing import Failure, cases, distinct, run_case, run_cases
from targets import TARGETS, Target

from files.errors import UserError

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number", [1_000, pytest.param(2_000, marks=SLOW), pytest.param(100_000, marks=SLOW)]
)
def test_mutated_files_end_in_one_sentence_or_are_read(
    number: int, cache: Path, record_property: Callable[[str, object], None]
) -> None:
    failures = run_cases(cases(number))
    record_property("fuzz cases", number)
    record_property("fuzz failures", len(failures))
    assert not failures, "\n".join(map(str, distinct(failures)))


def test_every_target_reads_its_own_good_files(cache: Path, tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        folder = tmp_path / "targets" / name
        folder.mkdir(parents=True)
        target.prepare(folder)
        for relative in dict.fromkeys(target.files):
            target.use(folder, folder / relative)


# --- the harness itself --------------------------------------------------------------------------


def _misbehave(_: Path, path: Path) -> None:
    """Do what the file says."""
    match path.read_text():
        case "hang":
            time.sleep(60)
        case "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "raise":
            raise KeyError("x")
        case "eat":
            bytearray(2**40)
        case "lines":
            raise _error("odd.txt:\nbad")
        case "long":
            raise _error("odd.txt: " + "bad " * 1000)
        case "silent":
            raise _error("bad")
        case "refuse":
            raise UserError("odd.txt: bad")


def _error(message: str) -> UserError:
    """Return an error whose message was not made into one line."""
    error = UserError("")
    error.args = (message,)
    return error


DEEDS = ("fine", "hang", "signal", "exit", "refuse", "raise", "eat", "lines", "long", "silent")


def _take(random: Random, _: bytes) -> bytes:
    return random.choice(DEEDS).encode()


ODD = Target(("odd.txt",), _take, lambda folder: (folder / "odd.txt").touch(), _misbehave)


def test_a_case_that_hangs_dies_or_raises_is_named_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(targets.TARGETS, "odd", ODD)
    seeds = range(40)
    deeds = {}
    for seed in seeds:
        random = Random(f"odd/{seed}")
        random.choice(ODD.files)
        deeds[seed] = _take(random, b"").decode()
    # One hang is enough to wait for.
    hang = next(seed for seed in seeds if deeds[seed] == "hang")
    chosen = [("odd", seed) for seed in seeds if deeds[seed] != "hang" or seed == hang]
    assert {deeds[seed] for _, seed in chosen} == set(DEEDS)
    expected = {
        "hang": "hang of 1 s",
        "signal": "signal 9",
        "exit": "exit 3",
        "raise": "KeyError",
        "eat": "MemoryError",
        "lines": "a message of several lines",
        "long": "a message over 2000 characters",
        "silent": "a message without 'odd.txt'",
    }
    failures = run_cases(chosen, max_seconds=1.0)
    assert {(failure.seed, failure.what) for failure in failures} == {
        (seed, expected[deeds[seed]]) for _, seed in chosen if deeds[seed] in expected
    }
    assert len(distinct(failures)) == len(expected)
    assert all(" odd " in str(failure) for failure in failures)


def test_a_case_is_the_same_each_time_and_leaves_the_good_file(tmp_path: Path) -> None:
    target = TARGETS["config"]
    target.prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for seed in range(20):
        assert run_case("config", seed, tmp_path) is None
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    made = [target.mutate(Random(seed), next(iter(before.values()))) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_a_failure_says_how_to_repeat_it() -> None:
    text = str(Failure("rows", 17, "KeyError", "data/source.py:1 (f)", "'x'"))
    assert "tests/reliability/fuzzing.py rows 17" in text
    assert "data/source.py:1" in text
