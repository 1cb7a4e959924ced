"""What a row of messages becomes: roles, values in strings, columns, tools, named templates.

Rows go through `train.show_data`; the text is what transformers makes of the messages in OpenAI's
form, which stand here written out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from shown import shown
from transformers import AutoTokenizer

from data.messages import read_messages
from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer
from files.errors import UserError

# Tools in the manner of Hermes and Qwen2.5; `tojson` of a text would be encoded twice.
TOOLS_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call functions.\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
EVERY_KEY = (
    "{{ tools | tojson }}\n{% for m in messages %}"
    "{% for key in m %}{{ key }}={{ m[key] | tojson }};{% endfor %}\n"
    "{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & 'here'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
# The one conversation that every dialect below says in its own way.
OPENAI = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]
TRAINED = [
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
    "Yes.<|im_end|>",
]
MESSAGES = "data.format=messages"


@pytest.fixture
def model(tokenizer_folder: Callable[..., Path]) -> Path:
    settings = {"eos_token": "<|im_end|>"}
    return tokenizer_folder(settings, files={"chat_template.jinja": TOOLS_TEMPLATE})


def theirs(folder: Path, messages: list, tools: list | None = None, **settings: Any) -> str:
    """Return what transformers makes of messages."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)


def turn(role: str, content: str = "x") -> dict[str, str]:
    return {"role": role, "content": content}


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    """Return the conversation with keys of one turn changed."""
    return [message | values if n == number else message for n, message in enumerate(OPENAI)]


# --- roles ---------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "human", "value": "Is it raining?"},
    {"from": "function_call", "value": json.dumps(CALL["function"], ensure_ascii=False)},
    {"from": "observation", "value": '{"rain": true}'},
    {"from": "gpt", "value": "Yes."},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI},
        {"conversations": SHAREGPT},
        {"conversations": [{"role": t["from"], "content": t["value"]} for t in SHAREGPT]},
        {"messages": [{"speaker": t["from"].upper(), "text": t["value"]} for t in SHAREGPT]},
        {"conversation": [t | {"from": t["from"].replace("_", "-").title()} for t in SHAREGPT]},
        # Keys of both layouts, as a file with columns unites them.
        {"conversations": [t | {"role": None, "content": None} for t in SHAREGPT]},
        {"conversations": SHAREGPT, "messages": OPENAI},
        {"conversations": SHAREGPT, "messages": None},
        # OpenAI's earlier key and role.
        {
            "messages": [
                *OPENAI[:1],
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "weather", "content": '{"rain": true}'},
                *OPENAI[3:],
            ]
        },
    ],
)
def test_every_dialect_is_one_conversation(tmp_path, model, row):
    (found,) = shown(tmp_path, [row | {"tools": [TOOL]}], MESSAGES, model=model)
    assert found["text"] == theirs(model, OPENAI, [TOOL])
    assert [text.lstrip("\n") for text in found["trained"]] == [t.lstrip("\n") for t in TRAINED]


@pytest.mark.parametrize(
    ("role", "name"),
    [
        *(("user", name) for name in ("user", "human", "Human", "PROMPTER", " user ")),
        *(("assistant", name) for name in ("gpt", "chatgpt", "ChatGPT", "bing", "bard", "bot")),
        *(("assistant", name) for name in ("model", "ai", "chatbot", "Assistant", "GPT")),
        *(("tool", name) for name in ("tool", "observation", "Tool Response", "ipython")),
        *(("tool", name) for name in ("function", "function_response", "function-result")),
        ("system", "System"),
        ("developer", "developer"),
    ],
)
def test_names_of_roles(role, name):
    assert read_messages([{"from": name, "value": "x"}], "c") == [turn(role)]
    assert read_messages([{"role": name, "content": "x"}], "c") == [turn(role)]


