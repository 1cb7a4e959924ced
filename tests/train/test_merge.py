"""`python -m train.merge`: the folder it writes, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from peft import PeftModel
from runs import Refused
from small import RaggedExamples
from torch import nn
from transformers import AutoModelForCausalLM

from data.tokenizer import Tokenizer
from files.tensors import TensorFile, read_header, write_tensors
from lora import LoraConfig, inject, save_adapter
from models import build, load_model
from models.config import parse_config
from models.weights import initialise, save_model
from train.config.load import load_config
from train.config.toml import to_toml
from train.evaluation.receipt import outputs, receipt, rows_to_compare
from train.merge.__main__ import main
from train.merge.fold import checkpoint_dtype

DOCUMENT: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the folder of a small random bf16 model with a tokenizer beside it."""
    config = parse_config(DOCUMENT, "test")
    model = build(config, device="meta")
    initialise(model, 1, torch.bfloat16, initializer_range=0.2)
    save_model(model, tmp_path / "base", config=config)
    (tmp_path / "base" / "tokenizer.json").write_text('{"of": "base"}')
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text('{"max_length": 9}')
    (tmp_path / "base" / "README.md").write_text("not copied")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return the folder of an adapter over that model."""
    model = load_model(base, dtype=torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=8, bias="lora_only"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    return tmp_path / "adapter"


def expected_weight(base: Path, adapter: Path, module: str) -> torch.Tensor:
    with (
        TensorFile(base / "model.safetensors") as weights,
        TensorFile(adapter / "adapter_model.safetensors") as factors,
    ):
        weight = weights.read(f"{module}.weight").float()
        a = factors.read(f"base_model.model.{module}.lora_A.weight")
        b = factors.read(f"base_model.model.{module}.lora_B.weight")
        return torch.addmm(weight, b, a, alpha=8 / 4).bfloat16()


def test_the_folder_is_a_model_in_the_dtype_of_the_checkpoint(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main([str(adapter), str(out)]) == 0
    assert "merged 14 layers" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "manifest.json",
    }
    header = read_header(out / "model.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {torch.bfloat16}
    assert header.tensors.keys() == read_header(base / "model.safetensors").tensors.keys()
    module = "model.layers.1.mlp.down_proj"
    with TensorFile(out / "model.safetensors") as file:
        assert torch.equal(file.read(f"{module}.weight"), expected_weight(base, adapter, module))


def test_another_program_s_config_beside_the_adapter_is_not_asked(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter.parent / "config.toml").write_text('title = "a site"\n[server]\nport = 3\n')
    assert main([str(adapter), str(tmp_path / "out")]) == 0
    assert "merged 14 layers" in capsys.readouterr().out


def test_transformers_loads_it_and_computes_what_the_adapted_model_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    main([str(adapter), str(tmp_path / "out")])
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "out")
    with torch.no_grad():
        expected = ours(tokens)
        # fp32: two orders of summation, 6e-8 an operation over some dozens of terms.
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (load_model(base)(tokens) - expected).abs().max() > 0.1 * expected.abs().max()


def make_run(adapter: Path, run: Path, *names: str) -> None:
    run.mkdir()
    (run / "config.toml").write_text("")
    for name in names:
        (run / name).mkdir()
        for path in adapter.iterdir():
            (run / name / path.name).write_bytes(path.read_bytes())
        (run / name / "tokenizer.json").write_text(json.dumps({"of": name}))
        (run / name / "prompt_format.json").write_text("{}")


@pytest.mark.parametrize(
    ("names", "taken"), [(("final", "best"), "final"), (("best",), "best"), (("final",), "final")]
)
def test_a_run_gives_its_final_else_its_best_with_the_tokenizer_beside_it(
    names: tuple[str, ...], taken: str, adapter: Path, tmp_path: Path
) -> None:
    make_run(adapter, tmp_path / "run", *names)
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": taken}
    assert (tmp_path / "out" / "prompt_format.json").exists()
    # Taken with tokenizer.json or not at all: two tokenizers' files must not be mixed.
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_base_overrules_the_name_in_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    moved = base.rename(tmp_path / "moved")
    message = refused(main, adapter, tmp_path / "out")
    assert str(base) in message
    assert "give it with --base FOLDER" in message
    assert not (tmp_path / "out").exists()
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(moved)]) == 0


def test_an_adapter_that_names_no_base_is_told_so(
    adapter: Path, tmp_path: Path, refused: Refused
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    assert "names no base model" in refused(main, adapter, tmp_path / "out")


def test_out_must_be_vacant(adapter: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not an empty folder" in refused(main, adapter, out)
    assert "is not an empty folder" in refused(main, adapter, out / "notes.txt")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert main([str(adapter), str(out)]) == 0  # an empty folder is vacant


def test_folders_that_are_no_adapter(base: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(main, tmp_path / "nowhere", out)
    assert "holds a model, not an adapter" in refused(main, base, out)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    assert "no final/ or best/ yet" in refused(main, run, out)
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    assert "was trained in full" in refused(main, run, out)
    assert not out.exists()


def test_a_diverged_adapter_writes_nothing(adapter: Path, tmp_path: Path, refused: Refused) -> None:
    path = adapter / "adapter_model.safetensors"
    with TensorFile(path) as file:
        tensors = {name: file.read(name).clone() for name in file.names}
    nn.init.constant_(next(t for name, t in tensors.items() if "lora_B" in name), float("nan"))
    write_tensors(path, tensors)
    assert "is not finite" in refused(main, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_numbers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", {"norm": torch.ones(8)})
    write_tensors(
        tmp_path / "model-00002-of-00002.safetensors",
        {"weight": torch.ones(3, 4).half(), "ids": torch.arange(99)},
    )
    weight_map = {
        "norm": "model-00001-of-00002.safetensors",
        "weight": "model-00002-of-00002.safetensors",
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    write_tensors(tmp_path / "consolidated.safetensors", {"stray": torch.ones(999)})
    assert checkpoint_dtype(tmp_path) == torch.float16


@pytest.fixture
def trained(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """Return a run's folder with that adapter as its final one, and three rows to be valid on."""
    write_byte_tokenizer(base, "A", ["A", *map(chr, range(33, 65)), *map(chr, range(66, 94))])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("3*(4+5)", "9", "7-2")))
    run = tmp_path / "run"
    overrides = {"model.path": str(base), "data.train": str(rows), "data.valid": str(rows)}
    run.mkdir()
    (run / "config.toml").write_text(to_toml(load_config(overrides=overrides)))
    shutil.copytree(adapter, run / "final")
    return run


