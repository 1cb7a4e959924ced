"""Labels of conversations are those that comparing prefixes gives, for any template and tokenizer.

Where a prefix is no prefix of the whole, comparing it defines nothing: what is trained there stands
in `test_spans.py`.
"""

import random
from pathlib import Path

import pytest
from chats import KINDS, TEMPLATES, Definition, write_tokenizer

from data import chat, labels
from data.labels import LabelledRow, label_rows
from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer

MESSAGES = PromptFormat("messages")
WORDS = (
    *("hello", "x = 1", "\n", "\n\n", "  ", "é", "漢字", "😀", "assistant", "user:", "### "),
    *("def add(a, b):\n    return a", "end", "}", "a", "<b>", "answer", " tail ", "\tq", "<thin"),
)


def conversation(draw: random.Random, system: bool) -> list[dict[str, str]]:
    """Return turns of words, with space at any end, some of which look like headers."""
    messages = [{"role": "system", "content": "be brief"}] if system else []
    for role in ("user", "assistant") * draw.randint(1, 5):
        words = draw.choices(WORDS, k=draw.randint(1, 5))
        messages.append({"role": role, "content": draw.choice(("", " ")).join(words)})
    if draw.random() < 0.3:
        messages.append({"role": "user", "content": "more"})
    return messages


def labelled(conversations: list[list[dict[str, str]]], tokenizer: Tokenizer) -> list[LabelledRow]:
    rows = [Row({"messages": messages}, "rows.jsonl:1") for messages in conversations]
    return label_rows(rows, tokenizer, MESSAGES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_those_of_comparing_prefixes(tmp_path: Path, name: str) -> None:
    compared = 0
    for kind in KINDS:
        folder = write_tokenizer(tmp_path / kind, kind, *TEMPLATES[name])
        definition, tokenizer = Definition(folder), Tokenizer.load(folder)
        draw = random.Random(f"{name} {kind}")
        drawn = [
            conversation(draw, name != "starcoder2" and draw.random() < 0.5) for _ in range(12)
        ]
        for messages, row in zip(drawn, labelled(drawn, tokenizer), strict=True):
            ids, labels, unknown = definition.labels(messages)
            assert row.input_ids.tolist() == ids
            ours = row.labels.tolist()
            for start, stop in unknown:
                ours[start:stop] = labels[start:stop] = [-100] * (stop - start)
            assert ours == labels, (kind, messages)
            compared += sum(label != -100 for label in labels)
            assert row.untrained_turns == 0
            assert row.assistant_turns == sum(turn["role"] == "assistant" for turn in messages)
    # Its header is asked for with thinking, and past turns have none: no prefix is a prefix.
    assert compared > 500 or name == "deepseek"


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama2", "starcoder2", "deepseek"])
def test_what_is_rendered_does_not_grow_with_the_square_of_the_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the turns, a template runs at most three times; each text is tokenised once."""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, "byte-level", *TEMPLATES[name]))
    prefixes: list[int] = []
    encoded: list[str] = []
    render, encode = chat.ChatTemplate.render, Tokenizer.encode_chats

    def counting_render(self, conversations, date=None):  # type: ignore[no-untyped-def]
        prefixes.extend(len(one.prefixes) for one in conversations)
        return render(self, conversations, date)

    def counting_encode(self, texts):  # type: ignore[no-untyped-def]
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(chat.ChatTemplate, "render", counting_render)
    monkeypatch.setattr(Tokenizer, "encode_chats", counting_encode)
    turns = [{"role": role, "content": "x = 1"} for role in ("user", "assistant") * 30]
    (row,) = labelled([turns], tokenizer)
    assert sum(prefixes) <= 3
    assert [text for text in encoded if len(text) > 100] == [row.text]


def test_batches_are_bounded_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by rows alone, of which a thousand may be anything; and none is lost or moved."""
    monkeypatch.setattr(labels, "_CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(labels, "_ROWS_AT_ONCE", 7)
    turns = [{"role": "user", "content": "x" * 30, "calls": [{"name": "y" * 30}]}]
    long = [Row({"messages": turns, "id": number}, f"r:{number}") for number in range(5)]
    short = [Row({"text": "z"}, f"s:{number}") for number in range(9)]
    batches = list(labels.in_batches([*long, *short]))
    assert [row for batch in batches for row in batch] == [*long, *short]
    assert [len(batch) for batch in batches] == [2, 2, 7, 3]