@pytest.mark.parametrize("name", ["narrator", "usr", "", "user:", "assistants", "42"])
@pytest.mark.parametrize("key", ["role", "from"])
def test_any_other_role_is_refused_with_line_and_turn(tmp_path, model, name, key):
    rows = [{"messages": OPENAI[:1]}, {"messages": [turn("user"), {key: name, "content": "A"}]}]
    with pytest.raises(UserError) as raised:
        shown(tmp_path, rows, MESSAGES, model=model)
    assert str(raised.value).startswith(
        f"{tmp_path / 'rows.jsonl'}:2: message 2 of 'messages' has the role '{name}', which is none"
    )
    for allowed in ("user: user, human, prompter", "chatgpt", "function_call", "observation"):
        assert allowed in str(raised.value)


def test_a_conversation_may_begin_with_an_answer(tmp_path, model):
    turns = [{"from": "gpt", "value": "Hello."}, *SHAREGPT[:1], *SHAREGPT[3:]]
    (found,) = shown(tmp_path, [{"conversations": turns}], MESSAGES, model=model)
    assert found["text"] == theirs(model, [turn("assistant", "Hello."), OPENAI[0], OPENAI[3]])
    assert "Hello." in found["trained"][0] and "Yes." in found["trained"][-1]


def test_a_developer_is_the_system_unless_the_template_knows_both(tokenizer_folder, model):
    tokenizer = Tokenizer.load(model)
    form = PromptFormat(format="messages", system_prompt="never")
    turns = [turn("developer", "Be brief."), turn("user", "Q")]
    system = theirs(model, [turn("system", "Be brief."), turn("user", "Q")])
    assert form.generation_prompt({"messages": turns}, tokenizer) == system + (
        "<|im_start|>assistant\n"
    )
    knows = "{% for m in messages %}{{ m.role }}{% endfor %}{# developer #}"
    tokenizer = Tokenizer.load(tokenizer_folder({"chat_template": knows}, name="knows"))
    assert form.generation_prompt({"messages": turns}, tokenizer) == "developeruser"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "from": "gpt", "content": "x"}, "'user' .* its role and 'gpt' .* from"),
        ({"role": "user", "content": "x", "value": "y"}, "'x' .* its content and 'y' .* its value"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "calls tools in a user turn"),
    ],
)
def test_a_turn_that_says_two_things_is_refused(message, complaint):
    with pytest.raises(UserError, match=f"message 1 of 'messages' .*{complaint}"):
        read_messages([message], "messages")
    same = {"role": "user", "from": "human", "content": "x", "value": "x"}
    assert read_messages([same], "messages") == [turn("user")]


def test_columns_that_contradict_each_other_are_refused(tmp_path, model):
    row = {"conversations": SHAREGPT, "messages": OPENAI[:1]}
    with pytest.raises(UserError, match=r":1: .*'messages' and 'conversations' hold different"):
        shown(tmp_path, [row], MESSAGES, model=model)


# --- structures in strings, and strings that were structures --------------------------------------


def text_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


ARGUMENTS = text_of(CALL["function"]["arguments"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI, "tools": text_of([TOOL])},
        {"messages": OPENAI, "tools": [text_of(TOOL)]},
        {"messages": OPENAI, "tools": [TOOL | {"function": text_of(TOOL["function"])}]},
        {
            "messages": OPENAI,
            "tools": [
                TOOL
                | {
                    "function": TOOL["function"]
                    | {"parameters": text_of(TOOL["function"]["parameters"])}
                }
            ],
        },
        {"messages": OPENAI, "functions": [TOOL["function"]]},
        {"messages": text_of(OPENAI), "tools": [TOOL]},
        {"messages": [text_of(message) for message in OPENAI], "tools": [TOOL]},
        {"conversations": text_of(SHAREGPT), "tools": text_of([TOOL])},
        {"messages": changed(1, tool_calls=text_of([CALL])), "tools": [TOOL]},
        {"messages": changed(1, tool_calls=[text_of(CALL)]), "tools": [TOOL]},
        {
            "messages": changed(
                1, tool_calls=[{"type": "function", "function": text_of(CALL["function"])}]
            ),
            "tools": [TOOL],
        },
        {
            "messages": changed(
                1,
                tool_calls=[
                    {"function": {"name": "weather", "arguments": ARGUMENTS}, "type": "function"}
                ],
            ),
            "tools": [TOOL],
        },
        # Without the level "function", as many data sets have it.
        {
            "messages": changed(1, tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
            "tools": [TOOL],
        },
        # What a tool answers, as a structure; and the call of ShareGPT's turn.
        {"messages": changed(2, content={"rain": True}), "tools": [TOOL]},
        {
            "conversations": [
                t | {"value": CALL["function"]} if t["from"] == "function_call" else t
                for t in SHAREGPT
            ],
            "tools": [TOOL],
        },
        # OpenAI's parts.
        {
            "messages": changed(
                0,
                content=[{"type": "text", "text": "Is it "}, {"type": "text", "text": "raining?"}],
            ),
            "tools": [TOOL],
        },
    ],
)
def test_a_structure_in_a_string_is_the_structure(tmp_path, model, row):
    (found,) = shown(tmp_path, [row], MESSAGES, model=model)
    assert found["text"] == theirs(model, OPENAI, [TOOL])


