"""Rows to text: the four formats, the system prompt, and rows that are refused."""

import pytest

from data.prompt import Part, PromptFormat, parse_template
from data.source import Row
from data.spans import Rendered
from data.tokenizer import Tokenizer
from files.errors import UserError

SEED_001_SYSTEM = (
    "You are an expert Python programmer. Please read the problem carefully before writing any "
    "Python code."
)
SEED_001 = PromptFormat(
    format="template",
    system_prompt=SEED_001_SYSTEM,
    prompt_template="Problem:\n{input}\n\nSolution:\n",
    completion_template="{solution}",
)
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def row(**values: object) -> Row:
    return Row(values, "rows.jsonl:7")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def spans(rendered: Rendered) -> tuple[tuple[str, str], ...]:
    """Return what stands before each span, and the span as far as it reaches at most."""
    text = rendered.text
    return tuple((text[: span.start], text[span.start : span.stop]) for span in rendered.trained)


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder({"eos_token": "<|im_end|>", "chat_template": CHATML}))


def test_seed_001_prompt(tokenizer):
    rendered = SEED_001.render(row(input="Add.", solution="def add():\n    pass"), tokenizer)
    prompt = f"{SEED_001_SYSTEM}\n\nProblem:\nAdd.\n\nSolution:\n"
    assert rendered.text == prompt + "def add():\n    pass"
    assert spans(rendered) == ((prompt, "def add():\n    pass"),)
    assert rendered.prompt == len(prompt) and not rendered.chat
    assert SEED_001.generation_prompt({"input": "Add."}) == prompt
    assert SEED_001.generation_prompt("Add.") == prompt


