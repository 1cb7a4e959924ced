"""Programs that a model wrote: right ones pass, whatever else they do is contained and no pass."""

import itertools
import math
import os
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from children import python

from data.source import Row
from files.errors import UserError
from train.evaluation import programs
from train.evaluation.confined import FILES_WRITTEN, kernel_refuses
from train.evaluation.problems import pass_at_k, problem_of
from train.evaluation.programs import Outcome, run_program, run_programs

PROMPT = 'def double(x):\n    """Return twice x."""\n'
TEST = "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n"
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "canonical_solution": "    return 2 * x\n",
    "test": TEST,
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "test_setup_code": "import math",
    "challenge_test_list": ["assert double(math.inf) == 0"],
}
RIGHT = [
    "    return 2 * x\n",
    "    return x + x\n\ndef check(f):\n    never looked at\n",
    "    import numpy\n    return int(numpy.array([x, x]).sum())\n",
    "    import os\n    os.mkdir('a')\n    open('a/b', 'w').write('x')\n"
    "    os.rename('a', str(x))\n    return 2 * x\n",
    "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nas you asked.",
]
# A wrong program, and what is said of it.
WRONG = [
    ("    return x * x\n", "AssertionError"),
    ("    return 2 * x)\n", "SyntaxError"),
    ("", "AssertionError"),
    ("    while True: pass\n", "took more than"),
    ("    import time\n    while True: time.sleep(9)\n", "took more than"),
    ("    import sys\n    sys.exit(0)\n", "SystemExit"),
    ("    import os\n    os._exit(0)\n", "left with exit code 0"),
    ("    quit()\n", "SystemExit"),
    ("    import os\n    while True: os.fork()\n", "os.fork"),
    ("    import subprocess\n    subprocess.run(['true'])\n    return 2 * x\n", "subprocess"),
    ("    import os\n    os.system('true')\n    return 2 * x\n", "os.system"),
    ("    import os\n    os.kill(os.getppid(), 9)\n", "os.kill"),
    ("    import socket\n    socket.socket()\n    return 2 * x\n", "socket"),
    ("    open('big', 'w').write('x' * 2**21)\n    return 2 * x\n", "File too large"),
    ("    for i in range(10**9): open(str(i), 'w').write('x')\n", "writes"),
    ("    return bytearray(2**31)\n", "MemoryError"),
    ("    import ctypes\n    ctypes.CDLL(None)\n    return 2 * x\n", "ctypes"),
    ("    raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()\n", "exit code 1"),
]


def program(completion: str) -> str:
    problem = problem_of(Row(HUMAN_EVAL, "rows:1"))
    assert problem is not None
    return problem.program(completion)