@pytest.mark.parametrize("none", [[], "[]", "", None, " "])
def test_no_tools_are_no_tools(tmp_path, model, none):
    (found,) = shown(tmp_path, [{"messages": OPENAI, "tools": none}], MESSAGES, model=model)
    assert found["text"] == theirs(model, OPENAI)
    calls = changed(3, tool_calls=none if none != " " else None)
    (found,) = shown(tmp_path, [{"messages": calls}], MESSAGES, model=model)
    assert found["text"] == theirs(model, OPENAI)


def test_a_turn_that_calls_and_says_nothing_is_as_transformers_passes_it_on(tokenizer_folder):
    """No content where it is null or absent, and the empty text where that is what the row says."""
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    folder = tokenizer_folder({"chat_template": template}, name="asks")
    tokenizer = Tokenizer.load(folder)
    absent = [{k: v for k, v in m.items() if v is not None} for m in OPENAI]
    for turns in (SHAREGPT, OPENAI, absent, changed(1, content="")):
        row = Row({"conversations": turns}, "rows.jsonl:1")
        text = PromptFormat(format="messages", completion_only=False).render(row, tokenizer).text
        expected = OPENAI if turns is SHAREGPT else turns
        decoder, theirs_, ours = json.JSONDecoder(), theirs(folder, expected), text
        while ours:
            one, stop = decoder.raw_decode(ours)
            other, their_stop = decoder.raw_decode(theirs_)
            assert one == other
            ours, theirs_ = ours[stop:], theirs_[their_stop:]


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    "calls",
    [
        # asks for null, as OpenAI writes it
        "{% if m.content is none %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}",
        # takes a part of the content
        "{{ m.content.split('x')[0] }}{{ m.tool_calls | tojson }}",
        # joins texts, as OpenAI writes arguments
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}",
        # prints what it is given
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}",
        "{% if m.content is none %}{{ m.tool_calls[0].function.name + "
        "m.tool_calls[0].function.arguments }}{% endif %}",
        "{{ m.tool_calls[0].function | tojson }}",
    ],
)
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_call_is_written_once_and_as_json_whatever_form_a_template_wants(
    tokenizer_folder, calls, content, as_text
):
    content = "" if "split" in calls else content  # transformers fails without one too
    name = f"calls-{calls.translate(str.maketrans('', '', '/{}% '))[-40:]}"
    settings = {"chat_template": CALLS.replace("CALLS", calls), "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, name=name))
    arguments = {"city": "Zürich"}
    given = json.dumps(arguments) if as_text else arguments
    call = {"type": "function", "function": {"name": "weather", "arguments": given}}
    messages = changed(1, content=content, tool_calls=[call])
    row = Row({"messages": messages}, "rows.jsonl:1")
    text = PromptFormat(format="messages").render(row, tokenizer).text
    assert text.count('{"city": "Zürich"}') == 1 and text.count("weather") == 1
    assert "None" not in text and "null" not in text and "\\" not in text


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_has_each_name_that_a_template_asks_for(tokenizer_folder, key):
    """As transformers 5 does: of several, the first of these three rules."""
    for asked in ("reasoning_content", "thinking"):
        template = (
            "{% for m in messages %}{{ m.role }}:{% if m.ASKED is defined %}<{{ m.ASKED }}>"
            "{% endif %}{{ m.content }};{% endfor %}"
        ).replace("ASKED", asked)
        folder = tokenizer_folder({"chat_template": template}, name=f"thinks-{asked}")
        messages = [turn("user", "Q"), turn("assistant", "A") | {key: "so", "reasoning": "so"}]
        row = Row({"messages": messages}, "rows.jsonl:1")
        text = PromptFormat(format="messages").render(row, Tokenizer.load(folder)).text
        assert text == theirs(folder, messages) == "user:Q;assistant:<so>A;"


def test_a_row_tells_its_template_more(tmp_path, tokenizer_folder):
    template = (
        "{{ tone or 'plain' }};{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    folder = tokenizer_folder({"chat_template": template, "eos_token": ";"}, name="told")
    messages = [turn("user", "Q"), turn("assistant", "A")]
    rows = [
        {"messages": messages, "chat_template_kwargs": {"tone": "loud"}},
        {"messages": messages, "chat_template_kwargs": '{"tone": "soft"}'},
        {"messages": messages, "chat_template_kwargs": None},
        {"messages": messages},
    ]
    found = shown(tmp_path, rows, MESSAGES, "data.append_eos=false", model=folder)
    assert [one["text"].split(";")[0] for one in found] == ["loud", "soft", "plain", "plain"]
    assert theirs(folder, messages, tone="loud") == found[0]["text"]
    prompt = PromptFormat("messages").generation_prompt(rows[0], Tokenizer.load(folder))
    assert prompt == "loud;user:Q;assistant:"
    for wrong in ("loud", [1], {"messages": []}, {"tools": []}):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: the column 'chat_template_kwargs'"):
            shown(
                tmp_path,
                [{"messages": messages, "chat_template_kwargs": wrong}],
                MESSAGES,
                model=folder,
            )


def test_a_prompt_to_be_answered_has_the_tools_of_its_row(model):
    tokenizer = Tokenizer.load(model)
    values = {"messages": text_of(OPENAI[:3]), "tools": text_of([TOOL])}
    prompt = PromptFormat(format="messages").generation_prompt(values, tokenizer)
    assert prompt == theirs(model, OPENAI[:3], [TOOL], add_generation_prompt=True)
    completion = {"prompt": text_of(OPENAI[:3]), "tools": text_of([TOOL])}
    assert PromptFormat(format="completion").generation_prompt(completion, tokenizer) == prompt


def test_several_calls_of_one_turn_and_calls_without_arguments(tmp_path, model):
    functions = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]
    calls = [{"type": "function", "function": function} for function in functions]
    expected = theirs(model, [OPENAI[0], {"role": "assistant", "content": "", "tool_calls": calls}])
    as_text = [functions[0] | {"arguments": '{"x": 1}'}, functions[1] | {"arguments": ""}]
    for value in (text_of(functions), functions, text_of(as_text)):
        turns = [SHAREGPT[0], {"from": "function_call", "value": value}]
        (found,) = shown(tmp_path, [{"conversations": turns}], MESSAGES, model=model)
        assert found["text"] == expected


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"tools": "weather"}, "'tools' must hold a list of tools, or its JSON text, holds 'weat"),
        ({"tools": "[{'name': 'f'}]"}, "list of tools.* which is no JSON: not JSON at line 1, col"),
        ({"tools": '[{"name": "f", "name": "g"}]'}, "key 'name' stands twice"),
        ({"tools": '{"name": "f"}'}, "'tools' must hold a list of tools"),
        ({"tools": ["weather"]}, "tool 1 of 'tools' must be an object .* is 'weather'"),
        ({"tools": [TOOL, 3]}, "tool 2 of 'tools' must be an object"),
        ({"tools": [{"function": "weather"}]}, "the function of tool 1 of 'tools' must be an obj"),
        ({"messages": "[{]"}, "'messages' must hold a list .* no JSON: not JSON at line 1, column"),
        ({"messages": '{"role": "user"}'}, "'messages' must hold a list of messages"),
        ({"messages": ["[1]"]}, "message 1 of 'messages' must be an object"),
        ({"messages": changed(1, tool_calls="weather")}, "message 2 .* a list as its tool_calls"),
        (
            {"messages": changed(1, tool_calls=["f"])},
            "tool call 1 of message 2 .* must call a tool",
        ),
        ({"messages": changed(1, tool_calls=[{"name": 3}])}, "tool call 1 .* must call a tool"),
        (
            {"messages": changed(1, tool_calls=[{"name": "f", "arguments": "x = 1"}])},
            "tool call 1 of message 2 .* an object as its arguments.* 'x = 1'",
        ),
        (
            {"messages": changed(1, tool_calls=[{"name": "f", "arguments": "{'x': 1}"}])},
            "object as its arguments.* which is no JSON",
        ),
        (
            {"messages": changed(1, tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}])},
            "NaN is no JSON number",
        ),
        (
            {"messages": changed(1, tool_calls=[{"name": "f", "arguments": [1]}])},
            "object as its arguments",
        ),
        (
            {"messages": changed(1, tool_calls=[{"name": "f", "arguments": '{"x": "\\ud800"}'}])},
            "half of a surrogate pair",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "message 1 .* call a too",
        ),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "message 1 .* call a tool"),
        (
            {"messages": changed(0, content={"a": 1})},
            "message 1 .* must have a text as its content",
        ),
        ({"messages": changed(0, content=["a"])}, "message 1 .* must have a text as its content"),
        ({"messages": changed(3, content=[])}, "message 4 .* must have a text as its content"),
        (
            {
                "messages": changed(
                    0,
                    content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": 1}],
                )
            },
            "part 2 of message 1 .* of the type 'image_url', and text alone can be trained",
        ),
        (
            {"messages": changed(0, content=[{"type": "text"}])},
            "part 1 of message 1 .* have a text",
        ),
    ],
)
def test_what_holds_no_such_structure_is_refused_by_name(tmp_path, model, row, complaint):
    row = {"messages": OPENAI} | row if "conversations" not in row else row
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{complaint}"):
        shown(tmp_path, [row], MESSAGES, model=model)


