"""What is trained of a conversation where comparing prefixes is no answer, through show_data.

Thinking that a template strips, weights, text behind an EOS, marked blocks, and turns or tools of
which a template writes nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, DEEPSEEK, GATHERED, LLAMA2, MISTRAL, QWEN3, STARCODER2, write_tokenizer
from shown import shown
from tokenised import tokenise

from data.examples import Examples
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from data.traces import holds
from files.errors import UserError
from train.log.samples import choose_samples
from train.show_data import main

END = "<|im_end|>"
MESSAGES = "data.format=messages"


def turns(*contents: str, **more: Any) -> list[dict[str, Any]]:
    """Return turns of user and assistant by turns."""
    roles = ("user", "assistant") * len(contents)
    return [
        {"role": role, "content": content} | more
        for role, content in zip(roles, contents, strict=False)
    ]


def trained(
    folder: Path,
    template: str,
    messages: list[dict[str, Any]],
    *settings: str,
    eos: str = END,
    bos: str | None = None,
    **columns: Any,
) -> list[str]:
    """Return the trained strings of one row."""
    one = row(folder, template, {"messages": messages, **columns}, *settings, eos=eos, bos=bos)
    return one["trained"]


def row(
    folder: Path,
    template: str,
    values: dict[str, Any],
    *settings: str,
    eos: str = END,
    bos: str | None = None,
) -> dict[str, Any]:
    model = write_tokenizer(folder / "model", "byte-level", template, bos, eos)
    (one,) = shown(folder, [values], MESSAGES, *settings, model=model)
    return one


def examples(folder: Path, template: str, *rows: list[dict[str, Any]], **settings: Any) -> Examples:
    tokenizer = Tokenizer.load(write_tokenizer(folder / "model", "byte-level", template, None, END))
    return tokenise(
        [{"messages": messages} for messages in rows],
        tokenizer,
        PromptFormat("messages"),
        **({"max_length": 1000} | settings),
    )


# --- what begins and ends an answer --------------------------------------------------------------

BEGINS = turns("Q", "Welcome.", "Q", "B")[1:]
DEFAULT_SYSTEM = (
    """\
{%- if messages and messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"""
    + CHATML
)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, "{{ bos_token }}" + CHATML, QWEN3])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_header_of_an_answer_that_comes_first_is_not_trained(
    tmp_path: Path, template: str, last: int
) -> None:
    expected = ["Welcome.<|im_end|>", "B<|im_end|>"]
    found = trained(tmp_path, template, BEGINS[:last], bos="<s>")
    assert [text.rstrip("\n") for text in found] == expected[: 1 + last // 3]


@pytest.mark.parametrize("answer", ["<div>x</div>", "<thinking hard>", "<", "plain"])
def test_an_answer_that_begins_like_the_rest_of_the_header_is_trained_whole(
    tmp_path: Path, answer: str
) -> None:
    """The generation prompt opens a tag of several tokens, and no answer does."""
    asked = "<|im_start|>assistant\\n"
    template = CHATML.replace(asked, asked + "<thought>\\n")
    found = trained(tmp_path, template, turns("Q", answer, "Q", answer))
    assert found == [f"{answer}{END}", f"{answer}{END}"]
    if len(answer) > 1:  # where something stands between an answer and its end
        apart = template.replace(
            "message.content + '<|im_end|>'", "message.content + ' <|im_end|>'"
        )
        found = trained(tmp_path, apart, turns("Q", answer, "Q", answer))
        assert found == [f"{answer} {END}", f"{answer} {END}"]


def test_a_short_answer_that_the_header_spells_too_is_no_end_of_the_header(tmp_path: Path) -> None:
    """The generation prompt and the turn go on behind CHATBOT, each in its own way."""
    template = (
        "{%- for m in messages %}{{- '<|header|>' + m.role + '|CHATBOT|<|begin|>' }}"
        "{{- m.content + '|' }}"
        "{{- '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|header|>assistant|CHATBOT|<think>' }}{%- endif %}"
    )
    found = trained(tmp_path, template, turns("Q", "B", "Q", "T"))
    assert found == ["<|begin|>B|<|im_end|>", "<|begin|>T|<|im_end|>"]


def test_a_header_that_no_prefix_shows_whole_is_known_by_its_part(tmp_path: Path) -> None:
    """What is asked for opens the thinking; the answer that comes first does not think."""
    asked = "<|im_start|>assistant\\n"
    template = DEFAULT_SYSTEM.replace(asked, asked + "<think>\\n")
    assert trained(tmp_path, template, BEGINS) == ["Welcome.<|im_end|>", "B<|im_end|>"]


@pytest.mark.parametrize("end", ["<|im_end|>\\n", ""], ids=["of its own", "behind the loop"])
@pytest.mark.parametrize("asked", ["<|im_start|>assistant\\n", ""])
def test_a_fixed_tail_with_ends_of_its_own_is_not_trained(
    tmp_path: Path, asked: str, end: str
) -> None:
    header = "<|im_start|>assistant\\n"
    tail = f"<|im_start|>system\\nWrite an action.<|im_end|>\\n{asked}"
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
        f"{{%- if not loop.last %}}{{{{- '<|im_end|>\\n' }}}}{{%- endif %}}"
        f"{{%- if loop.last %}}{{{{- '{end}' }}}}{{%- endif %}}{{%- endfor %}}"
        f"{'' if end else '<|im_end|>'}{{{{- '{tail}' }}}}"
        f"{{%- if add_generation_prompt %}}{{{{- '{'' if asked else header}' }}}}{{%- endif %}}"
    )
    assert trained(tmp_path, template, turns("Q", "A", "Q", "B"))[-1] == "B<|im_end|>"


def test_the_answer_of_a_tool_within_an_assistant_s_turn_is_not_trained(tmp_path: Path) -> None:
    """One turn of the model: what it calls, what the tool says, what it makes of it."""
    template = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}
{%- if m.tool_calls %}
{%- if not loop.last %}{{ '<result>' + messages[loop.index0 + 1].content + '</result>' }}{% endif %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{%- endif %}
{%- elif m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "SECRET"},
        {"role": "assistant", "content": "ok"},
    ]
    one = row(tmp_path, template, {"messages": messages})
    assert "SECRET" in one["text"] and not any("SECRET" in text for text in one["trained"])
    assert any("look" in text for text in one["trained"])
    assert one["trained"][-1].endswith("ok<|im_end|>")


def test_prefixes_that_a_template_refuses_are_not_needed(tmp_path: Path) -> None:
    refuses = """\
{%- set ns = namespace(asked=false) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = true %}{% endif %}{% endfor %}
{%- if not ns.asked %}{{ raise_exception('No user query found in messages.') }}{%- endif %}"""
    messages = [{"role": "system", "content": "S"}, *BEGINS]
    found = trained(tmp_path, refuses + CHATML, messages)
    assert found == ["Welcome.<|im_end|>", "B<|im_end|>"]


# --- thinking ------------------------------------------------------------------------------------

THOUGHT = turns("Q1", "<think>\nhm\n</think>\n\nA1", "Q2", "<think>\nso\n</think>\n\nA2")
# The same as QWEN3 in a form that does not tell where its turns are.
SILENT = """\
{%- macro all(messages) %}{% for message in messages %}
{%- set content = message.content %}
{%- if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}{% endmacro %}
{{- all(messages) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_an_answer_is_trained_as_it_stands_without_its_thinking(tmp_path: Path) -> None:
    one = row(tmp_path, QWEN3, {"messages": THOUGHT})
    assert one["trained"] == [f"A1{END}", f"<think>\nso\n</think>\n\nA2{END}"]
    assert (one["assistant_turns"], one["untrained_turns"], one["left_out_turns"]) == (2, 0, 0)


def test_a_header_that_begins_to_think_is_a_header_as_far_as_it_stands(tmp_path: Path) -> None:
    """Of `<|Assistant|><think>` the text has the first token alone; `<b>` is not `<think>`."""
    messages = turns("Q1", "<b>", "Q2", "<think>\nso\n</think>A2")
    assert trained(tmp_path, DEEPSEEK, messages, eos="</s>") == ["<b></s>", "A2</s>"]


def test_thinking_that_a_template_writes_itself_is_trained(tmp_path: Path) -> None:
    template = QWEN3.replace("\\n' + content }}", "\\n<think>\\n\\n</think>\\n\\n' + content }}")
    assert template != QWEN3
    expected = f"<think>\n\n</think>\n\nA{END}"
    assert trained(tmp_path, template, turns("Q", "A")) == [expected]


def test_a_turn_that_is_all_thinking_may_vanish(tmp_path: Path) -> None:
    messages = turns("Q1", "<think>\nhm\n</think>", "Q2", "A2")
    assert trained(tmp_path, QWEN3, messages) == [END, f"A2{END}"]


def test_the_system_turn_may_move(tmp_path: Path) -> None:
    """So that no prefix is a prefix of the whole, and all answers were untrained."""
    messages = [{"role": "system", "content": "S"}, *turns("Q1", "A1", "Q2", "A2", "Q3", "A3")]
    one = row(tmp_path, MISTRAL, {"messages": messages}, bos="<s>", eos="</s>")
    assert one["trained"] == [" A1</s>", " A2</s>", " A3</s>"]
    assert one["text"].endswith("[INST] S\n\nQ3[/INST] A3</s>")


def test_thinking_that_a_template_leaves_out_is_counted(tmp_path: Path) -> None:
    beside = turns("Q", "A", "Q", "A")
    beside[1] = {**beside[1], "reasoning_content": "because of it"}
    thinks = "{%- if message.reasoning_content %}{{ message.reasoning_content }}{% endif %}"
    for template, messages, lost in (
        (QWEN3, THOUGHT, 1),  # of an earlier turn
        (DEEPSEEK, THOUGHT, 2),
        (CHATML, THOUGHT, 0),
        (CHATML, beside, 1),
        (
            CHATML.replace("{{- '<|im_start|>' + message.role", thinks + "{{- message.role"),
            beside,
            0,
        ),
        (CHATML, turns("Q", "<think>\n\n</think>\n\nA"), 0),
    ):
        counts = examples(tmp_path, template, messages).counts
        assert counts.thoughtless_turns == lost, template


def test_turns_that_cannot_be_found_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = row(tmp_path, SILENT, {"messages": THOUGHT})
    assert one["trained"] == [f"<think>\nso\n</think>\n\nA2{END}"]
    assert (one["assistant_turns"], one["untrained_turns"]) == (2, 1)
    model = tmp_path / "model"
    assert main([f"data.train={tmp_path / 'rows.jsonl'}", f"model.path={model}", MESSAGES]) == 0
    said = "1 of 2 assistant turns untrained, 1 of 2 assistant turns without their thinking\n"
    assert f"targets, {said}" in capsys.readouterr().out
    counts = examples(tmp_path, SILENT, THOUGHT, turns("Q", "A"), THOUGHT[:3]).counts
    assert (counts.assistant_turns, counts.untrained_turns) == (4, 2)


def test_after_an_answer_that_cannot_be_found_no_eos_is_due(tmp_path: Path) -> None:
    """It would end the answer before it, and cut off what stands between them.

    The template says what the last answer says, so that it may have left a trace.
    """
    template = (
        "{%- macro all(messages) %}{% for m in messages %}"
        "{{ '<' + m.role + '>' + ('' if loop.length == 4 and loop.last else m.content) }}"
        "{% endfor %}{% endmacro %}A1 or A2?{{ all(messages) }}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    one = row(tmp_path, template, {"messages": turns("Q1", "A1", "Q2", "A2")})
    assert one["trained"] == ["A1"] and one["untrained_turns"] == 1
    assert one["text"] == "A1 or A2?<user>Q1<assistant>A1<user>Q2<assistant>"
    assert one["input_ids"][-1] != one["labels"][-1]


def test_an_answer_of_nothing_but_space_is_not_taken_for_one_that_is_nowhere(
    tmp_path: Path,
) -> None:
    """A template that gathers its text writes nothing in its loop, and so no blank answer."""
    messages = turns("Q1", " \n", "Q2", "A2")
    assert trained(tmp_path, GATHERED, messages) == [f" \n{END}", f"A2{END}"]


def test_a_header_behind_turns_that_move_is_still_a_header(tmp_path: Path) -> None:
    template = MISTRAL.replace("' ' + message.content", "'<|Assistant|>' + message.content")
    template += "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    messages = [{"role": "system", "content": "S"}, *turns("Q1", "A1", "Q2", "A2", "Q3", "A3")]
    found = trained(tmp_path, template, messages, bos="<s>", eos="</s>")
    assert found == ["A1</s>", "A2</s>", "A3</s>"]


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "on"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {"training": True}),
        ({"loss": False}, {"loss": True}),
        ({"weight": 0, "train": None}, {"weight": None}),
    ],
)
def test_a_message_is_kept_out_of_the_loss(tmp_path: Path, off: dict, on: dict) -> None:
    first, wrong, second, right = turns("Q1", "wrong", "Q2", "right")
    messages = [first, wrong | off, second, right | on]
    one = row(tmp_path, CHATML, {"messages": messages})
    assert one["trained"] == [f"right{END}"]
    assert (one["assistant_turns"], one["untrained_turns"], one["left_out_turns"]) == (2, 0, 1)
    renamed = [{"from": m.pop("role"), "value": m.pop("content")} | m for m in messages]
    again = row(tmp_path, CHATML, {"conversations": renamed})
    assert (again["input_ids"], again["labels"]) == (one["input_ids"], one["labels"])


@pytest.mark.parametrize("template", [CHATML, MISTRAL, QWEN3, GATHERED])
def test_the_last_answer_alone_is_what_weights_on_the_others_leave(
    tmp_path: Path, template: str
) -> None:
    messages = turns("Q1", "A1", "Q2", "A2", "Q3", "A3")
    one = row(tmp_path, template, {"messages": messages}, "data.train_on=last")
    messages[1]["weight"] = messages[3]["weight"] = 0
    other = row(tmp_path, template, {"messages": messages})
    assert one["labels"] == other["labels"]
    assert [part[:2] for part in map(str.strip, one["trained"])] == ["A3"]
    assert one["left_out_turns"] == 2
    messages[3]["weight"], messages[5]["weight"] = 1, 0  # of those that the row trains
    before = row(tmp_path, template, {"messages": messages}, "data.train_on=last")
    assert [part[:2] for part in map(str.strip, before["trained"])] == ["A2"]


def test_a_template_does_not_see_weights(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m | tojson }}" + "<|im_end|>{% endfor %}"
    one = row(tmp_path, template, {"messages": turns("Q", "A", train=False)[:1] + turns("Q", "A")})
    assert "train" not in one["text"] and "weight" not in one["text"]


