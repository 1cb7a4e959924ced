"""Runs compared: the table, what differs, the verdict, and the file with its picture."""

import json
import sys
from pathlib import Path

import pytest
from made_up import CONFIG, make_run, rewrite, rows_of
from runs import Refused

from files.errors import UserError
from train.report.__main__ import main
from train.report.compare import (
    labels,
    render_comparison,
    settings_that_differ,
    verdict,
    write_comparison,
)
from train.report.record import read_record


def two_runs(
    folder: Path, losses: tuple[float, float] = (1.195, 1.1), targets: int = 40_000
) -> list[Path]:
    """Write two runs of which the second has another rate, rank and last valid loss."""
    runs = [
        make_run(folder / name, valid={0: 2.0, 120: loss}, valid_targets=count)
        for name, loss, count in zip("ab", losses, (40_000, targets), strict=True)
    ]
    config = CONFIG.replace("learning_rate = 0.0002", "learning_rate = 0.001")
    (runs[1] / "config.toml").write_text(config + "[lora]\nr = 16\n")
    for row in (rows := rows_of(runs[1])):
        if row["kind"] == "train":
            row["learning_rate"] *= 5
    rewrite(runs[1], rows)
    return runs


def verdict_of(*folders: Path) -> str:
    return verdict([read_record(folder) for folder in folders])


def test_figures_settings_and_verdict_stand_in_one_text(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    for row in (rows := rows_of(runs[0])):
        if row["kind"] == "train":
            row |= {"tokens": 100, "targets": 50, "seconds": 0.25, "grad_norm": 2.0}
    rewrite(runs[0], rows)
    text = render_comparison([read_record(run) for run in runs])
    assert text.startswith("# Runs compared\n\n|  | a | b |\n| --- | ---: | ---: |\n")
    assert "| best valid loss | 1.1950 at step 120 | 1.1000 at step 120 |" in text
    assert "| tokens trained on | 12,000 |" in text and "| tokens/s | 400 |" in text
    assert "| time in steps | 30s |" in text and "| median gradient norm | 2 |" in text
    assert "test loss" not in text  # neither has one
    # The default of lora.r is 8; the first run, older than the key, does not say so.
    assert "| lora.r | 8 | 16 |" in text and "| optimizer.learning_rate | 0.0002 | 0.001 |" in text
    assert "## What stands out in a" in text  # its gradient was clipped all the time
    assert "output_dir" not in text


def test_only_what_differs_is_listed_with_what_surrounds_the_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=1, valid={}) for name in "ab"]
    records = [read_record(run) for run in runs]
    assert settings_that_differ(records) == []
    environment = {"device": "cpu", "versions": {"torch": "2.14"}, "commit": None}
    (runs[1] / "environment.json").write_text(json.dumps(environment))
    (runs[1] / "config.toml").write_text(
        CONFIG.replace("[train]", '[train]\noutput_dir = "elsewhere"') + "[lora]\nr = 8\n"
    )
    records = [read_record(run) for run in runs]
    assert settings_that_differ(records) == [("(versions.torch)", "2.13", "2.14")]


def test_the_lowest_loss_wins_where_the_rows_are_the_same(tmp_path: Path) -> None:
    text = verdict_of(*two_runs(tmp_path))
    assert (
        "**b is best**: its lowest valid loss, 1.1000 at step 120, is 7.9% below that of a "
        "(1.1950) on the same 40,000 targets."
    ) in text


def test_runs_that_are_nearly_equal_are_called_so(tmp_path: Path) -> None:
    assert "**b and a are equal**" in verdict_of(*two_runs(tmp_path / "x", (1.105, 1.1)))
    assert "**b is best**" in verdict_of(*two_runs(tmp_path / "y", (1.1056, 1.1)))


def test_as_many_targets_may_be_of_other_rows(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    for name, run in zip("xy", runs, strict=True):
        plan = json.loads((run / "plan.json").read_text())
        plan["fingerprints"] = {"valid": name}
        (run / "plan.json").write_text(json.dumps(plan))
    assert "cannot be compared**: they are of other rows" in verdict_of(*runs)


def test_a_small_valid_set_is_said_to_be_small(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    for run in runs:
        plan = json.loads((run / "plan.json").read_text())
        plan.setdefault("data", {})["valid_examples"] = 4
        (run / "plan.json").write_text(json.dumps(plan))
    text = verdict_of(*runs)
    assert "the valid set has 4 rows (below " in text and "may be chance" in text


def test_losses_over_other_rows_are_not_compared(tmp_path: Path) -> None:
    text = verdict_of(*two_runs(tmp_path, targets=39_000))
    assert "cannot be compared**: they are means over 39,000 and 40,000 targets" in text
    assert "is best" not in text


def test_runs_without_an_evaluation_or_an_end_are_named(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    third = make_run(tmp_path / "c", steps=3, valid={}, state="running")
    text = verdict_of(*runs, third)
    assert "Not finished, and judged as they stand: c." in text
    assert "Without an evaluation, and left out: c." in text and "**b is best**" in text
    assert "takes two runs with a valid loss" in verdict_of(runs[0], third)


def test_runs_of_one_name_go_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", steps=0, valid={}) for name in "ab"]
    assert labels([read_record(run) for run in runs]) == [str(run) for run in runs]


@pytest.mark.usefixtures("matplotlib")
def test_the_text_and_the_picture_are_written_and_nothing_of_the_user_s_is(tmp_path: Path) -> None:
    records = [read_record(run) for run in two_runs(tmp_path)]
    folder = tmp_path / "deep" / "both"
    written = [folder / "comparison.md", folder / "comparison.png"]
    for _ in range(2):  # what it wrote itself is written again
        assert write_comparison(records, folder) == written
    assert "**b is best**" in written[0].read_text()
    assert written[0].read_text().endswith("\n![comparison](comparison.png)\n")
    assert written[1].read_bytes().startswith(b"\x89PNG")
    written[0].write_text("a text of the user's")
    with pytest.raises(UserError, match=r"comparison\.md is there, and is none of ours"):
        write_comparison(records, folder)
    assert written[0].read_text() == "a text of the user's"


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_without_a_place_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = two_runs(tmp_path)
    assert main([str(run) for run in runs]) == 0
    reports = "".join(f"{run / 'report.md'}\n" for run in runs)
    assert capsys.readouterr().out.startswith(f"{reports}\n# Runs compared\n")


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_there_is_the_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = two_runs(tmp_path)
    assert main([*map(str, runs), "--to", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "comparison.md"
    assert capsys.readouterr().out.splitlines()[2:] == [str(path)]
    assert [written.name for written in path.parent.iterdir()] == ["comparison.md"]
    assert ".png" not in path.read_text()


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, refused: Refused
) -> None:
    run = make_run(tmp_path / "a", steps=0, valid={})
    (tmp_path / "file").write_text("")
    assert "name two or more" in refused(main, run, "--to", tmp_path)
    assert "is given twice" in refused(main, run, tmp_path / "a" / ".." / "a")
    assert "not the folder of a run" in refused(main, run, tmp_path)
    other = make_run(tmp_path / "b", steps=0, valid={})
    assert "is a file" in refused(main, run, other, "--to", tmp_path / "file")
    assert not (run / "report.md").exists()
