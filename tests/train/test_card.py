"""The model card in `final/`: read with huggingface_hub, used with PEFT and transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from made_up import make_run, rewrite, rows_of
from runs import settings, train

from files.folders import damage, replace_folder
from train.report.card import is_ours, licence_of, render_card, write_card
from train.report.page import write_report
from train.report.record import read_record
from train.saving.resume import find_run

APACHE = "\n" + " " * 33 + "Apache License\n" + " " * 27 + "Version 2.0, January 2004\n"


def finished(folder: Path, config: str = "", step: int = 120, **options: Any) -> Path:
    """Write a made-up run that has a `final/` of a step, as the loop leaves it."""
    run = make_run(folder, **options)
    replace_folder(run / "final", lambda _: {}, step=step)
    if config:
        (run / "config.toml").write_text(config)
    return run


def card_of(run: Path) -> ModelCard:
    path = write_card(read_record(run))
    assert path is not None
    return ModelCard.load(path)


def config_of(path: str, **data: str) -> str:
    rows = "".join(f"{name} = {json.dumps(value)}\n" for name, value in data.items())
    return (
        f'[model]\npath = {json.dumps(path)}\nrevision = "none"\n[train]\nmethod = "lora"\n'
        f"[data]\n{rows}"
    )


def of_the_hub(cache: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a file of org/base into a cache of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder, commit = cache / "models--org--base", "1" * 40
    for part in ("refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / name).write_text(content)


def test_the_header_of_a_run_over_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = (
        "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://x.org/L\n---\n"
    )
    of_the_hub(tmp_path / "hub", "README.md", header, monkeypatch)
    config = config_of("org/base", train="hub:org/rows:train", valid="/home/me/secret/v.jsonl")
    run = finished(tmp_path / "run", config)
    test = {"kind": "eval", "step": 120, "split": "test", "loss": 1.25, "targets": 900}
    rewrite(run, [*rows_of(run), test])
    card = card_of(run)
    data = card.data.to_dict()
    (index,) = data.pop("model-index")
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lathe", "lora"],
        "datasets": ["org/rows"],
        "metrics": ["loss"],
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://x.org/L",
    }
    values = {one["dataset"]["split"]: one["metrics"][0]["value"] for one in index["results"]}
    assert (index["name"], values) == ("run", {"valid": 1.195, "test": 1.25})
    assert "licence is `qwen-research`, as its card says" in card.text
    assert "| rows | `org/rows`, format" in card.text
    assert "| steps | 120, of 8 examples each |" in card.text
    assert str(tmp_path) not in card.content and "secret" not in card.content


def test_a_folder_is_no_base_that_the_hub_knows(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = finished(tmp_path / "run", config_of(str(base), train=str(base / "t.jsonl")))
    card = card_of(run)
    data = card.data.to_dict()
    assert {"base_model", "base_model_relation", "license", "datasets"}.isdisjoint(data)
    assert "The base model was a folder, `base`, and none that the Hub is known" in card.text
    assert "name no licence, so none is stated here" in card.text
    assert "| rows | `t.jsonl`" in card.text and str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("files", "fields", "said"),
    [
        (
            {"README.md": "---\nlicense: mit\n---\n", "LICENSE": APACHE},
            {"license": "mit"},
            "its card",
        ),
        ({"LICENSE": APACHE}, {"license": "apache-2.0"}, "by the title of its file LICENSE"),
        ({"LICENSE.txt": "MIT License\n\nCopyright (c) A\n"}, {"license": "mit"}, "LICENSE.txt"),
        ({"README.md": "no header", "LICENSE": APACHE}, {"license": "apache-2.0"}, "LICENSE"),
        ({"README.md": "---\nlicense: [\n---\n"}, {}, "name no licence"),
        ({"README.md": "---\nlicense: 3\n---\n"}, {}, "name no licence"),
        (
            {"LICENSE": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\n"},
            {},
            "it is none that could be named",
        ),
        ({"LICENSE": "Not the Apache License\nVersion 2.0, January 2004"}, {}, "none that could"),
        ({}, {}, "name no licence"),
    ],
)
def test_a_licence_is_read_and_never_invented(
    tmp_path: Path, files: dict[str, str], fields: dict[str, str], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = licence_of(lambda name: path if (path := tmp_path / name).is_file() else None)
    assert found.fields == fields and said in found.sentence


def test_losses_are_those_of_the_weights_in_final(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", step=80)  # the best, loaded at the end
    assert "| valid loss | 1.2000 | 40,000 targets |" in render_card(read_record(run))
    run = finished(tmp_path / "other", step=60)
    text = render_card(read_record(run))
    assert "No loss was measured of these weights" in text and "model-index" not in text


def test_a_card_that_was_changed_is_the_user_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run")
    path = run / "final" / "README.md"
    for _ in range(2):  # its own is written again
        assert write_card(read_record(run)) == path and is_ours(path)
    for mine in (path.read_text().replace("# run", "# My run"), "words of mine\n", ""):
        path.write_text(mine)
        assert write_card(read_record(run)) is None
        assert path.read_text() == mine
        assert "it stays as it is" in capsys.readouterr().err
    # And it outlives the folder, which a run writes anew.
    path.write_text("words of mine\n")
    replace_folder(run / "final", lambda _: {}, step=120)
    assert path.read_text() == "words of mine\n"
    assert damage(run / "final") is None


def test_there_is_no_card_before_the_end(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", state="preempted")
    assert write_card(read_record(run)) is None
    write_report(make_run(tmp_path / "other", steps=0, valid={}))
    assert not (run / "final" / "README.md").exists()
    assert not (tmp_path / "other" / "final").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_peft_and_transformers_load_the_folder_as_its_card_says(
    method: str, model_folder: Path, rows_file: Path, tmp_path: Path, cache: Path
) -> None:
    config = settings(model_folder, rows_file, tmp_path / "run", **{"train.max_steps": 1})
    train(config | {"train.method": method, "data.test": str(rows_file / "test.jsonl")})
    final = tmp_path / "run" / "final"
    assert is_ours(final / "README.md") and damage(final) is None
    # A kill in the middle of the card, before the report.
    (final / "README.md").rename(final / ".tmp-0")
    (tmp_path / "run" / "report.md").unlink()
    assert find_run(tmp_path / "run", {})[1] is None
    assert is_ours(final / "README.md") and damage(final) is None
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == {"lora": "peft", "full": "transformers"}[method]
    splits = [one.dataset_split for one in card.data.eval_results or []]
    assert splits == ["valid", "test"]
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    code = code.replace("THIS_FOLDER_OR_REPOSITORY", str(final))
    space: dict[str, Any] = {}
    exec(code.replace("THE_BASE_MODEL", str(model_folder)), space)
    ids = torch.tensor([space["tokenizer"].encode("abc")])
    assert space["model"](ids).logits.shape[:2] == ids.shape
