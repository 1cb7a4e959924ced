"""Runs on texts with holes: every epoch its own, the same again after a resume; what is refused."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
from infilling import write_model, write_rows
from runs import Refused, resume, rows_of, signalled, train, trained_bits

from data.fim import FimTokens
from data.tokenizer import Tokenizer
from models import load_model
from train import generate as generate_module
from train.config.load import load_config
from train.evaluation import holes as holes_module
from train.generate import generate
from train.generation.loaded import load_run
from train.inputs.dataset import load_data
from train.run import main
from train.show_data import main as show_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fim"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("programs"))


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of two epochs and a half, of three steps each."""
    asked = {"data.fim_rate": 0.7, "data.max_length": 64, "train.max_steps": 8, **changes}
    return runs.settings(model, rows, output, **asked)


def test_a_resume_amid_an_epoch_is_bit_equal(model: Path, rows: Path, tmp_path: Path) -> None:
    changes = {
        "data.fim_unit": "syntax",
        "lora.lora_dropout": 0.1,
        "eval.steps": 4,
        "eval.holes": 2,
        "eval.samples": 1,
    }
    whole = train(settings(model, rows, tmp_path / "whole", **changes)).folder
    run = tmp_path / "run"
    stopped = train(settings(model, rows, run, **changes), signalled(5, signal.SIGTERM))
    assert stopped.reason == "sigterm"
    resume(run)
    assert trained_bits(run) == trained_bits(whole)
    assert rows_of(run) == rows_of(whole)