def test_template_takes_column_names_as_they_stand(tokenizer):
    """Nothing reaches into a value, as str.format would."""
    template = "{{{a.__class__}}} {b!r} {c:>9} {0}"
    values = {"a.__class__": "A", "b!r": "B", "c:>9": "C", "0": "{a} {{"}
    prompt_format = PromptFormat(format="template", completion_template=template)
    assert prompt_format.render(Row(values, ""), tokenizer).text == "{A} B C {a} {{"
    with pytest.raises(UserError, match=r"no column 'a.__class__'"):
        prompt_format.render(row(a="x"), tokenizer)


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{a}}", "{{a}", "{a{b}}"])
def test_a_brace_without_its_partner_is_refused(template):
    with pytest.raises(UserError, match=r"data\.completion_template: '.+' is no placeholder"):
        PromptFormat(format="template", completion_template=template)


def test_parse_template():
    assert parse_template("{{x}} {y}", "k") == (
        Part("{", False),
        Part("x", False),
        Part("}", False),
        Part(" ", False),
        Part("y", True),
    )


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_system_prompt_stands_first_with_a_blank_line(tokenizer, system_prompt):
    system = "" if system_prompt is None else "Be brief.\n\n"

    def text(values: dict[str, str], **settings: object) -> str:
        prompt_format = PromptFormat(system_prompt=system_prompt, **settings)  # type: ignore[arg-type]
        return prompt_format.render(row(**values), tokenizer).text

    assert text({"text": "T"}) == f"{system}T"
    assert text({"content": "T"}, text_field="content") == f"{system}T"
    assert text({"prompt": "P", "completion": "C"}, format="completion") == f"{system}PC"
    templates = {"prompt_template": "<{p}>", "completion_template": "({c})"}
    assert text({"p": "P", "c": "C"}, format="template", **templates) == f"{system}<P>(C)"


def test_what_is_trained(tokenizer):
    values = {"prompt": "P", "completion": "C", "text": "T", "p": "P", "c": "C"}

    def trained(**settings: object) -> tuple[str, str]:
        (span,) = spans(PromptFormat(**settings).render(row(**values), tokenizer))  # type: ignore[arg-type]
        return span

    assert trained(system_prompt="S") == ("", "S\n\nT")
    assert trained(format="completion") == ("P", "C")
    assert trained(format="completion", system_prompt="S") == ("S\n\nP", "C")
    assert trained(format="completion", completion_only=True) == ("P", "C")
    assert trained(format="completion", completion_only=False) == ("", "PC")
    only_completion = {"format": "template", "completion_template": "{p}{c}"}
    assert trained(**only_completion) == ("", "PC")
    assert trained(**only_completion, prompt_template="{p}") == ("P", "PC")
    both = trained(**only_completion, prompt_template="{p}", completion_only=False)
    assert both == ("", "PPC")


TURNS = [turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q2"), turn("assistant", "A2")]


def test_messages_train_the_assistant(tokenizer):
    rendered = PromptFormat(format="messages").render(row(messages=TURNS), tokenizer)
    first, second = [("user", "Q1"), ("assistant", "A1")], [("user", "Q2"), ("assistant", "A2")]
    header = "<|im_start|>assistant\n"
    assert rendered.chat
    assert rendered.text == chatml(*first, *second)
    assert spans(rendered) == (
        (chatml(first[0]) + header, "A1<|im_end|>\n"),
        (chatml(*first, second[0]) + header, "A2<|im_end|>\n"),
    )
    everything = PromptFormat(format="messages", completion_only=False)
    assert spans(everything.render(row(messages=TURNS), tokenizer)) == (("", rendered.text),)


def test_messages_without_an_answer_at_the_end_or_the_beginning(tokenizer):
    prompt_format = PromptFormat(format="messages")
    ends = prompt_format.render(row(messages=TURNS[:3]), tokenizer)
    assert [text for _, text in spans(ends)] == ["A1<|im_end|>\n"] and not ends.ends
    begins = prompt_format.render(row(messages=TURNS[1:3]), tokenizer)
    assert spans(begins) == (("<|im_start|>assistant\n", "A1<|im_end|>\n"),)
    nothing = prompt_format.render(row(messages=TURNS[:1]), tokenizer)
    assert nothing.trained == ()


@pytest.mark.parametrize(
    ("prompt_format", "values"),
    [
        (PromptFormat(format="completion", system_prompt="S"), {"prompt": "P", "completion": "C"}),
        (SEED_001, {"input": "Add.", "solution": "def"}),
        (PromptFormat(format="messages", system_prompt="S"), {"messages": TURNS}),
        (PromptFormat(format="completion"), {"prompt": TURNS[:3], "completion": TURNS[3:]}),
    ],
)
def test_generation_begins_as_training_did(tokenizer, prompt_format, values):
    rendered = prompt_format.render(row(**values), tokenizer)
    prompt = prompt_format.generation_prompt(values, tokenizer)
    assert spans(rendered)[-1][0] == prompt
    assert rendered.text.startswith(prompt)


def test_generation_from_one_text(tokenizer):
    assert PromptFormat(system_prompt="S").generation_prompt("T") == "S\n\nT"
    assert PromptFormat(format="completion").generation_prompt("P") == "P"
    messages = PromptFormat(format="messages").generation_prompt("Q", tokenizer)
    assert messages == chatml(("user", "Q")) + "<|im_start|>assistant\n"
    two = PromptFormat(format="template", prompt_template="{a}{b}", completion_template="{c}")
    with pytest.raises(UserError, match=r"columns \(a, b\); give them by name"):
        two.generation_prompt("Q")
    with pytest.raises(UserError, match="no column 'b'"):
        two.generation_prompt({"a": "A"})


def test_prompt_ids_have_the_special_tokens_of_training(tokenizer_folder, bos_template):
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, bos_template, name="bos"))
    plain = PromptFormat(format="completion").prompt_ids("P", tokenizer)
    assert plain == [1, *tokenizer.encode("P", add_special_tokens=False)]
    # The chat template writes its own special tokens, and this one writes no BOS.
    chat = PromptFormat(format="messages").prompt_ids("P", tokenizer)
    assert 1 not in chat and chat[0] == 3


def test_dictionary_round_trip():
    assert PromptFormat.from_dict(SEED_001.to_dict()) == SEED_001
    with pytest.raises(UserError, match="unknown key 'formt'; did you mean 'format'"):
        PromptFormat.from_dict({"formt": "text"})


