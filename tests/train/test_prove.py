"""`--prove-resume`: a real kill, a real resume, and what differs is named."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from children import python
from runs import arguments, settings

from files.errors import UserError
from train.config.command_line import parse
from train.config.load import load_config
from train.process.world import World
from train.run import _answer
from train.saving import prove
from train.saving.prove import print_comparison, prove_resume


def test_a_killed_and_resumed_run_is_shown_to_be_equal(
    model_folder: Path, rows_file: Path, tmp_path: Path, cache: Path
) -> None:
    """The proof itself insists that the child died by SIGKILL and that the resume was at step 2."""
    values = settings(model_folder, rows_file, tmp_path / "new" / "run")
    given = [*arguments(values), "checkpoint.per_epoch=4", "lora_dropout=0.1"]
    done = python("-m", "train.run", "--prove-resume", "2", *given)
    lines = dict(re.findall(r"^(\S+) +([0-9a-f]{16})  \2  equal$", done.stdout, re.MULTILINE))
    assert list(lines) == [
        "best/adapter_model.safetensors",
        "checkpoints/step-00000002/adapter_model.safetensors",
        "checkpoints/step-00000002/optimizer.safetensors",
        "checkpoints/step-00000002/state.json",
        "checkpoints/step-00000004/adapter_model.safetensors",
        "checkpoints/step-00000004/optimizer.safetensors",
        "checkpoints/step-00000004/state.json",
        "final/adapter_model.safetensors",
        "metrics.jsonl",
    ]
    # Steps 2 and 4 are not the same state, so that the hashes are of something.
    assert len(set(lines.values())) == 7
    assert "killed with step 2 of 4 saved" in done.stdout
    assert "all 9 results are bit-equal" in done.stdout
    assert not (tmp_path / "new").exists()


def test_the_error_of_a_run_is_that_of_the_proof_and_nothing_is_left(
    model_folder: Path, tmp_path: Path, cache: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n{"txt": "abc"}\n')
    given = (f"model.path={model_folder}", f"data.train={rows}")
    output = f"output_dir={tmp_path / 'new' / 'run'}"
    done = python("-m", "train.run", "--prove-resume", *given, output, code=2)
    assert done.stderr.startswith(f"error: {rows}:2: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_process_that_watches_holds_no_torch() -> None:
    """Nor a GPU's memory, which the runs need."""
    program = "import sys, train.saving.prove; assert 'torch' not in sys.modules"
    python("-c", program)


def write_run(folder: Path, adapter: bytes = b"adapter", loss: float = 1.5) -> None:
    """Write what `results` reads of a run of two steps with a checkpoint at each."""
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.safetensors").write_bytes(b"moments")
        state = {"stopping": {"patience": None}, "step": step, "seconds": os.urandom(1)[0]}
        (checkpoint / "state.json").write_text(json.dumps({"state": state, "identity": {}}))
    (folder / "final").mkdir()
    (folder / "final" / "adapter_model.safetensors").write_bytes(adapter)
    row = {"kind": "train", "step": 1, "loss": loss, "seconds": os.urandom(1)[0]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"adapter": b"another"}, ["final/adapter_model.safetensors"]),
        ({"loss": 1.5000000000000002}, ["metrics.jsonl"]),
    ],
)
def test_what_differs_is_named(
    change: dict, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "whole")
    write_run(tmp_path / "resumed", **change)
    sides = prove.results(tmp_path / "whole"), prove.results(tmp_path / "resumed")
    assert print_comparison(*sides) == named
    assert capsys.readouterr().out.count("DIFFERS") == len(named)


def test_what_one_side_lacks_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_comparison({"a": "1" * 64, "b": "2" * 64}, {"b": "2" * 64}) == ["a"]
    assert re.search(r"^a .* 1{16}  missing +DIFFERS$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("spoilt", "when"),
    [
        ("final/adapter_model.safetensors", "came after the resume"),
        ("checkpoints/step-00000001/optimizer.safetensors", "before the kill"),
    ],
)
def test_differing_runs_end_with_1_and_are_kept(
    spoilt: str,
    when: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make_runs(whole: Path, resumed: Path, _: int) -> None:
        write_run(whole)
        write_run(resumed)
        (resumed / spoilt).write_bytes(b"spoilt")

    monkeypatch.setattr(prove, "_make_runs", make_runs)
    config = load_config(overrides={"train.output_dir": str(tmp_path / "run")})
    assert prove_resume(config, 1) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "not exact here: 1 of " in said
    assert when in said
    (kept,) = tmp_path.glob("prove-resume-*/resumed")
    assert str(kept.parent) in said


@pytest.mark.parametrize(("code", "kill_step"), [(0, 2), (0, 3), (-signal.SIGKILL, 3)])
def test_without_a_kill_at_its_step_there_is_no_proof(
    code: int, kill_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended by itself after or before that step, or was killed for another reason (memory)."""

    def start(arguments: list[str], program: str, folder: Path) -> int:
        run = Path(arguments[-1].removeprefix("train.output_dir="))
        write_run(run)
        (run / "status.json").write_text('{"reason": "early_stopping", "step": 2}')
        return code if program == prove._UNTIL_SAVED else 0

    monkeypatch.setattr(prove, "_start", start)
    config = load_config(overrides={"train.output_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"without a kill: .*early_stopping\) at step 2"):
        prove_resume(config, kill_step)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_over_after_the_kill_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(arguments: list[str], program: str, folder: Path) -> int:
        if arguments[0] == "--resume":
            (Path(arguments[1]) / "status.json").write_text('{"resumed_from": []}')
        elif program == prove._UNTIL_SAVED:
            write_run(folder / "resumed")
            return -signal.SIGKILL
        return 0

    monkeypatch.setattr(prove, "_start", start)
    config = load_config(overrides={"train.output_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"without a resume: .*step 0"):
        prove_resume(config, 1)
    assert list(tmp_path.iterdir()) == []


def test_ranks_prove_nothing() -> None:
    """Each would start whole runs of its own, which inherit torchrun's description of them all."""
    with pytest.raises(UserError, match="give it without torchrun"):
        _answer(parse(["--prove-resume", "1"]), World(1, 2))
