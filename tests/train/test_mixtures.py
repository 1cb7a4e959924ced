"""Runs on mixtures (`data.weights`): what is planned, trained, resumed, shown, and refused."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Refused, resume, signalled, train, trained_bits

from data.mixture import Mixture
from files.errors import UserError
from train.batches import StepBatches
from train.config.load import load_config
from train.inputs.dataset import Data, load_data
from train.inputs.known import KnownData
from train.plan.decide import UNKNOWN
from train.plan.document import plan_document
from train.plan.mixture import mixture_document
from train.plan.steps import plan_run
from train.process.world import World
from train.run import main, run
from train.saving.resume import find_run
from train.show_data import show_rows

FEW, MANY = 4, 14


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a folder with few.jsonl, 4 short rows, many.jsonl, 14 long ones, and valid.jsonl."""
    for name, count, letters in (("few", FEW, 6), ("many", MANY, 30), ("valid", 3, 9)):
        rows = [{"text": f"{name[0]}{number:02}".ljust(letters, "x")} for number in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def settings(model: Path, sources: Path, output: Any = "run", **changes: Any) -> dict[str, Any]:
    """Return a run of 7 steps of 6 of 18 examples: two epochs and a third."""
    values: dict[str, Any] = {
        "data.train": [str(sources / "few.jsonl"), str(sources / "many.jsonl")],
        "data.weights": [0.5, 0.5],
        "lora.lora_dropout": 0.1,
        "train.max_steps": 7,
        **changes,
    }
    return runs.settings(model, sources, sources / output, **values)


def arguments(values: dict[str, Any]) -> list[str]:
    """Return settings as a command line has them, lists as TOML and JSON both write them."""
    return runs.arguments(
        {key: json.dumps(one) if isinstance(one, list) else one for key, one in values.items()}
    )


def loaded(model: Path, values: dict[str, Any]) -> Data:
    return load_data(load_config(overrides=values), model, None)


def texts(data: Data, positions: Any) -> list[str]:
    """Return the first letters of the rows that positions of the training set hold."""
    return [data.tokenizer.decode(data.train[int(at)].input_ids.tolist())[:3] for at in positions]


SLOW = pytest.mark.slow
VARIANTS = [
    pytest.param({}, marks=SLOW),
    pytest.param({"data.shuffle": False}, marks=SLOW),
    {
        "data.group_by_length": True,
        "data.on_overflow": "split",
        "data.max_length": 12,
        "data.valid": None,
        "data.valid_fraction": 0.2,
    },
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_resume_amid_an_epoch_is_bit_equal(
    changes: dict[str, Any], model_folder: Path, sources: Path
) -> None:
    values = {**changes, "eval.steps": 3, "checkpoint.steps": 1}
    whole = train(settings(model_folder, sources, "whole", **values)).folder
    asked = settings(model_folder, sources, **values)
    assert train(asked, signalled(5, signal.SIGTERM)).reason == "sigterm"
    resume(sources / "run")
    assert trained_bits(sources / "run") == trained_bits(whole)
    assert runs.rows_of(sources / "run") == runs.rows_of(whole)


def test_a_run_trains_the_shares_and_its_plan_says_them(
    model_folder: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(model_folder, sources, **{"data.weights": [2, 1], "train.max_steps": 6})
    config = load_config(overrides=values)
    data = load_data(config, model_folder, None)
    plan = plan_run(config, len(data.train))
    batches = StepBatches.of(config, plan, data)
    seen = Counter()
    for step in range(1, 7):
        seen.update(texts(data, batches.order(plan.batch(step)[0])[slice(*plan.batch(step)[1:])]))
    # 12 and 6 places an epoch, two epochs: each of few 6 times, and 12 of many once.
    assert seen == {f"f{n:02}": 6 for n in range(FEW)} | {
        name: 1 for name in seen if name[0] == "m"
    }
    assert len(seen) == FEW + 12

    assert main([*arguments(values), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    few, many = planned["mixture"]
    # A byte is a token, and an end; the first token is no target.
    targets = 12 * 6, 6 * 30
    assert few == {
        "source": str(sources / "few.jsonl"),
        "weight": 2.0,
        "rows": FEW,
        "examples": FEW,
        "examples_an_epoch": 12,
        "share_of_examples": pytest.approx(2 / 3, abs=1e-15),
        "share_of_targets": pytest.approx(targets[0] / sum(targets), abs=1e-15),
        "times_seen": 6.0,
    }
    assert (many["examples_an_epoch"], many["times_seen"]) == (6, pytest.approx(12 / 14))
    assert planned["compute"]["tokens"] == 2 * (12 * 7 + 6 * 31)
    warned = " ".join(planned["warnings"])
    assert "those of few.jsonl 6 times: beyond about 4 times" in warned
    assert "the run ends before all is seen of many.jsonl (86%)" in warned

    folder = train(values).folder
    begun = json.loads((folder / "plan.json").read_text())
    assert begun["mixture"] == planned["mixture"]
    panel = " ".join(capsys.readouterr().out.split())
    assert "few.jsonl: 66.7% of the examples, 28.6% of the targets; 4 rows, each seen 6 t" in panel
    report = (folder / "report.md").read_text()
    line = next(line for line in report.splitlines() if "`many.jsonl`" in line)
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[1:] == ["14", "1", "6", "33.3%", "71.4%", "0.857 times", "0.857 times"]


def test_without_weights_nothing_is_mixed(model_folder: Path, sources: Path) -> None:
    values = settings(model_folder, sources)
    plain = loaded(model_folder, values | {"data.weights": None})
    mixed = loaded(model_folder, values)
    assert plain.mixture is None and KnownData.of(plain).sources == ()
    assert [e.input_ids.tolist() for e in plain.train] == [
        e.input_ids.tolist() for e in mixed.train
    ]
    assert plain.train.fingerprint == mixed.train.fingerprint
    assert plain.fingerprints["train"] != mixed.fingerprints["train"]
    assert plain.fingerprints["valid"] == mixed.fingerprints["valid"]
    config = load_config(overrides=values | {"data.weights": None})
    order = StepBatches.of(config, plan_run(config, 18), plain).order(0)
    assert sorted(order) == list(range(18))


@pytest.mark.usefixtures("cache")
def test_where_a_source_ends_is_kept_with_the_rows(model_folder: Path, sources: Path) -> None:
    """The second time nothing is read; the same files as other sources are other sources."""
    values = settings(model_folder, sources)
    assert isinstance(first := loaded(model_folder, values).mixture, Mixture)
    again = loaded(model_folder, values).mixture
    assert again is not None
    assert [one.tolist() for one in again.members] == [one.tolist() for one in first.members]
    assert [len(one) for one in first.members] == [FEW, MANY]
    valid = str(sources / "valid.jsonl")
    for number, name in ((1, "few.jsonl"), (2, "many.jsonl"), (3, "valid.jsonl")):
        (sources / "three").mkdir(exist_ok=True)
        (sources / "three" / f"{number}.jsonl").write_bytes((sources / name).read_bytes())
    three = [str(sources / "three" / f"{number}.jsonl") for number in (1, 2, 3)]
    pair = [f"{sources}/three/[12].jsonl", three[2]]
    counts = []
    for given in (pair, [three[0], f"{sources}/three/[23].jsonl"]):
        data = loaded(model_folder, values | {"data.train": given, "data.valid": valid})
        assert data.mixture is not None
        counts.append([len(one) for one in data.mixture.members])
    assert counts == [[FEW + MANY, 3], [FEW, MANY + 3]]


def test_rows_are_held_out_of_every_source_before_it_is_mixed(
    model_folder: Path, sources: Path
) -> None:
    held = {"data.valid": None, "data.valid_fraction": 0.3}
    mixed = loaded(model_folder, settings(model_folder, sources, **held))
    plain = loaded(model_folder, settings(model_folder, sources, **held, **{"data.weights": None}))
    assert mixed.valid is not None and plain.valid is not None and mixed.mixture is not None
    assert mixed.valid.rows.tolist() == plain.valid.rows.tolist()
    few, many = mixed.mixture.members
    assert {name[0] for name in texts(mixed, few)} == {"f"}
    assert {name[0] for name in texts(mixed, many)} == {"m"}
    assert len(few) + len(many) == len(mixed.train) == 12


def test_ranks_share_a_step_that_draws_an_example_twice(model_folder: Path, sources: Path) -> None:
    config = load_config(overrides=settings(model_folder, sources, **{"data.weights": [9, 1]}))
    data = load_data(config, model_folder, None)
    plan = plan_run(config, len(data.train), 3)
    for step in range(1, 8):
        epoch, start, stop = plan.batch(step)
        whole = StepBatches.of(config, plan, data).order(epoch)[start:stop]
        assert len(set(whole.tolist())) < len(whole)
        taken = [
            index
            for rank in range(3)
            for micro_batch in StepBatches.of(config, plan, data, World(rank, 3)).cut(
                epoch, start, stop
            )
            for index in micro_batch.examples
        ]
        assert sorted(taken) == sorted(whole)


def test_steps_of_tokens_are_cut_in_the_mixture_s_order(
    model_folder: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Targets are 6 of a short row, 30 of a long one; a step stops when it has 50 of them."""
    wanted = {"train.effective_batch_tokens": 50, "train.max_steps": None}
    values = settings(model_folder, sources, **wanted, **{"train.num_train_epochs": 3})
    config = load_config(overrides=values)
    data = load_data(config, model_folder, None)
    plan = plan_run(config, len(data.train), rows=data)
    batches = StepBatches.of(config, plan, data)
    for step in range(1, plan.total_steps + 1):
        epoch, start, stop = plan.batch(step)
        targets = data.train.num_targets[batches.order(epoch)[start:stop]]
        assert targets[:-1].sum() < 50
        assert targets.sum() >= 50 or stop == 18
    assert plan.batch(plan.total_steps)[::2] == (2, 18)
    assert main([*arguments(values), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == plan.total_steps


def test_a_split_column_a_folder_and_a_packed_file_are_sources(
    model_folder: Path, tmp_path: Path
) -> None:
    import gzip

    rows = [{"text": f"{n:03}", "split": ["train", "test"][n % 2]} for n in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace('"0', '"1').encode()))
    values = settings(
        model_folder,
        tmp_path,
        **{
            "data.train": [str(tmp_path / "folder"), str(tmp_path / "b.jsonl.gz")],
            "data.valid": None,
            "data.split_column": "split",
        },
    )
    data = loaded(model_folder, values)
    assert data.mixture is not None and data.test is not None and len(data.test) == 8
    assert [texts(data, own) for own in data.mixture.members] == [
        ["000", "002", "004", "006"],
        ["100", "102", "104", "106"],
    ]
    shown = [one for one, _ in show_rows(load_config(overrides=values))]
    assert [one.entry for one in shown] == [values["data.train"][0]] * 4 + [
        values["data.train"][1]
    ] * 4


def test_holes_of_a_mixture_are_those_of_the_epoch(tmp_path: Path) -> None:
    from infilling import write_model, write_rows

    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows")
    values = settings(
        model, rows, **{"data.fim_rate": 1, "data.train": [str(rows / "train.jsonl"),
                                                          str(rows / "valid.jsonl")]},
    )  # fmt: skip
    config = load_config(overrides=values)
    data = load_data(config, model, None)
    batches = StepBatches.of(config, plan_run(config, len(data.train)), data)
    order, examples = batches.order(2)[:6], data.train.at_epoch(2)
    expected = {int(at): len(examples[int(at)].input_ids) for at in order}
    for micro_batch in batches.cut(2, 0, 6):
        lengths = [expected[index] for index in micro_batch.examples]
        assert lengths == list(micro_batch.lengths)


REFUSED = [
    ({"data.weights": [1, 2, 3]}, "data.weights holds 3 numbers for the 2 entries of data.train"),
    ({"data.weights": [1]}, "data.weights holds 1 number for the 2 entries of data.train"),
    ({"data.weights": [1, 0]}, "data.weights = [1, 0] holds 0, which is out of range"),
    ({"data.weights": [1, -2]}, "holds -2, which is out of range"),
    ({"data.weights": "[1, nan]"}, "which is out of range (it takes a list of numbers > 0"),
    ({"data.weights": "[1, inf]"}, "which is out of range"),
    ({"data.weights": "[]"}, "data.weights = [] has 0 items"),
    ({"data.weights": "3"}, "is of the wrong type (it takes a list of numbers > 0, or none)"),
    ({"data.weights": [1, 1e-9]}, "the weight 1e-09 gives"),
    ({"data.max_length": 20, "data.on_overflow": "drop"}, "many.jsonl has no example to draw"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_makes_no_mixture_is_refused(
    changes: dict[str, Any], words: str, model_folder: Path, sources: Path, refused: Refused
) -> None:
    values = settings(model_folder, sources, **changes)
    for plan in ([], ["--plan"]):
        said = refused(main, *plan, *arguments(values))
        assert words in said
    assert not (sources / "run").exists()


def test_one_set_of_rows_has_no_shares(model_folder: Path, sources: Path, refused: Refused) -> None:
    one = settings(model_folder, sources, **{"data.train": str(sources / "few.jsonl")})
    assert "data.train is no list: write data.train='[" in refused(main, *arguments(one))
    twice = {"data.train": [str(sources / "few.jsonl")] * 2}
    said = refused(main, *arguments(settings(model_folder, sources, **twice)))
    assert "would be read twice" in said
    rows = settings(model_folder, sources, **{"data.train": None})
    with pytest.raises(UserError, match=r"data\.train is no list"):
        run(load_config(overrides=rows), rows=[{"text": "x"}] * 3)


@pytest.mark.parametrize("text", ["[0.7, 0.3]", "[0.7,0.3]", "0.7,0.3"])
@pytest.mark.parametrize("key", ["data.weights", "weights", "interleave_probs", "dataset_weights"])
def test_weights_are_spelled_in_several_ways(text: str, key: str) -> None:
    assert load_config(overrides={key: text}).data.weights == (0.7, 0.3)


def test_the_stack_s_other_words_for_it(sources: Path) -> None:
    config = load_config(overrides={"mix_strategy": "concat", "train_file": "a.jsonl"})
    assert config.data.weights is None
    for asked in (
        {"mix_strategy": "interleave_over"},
        {"mix_strategy": "concat", "interleave_probs": "0.7,0.3"},
        {"stopping_strategy": "first_exhausted"},
    ):
        with pytest.raises(UserError, match="an epoch has as many examples as all sources"):
            load_config(overrides=asked)


def test_a_resumed_run_keeps_its_sources(model_folder: Path, sources: Path) -> None:
    """A row that went from the one source to the other: the same rows, and another run."""
    values = settings(model_folder, sources, **{"checkpoint.steps": 1})
    train(values, signalled(2, signal.SIGTERM))
    few, many = sources / "few.jsonl", sources / "many.jsonl"
    *kept, last = few.read_text().splitlines(keepends=True)
    few.write_text("".join(kept))
    many.write_text(last + many.read_text())
    with pytest.raises(UserError, match=r"data\.train is not the data that the run began with"):
        resume(sources / "run")
    _, found = find_run(sources / "run", {})
    assert found is not None


def test_times_seen_are_of_the_whole_run(model_folder: Path, sources: Path) -> None:
    """9 places of 18: 4 rows in 20 epochs are seen 45 times, and in a third of one 0.75 times."""
    values = settings(model_folder, sources, **{"train.max_steps": None})
    known = KnownData.of(loaded(model_folder, values))
    for epochs, times in ((20, 45.0), (1, 2.25), (1 / 3, 0.75)):
        config = load_config(overrides=values | {"train.num_train_epochs": epochs})
        found = mixture_document(known, plan_run(config, 18))
        assert found is not None and found[0]["times_seen"] == pytest.approx(times)
    assert plan_document(config, known, _unknown(), UNKNOWN)["mixture"] == found


def _unknown() -> Any:
    from train.inputs.known import Unknown

    return Unknown("not here")
