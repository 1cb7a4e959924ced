"""`eval.metrics` of completions: equal to `lathe evaluate`'s, over ranks too; no bit is changed."""

import dataclasses
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Refused, resume, rows_of, signalled, train, trained_bits
from test_evaluate_command import evaluated, lines
from test_programs import HUMAN_EVAL
from test_step_over_ranks import on_ranks

from train.evaluation import during, rated, tasks
from train.evaluation.rated import with_rates
from train.plan.document import refuse_to_complete_shared
from train.publish.export_metrics import to_csv
from train.report.plots import draw_plots
from train.report.record import read_record
from train.run import main
from train.state import EvalResult, Run

RATES = ["parse_rate", "exact_match", "edit_similarity"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows of a prompt and an answer; 19 are held out, more than one batch."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 12), ("valid", 19), ("test", 3)):
        found = [{"prompt": f"{'ab' * (n % 5)}f{n}=", "completion": "aaa"} for n in range(count)]
        lines(folder / f"{name}.jsonl", found)
    return folder


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    asked = {
        "data.format": "completion",
        "train.max_steps": 4,
        "eval.steps": 2,
        "eval.metrics": RATES,
        "eval.max_new_tokens": 4,
        "optimizer.learning_rate": 3e-2,
        "lora.lora_dropout": 0.1,
    }
    return runs.settings(model, rows, output, **{**asked, **changes})


@pytest.fixture(scope="module")
def run(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    test = {"data.test": str(rows / "test.jsonl"), "eval.best_metric": "edit_similarity"}
    return train(settings(model_folder, rows, output, **test)).folder


def test_they_are_what_lathe_evaluate_finds_of_the_same_weights(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, place in (("valid", run / "final"), ("test", run), ("valid", run)):
        last = [row for row in rows_of(run, "eval") if row["split"] == split][-1]
        found = evaluated(
            *(capsys, place, "--data", rows / f"{split}.jsonl"),
            *("--complete", 64, "--max-new-tokens", 4),
        )
        assert found["completions"]["rows"] == last["completed"] == {"valid": 19, "test": 3}[split]
        assert {n: found["metrics"][n]["value"] for n in RATES} == {n: last[n] for n in RATES}
    assert 0 < last["edit_similarity"] < 1


def test_no_bit_of_the_training_is_changed_and_a_resume_goes_on_with_the_best(
    run: Path, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    plain = train(settings(model_folder, rows, tmp_path / "plain", **{"eval.metrics": None}))
    asked = {"data.test": str(rows / "test.jsonl"), "eval.best_metric": "edit_similarity"}
    values = settings(model_folder, rows, tmp_path / "run", **asked)
    assert train(values, signalled(3, signal.SIGTERM)).reason == "sigterm"
    stopped = resume(tmp_path / "run").folder
    assert rows_of(stopped) == rows_of(run)
    last = [
        {name: bits for name, bits in trained_bits(folder).items() if not name.startswith("best")}
        for folder in (plain.folder, run, stopped)
    ]
    assert last[0] == last[1] == last[2]
    assert trained_bits(stopped) == trained_bits(run)
    status = json.loads((stopped / "status.json").read_text())
    best = max(r["edit_similarity"] for r in rows_of(run, "eval") if r["split"] == "valid")
    assert status["best"]["edit_similarity"] == pytest.approx(best, rel=1e-12)


@pytest.mark.usefixtures("matplotlib")
def test_they_stand_in_report_console_curves_and_plan(
    run: Path, model_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = (run / "report.md").read_text()
    assert "| step | set | parse rate | exact match | edit similarity |" in report
    assert "of 19 and 3 rows, greedy" in report
    assert tmp_path / "eval-metrics.png" in (draw_plots(read_record(run), tmp_path) or [])
    assert "eval/edit_similarity" in to_csv(read_record(run)).splitlines()[0]
    assert json.loads((run / "plan.json").read_text())["measured"]["completed_rows"] == 19
    values = settings(model_folder, rows, tmp_path / "no", **{"train.max_steps": 2})
    assert main([*runs.arguments(values), "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "evaluations after step 2 measured parse_rate, exact_match, edit_similarity; 19 rows"
        in said
    )
    assert "19 rows completed at each, by up to 4 tokens in up to 8 passes of the model" in said


def caught(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Run:
    """Do a run, and return what its evaluations were given."""
    given: list[Run] = []

    def catch(run: Run, *rest: Any) -> EvalResult:
        given.append(run)
        before = torch.get_rng_state()
        found = with_rates(run, *rest)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    monkeypatch.setattr(during, "with_rates", catch)
    train(values)
    return given[-1]


def test_over_ranks_they_are_the_same_numbers(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches: of three ranks one has none."""
    run = caught(monkeypatch, settings(model_folder, rows, tmp_path / "run"))
    valid = run.data.valid
    assert valid is not None
    plain = EvalResult(loss=1.0, targets=9, seconds=0.0)
    alone = with_rates(run, valid, plain)
    own = tasks.complete_tasks
    counts = []

    def counting(model: Any, asked: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(asked))
        return own(model, asked, *rest, **more)

    monkeypatch.setattr(rated, "complete_tasks", counting)
    for size in (2, 3):
        counts.clear()
        for one in on_ranks(
            size, lambda world: with_rates(dataclasses.replace(run, world=world), valid, plain)
        ):
            assert one.rates == alone.rates and one.completed == alone.completed == 19
        assert sorted(counts) == [0] * (size - 2) + [3, 16]
    monkeypatch.setattr(rated, "find_stop_ids", lambda *_: frozenset(range(257)))
    assert alone.rates["edit_similarity"] > with_rates(run, valid, plain).rates["edit_similarity"]
    lost = with_rates(run, valid, dataclasses.replace(plain, loss=math.nan))
    assert all(math.isnan(lost.rates[name]) for name in RATES) and not lost.completed


@pytest.mark.usefixtures("cache")
def test_programs_that_pass_decide_the_best_and_the_end_and_are_warned_of(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Planted for two rows: none passes, then one, then none, and two failures stop the run."""
    right, wrong = "    return 2 * x\n", "    return 3 * x\n"
    planted = iter([wrong, wrong, right, wrong, wrong, wrong, wrong, right, right, right])

    def take(self: tasks.Task, asked: Any, tokenizer: Any) -> None:
        self.completions, self.ended = [next(planted)], [True]

    monkeypatch.setattr(tasks.Task, "take", take)
    found = lines(tmp_path / "train.jsonl", [{**HUMAN_EVAL, "task_id": str(n)} for n in range(2)])
    lines(tmp_path / "valid.jsonl", [{**HUMAN_EVAL, "task_id": str(n)} for n in range(2)])
    changes = {
        "data.format": "template",
        "data.prompt_template": "{prompt}",
        "data.completion_template": "{canonical_solution}",
        "data.max_length": 512,
        "eval.steps": 1,
        "eval.metrics": ["pass@1", "exact_match"],
        "eval.best_metric": "pass@1",
        "eval.max_new_tokens": 1,
        "eval.early_stopping_patience": 2,
        "train.max_steps": 9,
        "log.tensorboard": True,
    }
    outcome = train(settings(model_folder, found.parent, tmp_path / "run", **changes))
    said = capsys.readouterr().out
    assert "note: eval.metrics=pass@1 runs programs that a model wrote, with your rights" in said
    assert re.search(r"valid loss .* exact match 0.5 · pass@1 0.5 · 2 rows completed", said)
    folder = outcome.folder
    values = [(row["pass@1"], row["exact_match"]) for row in rows_of(folder, "eval")]
    assert values == [(0.0, 0.0), (0.5, 0.5), (0.0, 0.0), (0.5, 0.5)]
    assert [row["best"] for row in rows_of(folder, "eval")] == [True, True, False, False]
    assert outcome.reason == "early_stopping"
    assert json.loads((folder / "status.json").read_text())["best"] == {"step": 2, "pass@1": 0.5}
    best = read_record(folder).best
    assert best is not None and best["step"] == 2
    assert "eval/pass_at_1" in to_csv(read_record(folder)).splitlines()[0]
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert b"eval/pass_at_1" in events


REFUSED = [
    ({"data.format": "text"}, "with data.format=text: a whole text has no prompt"),
    (
        {"data.format": "template", "data.completion_template": "{completion}"},
        "is whole and has a prompt; raise data.max_length",
    ),
    ({"data.valid": None}, "is of held-out rows, and there are none"),
    ({"eval.metrics": "pass@1"}, "has no tests (HumanEval's columns"),
    (
        {"eval.metrics": "pass@1", "data.valid": None, "data.valid_fraction": 0.5},
        "reads the tests in the held-out rows themselves; name them by data.valid",
    ),
    (
        {"data.format": "text", "data.fim_rate": 0.5, "eval.holes": 3},
        "of holes exact_match alone is known",
    ),
    (
        {"data.format": "text", "data.fim_rate": 0.5, "eval.metrics": "exact_match"},
        "the share of held-out holes that are filled exactly, and none is; set eval.holes",
    ),
    ({"eval.complete": 0}, "eval.complete"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_what_cannot_be_measured_is_refused_before_weights_are_read(
    plan: list[str], changes: dict[str, Any], words: str, model_folder: Path, rows: Path,
    tmp_path: Path, refused: Refused,
) -> None:  # fmt: skip
    values = settings(model_folder, rows, tmp_path / "run", **changes)
    assert words in refused(main, *plan, *runs.arguments(values))
    assert not (tmp_path / "run").exists()


def test_ranks_that_share_a_model_complete_nothing(model_folder: Path, rows: Path) -> None:
    from files.errors import UserError
    from train.config.load import load_config

    config = load_config(overrides=settings(model_folder, rows, Path("no")))
    refuse_to_complete_shared(config, "replicate")
    with pytest.raises(UserError, match=r"exact_match,edit_similarity with ranks that share"):
        refuse_to_complete_shared(config, "shard")