def test_a_prompt_that_looks_like_json_stays_text(tmp_path, model):
    rows = [
        {"prompt": "[1, 2]", "completion": "3"},
        {"prompt": '[{"a": 1}]', "completion": '[{"b": 2}]'},
        {"prompt": text_of(OPENAI[:1]), "completion": "not a list"},
        {"prompt": "[INST] {", "completion": "]"},
        {"prompt": '[{"role": "admin"}]', "completion": '[{"role": "user"}]'},
        {"prompt": text_of(OPENAI[:1]), "completion": text_of(OPENAI[3:])},
        {"prompt": OPENAI[:1], "completion": text_of(OPENAI[3:])},
        {"prompt": [SHAREGPT[0]], "completion": [SHAREGPT[3]]},
    ]
    found = shown(tmp_path, rows, "data.format=completion", model=model)
    for row, one in zip(rows[:5], found, strict=False):
        assert one["text"] == row["prompt"] + row["completion"]
    for one in found[5:]:
        assert one["text"] == theirs(model, [OPENAI[0], OPENAI[3]])
        assert one["trained"] == ["Yes.<|im_end|>"]


# --- columnar files ------------------------------------------------------------------------------


def columnar(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_columnar_file_gives_the_text_of_its_rows(tmp_path, tokenizer_folder, model):
    """All structures of a column have all keys: of every tool's arguments, of every message."""
    other = {
        "type": "function",
        "function": {
            "name": "sum",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
    second = [
        {"role": "user", "content": "1 + 1?", "name": "Ada"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "sum", "arguments": {"x": 2}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "2"},
    ]
    rows = [{"messages": OPENAI, "tools": [TOOL]}, {"messages": second, "tools": [other]}]
    table = columnar(tmp_path, rows)
    united = pyarrow.parquet.read_table(table).to_pylist()[0]["messages"]
    assert united[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Zürich", "x": None}
    for template in (TOOLS_TEMPLATE, EVERY_KEY):
        (model / "chat_template.jinja").write_text(template)
        lines = shown(tmp_path, rows, MESSAGES, model=model)
        found = shown(tmp_path, table, MESSAGES, model=model)
        if template == TOOLS_TEMPLATE:
            assert [one["text"] for one in found] == [one["text"] for one in lines]
            assert found[0]["text"] == theirs(model, OPENAI, [TOOL])
        assert "null" not in found[0]["text"].replace("content=null", "")


def test_null_of_a_row_that_says_so_is_data(tmp_path, model):
    """JSON can leave a key out, so null among a call's arguments is what its author wrote."""
    call = {"name": "weather", "arguments": {"city": None}}
    (found,) = shown(tmp_path, [{"messages": changed(1, tool_calls=[call])}], MESSAGES, model=model)
    assert '{"city": null}' in found["text"]
    keys = [message | {"name": None, "tool_calls": None} for message in (OPENAI[0], OPENAI[3])]
    assert read_messages(keys, "messages") == [OPENAI[0], OPENAI[3]]


# --- the system turn -----------------------------------------------------------------------------


def test_a_system_column_is_the_system_turn(tmp_path, model):
    plain, turns = [OPENAI[0], OPENAI[3]], [SHAREGPT[0], SHAREGPT[3]]
    own = turn("system", "Be brief.")
    rows = [
        {"conversations": turns, "system": "Be brief."},
        {"messages": plain, "system": "Be brief."},
        {"messages": [own, *plain], "system": " Be brief.\n"},
        {"messages": [own, *plain], "system": None},
        {"prompt": plain[:1], "completion": plain[1:], "system": "Be brief."},
        {"messages": plain, "system": ""},
        {"messages": plain, "system": None},
    ]
    expected = theirs(model, [own, *plain])
    for settings in ((), ("data.system_prompt=Never.",)):
        for row in rows[:5]:
            form = "completion" if "prompt" in row else "messages"
            (found,) = shown(tmp_path, [row], f"data.format={form}", *settings, model=model)
            assert found["text"] == expected
    default = theirs(model, [turn("system", "Default."), *plain])
    found = shown(tmp_path, rows[5:], MESSAGES, "data.system_prompt=Default.", model=model)
    assert [one["text"] for one in found] == [default, default]


def test_two_system_turns_that_differ_are_refused_with_both(tmp_path, model):
    row = {"messages": [turn("system", "Be brief."), OPENAI[0]], "system": "Be long."}
    with pytest.raises(UserError, match=r":1: .*'system' holds 'Be long.'.*'Be brief.'.*keep one"):
        shown(tmp_path, [row], MESSAGES, model=model)
    with pytest.raises(UserError, match=r":1: the column 'system' must hold text, holds 3"):
        shown(tmp_path, [{"messages": OPENAI, "system": 3}], MESSAGES, model=model)


# --- named templates -----------------------------------------------------------------------------

NAMED = [
    {"name": "default", "template": "default{% for m in messages %} {{ m.content }}{% endfor %}"},
    {
        "name": "tool_use",
        "template": "tools{% for m in messages %} {{ m.content }}{% endfor %}{{ tools }}",
    },
    {"name": "rag", "template": "rag{% for m in messages %} {{ m.content }}{% endfor %}"},
]
PLAIN = [OPENAI[0], OPENAI[3]]


def named_model(make: Callable[..., Path], in_files: bool) -> Path:
    if not in_files:
        return make({"eos_token": "<|im_end|>", "chat_template": NAMED}, name="listed")
    folder = make({"eos_token": "<|im_end|>", "chat_template": "overruled"}, name="in-files")
    (folder / "additional_chat_templates").mkdir()
    for entry in NAMED:
        name = f"additional_chat_templates/{entry['name']}.jinja"
        path = folder / ("chat_template.jinja" if entry["name"] == "default" else name)
        path.write_text(entry["template"])
    return folder


@pytest.mark.parametrize("in_files", [False, True])
def test_rows_with_tools_take_tool_use(tmp_path, tokenizer_folder, in_files):
    folder = named_model(tokenizer_folder, in_files)
    rows = [{"messages": PLAIN, "tools": tools} for tools in ([TOOL], None, "[]", text_of([TOOL]))]
    found = shown(tmp_path, rows, MESSAGES, model=folder)
    for row, one, tools in zip(rows, found, ([TOOL], None, None, [TOOL]), strict=True):
        assert one["text"] == theirs(folder, row["messages"], tools)
    assert [one["text"].split()[0] for one in found] == ["tools", "default", "default", "tools"]


@pytest.mark.parametrize("in_files", [False, True])
def test_a_saved_tokenizer_keeps_its_named_templates(tmp_path, tokenizer_folder, in_files):
    """Also for transformers, and in one folder: those of a run hold no others."""
    folder = named_model(tokenizer_folder, in_files)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    assert all(path.is_file() for path in (tmp_path / "saved").iterdir())
    copy = Tokenizer.load(tmp_path / "saved")
    assert copy.fingerprint == tokenizer.fingerprint
    for tools in (None, [TOOL]):
        expected = theirs(folder, PLAIN, tools)
        assert copy.render_chat(PLAIN, tools=tools) == expected
        assert theirs(tmp_path / "saved", PLAIN, tools) == expected


def test_the_key_overrides_with_a_name_or_a_file(tmp_path, tokenizer_folder):
    (tmp_path / "mine.jinja").write_text("mine{% for m in messages %} {{ m.content }}{% endfor %}")
    for in_files in (False, True):
        folder = named_model(tokenizer_folder, in_files)
        for asked, name in (("rag", "rag"), (str(tmp_path / "mine.jinja"), "mine")):
            settings = (MESSAGES, f"data.chat_template={asked}")
            found = shown(tmp_path, [{"messages": PLAIN}], *settings, model=folder)
            assert found[0]["text"] == f"{name} Is it raining? Yes."
            tokenizer = Tokenizer.load(folder, asked)
            assert tokenizer.render_chat(PLAIN, tools=[TOOL]) == found[0]["text"]
            # What is trained with travels with the tokenizer's files.
            saved = tmp_path / f"{name}-{in_files}"
            tokenizer.save(saved)
            assert (saved / "chat_template.jinja").is_file()
            assert theirs(saved, PLAIN, [TOOL]) == found[0]["text"]
            assert Tokenizer.load(saved).render_chat(PLAIN, tools=[TOOL]) == found[0]["text"]
            assert tokenizer.fingerprint != Tokenizer.load(folder).fingerprint


def test_a_template_that_is_not_there_is_one_sentence_with_those_that_are(
    tmp_path, tokenizer_folder, model
):
    rows = [{"messages": PLAIN}]
    with pytest.raises(UserError, match=r"=tooluse: neither .*default, rag, tool_use\); did you m"):
        shown(
            *(tmp_path, rows, MESSAGES, "data.chat_template=tooluse"),
            model=named_model(tokenizer_folder, False),
        )
    with pytest.raises(UserError, match=r"=no/such\.jinja: neither a file nor .*has: default\)"):
        shown(tmp_path, rows, MESSAGES, "data.chat_template=no/such.jinja", model=model)
    bare = tokenizer_folder(name="bare")
    with pytest.raises(UserError, match=r"\(it has: none\)"):
        shown(tmp_path, rows, MESSAGES, "data.chat_template=default", model=bare)
    with pytest.raises(UserError, match=r"no chat template.*data\.chat_template"):
        shown(tmp_path, rows, MESSAGES, model=bare)
    no_default = tokenizer_folder({"chat_template": NAMED[1:]}, name="no-default")
    with pytest.raises(UserError, match=r"templates rag, tool_use and no default: name one as"):
        shown(tmp_path, rows, MESSAGES, model=no_default)
    (tmp_path / "latin.jinja").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"latin\.jinja: not UTF-8 at byte 2"):
        shown(tmp_path, rows, MESSAGES, f"data.chat_template={tmp_path}/latin.jinja", model=model)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"chat template of data\.chat_template=.*broken\.jinja"):
        shown(tmp_path, rows, MESSAGES, f"data.chat_template={tmp_path}/broken.jinja", model=model)
