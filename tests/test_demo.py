"""The demo as a newcomer runs it: `lathe --preset demo`, then `lathe generate`."""

import json
from pathlib import Path
from typing import Any

import pytest
from children import ROOT, python
from runs import rows_of

from lathe import main


def losses(rows: list[dict[str, Any]], split: str) -> list[float]:
    return [row["loss"] for row in rows if row.get("split") == split]


def test_the_shipped_base_model_is_small_enough() -> None:
    base = ROOT / "data" / "demo" / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 10_000_000


def test_a_few_steps_of_the_demo_already_help(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = ("max_steps=6", "eval.steps=6", "eval.samples=0", "data.test=none")
    assert main(["--preset", "demo", f"output_dir={run}", *changes]) == 0
    before, after = losses(rows_of(run), "valid")
    assert after < before
    capsys.readouterr()
    asked = ("--prompt", "Write `def add(a, b)`.\n\nReturn the sum.", "--max-new-tokens", "20")
    assert main(["generate", "--run", str(run), *asked]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    """The valid loss falls clearly, the test loss falls with it, and the report shows all of it."""
    run, cache = tmp_path / "run", str(tmp_path / "cache")
    python("-m", "train.run", "--preset", "demo", f"output_dir={run}", LATHE_CACHE=cache)
    rows = rows_of(run)
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
