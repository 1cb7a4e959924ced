"""report.md and its plots, from made-up runs in every state."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up import CONFIG, make_run, rewrite, rows_of

from files.atomic import RunLock
from files.errors import UserError
from train.report.__main__ import main
from train.report.costs import card_of
from train.report.notes import events, notes
from train.report.page import render_report, write_report
from train.report.plots import running_mean
from train.report.record import read_record

pytestmark = pytest.mark.usefixtures("matplotlib")


def report_of(folder: Path) -> str:
    """Return the text alone: drawing takes most of a report's time."""
    return render_report(read_record(folder), plots=[])


def table_rows(report: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, its own head left out."""
    lines = report.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def notes_of(folder: Path) -> str:
    return "\n".join(notes(read_record(folder)))


def test_a_finished_run_has_every_section_and_every_plot(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", samples=[{"prompt": "Write ``` x", "after": "def x(): ..."}]
    )
    rows = rows_of(folder)
    for step, loss in ((0, 2.05), (120, 1.21)):
        rows.append({"kind": "eval", "step": step, "split": "test", "loss": loss, "targets": 900})
    rewrite(folder, rows)
    report = write_report(folder).read_text()
    assert report.startswith("# run\n")  # its folder's name: it was given none
    assert "preset `demo`: **finished (completed) after 120 of 120 steps**" in report
    assert "2.0500 before, **1.2100** after (900 targets)" in report
    assert ["best valid loss", "**1.1950 at step 120**"] in table_rows(report, "Result")
    assert ["trained parameters", "1,000 of 50,000 (2.00%)"] in table_rows(report, "Result")
    assert "````\nWrite ``` x\n````" in report and "def x(): ..." in report
    assert "| versions.torch | `2.13` |" in report
    assert CONFIG in report
    for name in ("train-loss", "eval-loss", "learning-rate", "grad-norm"):
        assert f"(plots/{name}.png)" in report
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


def test_every_evaluation_has_a_train_loss_beside_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", valid={0: 2.0, 40: 1.5, 120: 1.6})
    rows = rows_of(folder)
    for row in rows:
        row.pop("train_loss", None)  # what the rows of the steps say has to do
    rewrite(folder, rows)
    steps = [row for row in rows if row["kind"] == "train"]

    def mean(first: int, last: int) -> str:
        span = [row for row in steps if first <= row["step"] <= last]
        targets = sum(row["targets"] for row in span)
        return f"{sum(row['loss'] * row['targets'] for row in span) / targets:.4f}"

    # Before training: the loss of step 1, which is taken on the same weights.
    assert table_rows(report_of(folder), "Evaluations") == [
        ["0", "0.00", f"{steps[0]['loss']:.4f} (step 1)", "2.0000", "", ""],
        ["40", "1.00", mean(1, 40), "1.5000", "-25.0%", "best"],
        ["120", "3.00", mean(41, 120), "1.6000", "+6.7%", ""],
    ]


def test_plan_against_actual(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=80, state="preempted", reason="sigterm")
    assert table_rows(report_of(folder), "Plan against actual") == [
        ["steps", "120", "80"],
        ["epochs", "3.00", "2.00"],
        ["evaluations", "3", "2"],
        ["warm-up steps", "6", "6"],
        ["trainable parameters", "1,000", "1,000"],
        ["total parameters", "50,000", "50,000"],
    ]
    assert "The learning rate of all 80 steps is the schedule's (cosine)." in report_of(folder)


def test_a_learning_rate_off_the_schedule_is_found(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = rows_of(folder)
    step = next(row for row in rows if row["kind"] == "train" and row["step"] == 50)
    step["learning_rate"] *= 1 + 1e-9
    rewrite(folder, rows)
    assert "The learning rate is not the schedule's at step 50." in report_of(folder)


def test_speed_counts_steps_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, valid={})
    rows = rows_of(folder)
    for row, tokens, seconds in zip(rows, (1000, 3000), (0.5, 1.5), strict=True):
        row |= {"tokens": tokens, "targets": tokens // 2, "seconds": seconds}
    rewrite(folder, rows)
    assert table_rows(report_of(folder), "Speed and memory")[:4] == [
        ["tokens trained on", "4,000 (2,000 targets)"],
        ["throughput", "2,000 tokens/s, 1,000 targets/s"],
        ["step", "median 1.00 s, slowest 1.50 s"],
        ["time in steps", "2.0s"],
    ]


def test_the_plan_s_warnings_and_the_seed_s_claims_are_repeated(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text())
    plan["warnings"] = ["12 of 320 rows (3.8%) are cut at data.max_length=512"]
    plan["claims"] = [
        {"statement": "64 steps | epoch", "holds": True, "note": ""},
        {"statement": "no train loss", "holds": False, "note": "there is one"},
        {"statement": "25 hours", "holds": None},
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    report = report_of(folder)
    assert "- 12 of 320 rows (3.8%) are cut" in report
    assert table_rows(report, "The seed's claims") == [
        ["64 steps \\| epoch", "holds", ""],
        ["no train loss", "**does not hold**", "there is one"],
        ["25 hours", "cannot be checked", ""],
    ]


def test_the_test_loss_says_which_weights_it_is_of(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", valid={40: 1.2, 80: 1.3})
    test = {"kind": "eval", "step": 120, "split": "test", "loss": 1.25, "targets": 900}
    rewrite(folder, [*rows_of(folder), test])
    assert ["test loss", "**1.2500** after (900 targets)"] in table_rows(
        report_of(folder), "Result"
    )
    config = CONFIG + "[checkpoint]\nload_best_at_end = true\n"
    (folder / "config.toml").write_text(config)
    cell = "**1.2500** after, of step 40, the best (900 targets)"
    assert ["test loss", cell] in table_rows(report_of(folder), "Result")


# Predictions


def replan(folder: Path, **changes: Any) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | changes))


def test_predicted_against_measured_on_a_card(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=60, training_memory_bytes=330 * 2**20)
    for row in (rows := rows_of(folder)):
        row |= {"seconds": 0.5, "tokens": 1000}
    rewrite(folder, rows)
    # 40 % of an H100's 989e12 operations a second, two ranks: 120 steps of 0.2 s.
    flops = 120 * 0.2 * 0.4 * 989e12 * 2
    replan(
        folder,
        device="cuda",
        world_size=2,
        memory={"total": 300 * 2**20, "overhead": 50 * 2**20},
        compute={"tokens": 100_000, "flops": flops},
        disk={"total": 2**20},
    )
    environment = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    (folder / "environment.json").write_text(json.dumps(environment))
    report = report_of(folder)
    assert table_rows(report, "Predicted against measured") == [
        ["memory of model and training", "250.0 MiB", "330.0 MiB", "1.32 ×"],
        ["tokens", "50,000", "60,000", "1.20 ×"],
        ["a step", "200 ms", "500 ms", "2.50 ×"],
        ["all steps", "12s", "30s", "2.50 ×"],
    ]
    assert "**Model and training took 32% more memory than predicted**" in report
    assert "**Steps took 2.5 times longer than predicted.**" in report
    assert "at 40% of the bf16 peak of the H100 SXM" in report
    assert "16% of its peak" in report  # 0.4 × 0.2 s / 0.5 s


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA T4", None),
    ],
)
def test_the_card_is_known_by_its_device_s_name(
    tmp_path: Path, name: str, card: str | None
) -> None:
    folder = make_run(tmp_path / "run", steps=1, valid={})
    environment = {"device": "cuda", "device_name": name}
    (folder / "environment.json").write_text(json.dumps(environment))
    found = card_of(read_record(folder))
    assert (found.name if found else None) == card


def test_no_time_is_predicted_for_a_cpu_and_all_that_is_held_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for place, size in (("checkpoints/step-00000120", 700), ("best", 200), ("final", 100)):
        (folder / place).mkdir(parents=True)
        (folder / place / "file").write_bytes(bytes(size))
    memory = {"total": 2**28, "overhead": 2**27}
    compute = {"tokens": None, "flops": 6e10}
    replan(folder, device="cpu", memory=memory, compute=compute, disk={"total": 2000})
    rows = table_rows(report := report_of(folder), "Predicted against measured")
    assert rows[0] == ["memory of model and training", "256.0 MiB", "240.0 MiB", "0.94 ×"]
    assert rows[1][:2] == ["tokens", "—"] and rows[2][:2] == ["a step", "—"]
    assert rows[4] == ["disk", "2.0 KiB", "1000 B", "0.50 ×"]
    assert "predicts no time for this device" in report and "GFLOP/s." in report
    assert "more memory than predicted" not in report


# Notes


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        ({0: 1.000, 120: 0.997}, "moved 0.3% (1.0000 → 0.9970): barely trained"),
        ({0: 1.0, 40: 1.1, 120: 1.2}, "never fell below its first value, 1.0000"),
        (
            {0: 2.0, 76: 1.0, 120: 1.1},
            "at step 76, 63% of the 120 steps; at the end the valid loss was 10.0% above it",
        ),
        ({0: 2.0, 80: 1.5, 120: 1.4}, "still fell by 6.7% between steps 80 and 120"),
        ({0: 4.0, 80: 2.01, 120: 2.0}, "the valid loss (2.0000) is 1.6 times the train loss"),
        ({}, "No evaluation was done"),
    ],
)
def test_notes_on_the_evaluations(tmp_path: Path, valid: dict[int, float], expected: str) -> None:
    assert expected in notes_of(make_run(tmp_path / "run", valid=valid))


def test_a_good_run_has_no_notes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", valid={0: 2.0, 40: 1.4, 80: 1.205, 120: 1.2})
    assert notes_of(folder) == "" and "## Notes" not in report_of(folder)


def test_a_small_valid_set_is_called_noisy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", valid_targets=2310)
    assert "The valid set has 2,310 targets (below 10,000): its loss is noisy" in notes_of(folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"data": {"valid_examples": 19}}))
    assert "The valid set has 19 rows (below 100): its loss is noisy" in notes_of(folder)


def test_missing_and_clipped_steps_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", grad_norm=2.0)
    rewrite(folder, [row for row in rows_of(folder) if row["step"] != 7])
    text = notes_of(folder)
    assert "1 of 120 steps without a row: step 7." in text
    assert "clipped to 1 in 100% of the steps (median norm 1.99)" in text


def test_early_stopping_and_an_unfinished_run_are_told(tmp_path: Path) -> None:
    stopped = make_run(
        tmp_path / "a",
        steps=80,
        valid={0: 2.0, 40: 1.2, 80: 1.201},
        reason="early_stopping",
    )
    text = notes_of(stopped)
    assert (
        "Stopped early at step 80: no evaluation after step 40 was better by more than 0." in text
    )
    running = make_run(tmp_path / "b", steps=50, state="running", reason=None)
    assert "not finished: running after 50 of 120 steps" in notes_of(running)
    assert f"--resume {running}" in notes_of(running)


def test_a_run_whose_process_is_gone_is_not_running(tmp_path: Path) -> None:
    """A kill leaves no time to say so; the lock ends with the process."""
    folder = make_run(tmp_path / "a", steps=50, state="running", reason="training")
    os.utime(folder / "status.json", (1e9, 1e9))
    os.utime(folder / "metrics.jsonl", (1e9 + 60, 1e9 + 60))
    with RunLock(folder):
        assert read_record(folder).outcome == "running (training) after 50 of 120 steps"
    said = "interrupted (no sign since 2001-09-09 01:47:40 UTC) after 50 of 120 steps"
    assert f"not finished: {said}" in notes_of(folder)
    assert f"--resume {folder}" in notes_of(folder)
    with RunLock(folder):  # looking took nothing away
        pass


def test_a_train_loss_that_ends_above_its_lowest_has_diverged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "diverged" not in notes_of(folder)
    for row in (rows := rows_of(folder)):
        if row["kind"] == "train":
            row |= {"loss": 1.0 if 61 <= row["step"] <= 72 else 1.5, "targets": 100}
            if row["step"] > 108:
                row["loss"] = 1.21
    rewrite(folder, rows)
    assert (
        "diverged: its mean over the last 12 steps is 1.2100, 21% above that of steps 61 to 72 "
        "(1.0000; more than 20%"
    ) in notes_of(folder)
    for row in rows:
        if row["step"] > 108 and row["kind"] == "train":
            row["loss"] = 1.19
    rewrite(folder, rows)
    assert "diverged" not in notes_of(folder)
    # A mean over less than five steps is noise.
    few = [row | {"loss": float(row["step"])} for row in rows if row["step"] < 50]
    rewrite(folder, few)
    assert "diverged" not in notes_of(folder)


def test_a_loss_of_zero_is_no_denominator(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", valid={0: 0.0, 40: 0.0, 120: 0.5})
    assert "never fell below its first value, 0.0000" in report_of(folder)


def test_wild_gradient_norms_are_told_with_their_share(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = rows_of(folder)
    for row in rows:
        if row["kind"] == "train":
            row["grad_norm"] = 0.5 if row["step"] not in (30, 90) else 5.5
    rewrite(folder, rows)
    text = notes_of(folder)
    assert "unstable: in 2 steps (1.7%) it was more than 10 times its median of 0.5" in text
    assert "at step 30 5.5." in text
    rows[30]["grad_norm"] = 0.5  # step 30: one alone is an incident
    rewrite(folder, rows)
    assert "unstable" not in notes_of(folder)


def test_a_peak_that_was_never_reached_and_too_few_steps_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4, state="running", valid={0: 2.0})
    assert "never reached" not in notes_of(folder)  # it may still come
    folder = make_run(tmp_path / "over", steps=4, valid={0: 2.0})
    text = notes_of(folder)
    # Warm-up over 6 steps: 0, 1/6, 2/6 and 3/6 of 2e-4.
    assert "the highest used was 0.0001 of 0.0002, at step 4 (warm-up takes 6 steps)" in text
    assert "The run had 4 steps (below 50): all learning rates together are 0.0002" in text
    text = notes_of(make_run(tmp_path / "enough"))
    assert "never reached" not in text and "below 50" not in text


def test_a_run_that_skipped_many_steps_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = rows_of(folder)
    for row in rows[1:8]:
        row["skipped"] = "no targets"
    rewrite(folder, rows)
    assert "6% of the steps changed nothing (more than 5%)" in notes_of(folder)


# What happened on the way


def test_a_run_without_incidents_has_no_such_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert list(events(read_record(folder))) == []
    assert "What happened" not in report_of(folder)


def test_resumes_skipped_steps_memory_and_spikes_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", resumed_from=[10, 30])
    (folder / "config.toml").write_text(
        CONFIG.replace("[train]\n", "[train]\nper_device_train_batch_size = 8\n")
    )
    rows = rows_of(folder)
    for row in rows:
        if row["kind"] == "eval" and row["step"] == 80:
            row["reduced_batch_size"] = 4
        if row["kind"] == "train":
            if row["step"] in (3, 4):
                row |= {"loss": None, "skipped": "non-finite", "examples": [5, 6], "rows": [9, 9]}
            if row["step"] == 5:
                row |= {"loss": 0.0, "skipped": "no targets"}
            if row["step"] == 60:
                row |= {"loss": 9.0, "spike": 23.44, "rows": [*range(19, 9, -1)]}
            if row["step"] > 20:
                row["micro_batch_divisor"] = 2 if row["step"] < 50 else 16
    rewrite(folder, rows)
    assert """## What happened on the way

- Resumed from steps 10, 30.
- 1 of 120 steps changed nothing (no targets): step 5.
- 2 of 120 steps changed nothing (non-finite): step 3 (row 9), step 4 (row 9).
- Out of memory at step 21: from there on, the step itself included, a micro-batch was 4 \
instead of 8 examples. Loss and gradient are the same.
- Out of memory at step 50: from there on, the step itself included, a micro-batch was 1 \
instead of 4 examples. Loss and gradient are the same.
- Out of memory in the valid evaluation at step 80: it was done in batches of 4.
- The loss of 1 of 120 steps was more than 6 standard deviations above the mean of the up to 128 \
losses before: step 60 (9.0000, 23.4 deviations; rows 10, 11, 12, 13, 14, 15, 16, 17 and 2 more).
- Rows are counted from 0 """ in report_of(folder)


def test_long_lists_of_incidents_are_cut_and_tokens_are_called_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.toml").write_text(
        CONFIG.replace("[train]\n", "[train]\nmicro_batch_tokens = 4096\n")
    )
    rows = rows_of(folder)
    for row in rows:
        if row["kind"] == "train":
            row |= {"skipped": "non-finite", "micro_batch_divisor": 2}
    rewrite(folder, rows)
    skipped, memory = events(read_record(folder))
    assert skipped.endswith("step 7, step 8 and 112 more.")
    assert "a micro-batch was 2,048 instead of 4,096 tokens" in memory


# Runs with little to tell


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("valid", [{}, {0: 2.0}])
def test_a_run_of_one_step_or_none_has_a_report(
    tmp_path: Path, steps: int, valid: dict[int, float]
) -> None:
    folder = make_run(tmp_path / "run", steps=steps, valid=valid, state="running")
    report = write_report(folder).read_text()
    assert f"after {steps} of 120 steps" in report
    assert (folder / "plots/train-loss.png").exists() == (steps == 1)
    assert (folder / "plots/eval-loss.png").exists() == bool(valid)
    if valid:
        beside = table_rows(report, "Evaluations")[0][2]
        assert beside.endswith("(step 1)") if steps else beside == "—"


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text("")
    report = report_of(tmp_path)
    assert "**no status after 0 steps**" in report and CONFIG in report


def test_losses_that_are_not_finite_are_told_and_left_out_of_the_plots(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, valid={0: 2.0})
    rows = rows_of(folder)
    rows[1] |= {"loss": None, "grad_norm": None}
    rewrite(folder, [*rows, {**rows[0], "step": 2, "loss": None, "best": False}])
    report = write_report(folder).read_text()
    assert "1 of 2 evaluations gave a loss that is not finite" in report
    assert table_rows(report, "Evaluations")[1][3:] == ["non-finite", "", ""]


def test_a_plot_without_rows_any_more_is_taken_away(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1, valid={})
    (folder / "plots").mkdir()
    (folder / "plots/eval-loss.png").write_bytes(b"of an earlier report")
    assert "eval-loss" not in write_report(folder).read_text()
    assert not (folder / "plots/eval-loss.png").exists()


def test_without_matplotlib_the_report_says_how_to_get_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = write_report(folder).read_text()
    assert "pip install matplotlib" in report and ".png" not in report
    assert table_rows(report, "Evaluations")


def test_the_running_mean_is_by_target_over_the_last_steps() -> None:
    points = [(1, 1.0), (2, 2.0), (5, 4.0)]
    smooth = running_mean(points, {1: 1, 2: 3, 5: 1}, window=2)
    assert smooth == [(1, 1.0), (2, 7 / 4), (5, 10 / 4)]


# The command


def test_the_command_writes_the_report_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of no step yet: what takes time is drawing.
    folders = [make_run(tmp_path / name, steps=0, valid={}) for name in ("a", "b")]
    assert main([str(folder) for folder in folders]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == [str(folder / "report.md") for folder in folders]


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not the folder of a run")
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.toml").write_text("a = = b")
    with pytest.raises(UserError, match=r"config\.toml: not TOML"):
        write_report(tmp_path)


def test_a_damaged_checkpoint_is_listed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "checkpoints" / "corrupt-step-00000040").mkdir(parents=True)
    assert "Damaged, and set aside: corrupt-step-00000040." in report_of(folder)


def test_a_run_that_ended_in_losses_that_are_not_finite_is_not_told_to_resume(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", state="failed", reason="non_finite")
    text = report_of(folder)
    assert "lower optimizer.learning_rate" in text
    assert "--resume" not in text
