"""The child with limits: what it answers, how it dies, and that nothing of it is left behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.limited import LimitedChild, limit_resources, one_line
from files.errors import UserError

ANSWERS = """
import os, resource, signal, sys, time
from files.errors import UserError

def answer(request):
    what, value = request
    if what == "say": yield from value
    elif what == "pid": yield [os.getpid(), os.getsid(0)]
    elif what == "limits":
        kinds = (resource.RLIMIT_AS, resource.RLIMIT_CORE)
        yield [resource.getrlimit(kind) for kind in kinds]
        yield sys.stdin.isatty()
    elif what == "refuse":
        yield 1
        raise UserError("not this")
    elif what == "print":
        print('{"answer": "forged"}', flush=True)
        os.write(2, b'{"answer": "forged"}')
        yield "true"
    else:
        yield "begun"
        exec(what)
"""
MEMORY = 512 * 2**20


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedChild]:
    """Return a child that serves the module above."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "answers_of_a_test.py").write_text(ANSWERS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        child = LimitedChild("answers_of_a_test", memory=MEMORY, seconds=1.0)
        yield child
        child.close()


def ask(child: LimitedChild, what: str, value: object = None) -> list:
    return child.ask(json.dumps([what, value]), lambda number: f"piece {number}", "mend it")


def gone(pid: int) -> bool:
    """Wait until there is no such process."""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # dead, and nobody has asked yet
            return True
        time.sleep(0.01)
    return False


def test_answers_come_back_in_order_from_one_process(child):
    values = ["", "é 漢 🙂 \ud800 \n", 1.5, None, {"a": [1]}, "x" * 3_000_000]
    assert ask(child, "say", values) == values
    assert ask(child, "say", []) == []
    assert ask(child, "pid") == ask(child, "pid")


def test_what_a_module_prints_is_no_answer(child):
    assert ask(child, "print") == ["true"]


def test_a_refusal_is_the_module_s_own_sentence(child):
    pid = ask(child, "pid")
    with pytest.raises(UserError, match=r"^not this$"):
        ask(child, "refuse")
    assert ask(child, "pid") == pid


def test_limits_and_a_session_of_its_own(child):
    limits, terminal = ask(child, "limits")
    assert limits == [[MEMORY, MEMORY], [0, 0]] and not terminal
    ((pid, session),) = ask(child, "pid")
    assert session == pid != os.getsid(0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("while True: pass", r"took more than 1 s"),
        ("10 ** 10 ** 8", r"took more than 1 s"),  # one instruction, which holds the interpreter
        ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 60)); time.sleep(99)", "took more"),
        ("b'a' * 10**10", r"needed more than 512 MiB of memory"),
        ("kept = [bytes(2**20) for _ in range(1000)]", r"needed more than 512 MiB of memory"),
        ("os.abort()", "died by signal SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "died by signal SIGKILL"),
        ("sys.exit('told\\nme \\x1b[31mso')", r"ended with exit code 1 \(it said: me \[31mso\)"),
        ("os._exit(0)", "ended with exit code 0"),
    ],
)
def test_a_broken_limit_is_one_sentence_and_the_next_question_is_answered(child, code, message):
    ((before, _),) = ask(child, "pid")
    with pytest.raises(UserError, match=rf"^piece 1 {message}.*; mend it$"):
        ask(child, code)
    assert gone(before)
    assert ask(child, "say", ["well"]) == ["well"]


def test_ctrl_c_in_the_middle_leaves_no_answer_for_the_next_question(child):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ((before, _),) = ask(child, "pid")
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            ask(child, "time.sleep(99)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert gone(before)
    assert ask(child, "say", ["well"]) == ["well"]


def test_close_leaves_no_process_and_may_be_called_twice(child):
    child.close()
    open_files = len(os.listdir("/dev/fd"))
    ((pid, _),) = ask(child, "pid")
    child.close()
    child.close()
    assert len(os.listdir("/dev/fd")) == open_files
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_killed_between_questions(child):
    """The kernel's memory killer may take it at any time: the question after says so."""
    ((pid, _),) = ask(child, "pid")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(UserError, match=r"^piece 0 died by signal SIGKILL; mend it$"):
        ask(child, "pid")
    assert ask(child, "say", [1]) == [1]


def test_any_current_folder_will_do(child, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for decoy in ("data/__init__.py", "files.py", "json.py"):
        (tmp_path / decoy).write_text("raise SystemExit('a decoy')")
    child.close()
    monkeypatch.chdir(tmp_path)
    assert ask(child, "say", [1]) == [1]
    child.close()
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()
    assert ask(child, "say", [1]) == [1]


def test_a_module_that_cannot_be_imported_is_one_sentence():
    with pytest.raises(UserError, match=r"^piece 0 ended with exit code 1 \(it said: .*nowhere"):
        ask(LimitedChild("data.nowhere"), "say", [1])


def test_no_program_to_start_is_one_sentence(monkeypatch):
    open_files = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match=r"^piece 0 needs a child process, and none starts"):
        ask(LimitedChild("data.chat"), "say", [1])
    assert len(os.listdir("/dev/fd")) == open_files


def test_a_forked_process_has_a_child_of_its_own(child):
    before = ask(child, "pid")
    reader, writer = os.pipe()
    forked = os.fork()
    if forked == 0:
        own = ask(child, "pid")
        child.close()
        os.write(writer, json.dumps(own).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        own = json.loads(file.read())
    os.waitpid(forked, 0)
    assert own[0] != before[0]
    assert ask(child, "pid") == before


@pytest.mark.parametrize("task", ["pass", "while True: pass"])
def test_nothing_is_left_when_the_parent_is_killed(child, tmp_path, task):
    """An idle child sees its pipe close; a busy one has an alarm of its own."""
    begun = tmp_path / "begun"
    code = f"open({str(begun)!r}, 'w').write(str(os.getpid()))\n{task}"
    program = f"""
import json, sys
sys.path[:] = json.loads({json.dumps(json.dumps(sys.path))})
from data.limited import LimitedChild
LimitedChild("answers_of_a_test", seconds=1).ask({json.dumps([code, None])!r}, str, "")
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    while not (begun.exists() and begun.read_text()):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.communicate()
    pid = int(begun.read_text())
    try:
        assert gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_system_without_limits(monkeypatch):
    """Windows, where `resource` is missing, and macOS, which takes no limit of address space."""
    import resource

    monkeypatch.setitem(sys.modules, "resource", None)
    assert not limit_resources(1)
    monkeypatch.setitem(sys.modules, "resource", resource)

    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert not limit_resources(1)


def test_what_is_not_limited_is_said_once_in_one_sentence(tmp_path):
    """Children of a system without `resource`, alarms and SIGUSR1 answer all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "for name in ('SIGALRM', 'setitimer', 'SIGUSR1'): delattr(signal, name)\n"
    )
    (tmp_path / "echo_of_a_test.py").write_text("def answer(request): yield request")
    program = """
from data.limited import LimitedChild
for text in ("1", "2"):
    child = LimitedChild("echo_of_a_test")
    print(*child.ask(text, str, ""))
    child.close()
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n2\n", done.stderr
    assert re.fullmatch(r"note: this system sets no limit to a process's memory: .*\n", done.stderr)


def test_one_line():
    assert one_line(" a\x1b[2J\n\tb\u202e ") == "a [2J b"
    assert one_line("x" * 1000, 10) == "x" * 9 + "…"
