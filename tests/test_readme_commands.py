"""Every command of README is run: here, or where `ELSEWHERE` says."""

import csv
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from infilling import write_model
from made_up import make_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASE = ROOT / "data" / "demo" / "base"
ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    ". .venv/bin/activate": "make setup, which .ci/run runs, makes it",
    "lathe --preset demo --prove-resume": "tests/train/test_prove.py",
    "lathe push runs/a --to owner/name --private": "tests/train/test_push.py",
}
PAIR = {"prompt": "Add two numbers.\n", "completion": "def add(a, b):\n    return a + b\n"}
# A run of one step of the demo's small model, whatever else the command says.
SHORT = (
    *("train.max_steps=1", "log.tensorboard=false", "eval.samples=0", "checkpoint.minutes=none"),
    *("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"),
)


def section(title: str) -> str:
    """Return the text between a heading and the next one of its level or above."""
    level = title.index(" ")
    rest = README.split(f"\n{title}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the commands of a text's shell blocks, comments and line breaks taken out."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [re.split(r" {2,}# ", line)[0].strip() for line in lines if line.strip()]


def named_rows(text: str) -> dict[str, str]:
    """Return the content of each file that the text shows a row of."""
    found, before = {}, ""
    for piece in re.split(r"^```", text, flags=re.MULTILINE):
        if piece.startswith("json\n"):
            found[re.findall(r"`(\w+\.jsonl)`", before)[0]] = piece.removeprefix("json\n") * 4
        before = piece
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Return a current folder that holds every file that README's commands name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "demo" / "base").symlink_to(BASE)
    write_model(tmp_path / "models" / "starcoder2-3b")
    for name, content in named_rows(section("### Data cookbook")).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    text = {"text": "x = 1\n"}
    for name in ("more.jsonl", "parts/a.jsonl", "parts/b.jsonl"):
        _write(tmp_path / name, json.dumps(text) + "\n")
    _write(tmp_path / "src" / "pack" / "a.py", "x = 1\n")
    _write(tmp_path / "src" / "b.py", "y = 2\n")
    rows = [{**PAIR, "split": split} for split in ("train", "train", "valid", "test")]
    _write(tmp_path / "rows.json", json.dumps({"rows": rows}, indent=2))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    _write(tmp_path / "rows.csv", table.getvalue())
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(table.getvalue().encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    _write(tmp_path / "clone" / "README.md", "---\nlicense: mit\n---\nA data set.\n")
    (tmp_path / "clone" / "data").mkdir()
    for split in ("train", "test"):
        pq.write_table(
            pa.Table.from_pylist([text] * 2),
            tmp_path / "clone" / "data" / f"{split}-00000-of-00001.parquet",
        )
    mine = [
        {**text, "input": "Add.", "solution": "a + b", "split": split}
        for split in ("train", "train", "validation", "test")
    ]
    _write(tmp_path / "my.jsonl", "".join(json.dumps(row) + "\n" for row in mine))
    return tmp_path


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def lathe(command: str, *more: str) -> int:
    """Run a command of README in this process and return its exit code."""
    program, *arguments = shlex.split(command)
    assert program == "lathe", command
    from lathe import main

    return main([*arguments, *more])


COOKBOOK = commands(section("### Data cookbook"))


@pytest.mark.parametrize("command", COOKBOOK)
def test_a_command_of_the_cookbook_trains(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command.startswith("lathe generate"):
        assert lathe(command, "--max-new-tokens", "3") == 0
        return
    if "hub:" in command:  # no network here: the plan says what is known
        assert lathe(command, "--plan") == 0
        assert "no data was read" in capsys.readouterr().out
        return
    assert lathe(command, *SHORT, f"train.output_dir={place / 'run'}") == 0, capsys.readouterr().err
    assert json.loads((place / "run" / "status.json").read_text())["step"] == 1
    assert lathe(command.replace("lathe", "lathe show-data", 1)) == 0
    assert "⟦" in capsys.readouterr().out


def test_every_shape_of_row_has_its_line(place: Path) -> None:
    shapes = named_rows(section("### Data cookbook"))
    assert len(shapes) >= 7 and len(COOKBOOK) >= 15
    assert all(any(f"data.train={name}" in command for command in COOKBOOK) for name in shapes)


def test_rows_are_looked_through(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        _write(place / name, json.dumps({**PAIR, "prompt": f"For {name}.\n"}) + "\n")
    for command, code in zip(commands(section("### Lint")), (0, 1), strict=True):
        assert lathe(command) == code, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "nothing found that would spoil a run" in said and '"kind": "duplicate"' in said


def test_whether_it_fits_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits, other, rent = commands(section("## Will it fit?"))
    assert lathe(fits) == 0 and "fits           as it is" in capsys.readouterr().out
    assert lathe(other) in (0, 2) and "fits" in capsys.readouterr().out
    assert lathe(rent) == 0 and "to rent by" in capsys.readouterr().out


def test_a_run_is_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = {
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1",
        "entry_point": "f",
    }
    _write(place / "humaneval.jsonl", json.dumps(problem) + "\n")
    model = "lathe model.path=data/demo/base data.train=my.jsonl"
    assert lathe(model, *SHORT, f"train.output_dir={place / 'runs' / 'mine'}") == 0
    for command in commands(section("## How good is it?")):
        command = command.replace("runs/<folder>", "runs/mine")
        more = () if "merge" in command else ("--max-new-tokens", "3")
        assert lathe(command, *more) == 0, command + capsys.readouterr().err
    assert "pass@10" in (place / "runs" / "mine" / "report.md").read_text()
    assert (place / "runs" / "checked" / "merge_receipt.json").is_file()


def test_the_commands_around_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, show, train, resume, generate, merge, report and TensorBoard, in README's order."""
    run = place / "runs" / "mine"
    own = commands(section("## Your own rows").split("### ")[0])
    use = commands(section("## Plan, train, resume, use"))
    presets = commands(section("## Presets"))
    for command in [*own, *presets, *use]:
        command = command.replace("runs/<folder>", "runs/mine").replace('"…"', "'def add'")
        more: tuple[str, ...] = ()
        if command in ELSEWHERE:
            continue
        if command.startswith("tensorboard"):
            words = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:]]
            assert subprocess.run([*words, "--inspect"], capture_output=True).returncode == 0
            continue
        if command.startswith("lathe data.train=") and "--plan" not in command:
            more = (*SHORT, f"train.output_dir={run}", "log.tensorboard=true")
        if command.startswith("lathe generate"):
            more = ("--max-new-tokens", "3")
        assert lathe(command, *more) == 0, command + capsys.readouterr().err
    assert (run / "report.md").is_file()
    assert (place / "runs" / "merged" / "model.safetensors").is_file()


def test_the_commands_after_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        make_run(place / "runs" / name)
    for command in commands(section("## After a run")):
        if command in ELSEWHERE:
            continue
        more: tuple[str, ...] = ()
        if "profile_steps" in command:
            more = (*SHORT, "train.max_steps=3", f"train.output_dir={place / 'traced'}")
        assert lathe(command, *more) == 0, command + capsys.readouterr().err
    assert "# Runs compared" in capsys.readouterr().out
    assert (place / "compared" / "comparison.md").is_file()
    assert (place / "a.csv").read_text().startswith("step,")
    assert (place / "traced" / "profile" / "steps-1-3.json.gz").is_file()


def test_the_python_of_readme_runs(place: Path) -> None:
    source = "\n".join(blocks(README, "python")).replace("path/to/folder", str(BASE))
    assert "load_config" in source and "save_adapter" in source
    short = '"train.max_steps": 1, "data.test": None, "eval.samples": 0, "eval.on_start": False'
    assert source.count('"train.max_steps": 3') == 1
    source = source.replace('"train.max_steps": 3', short)
    exec(compile(source, "README.md", "exec"), {"input_ids": torch.tensor([[1, 2, 3]])})
    assert (place / "adapter" / "adapter_config.json").is_file()


def test_every_command_is_run_somewhere() -> None:
    here = {
        command
        for title in (
            "### Data cookbook",
            "## Your own rows",
            "## Plan, train, resume, use",
            "## After a run",
            "## Presets",
            "## Will it fit?",
            "## How good is it?",
        )
        for command in commands(section(title))
    }
    left = [c for c in commands(README) if c not in here and c not in ELSEWHERE]
    assert left == []
