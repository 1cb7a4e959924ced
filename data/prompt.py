"""Rows to text: the four formats, and which part of the text is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from data.source import Row
from data.spans import Chat, Messages, Rendered, Span, render_chats, without_weights
from data.tokenizer import Tokenizer
from files.errors import UserError, did_you_mean

FORMATS = ("text", "template", "completion", "messages")
# Names of other layouts: {"conversations": [{"from": "human", "value": …}]}.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_PLACEHOLDER = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes text (configuration keys `data.*`), for training and generation alike.

    Attributes:
        format: `text`: one column. `template`: `prompt_template` and `completion_template`.
            `completion`: the columns `prompt` and `completion`, as text or as lists of messages.
            `messages`: the column `messages` (or `conversations`), through the chat template.
        text_field: Column of `text`.
        prompt_template: Text with `{column}` placeholders; `{{` and `}}` are braces.
        completion_template: The same, for the part that is trained.
        system_prompt: Stands first, with a blank line after it; under `messages` it is the system
            turn, unless the row has one.
        completion_only: Train the completion (the assistant's turns) alone. None: where there is a
            prompt before it.
        append_eos: Put EOS after the text, and train it.

    Raises:
        UserError: A value that is not allowed, or one that lacks another.
    """

    format: str = "text"
    text_field: str = "text"
    prompt_template: str | None = None
    completion_template: str | None = None
    system_prompt: str | None = None
    completion_only: bool | None = None
    append_eos: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(
                f"data.format: '{self.format}' is not one of {', '.join(FORMATS)}"
                f"{did_you_mean(self.format, FORMATS)}"
            )
        if self.format == "template":
            if self.completion_template is None:
                raise UserError(
                    "data.format=template needs data.completion_template, the part that is trained,"
                    " as in data.completion_template='{solution}'"
                )
            parse_template(self.completion_template, "data.completion_template")
            if self.prompt_template is not None:
                parse_template(self.prompt_template, "data.prompt_template")
        if self.completion_only and not self._has_prompt:
            raise UserError(
                "data.completion_only=true needs a prompt that can be told from the completion: "
                "use data.format=template with data.prompt_template, completion or messages"
            )

    @property
    def _has_prompt(self) -> bool:
        if self.format == "template":
            return self.prompt_template is not None
        return self.format != "text"

    @property
    def trains_completion_only(self) -> bool:
        """Whether labels are restricted to completions."""
        return self._has_prompt if self.completion_only is None else self.completion_only

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        """Return the format that `to_dict` wrote.

        Raises:
            UserError: A key that is none of the fields.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise UserError(f"prompt format: unknown key '{name}'{did_you_mean(name, names)}")
        return cls(**values)

    def columns(self) -> list[str] | None:
        """Return the columns that must hold text; None where they may hold messages."""
        if self.format == "text":
            return [self.text_field]
        if self.format == "template":
            names = []
            for template, key in self._templates():
                names += [column for column in _columns(template, key) if column not in names]
            return names
        return None

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        """Return a row as text with its trained spans; see `render_rows`."""
        return self.render_rows([row], tokenizer)[0]

    def render_rows(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Rendered]:
        """Return each row as text with its trained spans.

        Raises:
            UserError: A row lacks a column, holds something else than text in one, or is refused
                by the chat template; the message begins with the row's file and line.
        """
        made: list[Rendered | Chat] = []
        for row in rows:
            try:
                made.append(self._chat(row) or self._texts(row.values))
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from None
        chats = iter(render_chats([item for item in made if isinstance(item, Chat)], tokenizer))
        return [next(chats) if isinstance(item, Chat) else item for item in made]

    def generation_prompt(
        self, values: str | Mapping[str, Any], tokenizer: Tokenizer | None = None
    ) -> str:
        """Return the text after which a model that was trained on this format answers.

        Args:
            values: The prompt's columns, or a text: the one column of the prompt, the beginning of
                a text, or the user's turn.
            tokenizer: Needed where messages are rendered.

        Raises:
            UserError: A column is missing, or one text cannot fill the prompt's columns.
        """
        values = self._generation_values(values)
        messages = self._generation_messages(values)
        if messages is not None:
            if tokenizer is None:
                raise ValueError("messages are rendered by the tokenizer's chat template")
            return tokenizer.render_chat(messages, True, tools=values.get("tools"))
        if self.format == "text":
            return self._system() + text_column(values, self.text_field, "data.text_field")
        return self._prompt(values)

    def prompt_ids(self, values: str | Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
        """Return the ids of `generation_prompt`, with the special tokens that training had."""
        chat = self._generation_messages(self._generation_values(values)) is not None
        text = self.generation_prompt(values, tokenizer)
        return tokenizer.encode(text, add_special_tokens=not chat)

    def _templates(self) -> list[tuple[str, str]]:
        pairs = [
            (self.prompt_template, "data.prompt_template"),
            (self.completion_template, "data.completion_template"),
        ]
        return [(template, key) for template, key in pairs if template is not None]

    def _system(self) -> str:
        return "" if self.system_prompt is None else f"{self.system_prompt}\n\n"

    def _prompt(self, values: Mapping[str, Any]) -> str:
        """Return what stands before the completion, for rows without messages."""
        if self.format == "template" and self.prompt_template is not None:
            return self._system() + _fill(self.prompt_template, "data.prompt_template", values)
        if self.format == "completion":
            return self._system() + text_column(values, "prompt", "data.format=completion")
        return self._system()

    def _completion(self, values: Mapping[str, Any]) -> str:
        if self.format == "template":
            assert self.completion_template is not None  # __post_init__ saw to it
            return _fill(self.completion_template, "data.completion_template", values)
        if self.format == "completion":
            return text_column(values, "completion", "data.format=completion")
        return text_column(values, self.text_field, "data.text_field")

    def _with_system_turn(self, messages: Messages) -> Messages:
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _texts(self, values: Mapping[str, Any]) -> Rendered:
        """Return a row of texts."""
        prompt = self._prompt(values)
        text = prompt + self._completion(values)
        start = len(prompt) if self.trains_completion_only else 0
        return Rendered(text, (Span(start, len(text), len(text)),), prompt=len(prompt))

    def _chat(self, row: Row) -> Chat | None:
        """Return a row of messages, or None for a row of texts."""
        values = row.values
        completion: int | None = None
        if self.format == "completion" and isinstance(values.get("prompt"), list):
            messages, left_out = without_weights(
                _check_messages(values["prompt"], "prompt"), "prompt"
            )
            completion = len(messages)
            answer, not_trained = without_weights(
                _check_messages(values.get("completion"), "completion"), "completion"
            )
            messages = messages + answer
            left_out = [*left_out, *(completion + turn for turn in not_trained)]
        elif self.format == "messages":
            column = "messages" if "messages" in values else "conversations"
            messages, left_out = without_weights(_read_messages(values), column)
        else:
            return None
        whole = self._with_system_turn(messages)
        added = len(whole) - len(messages)
        return Chat(
            row.where,
            whole,
            frozenset(turn + added for turn in left_out),
            completion=None if completion is None else completion + added,
            everything=not self.trains_completion_only,
            tools=values.get("tools"),
            added=added,
        )

    def _generation_values(self, values: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a text as the columns of the prompt."""
        if not isinstance(values, str):
            return values
        if self.format == "text":
            return {self.text_field: values}
        if self.format == "completion":
            return {"prompt": values}
        if self.format == "messages":
            return {"messages": [{"role": "user", "content": values}]}
        columns = _columns(self.prompt_template or "", "data.prompt_template")
        if len(columns) != 1:
            raise UserError(
                f"one text cannot fill the prompt's columns ({', '.join(columns) or 'none'}); give "
                "them by name"
            )
        return {columns[0]: values}

    def _generation_messages(self, values: Mapping[str, Any]) -> Messages | None:
        """Return the messages before the turn to generate; None for a format of texts."""
        if self.format == "completion" and isinstance(values.get("prompt"), list):
            messages = _check_messages(values["prompt"], "prompt")
            return self._with_system_turn(without_weights(messages, "prompt")[0])
        if self.format != "messages":
            return None
        messages = self._with_system_turn(without_weights(_read_messages(values), "messages")[0])
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            return messages[:-1]
        return messages


