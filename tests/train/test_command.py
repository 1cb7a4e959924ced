"""How commands are called and what they answer, whichever of them it is."""

import json
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from children import ROOT, python
from runs import Refused

from files.errors import counted, note
from train import evaluate, generate, run, show_data
from train.inputs import lint
from train.merge import __main__ as merge
from train.process import command as command_module
from train.process.command import MODULES, command
from train.publish import export_metrics, push
from train.report import __main__ as report

Main = Callable[[list[str]], int]
COMMANDS: dict[str, Main] = {
    "run": run.main,
    "show-data": show_data.main,
    "lint": lint.main,
    "generate": generate.main,
    "merge": merge.main,
    "report": report.main,
    "push": push.main,
    "export-metrics": export_metrics.main,
    "evaluate": evaluate.main,
}


@pytest.mark.parametrize(
    ("name", "arguments", "option"),
    [
        ("run", "--preset demo --preset default", "--preset"),
        ("run", "--config a.toml seed=1 --config b.toml", "--config"),
        ("run", "--resume a --resume a", "--resume"),
        ("show-data", "--rows 1 --rows 2", "--rows"),
        ("show-data", "--preset demo --preset default", "--preset"),
        ("lint", "--preset demo --preset default", "--preset"),
        ("generate", "--run x --prompt a --prompt b", "--prompt"),
        ("generate", "--run x --run y --prompt a", "--run"),
        ("generate", "--model x --prompt a --top-p 0.1 --top-p=0.2", "--top-p"),
        ("merge", "a b --base c --base d", "--base"),
        ("evaluate", "a --data c --data d", "--data"),
    ],
)
def test_an_option_given_twice_is_refused_for_one_value_would_be_lost(
    name: str, arguments: str, option: str, refused: Refused
) -> None:
    said = refused(COMMANDS[name], *arguments.split())
    assert f"{option} is given twice" in said.replace(":", "")