@pytest.mark.usefixtures("cache")
def test_the_receipt_is_what_peft_and_transformers_say(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base in bf16's numbers and the adapter over it, against the files written, in fp32."""
    assert main([str(trained), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "merge_receipt.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(theirs, str(trained / "final")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(base)
    largest, differences, same, losses, targets = 0.0, [], [], [0.0, 0.0], 0
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id]])
        with torch.no_grad():
            one, other = adapted(ids).logits[0], merged(ids).logits[0]
        largest = max(largest, one.abs().max().item())
        differences.append((one - other).abs().max().item())
        same += (one.argmax(-1) == other.argmax(-1)).tolist()
        for which, logits in enumerate((one, other)):
            wanted = ids[0, 1:]
            losses[which] += nn.functional.cross_entropy(
                logits[:-1], wanted, reduction="sum"
            ).item()
        targets += ids.shape[1] - 1
    assert (found["rows"], found["tokens"], found["targets"]) == (3, len(same), targets)
    # fp32 logits of two implementations agree to 1e-5 of the largest.
    assert found["largest_logit"] == pytest.approx(largest, rel=1e-5)
    assert found["largest_logit_difference"] == pytest.approx(max(differences), abs=2e-5 * largest)
    assert max(differences) > 1e-3 * largest  # bf16's rounding shows
    assert found["top_1_agreement"] == sum(same) / len(same)
    assert found["adapted_loss"] == pytest.approx(losses[0] / targets, rel=1e-5)
    assert found["merged_loss"] == pytest.approx(losses[1] / targets, rel=1e-5)
    assert found["loss_difference"] == found["merged_loss"] - found["adapted_loss"]
    assert f"differs by {found['largest_logit_difference']:.3g} at most" in said
    assert (
        "merge_receipt.json"
        in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    )


@pytest.mark.usefixtures("cache")
def test_beyond_the_tolerance_nothing_is_left(
    trained: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    message = refused(main, trained, tmp_path / "out", "--tolerance", "1e-6")
    assert "beyond --tolerance 1e-06, and nothing was written" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert main([str(trained), str(tmp_path / "all")]) == 0
    found = json.loads((tmp_path / "all" / "merge_receipt.json").read_text())
    largest = found["largest_logit_difference"]
    assert abs(found["loss_difference"]) < 0.9 * largest
    capsys.readouterr()
    assert "beyond" in refused(main, trained, tmp_path / "out", "--tolerance", str(0.9 * largest))
    assert "must be a logit's difference" in refused(
        main, trained, tmp_path / "out", "--tolerance", "nan"
    )
    assert main([str(trained), str(tmp_path / "out"), "--tolerance", "1e3"]) == 0


@pytest.mark.usefixtures("cache")
def test_given_rows_are_taken_and_absent_ones_are_said(
    base: Path, trained: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "other.jsonl"
    rows.write_text('{"text": "1+1"}\n')
    adapter = tmp_path / "adapter"
    assert main([str(adapter), str(tmp_path / "a"), "--data", str(rows)]) == 0
    assert json.loads((tmp_path / "a" / "merge_receipt.json").read_text())["rows"] == 1
    assert main([str(adapter), str(tmp_path / "b")]) == 0
    assert "no receipt: " in capsys.readouterr().out
    assert not (tmp_path / "b" / "merge_receipt.json").exists()
    assert "the receipt needs rows" in refused(main, adapter, tmp_path / "c", "--tolerance", "1")
    (tmp_path / "rows.jsonl").unlink()  # a run's rows that went elsewhere do not prevent a merge
    assert main([str(trained), str(tmp_path / "d")]) == 0
    assert "no receipt: " in capsys.readouterr().out
    assert "the receipt needs rows" in refused(
        main, trained, tmp_path / "c", "--data", tmp_path / "rows.jsonl"
    )


def test_comparing_leaves_a_model_as_it_was_and_takes_whole_rows(base: Path) -> None:
    model = load_model(base, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    examples: Any = RaggedExamples([700] * 9, vocabulary=60)
    batches = rows_to_compare(examples)
    assert [batch.lengths for batch in batches] == [(700,)] * 2
    assert len(rows_to_compare(RaggedExamples([5000], vocabulary=60))) == 1  # type: ignore[arg-type]
    short: Any = RaggedExamples([9, 5, 7], vocabulary=60)
    seen = outputs(model, rows_to_compare(short))
    assert {hidden.dtype for hidden in seen.hidden} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])
    exact = load_model(base)
    both = receipt(seen, outputs(exact, rows_to_compare(short)), rows_to_compare(short))
    assert both.largest_logit_difference == 0.0 and both.top_1_agreement == 1.0
