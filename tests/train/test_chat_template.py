"""`data.chat_template` from the key to what a user takes away: a run, a merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import arguments, settings
from transformers import AutoTokenizer

from data.tokenizer import Tokenizer
from train.config.load import load_config
from train.generation.loaded import load_run
from train.merge.fold import merge_adapter
from train.run import main

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = [{"role": "user", "content": "hi"}]
NAMES = ["default", "tool_use"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "mine.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def run(model_folder: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a model without a chat template, started beside the template's file."""
    folder = tmp_path_factory.mktemp("chat-run")
    messages = [*QUESTION, {"role": "assistant", "content": "ho"}]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(template.parent)
        code = main(
            [
                *arguments(settings(model_folder, folder, folder / "run")),
                *("data.format=messages", "data.chat_template=mine.jinja"),
                *("train.max_steps=1", "load_best_at_end=true"),
            ]
        )
    assert code == 0
    return folder / "run"


def test_what_a_run_was_trained_with_lies_beside_it(run: Path, template: Path) -> None:
    assert load_config(file=run / "config.toml").data.chat_template == str(template)
    for name in ("final", "best"):
        assert (run / name / "chat_template.jinja").read_text() == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(run / "final")
    expected = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert expected == "<user>hi<|endoftext|>\n<assistant>"


@pytest.mark.parametrize("missing", [(), ("final", "best")])
def test_a_prompt_is_put_into_it(run: Path, tmp_path: Path, missing: tuple[str, ...]) -> None:
    """Also where nothing but a checkpoint is there, whose tokenizer is the base's."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in missing:
        shutil.rmtree(copy / name)
    generator = load_run(copy, torch.device("cpu"), torch.float32)
    text = generator.tokenizer.decode(generator.prompt_ids("hi"), skip_special_tokens=False)
    assert text == "<user>hi<|endoftext|>\n<assistant>"


def test_a_merged_model_has_the_templates_of_its_tokenizer(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    merge_adapter(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder, base)
    (base / "additional_chat_templates").mkdir()
    (base / "chat_template.jinja").write_text("default")
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tool_use")
    shutil.copytree(run / "final", adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    merge_adapter(adapter, tmp_path / "out", str(base))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out")
    for name, tools in zip(NAMES, (None, [{"name": "f"}]), strict=True):
        assert theirs.apply_chat_template(QUESTION, tools=tools, tokenize=False) == name
        assert ours.render_chat(QUESTION, tools=tools) == name