def test_columns_that_must_hold_text():
    assert PromptFormat(text_field="content").columns() == ["content"]
    assert SEED_001.columns() == ["input", "solution"]
    assert PromptFormat(format="completion").columns() is None
    assert PromptFormat(format="messages").columns() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "mesages"}, "data.format: 'mesages' is not one of .*did you mean 'messages'"),
        ({"format": "template"}, "needs data.completion_template"),
        ({"format": "template", "prompt_template": "{a}"}, "needs data.completion_template"),
        ({"completion_only": True}, "data.completion_only=true needs a prompt"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PromptFormat(**settings)


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        ({}, {"txt": "T"}, r"no column 'text', which data.text_field .*did you mean 'txt'"),
        ({}, {}, "the row has none"),
        ({}, {"text": 3}, r"the column 'text' must hold text, holds 3 \(int\)"),
        ({}, {"text": None}, "holds null"),
        ({"format": "completion"}, {"prompt": "P"}, "no column 'completion'"),
        ({"format": "completion"}, {"prompt": TURNS, "completion": "C"}, "list of messages"),
        ({"format": "completion"}, {"prompt": "P", "completion": TURNS}, "must hold text"),
        ({"format": "messages"}, {"message": []}, "did you mean 'message'"),
        ({"format": "messages"}, {"messages": []}, "holds an empty list"),
        ({"format": "messages"}, {"messages": "hello"}, r"holds 'hello' \(str\)"),
        ({"format": "messages"}, {"messages": ["hello"]}, "message 1 of 'messages'"),
        ({"format": "messages"}, {"messages": [*TURNS, {"role": "user"}]}, "message 5 .*null"),
        ({"format": "messages"}, {"messages": [turn("user", 3)]}, r"has 3 \(int\)"),  # type: ignore[arg-type]
        ({"format": "messages"}, {"messages": [{"content": "Q"}]}, "must be an object with a role"),
        ({"format": "messages"}, {"conversations": 3}, r"'conversations' must hold a list"),
        ({"format": "messages"}, {"conversations": [{"from": "gpt"}]}, "message 1 .*null"),
        ({"format": "messages"}, {"conversations": [{"from": 3, "value": "Q"}]}, "message 1"),
        ({"format": "messages"}, {"conversations": [{"from": [], "value": "Q"}]}, "message 1"),
    ],
)
def test_rows_that_are_refused_name_file_and_line(tokenizer, settings, values, message):
    with pytest.raises(UserError, match=rf"^rows\.jsonl:7: .*{message}"):
        PromptFormat(**settings).render(Row(values, "rows.jsonl:7"), tokenizer)


def test_rows_rendered_together_are_those_rendered_alone(tokenizer):
    """Rows of texts and of messages may stand side by side, each with its own prefixes."""
    prompt_format = PromptFormat(format="completion", system_prompt="S")
    rows = [
        row(prompt="P", completion="C"),
        row(prompt=TURNS[:1], completion=TURNS[1:2]),
        row(prompt="Q", completion="D"),
        row(prompt=TURNS[:3], completion=TURNS[3:]),
    ]
    together = prompt_format.render_rows(rows, tokenizer)
    assert together == [prompt_format.render(one, tokenizer) for one in rows]
    assert [item.chat for item in together] == [False, True, False, True]
    messages = PromptFormat(format="messages")
    rows = [row(messages=TURNS[:length]) for length in (4, 1, 3, 2)]
    together = messages.render_rows(rows, tokenizer)
    assert together == [messages.render(one, tokenizer) for one in rows]
    assert messages.render_rows([], tokenizer) == []


def test_the_row_that_a_chat_template_refuses_is_named_among_others(tokenizer_folder):
    template = "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}"
    tokenizer = Tokenizer.load(tokenizer_folder({"chat_template": template}, name="many"))
    rows = [Row({"messages": TURNS[:length]}, f"rows.jsonl:{length}") for length in (1, 2, 3)]
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: .*too many"):
        PromptFormat(format="messages", completion_only=False).render_rows(rows, tokenizer)
