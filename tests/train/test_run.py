"""One run from the command line, its folder, and every kind of bad input."""

import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from runs import rows_of

from files.tensors import TensorFile, write_tensors
from models import load_model
from train.config.load import load_config
from train.run import main, run
from train.text import size_text


def arguments(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a run of 6 steps of 8 examples, two epochs."""
    changes = {
        "data.test": str(rows / "test.jsonl"),
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.num_train_epochs": 2,
    }
    given = runs.arguments(runs.settings(model, rows, output, **changes))
    return runs.changed(given, *more)


@pytest.fixture(scope="module")
def folder(
    model_folder: Path,
    rows_file: Path,
    matplotlib: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a finished run with everything turned on."""
    output = tmp_path_factory.mktemp("runs") / "run"
    more = [
        "eval.steps=2",
        "eval.on_start=true",
        "eval.samples=2",
        "load_best_at_end=true",
        "log.tensorboard=true",
    ]
    assert main(arguments(model_folder, rows_file, output, *more)) == 0
    return output


def test_the_folder_holds_what_the_contract_says(folder: Path) -> None:
    for name in ("config.toml", "plan.json", "environment.json", "status.json", "metrics.jsonl"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    for name in ("train-loss", "eval-loss", "learning-rate", "grad-norm"):
        assert (folder / "plots" / f"{name}.png").is_file()
    assert (folder / "report.md").is_file()
    # 22 rows in steps of 8: 3 steps an epoch, saved once an epoch
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]
    checkpoint = {path.name for path in (folder / "checkpoints" / "step-00000006").iterdir()}
    assert checkpoint == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    }
    for name in ("best", "final"):
        for file in ("adapter_model.safetensors", "tokenizer.json", "prompt_format.json"):
            assert (folder / name / file).is_file()


def test_the_environment_says_which_library_multiplied(folder: Path) -> None:
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["products"] == {"bf16": "oneDNN", "fp32": "MKL"}[environment["precision"]]


def test_every_step_has_a_row_with_the_contract_s_fields(folder: Path) -> None:
    train = rows_of(folder, "train")
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert (folder / "metrics.jsonl").read_text().count('"seconds"') == len(rows_of(folder))
    fields = ["step", "epoch", "loss", "learning_rate", "grad_norm", "targets", "tokens"]
    assert all(set(fields) <= set(row) for row in train)
    assert [row["epoch"] for row in train[:3]] == [8 / 22, 16 / 22, 1.0]
    assert train[0]["learning_rate"] == 0.0  # the first step of a warm-up
    assert train[1]["learning_rate"] == 0.01
    evals = [(row["step"], row["split"]) for row in rows_of(folder, "eval")]
    valid = [(step, "valid") for step in (2, 4, 6)]
    assert evals == [(0, "valid"), (0, "test"), *valid, (6, "test")]
    since = [row["train_loss"] for row in rows_of(folder, "eval") if row["split"] == "valid"]
    assert all(since[1:])


def test_status_plan_and_samples(folder: Path) -> None:
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("finished", "completed", 6)
    assert status["best"]["loss"] == min(
        row["loss"] for row in rows_of(folder) if row.get("split") == "valid" and row["step"] > 0
    )
    assert len(status["samples"]) == 2
    assert all(sample["before"] is not None for sample in status["samples"])
    assert all(sample["after"] is not None for sample in status["samples"])
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["total_steps"], plan["warmup_steps"], plan["num_examples"]) == (6, 1, 22)
    assert plan["trainable_parameters"] == status["trainable_parameters"]
    assert plan["total_parameters"] == status["total_parameters"]


def test_memory_is_planned_and_measured_of_the_same_things(folder: Path) -> None:
    status = json.loads((folder / "status.json").read_text())
    with TensorFile(folder / "final" / "adapter_model.safetensors") as file:
        adapter = sum(file.read(name).nbytes for name in file.names)
    least = 4 * (status["total_parameters"] - status["trainable_parameters"]) + 3 * adapter
    assert least < status["training_memory_bytes"] < status["peak_memory_bytes"]
    assert 0 < status["memory_before_bytes"] < status["peak_memory_bytes"] + 1
    report = (folder / "report.md").read_text()
    plan = json.loads((folder / "plan.json").read_text())
    planned, taken = plan["memory"]["total"], status["training_memory_bytes"]
    assert f"| memory of model and training | {size_text(planned)} | {size_text(taken)} |" in report
    assert f"{size_text(status['memory_before_bytes'])} before the model was loaded" in report


