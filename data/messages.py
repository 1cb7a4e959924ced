"""A row's conversation: its turns, their roles and the tools, whichever way a data set writes them.

Data sets name roles and keys in many ways, keep structures as JSON text where their files have no
others, and fill in null for what a turn never had. What comes out has one form, OpenAI's, which
chat templates expect: `role`, `content`, `tool_calls` with `arguments` as an object. What has no
place in it is refused, with the turn's number: a role that a template does not know leaves no
trace in the text, and what follows would be trained without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from files.errors import UserError, did_you_mean, shown
from files.strict_json import parse_json

Messages = list[dict[str, Any]]

# Role → what data sets call it, in small letters and with `_` for a space or a hyphen.
_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "ai", "bot", "chatbot", "model", "bing", "bard"),
        *("function_call", "tool_call"),
    ),
    "system": ("system",),
    "developer": ("developer",),
    "tool": (
        *("tool", "observation", "function", "function_response", "tool_response"),
        *("function_result", "tool_result", "ipython"),
    ),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
# The turns of ShareGPT's dialects whose whole text is a call: {"name": …, "arguments": …}.
_CALL_TURNS = ("function_call", "tool_call")
_THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
# What the parts of a content may be of, by OpenAI, Anthropic and transformers.
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = (
    *("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file"),
    *("input_file", "document", "refusal", "thinking", "tool_use", "tool_result"),
)


def read_conversation(values: Mapping[str, Any]) -> Messages:
    """Return the messages of a row of `data.format=messages`, from whichever column has them.

    Raises:
        UserError: As `read_messages`, or two columns hold different conversations.
    """
    there = {name: values[name] for name in CONVERSATION_COLUMNS if name in values}
    # An empty one beside another is a column that this row does not use.
    found = {name: value for name, value in there.items() if value} or there
    if not found:
        columns = ", ".join(f"'{column}'" for column in values) or "none"
        raise UserError(
            "no column 'messages' or 'conversations', which data.format=messages asks for; "
            f"the row has {columns}{did_you_mean('messages', values)}"
        )
    conversations = {name: read_messages(value, name) for name, value in found.items()}
    first, *others = conversations
    for other in others:
        if conversations[other] != conversations[first]:
            raise UserError(
                f"the columns '{first}' and '{other}' hold different conversations; keep one"
            )
    return conversations[first]


def with_system_turn(
    messages: Messages, values: Mapping[str, Any], system_prompt: str | None
) -> Messages:
    """Return `messages` after the system turn that the row's column `system` holds.

    Without one, it is the messages' own, and without that `system_prompt`.

    Raises:
        UserError: The column holds no text, or another one than the messages' own system turn.
    """
    given = values.get("system")
    if given is not None and not isinstance(given, str):
        raise UserError(f"the column 'system' must hold text, holds {describe(given)}")
    if messages[0]["role"] in ("system", "developer"):
        own = messages[0]["content"]
        if given and given.strip() not in ("", own.strip()):
            raise UserError(
                f"the column 'system' holds {describe(given)} and the first message, a "
                f"{messages[0]['role']} turn, {describe(own)}; keep one of them"
            )
        return messages
    text = given if given and given.strip() else system_prompt
    return messages if text is None else [{"role": "system", "content": text}, *messages]


def read_messages(value: Any, column: str) -> Messages:
    """Return a list of messages in the one form.

    A role is told from `role`, `from` or `speaker`, whatever its capitals, and a content from
    `content`, `value` or `text`; a content of several text parts is joined. A turn
    `function_call`, and OpenAI's earlier key of that name, become `tool_calls`. Keys that hold null
    are left out: files with columns write them for every turn that lacks what another has.

    Args:
        value: The list, or its JSON text.
        column: The column, for messages.

    Raises:
        UserError: It is no list of messages; a role is unknown; a content is no text; or a call is
            not a name with arguments. The number of the turn is named.
    """
    turns = _decoded(value)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"the column '{column}' must hold a list of messages, or its JSON text, holds "
            f"{_undecoded(value)}"
        )
    return [
        _message(_decoded(turn), f"message {number} of '{column}'")
        for number, turn in enumerate(turns, start=1)
    ]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, or JSON text of one.

    A text is one only if each item has a role and a content: prompts may begin with a bracket.
    """
    if isinstance(value, list):
        return True
    turns = _decoded(value)
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(turn, dict)
            and any(isinstance(turn.get(key), str) for key in ROLE_KEYS)
            and any(key in turn for key in (*CONTENT_KEYS, "tool_calls"))
            for turn in turns
        )
    )


