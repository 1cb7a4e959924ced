"""`lathe generate --chat`: the run's format, its history, and tokens that are fed once."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_tokenizer import BYTES, write_byte_tokenizer
from runs import Refused
from small import small_model

from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.atomic import write_json
from files.errors import UserError
from models.weights import save_model
from train.generate import generate, main
from train.generation.chat import Chat
from train.generation.loaded import Generator, load_from_model
from train.generation.sampling import Sampling

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAID = ("hello", "and then?", "why")


def write_chat_model(folder: Path, **changes: object) -> Path:
    """Write a model that says printable characters alone, whose text has the tokens it was."""
    folder.mkdir(exist_ok=True)
    write_byte_tokenizer(folder, "<eos>", chat_template=TEMPLATE)
    model = small_model("llama", vocab_size=257, max_position_embeddings=160, **changes)
    with torch.no_grad():
        for number, byte in enumerate(BYTES, start=1):
            if not (byte.isascii() and byte.isalnum()):
                model.head_weight()[number] = 0
        model.head_weight()[0] = 0
    save_model(model, folder, config=model.config)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def loaded_of(folder: Path) -> Generator:
    return load_from_model(str(folder), torch.device("cpu"), torch.float32)


def talked(loaded: Generator, chat: Chat, form: PromptFormat) -> list[int]:
    """Say all there is to say, with each answer as it must be; return the tokens fed each time."""
    turns: list[dict[str, str]] = []
    fed = []
    for text in SAID:
        turns.append({"role": "user", "content": text})
        ids = form.prompt_ids({"messages": turns}, loaded.tokenizer)
        expected = loaded.tokenizer.decode(generate(loaded.model, ids, max_new_tokens=10))
        assert "".join(chat.answer(text)) == expected
        turns.append({"role": "assistant", "content": expected})
        assert chat.messages == turns
        fed.append(chat.fed)
    return fed


def test_it_is_what_the_whole_history_gives_and_feeds_what_is_new(folder: Path) -> None:
    loaded = loaded_of(folder)
    for system in (None, "Be terse."):
        form = loaded.chat_format(system)
        chat = Chat(loaded, form, Sampling(10))
        fed = talked(loaded, chat, form)
        # The last token of an answer, "\n", "<user>", the text, "\n", "<assistant>".
        assert fed[1:] == [1 + 1 + 6 + len(text) + 1 + 11 for text in SAID[1:]]
        assert fed[0] == 6 + len("hello") + 1 + 11 + (0 if system is None else 8 + 9 + 1)


def test_a_template_that_changes_what_was_said_is_fed_again(folder: Path) -> None:
    loaded = loaded_of(folder)
    tokenizer = loaded.tokenizer
    shorter = TEMPLATE.replace(
        "{{ message.content }}",
        "{% if loop.last %}{{ message.content }}{% else %}{{ message.content[:3] }}{% endif %}",
    )
    tokenizer = Tokenizer.load(folder, None)
    tokenizer.chat_templates["default"] = shorter
    loaded = replace(loaded, tokenizer=tokenizer)
    form = PromptFormat("messages")
    fed = talked(loaded, Chat(loaded, form, Sampling(10)), form)
    assert fed[1] > len("and then?") + 20


def test_frequencies_of_the_length_are_fed_again(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 8.0}
    folder = write_chat_model(tmp_path / "dynamic", rope_scaling=scaling)
    loaded = loaded_of(folder)
    form = loaded.chat_format(None)
    chat = Chat(loaded, form, Sampling(10))
    "".join(chat.answer("hello"))
    first = chat.fed
    "".join(chat.answer("hello"))
    assert chat.fed == 2 * first + 10 + 1


def test_the_end_of_the_context_is_said_and_the_chat_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_of(folder)
    chat = Chat(loaded, loaded.chat_format(None), Sampling(500))
    "".join(chat.answer("hello"))
    assert "stopped at the end of the model's context of 160 tokens" in capsys.readouterr().err
    before = list(chat.messages)
    with pytest.raises(UserError, match="/reset begins a new one"):
        "".join(chat.answer("hello"))
    assert chat.messages == before
    chat.reset()
    assert "".join(chat.answer("hello")) == before[1]["content"]


def test_lines_are_turns_until_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nhello\n"))
    command = ["--model", str(folder), "--chat", "--max-new-tokens", "10", "--dtype", "fp32"]
    assert main([*command, "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and len(first) == 10


def test_what_knows_no_turns_is_refused(
    folder: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    form = PromptFormat("template", prompt_template="{a}", completion_template="{b}")
    write_json(tmp_path / "prompt_format.json", form.to_dict())
    assert loaded_of(tmp_path).chat_format(None) == PromptFormat("messages")
    assert "was trained on data.format=template" in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    said = refused(main, "--model", tmp_path, "--chat")
    assert "data.format=template and has no chat template" in said
    assert "--system goes with --chat" in refused(main, "--model", folder, "--system", "x")
    assert "--raw" in refused(main, "--model", folder, "--chat", "--raw")