def test_every_epoch_has_holes_of_its_own_and_the_valid_set_those_of_one(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    values = {"data.shuffle": False, "optimizer.learning_rate": 1e-30, "eval.steps": 1}
    run = train(settings(model, rows, tmp_path / "run", **values, **{"lora.lora_dropout": 0.0}))
    losses = [row["loss"] for row in rows_of(run.folder, "train")]
    assert len(set(losses)) == len(losses) == 8
    valid = {row["loss"] for row in rows_of(run.folder, "eval")}
    assert len(valid) == 1
    # Without holes the epochs are alike.
    values |= {"data.fim_rate": 0.0}
    plain = train(settings(model, rows, tmp_path / "plain", **values, **{"lora.lora_dropout": 0.0}))
    losses = [row["loss"] for row in rows_of(plain.folder, "train")]
    assert losses[:3] == losses[3:6]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_what_is_shown_is_what_is_trained(
    split: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch, overflow in ((0, "truncate"), (3, "split")):
        values = settings(
            model, rows, tmp_path / "no", **{"data.max_length": 20, "data.on_overflow": overflow}
        )
        data = load_data(load_config(overrides=values), model, None)
        examples = data.train.at_epoch(epoch) if split == "train" else data.valid
        assert examples is not None
        arguments = [*runs.arguments(values), "--json", "--split", split, "--epoch", str(epoch)]
        assert show_data(arguments) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["input_ids"] for one in found] == [e.input_ids.tolist() for e in examples]
        assert [one["labels"] for one in found] == [e.labels.tolist() for e in examples]
        assert [one["fate"].endswith("with a hole") for one in found] == [
            example.has_hole for example in examples
        ]
        assert any(example.has_hole for example in examples)


REFUSED = [
    ({"data.format": "messages"}, "data.fim_rate=0.7 with data.format=messages: a hole is cut"),
    ({"data.append_eos": False}, "data.fim_rate=0.7 with data.append_eos=false: what ends"),
    ({"eval.holes": 4, "data.fim_rate": 0}, "eval.holes=4 with data.fim_rate=0: held-out rows"),
    ({"data.fim_rate": 1.5}, "data.fim_rate"),
    ({"data.fim_unit": "word"}, "data.fim_unit"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_what_does_not_go_with_holes_is_refused(
    changes: dict[str, Any], words: str, plan: list[str], model: Path, rows: Path, tmp_path: Path,
    refused: Refused,
) -> None:  # fmt: skip
    values = settings(model, rows, tmp_path / "run", **changes)
    assert words in refused(main, *plan, *runs.arguments(values))
    assert not (tmp_path / "run").exists()


def test_a_model_without_the_tokens_is_refused(
    model_folder: Path, rows: Path, tmp_path: Path, refused: Refused
) -> None:
    values = settings(model_folder, rows, tmp_path / "run")
    assert "needs a tokenizer with tokens for prefix" in refused(main, *runs.arguments(values))
    generate = generate_module.main
    said = refused(generate, "--model", str(model_folder), "--fim", "a", "b")
    assert "needs a tokenizer with tokens for prefix" in said


def test_the_plan_says_what_is_not_read_and_what_is_not_cut(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "def f(:"}\n{"text": "x = 1"}\n{"text": "<fim_suffix> = 1"}\n')
    values = settings(model, rows, tmp_path / "run", **{"data.train": str(odd)})
    asked = [*runs.arguments({**values, "data.fim_unit": "syntax"}), "--plan"]
    assert main(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 examples (66.7%) not Python to its parser" in said
    assert "1 example (33.3%) without a hole, ever" in said
    assert main([*runs.arguments({**values, "eval.holes": 99}), "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "99 holes" not in said and "up to 5 holes filled at each" in said
    assert "eval.holes=99: about 4 of 5 valid rows have a hole, and no more are filled" in said
    values |= {"eval.complete": 9}
    values |= {"data.fim_rate": 0, "data.fim_targets": "middle", "data.fim_unit": "line"}
    assert main([*runs.arguments(values), "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data.fim_unit, data.fim_targets: not read while data.fim_rate is 0" in said
    assert "eval.complete: not read while eval.metrics names none of completions" in said


def test_generate_fills_a_hole(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ids are those of the card's one text; what is printed is the middle alone."""
    command = ["--model", str(model), "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "5"]
    assert generate_module.main([*command, "--fim", "def f(a):\n", "    return a\n"]) == 0
    tokenizer = Tokenizer.load(model)
    prompt = tokenizer.encode("<fim_prefix>def f(a):\n<fim_suffix>    return a\n<fim_middle>")
    ids = generate(load_model(model), prompt, max_new_tokens=5, stop_ids={tokenizer.eos_id or 0})
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_what_is_completed_ends_where_a_hole_ends(rows: Path, tmp_path: Path) -> None:
    """Code Llama ends a hole with a token that ends no text, for `generate` and `evaluate`."""
    import torch

    model = write_model(tmp_path / "model", "codellama")
    for rate, stops in ((0.7, True), (0.0, False)):
        values = settings(model, rows, tmp_path / f"run-{rate}", **{"train.max_steps": 1})
        run = train({**values, "data.fim_rate": rate}).folder
        loaded = load_run(run, torch.device("cpu"), torch.float32)
        assert loaded.tokenizer.eos_id in loaded.stop_ids
        assert (loaded.tokenizer.token_id("▁<EOT>") in loaded.stop_ids) == stops


def test_the_system_prompt_of_training_stands_before_the_prefix(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    import torch

    values = {"data.system_prompt": "Be brief.", "train.max_steps": 1}
    run = train(settings(model, rows, tmp_path / "run", **values)).folder
    loaded = load_run(run, torch.device("cpu"), torch.float32)
    text = "<fim_prefix>Be brief.\n\ndef<fim_suffix>x<fim_middle>"
    assert loaded.hole_ids("def", "x") == loaded.tokenizer.encode(text)
    assert loaded.hole_ids("def", "x", raw=True) == FimTokens(loaded.tokenizer).prompt_ids(
        "def", "x"
    )


def test_a_hole_is_filled_where_the_text_is_the_same_and_ends(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three is said as it is, the second runs on, the third says something else."""
    config = load_config(overrides=settings(model, rows, tmp_path / "run", **{"data.fim_rate": 1}))
    data = load_data(config, model, None)
    assert data.valid is not None and data.fim is not None
    answers = {}
    for number, example in enumerate(data.valid):
        ids = example.input_ids.tolist()
        middle = ids[example.prompt_length : -1]
        runs_on = [*middle, *[5] * 40]
        answers[tuple(ids[: example.prompt_length])] = [middle, runs_on, [*middle, 9]][number % 3]

    def said(_: Any, prompt: list[int], *, max_new_tokens: int, stop_ids: set[int]) -> list[int]:
        assert data.fim is not None and data.fim.tokens.end_id in stop_ids
        return answers[tuple(prompt)][:max_new_tokens]

    monkeypatch.setattr(holes_module, "generate", said)
    values = {"data.fim_rate": 1, "eval.holes": 4, "train.max_steps": 1, "log.tensorboard": True}
    run = train(settings(model, rows, tmp_path / "run", **values)).folder
    (row,) = rows_of(run, "eval")
    assert (row["holes"], row["exact_match"]) == (4, 0.5)
    assert "50.0% of 4 holes of the valid set filled exactly" in (run / "report.md").read_text()