def test_weights_hold_where_all_of_the_text_is_trained(tmp_path: Path) -> None:
    messages = turns("Q1", "wrong", "Q2", "right")
    messages[1]["weight"] = 0
    messages[2]["train"] = False
    header = "<|im_start|>assistant\n"
    parts = trained(tmp_path, CHATML, messages, "data.completion_only=false")
    assert parts == [f"<|im_start|>user\nQ1{END}\n{header}", f"{header}right{END}\n"]


@pytest.mark.parametrize("completion_only", ["true", "false"])
def test_after_an_answer_that_is_left_out_no_eos_is_due(
    tmp_path: Path, completion_only: str
) -> None:
    template = CHATML.replace("<|im_end|>", "<|end|>")
    messages = turns("Q1", "A1", "Q2", "wrong")
    messages[3]["weight"] = 0
    one = row(tmp_path, template, {"messages": messages}, f"data.completion_only={completion_only}")
    assert "A1<|end|>\n" in one["trained"][0] and END not in "".join(one["trained"])
    assert one["text"].endswith("wrong<|end|>\n") and one["labels"][-1] == -100


def test_a_system_turn_that_is_added_moves_no_weight(tmp_path: Path) -> None:
    messages = turns("Q1", "wrong", "Q2", "right")
    messages[1]["weight"] = 0
    assert trained(tmp_path, CHATML, messages, "data.system_prompt=S") == [f"right{END}"]