def test_the_recorded_configuration_decides_everything(folder: Path) -> None:
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["train"]["precision"] == "fp32"
    assert config["model"]["gradient_checkpointing"] == "none"
    assert load_config(file=folder / "config.toml").lora.r == 4


def test_final_is_the_best_and_the_adapter_is_fp32(folder: Path) -> None:
    best, final = (
        (folder / name / "adapter_model.safetensors").read_bytes() for name in ("best", "final")
    )
    assert best == final
    with TensorFile(folder / "final" / "adapter_model.safetensors") as file:
        assert all(file.read(name).dtype == torch.float32 for name in file.names)


def test_the_final_adapter_in_peft_gives_the_test_loss(
    folder: Path, model_folder: Path, rows_file: Path
) -> None:
    """The number in metrics.jsonl, computed again by transformers and PEFT from the files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from data.tokenizer import Tokenizer

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "final")).eval()
    tokenizer = Tokenizer.load(folder / "final")
    total, targets = 0.0, 0
    for line in (rows_file / "test.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer.encode(json.loads(line)["text"]), 0]])[:, :48]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    recorded = [row for row in rows_of(folder) if row.get("split") == "test"][-1]
    assert recorded["targets"] == targets
    # fp32 logits agree to 1e-5 relative; a mean of losses is better than that
    assert recorded["loss"] == pytest.approx(total / targets, rel=1e-5)


def test_an_existing_run_is_never_overwritten(
    folder: Path, model_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in ([], ["--plan"]):
        assert main([*asked, *arguments(model_folder, rows_file, folder)]) == 2
        assert "never overwritten" in capsys.readouterr().err


def test_a_full_run_loads_in_transformers(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    more = ["train.method=full", "optimizer.name=adafactor", "data.test=none"]
    assert main(arguments(model_folder, rows_file, output, *more)) == 0
    theirs = AutoModelForCausalLM.from_pretrained(output / "final", dtype=torch.float32).eval()
    ours = load_model(output / "final")
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected, got = theirs(input_ids=ids).logits, ours(ids)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_biases_are_trained_over_a_base_in_bf16(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    more = ["lora.bias=all", "train.precision=bf16"]
    assert main(arguments(model_folder, rows_file, output, *more)) == 0
    with TensorFile(output / "final" / "adapter_model.safetensors") as file:
        assert any(name.endswith("input_layernorm.bias") for name in file.names)


def test_the_panel_names_the_adapter_that_a_run_starts_from(
    folder: Path,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"lora.init_from={folder / 'final'}", "max_steps=1"]
    assert main(arguments(model_folder, rows_file, tmp_path / "run", *more)) == 0
    assert "LoRA r=4 alpha=32" in capsys.readouterr().out


def test_a_setting_that_is_no_utf_8_is_refused(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model_folder, rows_file, tmp_path / "run", "run_name=\udcff")) == 2
    assert capsys.readouterr().err == "error: the setting run_name holds bytes that are not UTF-8\n"


def test_from_python_in_three_lines(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    overrides = runs.settings(model_folder, rows_file, tmp_path / "run", **{"train.max_steps": 1})
    assert run(load_config(overrides=overrides)) == tmp_path / "run"


def test_random_weights_from_an_architecture_alone(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "architecture"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    more = ["model.random_init=true", "train.method=full", "max_steps=1"]
    assert main(arguments(bare, rows_file, tmp_path / "run", *more)) == 0


# --- bad input: one sentence, exit code 2, no traceback ---

Change = Callable[[Path, Path], list[str]]


def rewrite(path: Path, text: str | bytes) -> None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = model / "model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    change(tensors)
    write_tensors(path, tensors)


def row(text: str | bytes) -> Change:
    return lambda model, rows: rewrite(rows / "train.jsonl", text) or []


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda model, rows: (
        change_tensors(model, lambda tensors: (change(tensors), None)[1]) or []
    )


def only_pickle(model: Path, rows: Path) -> list[str]:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return []


def untied(model: Path, rows: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps({**config, "tie_word_embeddings": False}))
    return []


def small_vocabulary(model: Path, rows: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps({**config, "vocab_size": 60}))
    change_tensors(
        model,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:60].clone()}
        ),
    )
    return []


EMBEDDING = "model.embed_tokens.weight"
BAD_INPUT: dict[str, tuple[Change, str]] = {
    "preset": (lambda m, r: ["--preset", "startcoder2-3b"], "did you mean 'starcoder2-3b'"),
    "key": (lambda m, r: ["optimizer.learning_rat=1"], "did you mean 'optimizer.learning_rate'"),
    "the stack's key": (lambda m, r: ["batch_size=8"], "train.effective_batch_size"),
    "the stack's value": (lambda m, r: ["bf16=auto"], "train.precision"),
    "what is not supported": (lambda m, r: ["use_qalora=true"], "model.quantization=nf4 or int8"),
    "quantised and trained": (
        lambda m, r: ["model.quantization=nf4", "train.method=full"],
        "model.quantization=nf4 with train.method=full: quantised weights are frozen",
    ),
    "value": (lambda m, r: ["optimizer.name=adamm"], "did you mean 'adamw'"),
    "range": (lambda m, r: ["lora.lora_dropout=1.5"], "lora.lora_dropout"),
    "missing file": (lambda m, r: ["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "missing model folder": (lambda m, r: ["model.path=./nowhere"], "nowhere"),
    "row that is no object": (row('{"text": "ab"}\n[1]\n'), "train.jsonl:2"),
    "row without the field": (row('{"text": "ab"}\n{"tekst": "x"}\n'), "train.jsonl:2"),
    "row with a number": (row('{"text": 3}\n'), "train.jsonl:1"),
    "bad UTF-8": (row(b'{"text": "ab"}\n\xff\xfe\n'), "train.jsonl:2"),
    "empty data": (row(""), "train.jsonl"),
    "every label masked": (row('{"text": ""}\n'), "target"),
    "target that matches nothing": (
        lambda m, r: ["lora.target_modules=q_porj"],
        "did you mean 'q_proj'",
    ),
    "missing tensor": (weights(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "unexpected tensor": (weights(lambda t: t.update(x=torch.ones(1))), "x"),
    "tensor of another shape": (
        weights(lambda t: t.update({EMBEDDING: torch.ones(3, 3)})),
        EMBEDDING,
    ),
    "tied with a stray head": (
        weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        "lm_head",
    ),
    "untied without a head": (untied, "lm_head.weight"),
    "token beyond the vocabulary": (small_vocabulary, "vocab"),
    "pickle only": (only_pickle, "safetensors"),
    "early stopping without a valid set": (
        lambda m, r: ["data.valid=none", "eval.steps=1", "early_stopping_patience=1"],
        "data.valid",
    ),
    "no weights": (lambda m, r: (m / "model.safetensors").unlink() or [], "model.safetensors"),
    "no adapter to start from": (lambda m, r: [f"lora.init_from={r}"], "adapter_config.json"),
    "a base in another half precision": (
        lambda m, r: ["precision=bf16", "model.dtype=fp16"],
        "model.dtype=fp16 with train.precision=bf16",
    ),
    "no device": (lambda m, r: ["train.device=cuda"], "train.device=cuda"),
    "kernels": (lambda m, r: ["train.kernels=triton"], "train.kernels"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device that is not there")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_sentence(
    case: str,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    change, expected = BAD_INPUT[case]
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    rows = Path(shutil.copytree(rows_file, tmp_path / "rows"))
    more = change(model, rows)
    assert main(arguments(model, rows, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert expected in error
    assert "Traceback" not in error
    # What cannot run cannot be planned either, in the same words.
    assert main(["--plan", *arguments(model, rows, tmp_path / "run", *more)]) == 2
    assert capsys.readouterr() == ("", error)
    assert not (tmp_path / "run").exists()


def test_an_equal_stray_head_is_accepted(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    change_tensors(model, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert main(arguments(model, rows_file, tmp_path / "run", "max_steps=1")) == 0


def test_tensorboard_that_is_not_installed_is_missed_before_anything_is_read(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    given = arguments(model_folder, tmp_path / "none", tmp_path / "run", "log.tensorboard=true")
    for asked in ([], ["--plan"]):
        assert main([*asked, *given]) == 2
        assert "log.tensorboard=false" in capsys.readouterr().err


def test_a_plan_needs_no_weights_that_would_be_drawn(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "architecture"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = ["--plan", "--json", *arguments(bare, rows_file, tmp_path / "run")]
    assert main([*asked, "model.random_init=true"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 6
    assert main(asked) == 2
