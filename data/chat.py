"""Chat templates: messages to text, by a program that came with the model.

A template is Jinja, with loops and arithmetic. The immutable sandbox keeps it from Python's own
objects; that it ends, and does not eat all memory, no sandbox can promise, and whether it does may
depend on the row. So every rendering happens in a child process with limits (`data/limited.py`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from data.limited import LimitedChild, one_line
from files.errors import UserError

# Twice what a row may have (MAX_ROW_BYTES of data/source.py): a template adds headers to each
# message, which double the shortest of them, and no more.
MAX_CHARACTERS = 32 * 2**20

# Conversations go to the child in requests of about this size: a request for each would cost more
# than most renderings, and many large ones at once more memory than the child has.
_REQUEST_CHARACTERS = 2**20

_CHILD = LimitedChild("data.chat")

# The first messages of a conversation, and whether the header of an assistant's turn follows them.
Prefix = tuple[int, bool]


@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered, in one or more prefixes.

    Attributes:
        messages: Turns with `role` and `content`.
        prefixes: What is rendered of them.
        tools: Descriptions of tools, for templates that know them.
        where: The row that messages of errors begin with; empty where there is none.
    """

    messages: Sequence[Mapping[str, Any]]
    prefixes: Sequence[Prefix]
    tools: Sequence[Any] | None = None
    where: str = ""

    @property
    def subject(self) -> str:
        """How a message of an error begins."""
        return f"{self.where}: " if self.where else ""


class ChatTemplate:
    """A chat template with the special tokens that it sees.

    Args:
        source: The Jinja source.
        special_tokens: Name (`bos_token`, …) to text.
        where: The folder that messages name.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        self._name = f"the chat template of {where}"
        self._fixed = json.dumps([source, dict(special_tokens), self._name])

    def render(
        self, conversations: Sequence[Conversation], date: datetime.datetime | None = None
    ) -> list[list[str]]:
        """Return what the template makes of each prefix of each conversation.

        Args:
            conversations: The conversations.
            date: What `strftime_now` tells the template; None is the present.

        Raises:
            UserError: The template cannot be parsed, refuses the messages, fails, takes too long
                or too much memory; or a message holds what is no JSON.
        """
        texts: list[str] = []
        waiting: list[Conversation] = []
        encoded: list[str] = []
        size = 0
        for conversation in conversations:
            waiting.append(conversation)
            encoded.append(self._encode(conversation))
            size += len(encoded[-1])
            if size > _REQUEST_CHARACTERS:
                texts += self._ask(waiting, encoded, date)
                waiting, encoded, size = [], [], 0
        texts += self._ask(waiting, encoded, date)
        rest = iter(texts)
        return [list(islice(rest, len(item.prefixes))) for item in conversations]

    def _encode(self, item: Conversation) -> str:
        try:
            return json.dumps([item.subject, item.messages, item.prefixes, item.tools])
        except (TypeError, ValueError, RecursionError) as error:
            reason = one_line(str(error))
        raise UserError(
            f"{item.subject}messages and tools may hold what JSON can hold and nothing else, for "
            f"{self._name}: {reason}"
        )

    def _ask(
        self, items: list[Conversation], encoded: list[str], date: datetime.datetime | None
    ) -> list[str]:
        if not items:
            return []
        day = json.dumps(None if date is None else date.isoformat())
        subjects = [f"{item.subject}{self._name}" for item in items for _ in item.prefixes]
        return _CHILD.ask(
            f"[{self._fixed}, {day}, [{', '.join(encoded)}]]",
            lambda answers: subjects[min(answers, len(subjects) - 1)],
            "correct the template or the messages, or use data.format=template, which needs no "
            "chat template",
        )


def answer(request: list[Any]) -> Iterator[str]:
    """Yield the rendering of each prefix; the child's side of `ChatTemplate.render`."""
    (source, special_tokens, name), day, conversations = request
    template = _compile(source, name)
    date = day and datetime.datetime.fromisoformat(day)
    for subject, messages, prefixes, tools in conversations:
        for length, add_generation_prompt in prefixes:
            try:
                pieces = template.generate(
                    special_tokens,
                    messages=messages[:length],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    strftime_now=(date or datetime.datetime.now()).strftime,
                    raise_exception=_raise_exception,
                )
                text = _join(pieces)
            except MemoryError:
                raise
            except Exception as error:  # a template is a program: it may fail in any way
                reason = one_line(str(error)) or type(error).__name__
                raise UserError(f"{subject}{name} failed on the messages: {reason}") from None
            yield text


def _join(pieces: Iterator[str]) -> str:
    """Return the whole text, unless it grows beyond what any row comes to."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise jinja2.TemplateError(
                f"it makes more than {MAX_CHARACTERS // 2**20} Mi characters of one row"
            )
    return "".join(kept)


@lru_cache(maxsize=8)
def _compile(source: str, name: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except MemoryError:
        raise
    except Exception as error:  # Python's compiler has limits of its own, and errors for them
        line = getattr(error, "lineno", None) or "?"
        reason = one_line(str(error)) or type(error).__name__
    raise UserError(f"{name} cannot be parsed, at its line {line}: {reason}")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, where what is forbidden is an error at once and not an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse an attribute that leads out of the sandbox, or would change the messages."""
        kind = type(obj).__name__
        raise jinja2.exceptions.SecurityError(f"access to '{attribute}' of a {kind} is unsafe")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant turns.

    Its body is rendered as it stands: labels come from rendered prefixes, for every template.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the nodes of the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    """Let a template refuse its messages."""
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without the HTML escapes of jinja2's own, which would reach the model as text."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
