"""The demo's model learns to fill holes: more of the held-out ones exactly than its base."""

import ast
import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from infilling import STARCODER
from runs import rows_of, train
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from data.demo.build import standard_library

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo's base with three more tokens, each the mean of the others and a little."""
    folder = Path(shutil.copytree(DEMO / "base", tmp_path_factory.mktemp("base") / "base"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in STARCODER])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == first and config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": first + 3}))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    noise = torch.randn(3, embedding.shape[1], generator=torch.Generator().manual_seed(0))
    more = embedding.float().mean(0) + 0.02 * noise
    weights["model.embed_tokens.weight"] = torch.cat([embedding, more.to(embedding.dtype)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def short_functions() -> dict[bool, list[str]]:
    """Return the short functions of the demo's corpus, of modules held out (True) and of others.

    They are those of the running interpreter; the base has read modules of the split `train` alone.
    """
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for module in standard_library():
        lines = module.source.split("\n")
        for node in ast.walk(ast.parse(module.source)):
            if isinstance(node, ast.FunctionDef):
                own = lines[node.lineno - 1 : node.end_lineno]
                text = textwrap.dedent("\n".join(own)) + "\n"
                if 40 < len(text) <= 200:
                    found[module.split != "train"].add(text)
    return {held: sorted(texts, key=_shuffled) for held, texts in found.items()}


def _shuffled(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.slow
def test_the_demo_with_holes_fills_more_of_them_than_its_base(
    base: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Functions of modules that neither the base nor the run has seen, a node of each cut out."""
    functions = short_functions()
    for name, texts in (("train", functions[False]), ("valid", functions[True][:320])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    values = {
        "model.path": str(base),
        "model.dtype": "fp32",
        "data.train": str(tmp_path / "train.jsonl"),
        "data.valid": str(tmp_path / "valid.jsonl"),
        "data.fim_rate": 0.5,
        "data.fim_unit": "syntax",
        "data.fim_targets": "middle",
        "train.method": "full",
        "train.num_train_epochs": 2,
        "train.per_device_train_batch_size": 16,
        "train.gradient_accumulation_steps": 1,
        "train.device": "cpu",
        "train.precision": "fp32",
        "train.output_dir": str(tmp_path / "run"),
        "optimizer.learning_rate": 2e-3,
        "eval.on_start": True,
        "eval.holes": 160,
        "checkpoint.steps": None,
        "log.tensorboard": False,
        "log.progress": False,
        "log.steps": 50,
    }
    run = train(values).folder
    before, after = rows_of(run, "eval")
    for name in ("holes", "exact_match", "loss"):
        record_property(f"{name} before", before[name])
        record_property(f"{name} after", after[name])
    assert before["holes"] == after["holes"] >= 140
    assert after["exact_match"] > before["exact_match"]