@lru_cache(maxsize=64)
def parse_template(template: str, key: str) -> tuple[tuple[str, bool], ...]:
    """Return the parts of a template: (literal text, False) or (column name, True).

    A column's name is taken as it stands: nothing in it reaches into the value, unlike in
    `str.format`.

    Raises:
        UserError: A brace without its partner, or an empty name; the message names `key`.
    """
    parts: list[tuple[str, bool]] = []
    for part in _PLACEHOLDER.split(template):
        if part in ("{", "}", "{}"):
            raise UserError(
                f"{key}: '{part}' is no placeholder; a column is written {{name}}, "
                "a brace {{ or }}"
            )
        if part in ("{{", "}}"):
            parts.append((part[0], False))
        elif part.startswith("{"):
            parts.append((part[1:-1], True))
        elif part:
            parts.append((part, False))
    return tuple(parts)


def text_column(values: Mapping[str, Any], name: str, asked_by: str) -> str:
    """Return the text in a column.

    Raises:
        UserError: There is no such column, or it holds no text.
    """
    if name not in values:
        columns = ", ".join(f"'{column}'" for column in values) or "none"
        raise UserError(
            f"no column '{name}', which {asked_by} asks for; the row has {columns}"
            f"{did_you_mean(name, values)}"
        )
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"the column '{name}' must hold text, holds {_describe(value)}")
    return value


def _fill(template: str, key: str, values: Mapping[str, Any]) -> str:
    parts = parse_template(template, key)
    return "".join(text_column(values, part, key) if column else part for part, column in parts)


def _columns(template: str, key: str) -> list[str]:
    """Return the names of a template's columns, each once, in order."""
    names = [part for part, column in parse_template(template, key) if column]
    return list(dict.fromkeys(names))


def _read_messages(values: Mapping[str, Any]) -> Messages:
    """Return the messages of a row, whichever of the two layouts it has."""
    if "messages" in values:
        return _check_messages(values["messages"], "messages")
    if "conversations" in values:
        turns = values["conversations"]
        if isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) for turn in turns
        ):
            turns = [
                turn
                | {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
                for turn in turns
            ]
        return _check_messages(turns, "conversations")
    columns = ", ".join(f"'{column}'" for column in values) or "none"
    raise UserError(
        f"no column 'messages' or 'conversations', which data.format=messages asks for; "
        f"the row has {columns}{did_you_mean('messages', values)}"
    )


def _check_messages(messages: Any, column: str) -> Messages:
    """Return `messages` if it is a list of turns with a role and a content."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"the column '{column}' must hold a list of messages, holds {_describe(messages)}"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"message {number} of '{column}' must be an object with a role (user, assistant, …)"
                f" and a content, is {_describe(message)}"
            )
        content = message.get("content")
        is_call = content is None and message.get("tool_calls")
        if not isinstance(content, str) and not is_call:
            raise UserError(
                f"message {number} of '{column}' must have a text as its content, "
                f"has {_describe(content)}"
            )
    return messages


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Sequence | Mapping) and not value:
        return f"an empty {type(value).__name__}"
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}…"
    return f"{shown} ({type(value).__name__})"