def test_weights_in_a_completion(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "byte-level", CHATML, None, END)
    completion = turns("Q2", "A2", "Q3", "A3")[1:]
    completion[0]["weight"] = 0
    values = {"prompt": turns("Q1", "A1", "Q2"), "completion": completion}
    (one,) = shown(tmp_path, [values], "data.format=completion", model=model)
    assert one["trained"] == [f"<|im_start|>user\nQ3{END}\n<|im_start|>assistant\nA3{END}"]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"weight": 0.5}, "'weight' must be 0 or 1, is 0.5"),
        ({"weight": True}, "'weight' must be 0 or 1, is True"),
        ({"weight": "0"}, "'weight' must be 0 or 1, is '0'"),
        ({"train": 0}, "'train' must be true or false, is 0"),
        ({"training": "no"}, "'training' must be true or false, is 'no'"),
        ({"train_detail": []}, "'train_detail' weights parts of a message"),
        ({"role": "user", "train": True}, "turn 2 (user): 'train' is true, and only turns of the"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, message: dict, sentence: str) -> None:
    messages = turns("Q1", "A1")
    messages[1] |= message
    with pytest.raises(UserError, match=r"rows\.jsonl:1: turn 2 \((user|assistant)\): ") as caught:
        trained(tmp_path, CHATML, messages)
    assert sentence in str(caught.value)