def read_tools(values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the descriptions of the tools that a row offers; None where it offers none.

    They stand in the column `tools`, or in OpenAI's earlier `functions`, as a list or as JSON text.

    Raises:
        UserError: The column holds something else than a list of objects.
    """
    for column in ("tools", "functions"):
        value = values.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        tools = _decoded(value)
        if not isinstance(tools, list):
            raise UserError(
                f"the column '{column}' must hold a list of tools, or its JSON text, holds "
                f"{_undecoded(value)}"
            )
        described = [
            _tool(tool, f"tool {number} of '{column}'")
            for number, tool in enumerate(tools, start=1)
        ]
        if described and column == "functions":
            return [{"type": "function", "function": function} for function in described]
        if described:
            return described
    return None


def describe(value: Any) -> str:
    """Return a value for a message, cut where it is long, with its type."""
    if value is None:
        return "null"
    if isinstance(value, Sequence | Mapping) and not value:
        return f"an empty {type(value).__name__}"
    return f"{shown(value, 40)} ({type(value).__name__})"


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return one turn in the one form, its keys in their order."""
    if not isinstance(turn, dict):
        raise _no_message(where, turn)
    role_key = _key(turn, ("role", "from"), where) or "speaker"
    content_key = _key(turn, ("content", "value"), where) or "text"
    name, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(name, str):
        raise _no_message(where, turn)
    role = _ROLES.get(_spelled(name))
    if role is None:
        known = "; ".join(f"{role}: {', '.join(names)}" for role, names in _NAMES.items())
        raise UserError(
            f"{where} has the role '{name}', which is none of those that are read ({known}); "
            "rename it, or drop the turn"
        )
    if _spelled(name) in _CALL_TURNS:
        calls, content = _read_calls(content, where), None
    else:
        calls = _calls(turn, where)
    if calls and role != "assistant":
        raise UserError(f"{where} calls tools in a {role} turn; only an assistant's turn may")
    renamed: dict[Any, Any] = {role_key: "role", content_key: "content"}
    message = {renamed.get(key, key): item for key, item in turn.items() if item is not None}
    for key in ("from", "value", "tool_calls", "function_call"):
        message.pop(key, None)
    message["role"] = role
    if calls and content is None:
        message.pop("content", None)  # as transformers leaves out what is null
    else:
        message["content"] = _text(content, role, where)
    if calls:
        message["tool_calls"] = calls
    return _with_thinking(message)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose thinking has each of the names that a template may ask for.

    As transformers does: `reasoning_content` is filled from the others, and gpt-oss's `thinking`.
    """
    thinking = next((message[key] for key in _THINKING_KEYS if key in message), None)
    if thinking is None:
        return message
    return {"thinking": thinking, **message, "reasoning_content": thinking}


def other_forms(messages: Messages) -> Iterator[Messages]:
    """Yield the other forms in which messages that call tools are written.

    A turn that calls and says nothing has no content in transformers, and null in OpenAI's form;
    arguments are objects in transformers, and JSON text in OpenAI's form. Templates are written for
    one or the other.
    """
    if not any("tool_calls" in message for message in messages):
        return
    for null, text in ((True, False), (False, True), (True, True)):
        yield [_in_form(message, null, text) for message in messages]


def _in_form(message: dict[str, Any], null: bool, text: bool) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    changed = dict(message)
    if null and not message.get("content"):
        changed["content"] = None
    if text:
        changed["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
    return changed


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text_arguments(call["function"])}
    if "arguments" not in call:
        return call
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


def read_variables(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row tells its chat template besides messages and tools, as TRL's rows do.

    Raises:
        UserError: The column `chat_template_kwargs` holds no object, or names what a template is
            given in any case.
    """
    given = values.get("chat_template_kwargs")
    variables = {} if given is None else _decoded(given)
    if not isinstance(variables, dict):
        raise UserError(
            "the column 'chat_template_kwargs' must hold an object, or its JSON text, holds "
            f"{_undecoded(given)}"
        )
    for name in ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"):
        if name in variables:
            raise UserError(
                f"the column 'chat_template_kwargs' names '{name}', which a template has from the "
                "row itself; leave it out"
            )
    return variables


def _key(turn: dict[str, Any], names: tuple[str, str], where: str) -> str | None:
    """Return which of two names of one thing a turn uses; None where it uses neither."""
    given = [name for name in names if turn.get(name) is not None]
    if len(given) == 2 and _same(turn[names[0]]) != _same(turn[names[1]]):
        raise UserError(
            f"{where} has {describe(turn[names[0]])} as its {names[0]} and "
            f"{describe(turn[names[1]])} as its {names[1]}; keep one of them"
        )
    return given[0] if given else None


def _same(value: Any) -> Any:
    """Return a value as it is compared with its other name's: roles by what they mean."""
    return _ROLES.get(_spelled(value), value) if isinstance(value, str) else value


def _spelled(name: str) -> str:
    """Return how a role is spelled in the table."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _no_message(where: str, turn: Any) -> UserError:
    return UserError(
        f"{where} must be an object with a role (user, assistant, …) and a content, is "
        f"{describe(turn)}"
    )


def _text(content: Any, role: str, where: str) -> str:
    """Return a content as text: parts joined, and what a tool answers in JSON written as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(_is_part(part) for part in content):
        return "".join(
            _part(part, f"part {number} of {where}") for number, part in enumerate(content, start=1)
        )
    if role == "tool" and isinstance(content, list | dict):
        return json.dumps(content, ensure_ascii=False)
    raise UserError(f"{where} must have a text as its content, has {describe(content)}")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in (*_TEXT_PARTS, *_OTHER_PARTS)


def _part(part: dict[str, Any], where: str) -> str:
    if part["type"] not in _TEXT_PARTS:
        raise UserError(
            f"{where} is of the type '{part['type']}', and text alone can be trained; drop the "
            "part or the row"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise UserError(f"{where} must have a text, has {describe(text)}")
    return text


def _calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the calls that a turn's keys hold."""
    given = turn.get("tool_calls") or []
    calls = _decoded(given)
    if not isinstance(calls, list):
        raise UserError(
            f"{where} must have a list as its tool_calls, or its JSON text, has {_undecoded(given)}"
        )
    if not calls and turn.get("function_call"):
        return _read_calls(turn["function_call"], where)
    return [_call(call, f"tool call {n} of {where}") for n, call in enumerate(calls, start=1)]


def _read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls that an object, a list of them, or the JSON text of either describes."""
    calls = _decoded(value)
    calls = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    if not calls:
        raise _no_call(where, value)
    return [
        call if "function" in call else {"type": "function", "function": call} for call in calls
    ]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call, whose function stands in it or is itself, with what is null left out."""
    decoded = _decoded(call)
    if isinstance(decoded, dict) and decoded.get("function") is not None:
        kept = {key: value for key, value in decoded.items() if value is not None}
        return {**kept, "function": _function(decoded["function"], where)}
    return _function(call, where)


def _function(function: Any, where: str) -> dict[str, Any]:
    """Return the function that is called, with its arguments as an object."""
    decoded = _decoded(function)
    if not isinstance(decoded, dict) or not isinstance(decoded.get("name"), str):
        raise _no_call(where, function)
    decoded = {key: value for key, value in decoded.items() if value is not None}
    if "arguments" in decoded:
        given = decoded["arguments"]
        # A call without arguments is written "" by some.
        arguments = {} if isinstance(given, str) and not given.strip() else _decoded(given)
        if not isinstance(arguments, dict):
            raise UserError(
                f"{where} must have an object as its arguments, or its JSON text, has "
                f"{_undecoded(given)}"
            )
        decoded["arguments"] = arguments
    return decoded


def _no_call(where: str, call: Any) -> UserError:
    return UserError(
        f'{where} must call a tool as {{"name": "f", "arguments": {{}}}}, or in its JSON text, '
        f"has {_undecoded(call)}"
    )


def _tool(
    tool: Any, where: str, levels: Sequence[str] = ("function", "parameters")
) -> dict[str, Any]:
    """Return the description of a tool, decoded where it or one of its levels is JSON text."""
    decoded = _decoded(tool)
    if not isinstance(decoded, dict):
        raise UserError(
            f"{where} must be an object that describes a function, or its JSON text, is "
            f"{_undecoded(tool)}"
        )
    for number, key in enumerate(levels, start=1):
        if decoded.get(key) is not None:
            level = _tool(decoded[key], f"the {key} of {where}", levels[number:])
            decoded = {**decoded, key: level}
    return decoded


def _decoded(value: Any) -> Any:
    """Return what the JSON text of a list or an object holds; any other value as it is."""
    return _decode(value)[0]


def _undecoded(value: Any) -> str:
    """Describe a value that is not what it must be, and why where it is no JSON."""
    reason = _decode(value)[1]
    return f"{describe(value)}, which is {reason}" if reason else describe(value)


def _decode(value: Any) -> tuple[Any, str]:
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value, ""
    try:
        return _parsed(value), ""
    except UserError as error:
        return value, str(error)


def _parsed(text: str) -> Any:
    value = parse_json(text, "no JSON")
    # As in a row itself: half of a pair, which an escape can smuggle in, is no character.
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("no JSON: it holds half of a surrogate pair") from None
    return value