def test_what_may_be_given_several_times_still_may() -> None:
    asked = generate.parser().parse_args(["--run", "x", "--field", "a=1", "--field", "b=2"])
    assert asked.field == ["a=1", "b=2"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", "--bogus"),
        ("show-data", "--bogus"),
        ("lint", "--bogus"),
        ("generate", "--prompt x"),
        ("generate", "--run x --prompt y --max-new-tokens many"),
        ("merge", "a"),
        ("report", ""),
        ("push", ""),
        ("export-metrics", "runs/demo"),
        ("evaluate", ""),
        ("evaluate", "a --data b --k"),
    ],
)
def test_every_command_s_complaint_is_one_sentence(
    name: str, arguments: str, refused: Refused
) -> None:
    assert "--help" in refused(COMMANDS[name], *arguments.split())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", "--resume runs/demo-2"),
        ("run", "--resume runs/demo-2/checkpoints/step-00000001"),
        ("run", "model.path=runs/demo-2 data.train=x"),
        ("show-data", "--resume runs/demo-2"),
        ("lint", "--resume runs/demo-2"),
        ("generate", "--prompt x --run runs/demo-2"),
        ("generate", "--prompt x --adapter runs/demo-2"),
        ("generate", "--prompt x --model runs/demo-2"),
        ("merge", "runs/demo-2 out"),
        ("report", "runs/demo-2"),
        ("push", "runs/demo-2"),
        ("evaluate", "runs/demo-2 --data rows.jsonl"),
    ],
)
def test_a_folder_that_is_not_there_is_said_to_be_not_there(
    name: str,
    arguments: str,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before the network is blamed, or a file that would be in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    said = refused(COMMANDS[name], *arguments.split())
    assert "no such folder" in said.partition("cannot be reached")[0]
    if "step" not in arguments:
        assert "did you mean 'demo-1'?" in said


# Each command line of the child's standard input is answered in it; what imported torch is printed.
ANSWERING = """
import json, sys
from contextlib import redirect_stdout, suppress
import lathe
found = []
for arguments in json.load(sys.stdin):
    with suppress(SystemExit), redirect_stdout(sys.stderr):
        lathe.main(arguments)
    if sys.modules.pop("torch", None):
        found.append(arguments)
print(json.dumps(found))
"""


def test_what_is_cheap_to_answer_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Help, wrong arguments, folders that are not there, rows: torch takes seconds to import."""
    (tmp_path / "rows.jsonl").write_text('{"text": "x = 1"}\n')
    rows = [f"model.path={ROOT / 'data' / 'demo' / 'base'}", "data.train=rows.jsonl"]
    asked = [
        *([name, "--help"] for name in MODULES),
        *([name, "--bogus"] for name in MODULES),
        *(["--completion", "zsh"], ["--schema"], ["--list-presets"], ["--show", "demo"]),
        *(["genrate"], ["model.pth=x"], ["train.seed=x"], ["--resume", "none"]),
        *(["show-data", *rows], ["lint", *rows], ["lint", "none.jsonl", rows[0]]),
        *(["merge", "none", "out"], ["evaluate", "./none", "--data", "rows.jsonl"]),
        *(["evaluate", ".", "lora.r=2", "--data", "rows.jsonl"], ["push", "none"]),
        *(["generate", "--model", "x", "--prompt", "x", "--top-p", "2"], ["report", "none"]),
        *(["generate", "--run", "none", "--prompt", "x"], ["export-metrics", "none", "--to=csv"]),
    ]
    done = python("-c", ANSWERING, given=json.dumps(asked), cwd=tmp_path)
    assert json.loads(done.stdout) == []
    assert done.stderr.count("usage: ") == len(MODULES)
    assert done.stderr.count("error: ") == len(MODULES) + 13


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_what_one_process_does_is_not_done_by_every_rank(
    name: str, environment: dict[str, str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    said = refused(COMMANDS[name], "--help")
    assert "the work of one process" in said and next(iter(environment)) in said


def test_one_rank_is_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under `torchrun --nproc-per-node 1`, and in a step of srun's that torchrun describes."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit, match=r"^0$"):
        merge.main(["--help"])


def test_evaluate_is_a_module_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It used to end with 0 and no word, as if it had evaluated something."""
    monkeypatched = sys.argv
    try:
        sys.argv = ["evaluate", "x"]
        with pytest.raises(SystemExit, match=r"^2$"):
            runpy.run_path(evaluate.__file__, run_name="__main__")
    finally:
        sys.argv = monkeypatched
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1) and "--data" in said.err


@pytest.mark.parametrize(
    ("program", "on_path", "run", "merge"),
    [
        ("/env/bin/lathe", True, "lathe", "lathe merge"),
        ("./lathe", False, "./lathe", "./lathe merge"),
        ("/a b/lathe", False, "'/a b/lathe'", "'/a b/lathe' merge"),
        ("/src/lathe.py", False, "py3 /src/lathe.py", "py3 /src/lathe.py merge"),
        ("notebook", True, "lathe", "lathe merge"),
        ("notebook", False, "py3 -m train.run", "py3 -m train.merge"),
    ],
)
def test_a_command_is_named_as_this_process_was_started(
    program: str,
    on_path: bool,
    run: str,
    merge: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["py3", program])
    monkeypatch.setattr(
        command_module.shutil, "which", lambda _: "/env/bin/lathe" if on_path else None
    )
    monkeypatch.setattr(Path, "samefile", lambda one, other: str(one) == str(other))
    assert (command(), command("merge")) == (run, merge)


def test_a_number_has_its_noun() -> None:
    numbers = (0, 1, 2, 12_345)
    assert [counted(number, "micro-batch", "micro-batches") for number in numbers] == [
        "0 micro-batches",
        "1 micro-batch",
        "2 micro-batches",
        "12,345 micro-batches",
    ]
    assert counted(1, "row") == "1 row" and counted(2, "row") == "2 rows"


def test_a_note_is_a_plain_line_and_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note("a\x1b[2Jb")
    assert capsys.readouterr().err == "note: a\\x1b[2Jb\n"


def test_nothing_of_ours_warns_with_a_source_line() -> None:
    for folder in ("files", "kernels", "lora", "models", "data", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "warnings.warn" not in path.read_text(encoding="utf-8"), path