# --- the end of a span ---------------------------------------------------------------------------


def test_what_stands_behind_the_eos_is_not_trained(tmp_path: Path) -> None:
    one = row(tmp_path, STARCODER2, {"messages": turns("Q1", "A1", "Q2", "A2")}, eos="</s>")
    assert one["trained"] == ["A1</s>", "A2</s>"]
    assert one["text"].endswith("A2</s>\n\n### Response\n")


def test_a_header_at_the_end_gives_way_to_the_eos_that_is_due(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}<assistant>"
    one = row(tmp_path, template, {"messages": turns("Q1", "A1", "Q2", "A2")})
    assert one["trained"] == ["A1;", f"A2;{END}"]
    none = row(
        tmp_path, template, {"messages": turns("Q1", "A1", "Q2", "A2")}, "data.append_eos=false"
    )
    assert none["trained"] == ["A1;", "A2;"]


def test_an_eos_that_is_spoken_of_ends_nothing(tmp_path: Path) -> None:
    messages = turns("Q1", f"print('{END}')\nend", "Q2", f"{END}\nend")
    assert trained(tmp_path, CHATML, messages) == [
        f"print('{END}')\nend{END}",
        f"{END}\nend{END}",
    ]
    assert trained(tmp_path, CHATML.replace(END, "<|end|>"), messages) == [
        f"print('{END}')\nend<|end|>\n",
        f"{END}\nend<|end|>\n{END}",
    ]