def test_right_programs_pass_and_wrong_ones_do_not_whatever_they_try() -> None:
    """The planted set: pass@k of it is the fraction that the right ones are of it, exactly."""
    completions = [*RIGHT, *(wrong for wrong, _ in WRONG)]
    outcomes = run_programs([program(text) for text in completions], seconds=1)
    assert outcomes[: len(RIGHT)] == [Outcome(True)] * len(RIGHT)
    for outcome, (text, why) in zip(outcomes[len(RIGHT) :], WRONG, strict=True):
        assert not outcome.passed and why in outcome.why, (text, outcome)
    samples, passed = len(outcomes), sum(outcome.passed for outcome in outcomes)
    for k in (1, 5, samples):
        exact = 1 - Fraction(math.comb(samples - passed, k), math.comb(samples, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(float(exact), rel=1e-14)


def test_nothing_outside_its_own_folder_is_written_moved_or_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    place = str(tmp_path)
    tries = [
        f"open({place!r} + '/new', 'w')",
        f"open({place!r} + '/mine', 'a')",
        f"import os; os.open({place!r} + '/mine', os.O_TRUNC)",
        f"import os; os.remove({place!r} + '/mine')",
        f"import os; os.rename('program.py', {place!r} + '/new')",
        f"import os; os.rename({place!r} + '/mine', 'new')",
        f"import os; os.symlink({place!r}, 'way'); open('way/new', 'w')",
        f"import shutil; shutil.rmtree({place!r})",
        f"import os; os.mkdir({place!r} + '/new')",
        f"import os; f = os.open({place!r}, 0); os.remove('mine', dir_fd=f)",
        f"import os; os.chmod({place!r}, 0o755)",
        f"import pathlib; pathlib.Path('../../../../../..{place}/new').touch()",
    ]
    outcomes = run_programs(tries)
    assert [outcome.why.split(":")[0] for outcome in outcomes] == ["PermissionError"] * len(tries)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "mine"


def test_its_folder_goes_and_none_of_our_environment_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tell = "import os; raise Exception(os.getcwd(), 'HF_TOKEN' in os.environ, os.listdir())"
    why = run_program(tell).why
    assert str(tmp_path) in why and "False, ['program.py']" in why
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_its_own_is_used_as_always() -> None:
    """What the standard library removes by a folder's descriptor is within."""
    assert run_program(
        "import tempfile\nwith tempfile.TemporaryDirectory() as f:\n"
        "  open(f + '/a', 'w').close(); open('/dev/null', 'w').write('x')"
    ).passed


def test_more_small_files_than_are_allowed_are_refused() -> None:
    loop = "for i in range({}): open(str(i), 'w')"
    assert run_program(loop.format(FILES_WRITTEN)).passed
    assert not run_program(loop.format(FILES_WRITTEN + 1)).passed


@pytest.mark.skipif(not kernel_refuses(), reason="the kernel's filter is Linux's, on two machines")
def test_the_kernel_refuses_what_goes_past_python(tmp_path: Path) -> None:
    """These raise no audit event, or one that nobody looks at."""
    thread = "import _thread; _thread.start_new_thread(print, ())"
    look = f"import os; f = os.open({str(tmp_path)!r}, 0); os.open('new', os.O_CREAT, dir_fd=f)"
    assert "Permission denied" in run_program(look).why and list(tmp_path.iterdir()) == []
    assert "can't start new thread" in run_program(thread).why
    alone = (
        "import ctypes, os, socket; from train.evaluation import confined as c\n"
        "libc = ctypes.CDLL(None); libc.prctl(c._NO_NEW_PRIVILEGES, 1, 0, 0, 0)\n"
        "c._refuse_calls(libc)\n"
        "for call in (os.fork, socket.socket, lambda: os.kill(os.getppid(), 0)):\n"
        "    try: call()\n"
        "    except PermissionError: print('refused')\n"
    )
    assert python("-c", alone).stdout.split() == ["refused"] * 3


def test_a_program_that_turns_its_clock_off_is_ended_from_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "_PATIENCE_SECONDS", programs.SECONDS)
    started = time.monotonic()
    loop = "import signal; signal.alarm(0); signal.setitimer(signal.ITIMER_REAL, 0)\n"
    loop += "import time\nwhile True: time.sleep(9)"
    assert run_program(loop, seconds=1) == Outcome(False, "took more than 1 s")
    assert time.monotonic() - started < 5


def test_where_no_process_can_be_limited_no_program_is_said_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "_CHILD", "raise OSError('no filter')")
    with pytest.raises(UserError, match="not even a program that does nothing"):
        run_programs(["x = 1"])


def test_ctrl_c_ends_what_runs_and_begins_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.os, "cpu_count", lambda: 2)
    # A shell that starts a job in the background has it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_programs(["while True: pass"] * 9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 6


def test_what_it_prints_is_no_answer() -> None:
    """It has no way to the answer but its end: the token is not in its sources or arguments."""
    for text in (
        "print('x' * 10**7)",
        "import sys; sys.stdout.write('ok'); sys.stderr.write('ok')",
    ):
        assert run_program(text) == Outcome(True)
    look = "import sys; raise Exception(sys.argv, sys.orig_argv[3:], sys.stdin.read())"
    assert not run_program(look).passed


def test_mbpp_runs_setup_code_and_tests_but_not_the_challenge() -> None:
    problem = problem_of(Row(MBPP, "rows:1"))
    assert problem is not None and problem.reference == "def double(x):\n  return 2 * x"
    assert problem.prompt.startswith('"""\nWrite a function to double a number.\nassert double(2)')
    right = f"{problem.reference}\nassert False"  # a model that writes tests of its own
    wrong = "def double(x):\n  return 4"
    outcomes = run_programs([problem.program(text) for text in (right, wrong)])
    assert [outcome.passed for outcome in outcomes] == [True, False]
    # The published split with other names of the same columns.
    other = {**MBPP, "prompt": MBPP["text"], "test_imports": ["import math"]}
    del other["text"], other["test_setup_code"]
    assert problem_of(Row(other, "rows:1")) == problem


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({**HUMAN_EVAL, "test": 1}, "rows:3: the column 'test' must hold text, holds 1"),
        ({**HUMAN_EVAL, "entry_point": "f(); g"}, "rows:3: entry_point is 'f\\(\\); g', but"),
        ({**MBPP, "test_list": []}, "rows:3: the column 'test_list' must hold a list of texts"),
        ({**MBPP, "test_list": "assert 1"}, "must hold a list of texts, holds"),
    ],
)
def test_a_bad_row_is_named(columns: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        problem_of(Row(columns, "rows:3"))


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one() -> None:
    """Against every choice of k of n samples, counted."""
    for n, c in itertools.product(range(1, 8), range(8)):
        for k in range(1, n + 1 if c <= n else 0):
            choices = list(itertools.combinations(range(n), k))
            share = sum(any(i < c for i in chosen) for chosen in choices) / len(choices)
            assert pass_at_k(n, c, k) == pytest.approx(share, rel=1e-13, abs=0)
    with pytest.raises(ValueError, match="from 1 to the 3 samples"):
        pass_at_k(3, 1, 4)
