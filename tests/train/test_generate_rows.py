"""`lathe generate --prompts`: every row as if alone, in order, and nothing lost on the way."""

import gzip
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import write_byte_tokenizer
from runs import Refused
from small import small_model

from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.atomic import write_json
from lora import LoraConfig, inject, save_adapter
from models import load_model
from models.weights import save_model
from train.generate import generate, main
from train.generation import decode as decode_module
from train.generation.decode import Asked
from train.generation.sampling import Sampling

PROMPTS = ["def f(", "x", "a much longer prompt ", "class A", "y = "]
SAMPLED = ("--temperature", "1.5", "--top-k", "40", "--seed", "7")
OPTIONS = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "9")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_byte_tokenizer(folder, "<eos>")
    model = small_model("qwen2", vocab_size=257, max_position_embeddings=64)
    save_model(model, folder, config=model.config)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    rows = [{"prompt": text, "number": number} for number, text in enumerate(PROMPTS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alone(base: Path, **settings: Any) -> list[str]:
    """Return what each prompt is completed to by itself."""
    model, tokenizer = load_model(base), Tokenizer.load(base)
    texts = []
    for row, prompt in enumerate(PROMPTS):
        if "seed" in settings:
            key = Asked([], (row,)).seed(Sampling(1, seed=7))
            settings["seed"] = key
        ids = tokenizer.encode(prompt)
        texts.append(
            tokenizer.decode(generate(model, ids, max_new_tokens=9, stop_ids=[0], **settings))
        )
    return texts


def completed(base: Path, rows: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["--model", base, "--prompts", rows, "--out", out, *OPTIONS, *options]
    assert main([str(one) for one in arguments]) == 0
    assert not out.with_name(f"{out.name}.partial").exists()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", ["1", "2", "16"])
def test_each_row_is_completed_as_alone(
    base: Path, rows: Path, tmp_path: Path, batch_size: str
) -> None:
    options = ("--batch-size", batch_size)
    texts = alone(base)
    found = completed(base, rows, tmp_path / "out.jsonl", *options)
    assert found == [
        {"prompt": prompt, "number": number, "completion": text}
        for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    drawn = alone(base, temperature=1.5, top_k=40, seed=7)
    assert drawn != texts
    found = completed(base, rows, tmp_path / "drawn.jsonl", *options, *SAMPLED)
    assert [row["completion"] for row in found] == drawn


def test_other_files_and_formats_are_read_as_training_reads_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(
        gzip.compress(b"ask,n\n" + b"".join(b"%s,1\n" % p.encode() for p in PROMPTS))
    )
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    form = PromptFormat("template", prompt_template="{ask}", completion_template="{answer}")
    write_json(folder / "prompt_format.json", form.to_dict())
    assert main(["--model", str(folder), "--prompts", str(packed), *OPTIONS]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in printed] == alone(base)
    assert list(printed[0]) == ["ask", "n", "completion"]


def test_a_command_that_was_stopped_goes_on_where_it_was(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Refused,
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--model", base, "--prompts", rows, "--out", out, "--batch-size", "2", *OPTIONS]
    expected = completed(base, rows, tmp_path / "whole.jsonl")
    write, batches = decode_module.write, []

    def stopped(model: Any, batch: Any, sampling: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return write(model, batch, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "write", stopped)
        assert main([str(one) for one in arguments]) == 130
    partial = tmp_path / "out.jsonl.partial"
    assert f"4 of 5 rows are in {partial}: the same command goes on" in capsys.readouterr().err
    assert not out.exists() and batches == [2, 2, 1]
    # A kill in the middle of a line, then another command: it is not taken for ours.
    with open(partial, "a") as file:
        file.write('{"row": 4, "id')
    assert "of other prompts, weights or settings" in refused(main, *arguments, "--seed", "3")
    seen: list[int] = []

    def counted(model: Any, batch: Any, sampling: Any) -> Any:
        seen.extend(one.key[0] for one in batch)
        return write(model, batch, sampling)

    monkeypatch.setattr(decode_module, "write", counted)
    assert completed(base, rows, out, "--batch-size", "2") == expected
    assert len(seen) == 1


def test_what_was_done_over_another_base_is_not_taken(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    model = load_model(own)
    inject(model, LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter", base_model=str(own))
    out, write, done = tmp_path / "out.jsonl", decode_module.write, []
    given = ["--adapter", tmp_path / "adapter", "--prompts", rows, "--out", out, *OPTIONS]
    given += ["--batch-size", "2"]

    def stopped(model: Any, batch: Any, sampling: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(batch)
        return write(model, batch, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "write", stopped)
        assert main([str(one) for one in given]) == 130
    capsys.readouterr()
    os.utime(own / "model.safetensors", (1, 1))  # as weights that were replaced
    assert "of other prompts, weights or settings" in refused(main, *given)


def test_bad_rows_are_one_sentence(
    base: Path, rows: Path, tmp_path: Path, refused: Refused
) -> None:
    command = ("--model", base, "--prompts")
    assert "--column generated" in refused(main, *command, rows, "--column", "number")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    assert f"{other}:2: " in refused(main, *command, other)
    other.write_text(json.dumps({"prompt": "x" * 64}) + "\n")
    assert f"{other}:1: the prompt has 64 tokens" in refused(main, *command, other)
    other.write_text("")
    assert "no rows" in refused(main, *command, other)
    table = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "n": [math.nan]}), table)
    assert f"{table}:1: holds NaN" in refused(main, *command, table)
    assert "no such folder" in refused(main, *command, rows, "--out", tmp_path / "no" / "out.jsonl")
    there = tmp_path / "there.jsonl"
    there.write_text("kept\n")
    assert "is there already" in refused(main, *command, rows, "--out", there)
    assert "is there already" in refused(main, *command, rows, "--out", rows)
    assert there.read_text() == "kept\n"
    assert "name it .jsonl" in refused(main, *command, rows, "--out", tmp_path / "out.csv")
    for option in (("--top-k", "3"), ("--top-p", "0.5")):
        assert "give a --temperature above 0" in refused(main, *command, rows, *option)
    assert "--batch-size 0" in refused(main, *command, rows, "--batch-size", "0")
    assert "--out goes with --prompts" in refused(main, *command[:2], "--prompt", "x", "--out", "a")