@pytest.mark.parametrize("ending", ["", "\\n", "<|eot|>"])
def test_an_eos_behind_the_loop_is_trained(tmp_path: Path, ending: str) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ '" + ending + "' + eos_token }}"
        "{% endif %}"
    )
    expected = "A" + ending.replace("\\n", "\n") + END
    assert trained(tmp_path, template, turns("Q", "A")) == [expected]


def test_only_a_lost_eos_is_counted_as_lost(tmp_path: Path) -> None:
    """The line break behind it may be cut off: no target is."""
    whole = examples(tmp_path, CHATML, turns("Q", "A"))
    length = len(whole[0].input_ids)
    assert [
        examples(tmp_path, CHATML, turns("Q", "A"), max_length=length - cut).counts.eos_lost
        for cut in (0, 1, 2)
    ] == [0, 0, 1]


# --- marked blocks -------------------------------------------------------------------------------


def marked(block: str, behind: str = "") -> str:
    """Return a template that marks what stands in `block`."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% generation %}{{ " + block + " }}{% endgeneration %}{{ '" + behind + "' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def test_marked_blocks_are_trained_as_they_are(tmp_path: Path) -> None:
    messages = turns("Q1", "A1", "Q2", "A2")
    with_break = marked("m.content + '<|im_end|>\\n'")
    assert trained(tmp_path, with_break, messages) == [f"A1{END}\n", f"A2{END}\n"]
    # A model that never learns to end a turn is nobody's wish.
    without_end = marked("m.content", "<|im_end|>\\n")
    assert trained(tmp_path, without_end, messages) == [f"A1{END}", f"A2{END}"]
    messages[1]["weight"] = 0
    assert trained(tmp_path, with_break, messages) == [f"A2{END}\n"]
    assert trained(tmp_path, with_break, messages[:1] + turns("", "A2")[1:]) == [f"A2{END}\n"]


def test_a_block_outside_of_a_loop_tells_nothing(tmp_path: Path) -> None:
    template = (
        "Q{{ messages[0].content }}A{% if messages | length > 1 %}"
        "{% generation %}{{ messages[1].content }}{% endgeneration %}{% endif %}"
    )
    one = row(tmp_path, template, {"messages": turns("1", "2")})
    assert one["trained"] == [f"2{END}"] and one["untrained_turns"] == 0


def test_answers_that_a_template_does_not_mark_are_counted(tmp_path: Path) -> None:
    last_alone = marked("m.content + '<|im_end|>\\n'")
    last_alone = last_alone.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    one = row(tmp_path, last_alone, {"messages": turns("Q1", "A1", "Q2", "A2")})
    assert one["trained"] == [f"A2{END}\n"]
    assert (one["assistant_turns"], one["untrained_turns"]) == (2, 1)


# --- turns and tools of which nothing is written -------------------------------------------------

IGNORES = CHATML.replace(
    "{%- for message in messages %}",
    "{%- for message in messages if message.role in ('user', 'assistant') %}",
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("completion_only", ["true", "false"])
def test_a_turn_without_a_trace_is_refused(
    tmp_path: Path, number: int, completion_only: str
) -> None:
    messages = turns("Q1", "A1")
    messages.insert(number, {"role": "tool", "content": "It\n rains"})
    with pytest.raises(UserError) as caught:
        trained(tmp_path, IGNORES, messages, f"data.completion_only={completion_only}")
    assert f"rows.jsonl:1: turn {number + 1} (tool) leaves no trace" in str(caught.value)


def test_a_system_prompt_without_a_trace_is_refused_and_turns_keep_their_numbers(
    tmp_path: Path,
) -> None:
    setting = "data.system_prompt=Be brief."
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the system turn .*data\.system_prompt\) leaves no trace"
    ):
        trained(tmp_path, IGNORES, turns("Q1", "A1"), setting)
    messages = [*turns("Q1", "A1"), {"role": "tool", "content": "rain"}]
    template = IGNORES.replace("('user',", "('system', 'user',")
    with pytest.raises(UserError, match=r"turn 3 \(tool\) leaves no trace"):
        trained(tmp_path, template, messages, setting)


def test_what_a_template_writes_in_its_own_way_has_left_a_trace(tmp_path: Path) -> None:
    """Folded into another turn, trimmed, as JSON, with other white space."""
    messages = [{"role": "system", "content": "Be  brief.\nPlease."}, *turns(" Q1 ", "A1")]
    assert trained(tmp_path, LLAMA2, messages, bos="<s>", eos="</s>") == [" A1 </s>"]
    answer = {"role": "tool", "content": '{"rain": true}\n{"wind": "é"}'}
    template = CHATML.replace("message.content +", "(message.content | tojson) +")
    assert trained(tmp_path, template, [*turns("Q")[:1], answer, *turns("", "A")[1:]]) == [
        f'"A"{END}'
    ]
    message = {"role": "user", "content": "a\tb\n  c"}
    assert holds("<user>a b c", message) and not holds("<user>a c", message)


def test_empty_turns_leave_none(tmp_path: Path) -> None:
    messages = [{"role": "tool", "content": " "}, *turns("Q1", "")]
    assert trained(tmp_path, IGNORES, messages) == [END]


@pytest.mark.parametrize("template", [CHATML, CHATML + "{% if tools and false %}{% endif %}"])
def test_tools_without_a_trace_are_refused(tmp_path: Path, template: str) -> None:
    sentence = r"rows\.jsonl:1: the tool 'get_weather' leaves no trace .* leave the column 'tools'"
    with pytest.raises(UserError, match=sentence):
        trained(tmp_path, template, turns("Q", "A"), tools=TOOLS)
    assert trained(tmp_path, template, turns("Q", "A"), tools=[]) == [f"A{END}"]


def test_a_call_of_a_tool_is_no_trace_of_its_description(tmp_path: Path) -> None:
    """The name stands in the text, and yet the model is never told what it may call."""
    calls = [{"type": "function", "function": TOOLS[0]["function"]}]
    messages = [*turns("Q")[:1], {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(UserError, match="the tool 'get_weather' leaves no trace"):
        trained(tmp_path, QWEN3, messages, tools=TOOLS)
    template = "{{ tools | tojson if tools else '' }}" + QWEN3
    (answer,) = trained(tmp_path, template, messages, tools=TOOLS)
    assert answer.startswith('<call>{"name": "get_weather"') and answer.endswith(f"</call>{END}")


def test_calls_without_a_trace_are_refused(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": TOOLS[0]["function"]}]
    messages = [
        *turns("Q")[:1],
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
    ]
    with pytest.raises(UserError, match=r"turn 2 \(assistant\) leaves no trace"):
        trained(tmp_path, CHATML, messages)


# --- prompts, samples, counts --------------------------------------------------------------------


@pytest.mark.parametrize("only", [True, False])
def test_a_sample_of_a_conversation_is_its_first_answer(tmp_path: Path, only: bool) -> None:
    folder = write_tokenizer(tmp_path, "byte-level", CHATML, None, END)
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "system", "content": "S"}, *turns("Q1", "A1", "Q2", "A2")]
    data = tokenise(
        [{"messages": messages}],
        tokenizer,
        PromptFormat("messages", completion_only=only),
        max_length=1000,
    )
    ((sample, prompt_ids),) = choose_samples(data, tokenizer, 1)
    prompt = f"<|im_start|>system\nS{END}\n<|im_start|>user\nQ1{END}\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids, skip_special_tokens=False) == prompt
    assert sample.reference == ("A1" if only else "A1\nuser\nQ2\nassistant\nA2\n")


def test_turns_are_counted_once_for_pieces_and_subsets(tmp_path: Path) -> None:
    messages = turns("Q1", "A1", "Q2", "A2 " * 20)
    messages[1]["weight"] = 0
    data = examples(tmp_path, SILENT, THOUGHT, messages, max_length=6, on_overflow="split")
    assert np.bincount(data.rows).max() > 3
    counts = data.counts
    assert (counts.assistant_turns, counts.untrained_turns, counts.left_out_turns) == (4, 1, 1)
    both = [data.subset(np.flatnonzero(data.rows == number)).counts for number in (0, 1)]
    assert [(c.assistant_turns, c.untrained_turns, c.left_out_turns) for c in both] == [
        (2, 1, 0),
        (2, 0, 1),
    ]


# --- traces that others leave --------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [
            *turns("How much is 2+3?", "I look."),
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "It is 5."},
        ],
        [
            {"role": "system", "content": "Answer in French"},
            *turns("Answer in French: hi", "Salut"),
        ],
        [
            turns("Q")[0],
            {
                "role": "assistant",
                "content": "ok",
                "tool_calls": [{"type": "function", "function": {"name": "ok", "arguments": {}}}],
            },
        ],
    ],
    ids=["a tool's answer", "a system turn", "a call"],
)
def test_what_others_say_alike_is_no_trace(tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="leaves no trace"):
        trained(tmp_path, IGNORES, messages)


def test_a_tool_that_is_described_has_not_been_called(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    messages = [turns("Q")[0], {"role": "assistant", "content": "I do.", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    with pytest.raises(UserError, match=r"turn 2 \(assistant\) leaves no trace"):
        trained(tmp_path, "{{- tools | tojson }}" + IGNORES, messages, tools=[tool])


def test_the_same_words_twice_are_two_traces(tmp_path: Path) -> None:
    messages = turns("hi", "hi", "hi there, hi", "hi")
    assert trained(tmp_path, IGNORES, messages) == ["hi<|im_end|>", "hi<|im_end|>"]
    assert trained(tmp_path, SILENT, messages) == ["hi<|im_end|>", "hi<|im_end|>"]
    system = [{"role": "system", "content": "hi"}, *messages]
    assert len(trained(tmp_path, LLAMA2, system, eos="</s>", bos="<s>")) == 2
