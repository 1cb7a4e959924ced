"""Steps of so many target tokens: the cut, its plan, and a run that follows it."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from runs import Refused, resume, rows_of, signalled, train, trained_bits
from small import RaggedExamples, adapted
from steps import gradient_step, trained

from data.order import epoch_order
from files.errors import UserError
from models.config import parse_config
from train.batches import StepBatches
from train.config.load import load_config
from train.inputs.dataset import Data
from train.inputs.known import KnownData, Unknown
from train.plan import steps as steps_module
from train.plan.cuts import stops_of, with_mean_examples
from train.plan.decide import UNKNOWN, decide
from train.plan.document import plan_document
from train.plan.ledger import micro_batch_tokens
from train.plan.steps import RunPlan, plan_run
from train.plan.text import render_plan
from train.process.world import ALONE
from train.run import main
from train.survey import print_plan

TOKENS = "train.effective_batch_tokens"
LENGTHS = np.random.default_rng(3).integers(2, 60, 40).tolist()
EXAMPLES: Any = RaggedExamples(LENGTHS)
TARGETS = EXAMPLES.num_targets


def planned(tokens: int, world: Any = ALONE, **settings: Any) -> tuple[RunPlan, StepBatches]:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(overrides={TOKENS: tokens, "train.num_train_epochs": 3, **keys})
    data = Data(SimpleNamespace(pad_id=0), None, EXAMPLES, None, None)  # type: ignore[arg-type]
    plan = plan_run(config, len(EXAMPLES), world.size, rows=data)
    return plan, StepBatches.of(config, plan, data, world)


# --- the cut ---


@pytest.mark.parametrize(
    ("targets", "wanted", "stops"),
    [
        # 3 + 5, 2 + 9, and of the last what is left: 1 + 1 + 4
        ([3, 5, 2, 9, 1, 1, 4], 7, [2, 4, 7]),
        ([2, 4, 3, 3, 1], 6, [2, 4, 5]),  # reached exactly, and a last step of one target
        ([10, 1, 30, 2], 5, [1, 3, 4]),  # an example that is longer than a step is one by itself
        ([1, 1, 1], 1, [1, 2, 3]),
        ([1, 1, 1], 100, [3]),
    ],
)
def test_a_step_stops_where_its_targets_are_reached(
    targets: list[int], wanted: int, stops: list[int]
) -> None:
    assert stops_of(targets, wanted) == stops


@pytest.mark.parametrize("settings", [{}, {"data__shuffle": False}, {"train__max_steps": 33}])
@pytest.mark.parametrize("tokens", [1, 37, 150, 10_000])
def test_each_epoch_is_cut_by_its_own_order(tokens: int, settings: dict[str, Any]) -> None:
    """An example once an epoch; N targets and more in a step, and fewer without its last one."""
    plan, batches = planned(tokens, **settings)
    seen: dict[int, list[int]] = {}
    for step in range(1, plan.total_steps + 1):
        epoch, start, stop = plan.batch(step)
        examples = [index for part in batches.cut(epoch, start, stop) for index in part.examples]
        seen.setdefault(epoch, []).extend(examples)
        targets = TARGETS[examples]
        assert targets[:-1].sum() < tokens
        assert targets.sum() >= tokens or stop == len(EXAMPLES)
        assert plan.epoch_of(step) == epoch + stop / len(EXAMPLES)
    shuffled = "data__shuffle" not in settings
    for epoch, examples in seen.items():
        order = epoch_order(len(EXAMPLES), seed=42, epoch=epoch, shuffle=shuffled).tolist()
        assert examples == order[: len(examples)]
        assert len(examples) == len(order) or (epoch == max(seen) and plan.total_steps == 33)
    assert plan.total_steps == settings.get("train__max_steps", plan.total_steps)
    assert len(seen) == 3 or plan.total_steps == 33


def test_epochs_differ_in_their_steps_and_what_is_due_at_their_ends_is() -> None:
    settings = {"eval__steps": "epoch", "checkpoint__per_epoch": 3, "schedule__name": "linear"}
    plan, _ = planned(48, **settings)
    ends = [step for step in range(1, plan.total_steps + 1) if plan.epoch_of(step).is_integer()]
    each = np.diff([0, *ends]).tolist()
    assert len(set(each)) > 1  # or the test shows nothing
    assert plan.eval_steps == tuple(ends)
    thrice = {
        begin + k * (n // 3)
        for begin, n in zip([0, *ends], each, strict=False)
        for k in range(1, n // (n // 3) + 1)
    }
    assert plan.save_steps == tuple(sorted({*thrice, plan.total_steps}))
    assert plan.steps_per_epoch == round(np.mean(each))
    assert plan.effective_batch_size == round(len(EXAMPLES) / np.mean(each))
    # The last of T updates uses f(T - 1) of a line that comes to 0 at T (train.plan.schedule).
    fall = plan.total_steps - plan.warmup_steps
    assert plan.learning_rate(plan.total_steps) == pytest.approx(2e-4 / fall, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "share"), [(0.01, 0.01), (0.3, 0.3), (1, 1), (1.3, 0.3), (2, 1)]
)
def test_of_an_epoch_that_is_cut_short_its_share_of_the_steps(epochs: float, share: float) -> None:
    whole, _ = planned(48)
    ends = [0, *(step for step in range(1, 100) if whole.epoch_of(step).is_integer())]
    before = int(np.ceil(epochs)) - 1
    steps = ends[before] + np.ceil(share * (ends[before + 1] - ends[before]))
    assert planned(48, train__num_train_epochs=epochs)[0].total_steps == steps


def test_more_steps_than_can_be_listed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "MAX_STEPS", 90)
    assert planned(1, train__num_train_epochs=2)[0].total_steps == 80
    for settings in ({"train__num_train_epochs": 10**6}, {"train__max_steps": 10**9}):
        with pytest.raises(UserError, match="more than a run can have"):
            planned(1, **settings)


@pytest.mark.parametrize("tokens", [1, 150])
def test_ranks_share_the_examples_of_a_step(tokens: int) -> None:
    """Of a step of one example, one of two ranks has none."""
    alone, whole = planned(tokens)
    ranks = [planned(tokens, SimpleNamespace(size=2, rank=rank)) for rank in range(2)]
    assert all(plan.cut == alone.cut for plan, _ in ranks)
    for step in range(1, 30):
        taken = [
            [index for part in batches.cut(*alone.batch(step)) for index in part.examples]
            for _, batches in ranks
        ]
        examples = [index for part in whole.cut(*alone.batch(step)) for index in part.examples]
        assert sorted(taken[0] + taken[1]) == sorted(examples)
        assert abs(len(taken[0]) - len(taken[1])) <= 1


def test_the_gradient_is_that_of_the_mean_over_the_step_s_targets() -> None:
    """Against autograd over one dense computation, whatever the micro-batches, in fp64."""
    model = adapted()
    for step, size in ((1, 1), (2, 3)):
        plan, batches = planned(150, train__per_device_train_batch_size=size)
        epoch, start, stop = plan.batch(step)
        result, gradients = gradient_step(model, batches.cut(epoch, start, stop))
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for index in batches.order(epoch)[start:stop]:
            example = EXAMPLES[index]
            ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
            total = total + F.cross_entropy(model(ids[None])[0, :-1], labels[1:], reduction="sum")
            targets += int((labels[1:] != -100).sum())
        assert result.targets == targets >= 150
        assert result.loss == pytest.approx(total.item() / targets, rel=1e-12)
        expected = torch.autograd.grad(total / targets, list(trained(model).values()))
        for (name, gradient), exact in zip(gradients.items(), expected, strict=True):
            assert (gradient - exact).norm() <= 1e-12 * exact.norm(), name


# --- the configuration ---


def test_the_last_said_of_examples_and_tokens_rules() -> None:
    preset = load_config("starcoder2-15b", overrides={TOKENS: 4096})  # which says 25 examples
    assert (preset.train.effective_batch_size, preset.train.effective_batch_tokens) == (None, 4096)
    with pytest.raises(UserError, match=r"effective_batch_size and train\.effective_batch_tokens"):
        load_config(overrides={TOKENS: 4096, "train.effective_batch_size": 8})
    with pytest.raises(UserError, match=r"several keys: .*effective_batch_tokens"):
        load_config(overrides={"tokens_per_batch": 4096})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data.fim_rate": 0.5}, "differ from epoch to epoch"),
        ({"data.group_by_length": True}, "use data.group_by_length=false"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        decide(load_config(overrides={TOKENS: 100, **settings}), UNKNOWN)
    assert str(raised.value).startswith(f"{TOKENS}=100 with {next(iter(settings))}=")
    assert sentence in str(raised.value)


# --- the plan ---

DECODER = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}


def document_of(data: KnownData | Unknown, world: int = 1, **settings: Any) -> dict[str, Any]:
    config = load_config(overrides={TOKENS: 2000, "data.max_length": 500, **settings})
    return plan_document(config, data, parse_config(DECODER, "a test"), UNKNOWN, world)


def test_the_plan_says_how_large_a_step_is() -> None:
    rows = KnownData(100, 0, 0, [30] * 100, {"rows": 100}, [20] * 100)
    document = document_of(rows, 2)
    # 100 examples of 20 targets are 2,000: one step an epoch.
    assert (document["effective_batch_tokens"], document["effective_batch_size"]) == (2000, 100)
    assert (document["total_steps"], document["epochs"]) == (20, 20.0)
    assert document["tokens_per_rank"] == 100 * 30 / 2
    assert document["compute"]["tokens"] == 20 * 100 * 30
    assert "all 100 examples make one step" in "\n".join(document["warnings"])
    text = render_plan(document)
    assert "at least 2,000 target tokens, about 100 examples a step, on 2 ranks 50/50" in text
    assert "20 (about 1 an epoch)" in text
    # A step may have more examples than the mean: a micro-batch counts as the largest that it is.
    config = with_mean_examples(load_config(overrides={TOKENS: 40, "data.max_length": 500}), 2)
    assert micro_batch_tokens(config, [30] * 100) == (8 * 30, 30)


@pytest.mark.parametrize("known", [False, True])
def test_without_targets_the_steps_are_not_known(known: bool) -> None:
    why = Unknown("the tokenizer is away")
    document = document_of(KnownData(100, 0, 0, why, {"rows": 100}) if known else why)
    assert (document["steps_per_epoch"], document["total_steps"]) == (None, None)
    assert document["effective_batch_size"] == 4  # 2,000 targets of examples of 500
    assert "are known when the rows are tokenised" in "\n".join(document["warnings"])
    assert "unknown without the rows' targets" in render_plan(document)


# --- the run ---


@pytest.fixture(scope="module")
def run(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(model_folder, rows_file, tmp_path_factory.mktemp("whole") / "r")).folder


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    asked = {TOKENS: 120, "train.num_train_epochs": 2, "lora.lora_dropout": 0.1}
    cadence = {"eval.steps": "epoch", "checkpoint.steps": 2, "schedule.name": "linear"}
    return runs.settings(model, rows, output, **asked, **cadence, **changes)


def test_what_is_planned_is_what_runs(
    run: Path,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    print_plan(
        load_config(overrides=settings(model_folder, rows_file, tmp_path / "other")), as_json=True
    )
    plan = json.loads(capsys.readouterr().out)
    written = json.loads((run / "plan.json").read_text())
    names = ("effective_batch_size", "total_steps", "steps_per_epoch", "epochs", "eval_steps")
    for name in (*names, "save_steps", "learning_rates", TOKENS.removeprefix("train.")):
        assert plan[name] == written[name], name
    steps = rows_of(run, "train")
    assert [row["step"] for row in steps] == list(range(1, plan["total_steps"] + 1))
    ends = [row["step"] for row in steps if row["epoch"].is_integer()]
    assert plan["eval_steps"] == ends == [row["step"] for row in rows_of(run, "eval")]
    assert ends[-1] == plan["total_steps"] and len(ends) == 2
    assert all(row["targets"] >= 120 for row in steps if row["step"] not in ends)
    # Every target of the rows once an epoch: bytes, and the end of the text, but the first.
    texts = [json.loads(line)["text"] for line in (rows_file / "train.jsonl").open()]
    assert sum(row["targets"] for row in steps) == 2 * sum(map(len, texts))
    assert steps[-1]["learning_rate"] == 1e-2 / (plan["total_steps"] - plan["warmup_steps"])
    report = (run / "report.md").read_text()
    assert "22 examples in batches of at least 120 targets make about" in report
    assert "| epochs | 2.00 | 2.00 |" in report
    assert "of at least 120 targets each" in (run / "final" / "README.md").read_text()


def test_a_stop_in_the_middle_of_an_epoch_changes_no_bit(
    run: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Whatever the micro-batches of the rest: here they are as before, for the same roundings."""
    stopped = tmp_path / "stopped"
    train(settings(model_folder, rows_file, stopped), signalled(3, signal.SIGTERM))
    assert not float(rows_of(stopped, "train")[-1]["epoch"]).is_integer()
    assert resume(stopped).reason == "completed"
    assert trained_bits(stopped) == trained_bits(run)
    assert rows_of(stopped) == rows_of(run)


@pytest.mark.parametrize("now", ['"none"', "60"])
def test_an_edited_step_size_is_refused(
    now: str, run: Path, tmp_path: Path, refused: Refused
) -> None:
    for name in ("config.toml", "plan.json"):  # a run that was stopped before its first checkpoint
        (tmp_path / name).write_text((run / name).read_text())
    config = tmp_path / "config.toml"
    assert "effective_batch_tokens = 120" in config.read_text()
    edited = config.read_text().replace("batch_tokens = 120", f"batch_tokens = {now}")
    config.write_text(edited)
    error = refused(main, "--resume", str(tmp_path))
    was = "train.effective_batch_tokens was 120 and is"
    assert f"{was} {'None' if 'none' in now else now} in config.toml" in error


def test_a_run_made_shorter_than_it_is_ends(run: Path, tmp_path: Path) -> None:
    """Its steps lie behind those that the new plan has."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "status.json").unlink()
    assert main(["--resume", str(copy), "max_steps=1"]) == 0
