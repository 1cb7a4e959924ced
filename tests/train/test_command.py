"""How commands end: one sentence and an exit code, whatever happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from files.errors import UserError
from train.command import run_command

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("rows.jsonl:3: no"), 2, "error: rows.jsonl:3: no\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "error: a/b: No space left on device\n"),
        (OSError("the disk is gone"), 2, "error: the disk is gone\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_sentence(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: raising(error)) == code
    assert capsys.readouterr().err == sentence


def test_what_is_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def lathe(*arguments: str, **changes: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.run", *arguments],
        cwd=ROOT,
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_terminal_that_knows_ascii_alone_is_answered() -> None:
    out, err = lathe("--show", "qwen2.5-coder-1.5b", PYTHONIOENCODING="ascii").communicate()
    assert (b"[train]" in out, err) == (True, b"")


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    process = lathe("--show", "qwen2.5-coder-1.5b")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
