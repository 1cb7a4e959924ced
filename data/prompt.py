"""Rows to text: the five formats, and which part of the text is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from data.messages import (
    Messages,
    describe,
    is_conversation,
    read_conversation,
    read_messages,
    read_tools,
    read_variables,
    with_system_turn,
)
from data.source import Row
from data.spans import Rendered, Span, render_chats, without_weights
from data.tokenizer import Tokenizer
from data.turns import Chat
from files.errors import UserError, did_you_mean

FORMATS = ("text", "template", "completion", "messages", "instruction")
# Both prompts of Stanford Alpaca's README, which differ in what is left out without an input.
ALPACA = (
    "Below is an instruction that describes a task"
    "{?input}, paired with an input that provides further context{/input}"
    ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "{?input}### Input:\n{input}\n\n{/input}"
    "### Response:\n"
)
_INSTRUCTION = "data.format=instruction"
_PLACEHOLDER = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes text (configuration keys `data.*`), for training and generation alike.

    Attributes:
        format: `text`: one column. `template`: `prompt_template` and `completion_template`.
            `completion`: the columns `prompt` and `completion`, as text or as lists of messages.
            `messages`: the column `messages` (or `conversations`), through the chat template.
            `instruction`: the columns `instruction`, `input` and `output`, by Alpaca's prompts.
        text_field: Column of `text`.
        prompt_template: Text with `{column}` placeholders; `{{` and `}}` are braces, and
            `{?column}…{/column}` is a part that is left out where that column is empty.
        completion_template: The same, for the part that is trained.
        system_prompt: Stands first, with a blank line after it; under `messages` it is the system
            turn, unless the row has one.
        completion_only: Train the completion (the assistant's turns) alone. None: where there is a
            prompt before it.
        append_eos: Put EOS after the text, and train it.
        train_on: Of a conversation's answers `all` are trained, or the `last`.

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
    train_on: str = "all"

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
                "use data.format=template with data.prompt_template, instruction, completion or "
                "messages"
            )

        if self.train_on not in ("all", "last"):
            raise UserError(f"data.train_on: '{self.train_on}' is not one of all, last")
        if self.train_on == "last" and (
            self.format != "messages" or not self.trains_completion_only
        ):
            raise UserError(
                "data.train_on=last chooses among the answers of a conversation: use it with "
                "data.format=messages and without data.completion_only=false"
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
            parts = [part for pair in self._templates() for part in parse_template(*pair)]
            # A column that may be absent is asked for nowhere but in its row.
            if any(part.within is not None for part in parts):
                return None
            return list(dict.fromkeys(part.text for part in parts if part.is_column))
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
            return tokenizer.render_chat(
                messages, True, tools=read_tools(values), variables=read_variables(values)
            )
        if self.format == "text":
            return self._system() + text_column(values, self.text_field, "data.text_field")
        return self._prompt(values)

    def prompt_ids(self, values: str | Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
        """Return the ids of `generation_prompt`, with the special tokens that training had."""
        chat = self._generation_messages(self._generation_values(values)) is not None
        text = self.generation_prompt(values, tokenizer)
        return tokenizer.encode(text, add_special_tokens=not chat)

    def prompt_columns(self) -> list[str]:
        """Return the columns that the prompt needs, those of parts that may be left out apart."""
        if self.format == "template":
            return required_columns(self.prompt_template or "", "data.prompt_template")
        return required_columns(ALPACA, _INSTRUCTION) if self.format == "instruction" else []

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
        if self.format == "instruction":
            return self._instruction(values)
        return self._system()

    def _instruction(self, values: Mapping[str, Any]) -> str:
        if values.get("history") not in (None, "", "[]", []):
            raise UserError(
                "the column 'history' holds earlier turns, for which Alpaca's prompt has no place; "
                "write the row's turns as a list in a column 'messages', for data.format=messages"
            )
        # The row's own rules, as in messages.
        own = "" if _is_empty(values, "system") else text_column(values, "system", _INSTRUCTION)
        system = f"{own}\n\n" if own else self._system()
        return system + _fill(ALPACA, _INSTRUCTION, values)

    def _completion(self, values: Mapping[str, Any]) -> str:
        if self.format == "template":
            assert self.completion_template is not None  # __post_init__ saw to it
            return _fill(self.completion_template, "data.completion_template", values)
        if self.format == "completion":
            return text_column(values, "completion", "data.format=completion")
        if self.format == "instruction":
            return text_column(values, "output", _INSTRUCTION)
        return text_column(values, self.text_field, "data.text_field")

    def _prompt_messages(self, values: Mapping[str, Any]) -> Messages | None:
        """Return the row's messages before a completion; None where it has a text before it.

        Both columns must hold messages for a text to be read as such: it may be JSON by itself.
        """
        prompt, completion = values.get("prompt"), values.get("completion", [])
        if not isinstance(prompt, list) and not (
            is_conversation(prompt) and is_conversation(completion)
        ):
            return None
        return read_messages(prompt, "prompt")

    def _with_system_turn(self, messages: Messages, values: Mapping[str, Any]) -> Messages:
        return with_system_turn(messages, values, self.system_prompt)

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
        if self.format == "completion" and (messages := self._prompt_messages(values)):
            completion = len(messages)
            messages = messages + read_messages(values.get("completion"), "completion")
        elif self.format == "messages":
            messages = read_conversation(values)
        else:
            return None
        messages, left_out = without_weights(messages)
        whole = self._with_system_turn(messages, values)
        added = len(whole) - len(messages)
        chat = Chat(
            row.where,
            whole,
            frozenset(turn + added for turn in left_out),
            completion=None if completion is None else completion + added,
            everything=not self.trains_completion_only,
            tools=read_tools(values),
            added=added,
            variables=read_variables(values),
        )
        if self.train_on == "last":
            trained = [turn for turn in chat.answers if turn not in chat.left_out]
            chat = replace(chat, left_out=chat.left_out.union(trained[:-1]))
        return chat

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
        columns = self.prompt_columns()
        if len(columns) != 1:
            raise UserError(
                f"one text cannot fill the prompt's columns ({', '.join(columns) or 'none'}); give "
                "them by name"
            )
        return {columns[0]: values}

    def _generation_messages(self, values: Mapping[str, Any]) -> Messages | None:
        """Return the messages before the turn to generate; None for a format of texts."""
        if self.format == "completion":
            messages = self._prompt_messages(values)
        else:
            messages = read_conversation(values) if self.format == "messages" else None
        if messages is None:
            return None
        messages = self._with_system_turn(without_weights(messages)[0], values)
        if self.format == "completion":
            return messages
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            return messages[:-1]
        return messages


@dataclass(frozen=True)
class Part:
    """A part of a template.

    Attributes:
        text: Literal text, or the name of a column.
        is_column: Whether it is a column.
        within: The column without which it is left out, or None.
    """

    text: str
    is_column: bool
    within: str | None = None


@lru_cache(maxsize=64)
def parse_template(template: str, key: str) -> tuple[Part, ...]:
    """Return the parts of a template.

    A column's name is taken as it stands: nothing in it reaches into the value, unlike in
    `str.format`. `{?name}` begins a part that is left out where the column is empty, and `{/name}`
    ends it.

    Raises:
        UserError: A brace without its partner, an empty name, or a part that does not end or stands
            in another; the message names `key`.
    """
    parts: list[Part] = []
    within: str | None = None
    for piece in _PLACEHOLDER.split(template):
        mark = piece[1:2] if piece[:1] == "{" and piece[-1:] == "}" else ""
        if piece in ("{", "}", "{}", "{?}", "{/}"):
            raise UserError(
                f"{key}: '{piece}' is no placeholder; a column is written {{name}}, "
                "a brace {{ or }}"
            )
        if piece in ("{{", "}}"):
            parts.append(Part(piece[0], False, within))
        elif mark == "?":
            if within is not None:
                raise UserError(f"{key}: {piece} stands before {{/{within}}}; end that part first")
            within = piece[2:-1]
        elif mark == "/":
            if piece[2:-1] != within:
                begun = f"{{?{within}}} is the part to end" if within else "no part has begun"
                raise UserError(f"{key}: {piece} ends nothing, as {begun}")
            within = None
        elif mark:
            parts.append(Part(piece[1:-1], True, within))
        elif piece:
            parts.append(Part(piece, False, within))
    if within is not None:
        raise UserError(f"{key}: {{?{within}}} begins a part that {{/{within}}} never ends")
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
        raise UserError(f"the column '{name}' must hold text, holds {describe(value)}")
    return value


def _fill(template: str, key: str, values: Mapping[str, Any]) -> str:
    return "".join(
        text_column(values, part.text, key) if part.is_column else part.text
        for part in parse_template(template, key)
        if part.within is None or not _is_empty(values, part.within)
    )


def _is_empty(values: Mapping[str, Any], column: str) -> bool:
    """Whether a column is absent, null, or holds nothing but white space."""
    value = values.get(column)
    return value is None or (isinstance(value, str) and not value.strip())


def required_columns(template: str, key: str) -> list[str]:
    """Return the names of the columns that a template needs in every row, each once, in order."""
    parts = parse_template(template, key)
    return list(dict.fromkeys(p.text for p in parts if p.is_column and p.within is None))
