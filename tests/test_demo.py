"""The demo as a newcomer runs it: `python -m train.run --preset demo`, then `train.generate`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"LATHE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_demo(tmp_path: Path, *changes: str) -> tuple[Path, list[dict[str, Any]]]:
    run = tmp_path / "run"
    cache = tmp_path / "cache"
    command("train.run", "--preset", "demo", f"output_dir={run}", *changes, cache=cache)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, rows


def losses(rows: list[dict[str, Any]], split: str) -> list[float]:
    return [row["loss"] for row in rows if row.get("split") == split]


def test_the_shipped_base_model_is_small_enough() -> None:
    base = ROOT / "data" / "demo" / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 10_000_000


def test_a_few_steps_of_the_demo_already_help(tmp_path: Path) -> None:
    run, rows = run_demo(tmp_path, "max_steps=6", "eval.steps=6", "eval.samples=0")
    before, after = losses(rows, "valid")
    assert after < before
    completion = command(
        "train.generate",
        *("--run", str(run), "--prompt", "Write `def add(a, b)`.\n\nReturn the sum."),
        *("--max-new-tokens", "20"),
        cache=tmp_path / "cache",
    )
    assert completion.strip()


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    """The valid loss falls clearly, the test loss falls with it, and the report shows all of it."""
    run, rows = run_demo(tmp_path)
    valid, test = losses(rows, "valid"), losses(rows, "test")
    assert min(valid) < 0.9 * valid[0]
    assert test[-1] < 0.9 * test[0]
    report = (run / "report.md").read_text()
    for part in ("plots/train-loss.png", "plots/eval-loss.png"):
        assert part in report
        assert (run / part).is_file()
    (sample,) = json.loads((run / "status.json").read_text())["samples"]
    assert sample["before"] is not None
    assert sample["after"] is not None
