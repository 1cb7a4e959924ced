"""Chat templates: messages to text, by a program that came with the model.

A template is Jinja, with loops and arithmetic. The immutable sandbox keeps it from Python's own
objects; that it ends, and does not eat all memory, no sandbox can promise. Nor does a trial when it
is first seen: `{% if messages|length == 7 %}` may stand before a loop of 10**9 that writes nothing,
or before `'a' * 10**10`, and a cap on what is written sees neither. So every rendering of every row
happens in a child process with limits (`data/limited.py`), many rows to a request.

A rendering also says which part of its text the template wrote for which message. Templates write
their turns in a loop over the messages: into the body of each loop goes a call that writes nothing
and leaves a note of how much text there is by now.
"""

from __future__ import annotations

import datetime
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

from data.limited import LimitedChild, one_line
from files.errors import UserError

# Twice what a row may have (MAX_ROW_BYTES of data/row_files.py): a template adds headers to each
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
        variables: What else the template is told.
    """

    messages: Sequence[Mapping[str, Any]]
    prefixes: Sequence[Prefix]
    tools: Sequence[Any] | None = None
    where: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """How a message of an error begins."""
        return f"{self.where}: " if self.where else ""


@dataclass(frozen=True)
class Rendering:
    """What a chat template makes of one prefix; places are (start, stop) in characters of the text.

    Attributes:
        text: The text.
        turns: For each message what was written while the template's loop was at it, header and
            end of the turn included; None where the loop left it out, or where there is no loop
            whose output goes straight into the text.
        marked: What stands in `{% generation %}` blocks, as (message, start, stop).
        knows_tools: The template speaks of tools.
    """

    text: str
    turns: tuple[tuple[int, int] | None, ...]
    marked: tuple[tuple[int, int, int], ...]
    knows_tools: bool


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
    ) -> list[list[Rendering | None]]:
        """Return what the template makes of each prefix of each conversation.

        The first must be possible; None stands for a later one that the template refuses.

        Args:
            conversations: The conversations.
            date: What `strftime_now` tells the template; None is the present.

        Raises:
            UserError: The template cannot be parsed, refuses the messages, fails, takes too long
                or too much memory; or a message holds what is no JSON.
        """
        answers: list[Any] = []
        waiting: list[Conversation] = []
        encoded: list[str] = []
        size = 0
        for conversation in conversations:
            waiting.append(conversation)
            encoded.append(self._encode(conversation))
            size += len(encoded[-1])
            if size > _REQUEST_CHARACTERS:
                answers += self._ask(waiting, encoded, date)
                waiting, encoded, size = [], [], 0
        answers += self._ask(waiting, encoded, date)
        rest = iter(answers)
        return [_renderings(islice(rest, len(item.prefixes))) for item in conversations]

    def _encode(self, item: Conversation) -> str:
        try:
            return json.dumps(
                [item.subject, item.messages, item.prefixes, item.tools, item.variables]
            )
        except (TypeError, ValueError, RecursionError) as error:
            reason = one_line(str(error))
        raise UserError(
            f"{item.subject}messages and tools may hold what JSON can hold and nothing else, for "
            f"{self._name}: {reason}"
        )

    def _ask(
        self, items: list[Conversation], encoded: list[str], date: datetime.datetime | None
    ) -> list[Any]:
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


def _renderings(answers: Iterable[Any]) -> list[Rendering | None]:
    """Return one conversation's renderings from what the child says of them."""
    renderings: list[Rendering | None] = []
    whole = ""
    for said in answers:
        if said is None:
            renderings.append(None)
            continue
        shared, rest, turns, marked, knows_tools = said
        text = whole[:shared] + rest
        whole = whole or text
        places = tuple(None if place is None else (place[0], place[1]) for place in turns)
        blocks = tuple((turn, start, stop) for turn, start, stop in marked)
        renderings.append(Rendering(text, places, blocks, knows_tools))
    return renderings


def answer(request: list[Any]) -> Iterator[list[Any] | None]:
    """Yield each prefix's rendering; the child's side of `ChatTemplate.render`.

    It is [characters shared with the conversation's first rendering, the text behind them, turns,
    marked, whether it knows tools]: most prefixes are prefixes of the first rendering too, and need
    not be sent again. Of a row that the template takes it may refuse a prefix: that is None.
    """
    (source, special_tokens, name), day, conversations = request
    template = _compile(source, name)
    date = day and datetime.datetime.fromisoformat(day)
    for subject, messages, prefixes, tools, variables in conversations:
        template.notices.numbers = {id(message): n for n, message in enumerate(messages)}
        first = None
        for length, add_generation_prompt in prefixes:
            try:
                pieces = template.program.generate(
                    special_tokens | variables,
                    messages=messages[:length],
                    tools=tools,
                    documents=variables.get("documents"),
                    add_generation_prompt=add_generation_prompt,
                    strftime_now=(date or datetime.datetime.now()).strftime,
                    raise_exception=_raise_exception,
                )
                text, notes = _join(pieces)
            except MemoryError:
                raise
            except Exception as error:  # a template is a program: it may fail in any way
                if first is not None:
                    yield None
                    continue
                reason = one_line(str(error)) or type(error).__name__
                raise UserError(f"{subject}{name} failed on the messages: {reason}") from None
            shared = common_characters(first or "", text)
            turns, marked = _turns(notes, length), _marked(notes)
            yield [shared, text[shared:], turns, marked, template.knows_tools]
            first = text if first is None else first


def common_characters(first: str, second: str) -> int:
    """Return how many leading characters two texts share."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return bisect_left(range(most), True, key=lambda n: first[: n + 1] != second[: n + 1])


class _Note(str):
    """An empty text with which a template tells where in its program it is.

    Attributes:
        loop: The loop that speaks, or `_BLOCK`.
        value: The message that the loop has come to, or `_NO_MESSAGE` (something else, or its end);
            of a block, whether it begins.
    """

    loop: int
    value: int

    def __new__(cls, loop: int, value: int) -> _Note:
        """Return the note."""
        note = super().__new__(cls)
        note.loop, note.value = loop, value
        return note

    def __str__(self) -> str:  # str() would make a text without attributes of it
        return self


_BLOCK, _NO_MESSAGE = -1, -1
# (what was noted, how many characters stood before it)
_Notes = list[tuple[_Note, int]]


def _join(pieces: Iterator[str]) -> tuple[str, _Notes]:
    """Return the whole text, unless it grows beyond what any row comes to, and the notes in it."""
    kept: list[str] = []
    notes: _Notes = []
    size = 0
    for piece in pieces:
        if isinstance(piece, _Note):
            notes.append((piece, size))
            continue
        kept.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise jinja2.TemplateError(
                f"it makes more than {MAX_CHARACTERS // 2**20} Mi characters of one row"
            )
    return "".join(kept), notes


def _turns(notes: _Notes, length: int) -> list[tuple[int, int] | None]:
    """Return where each message was written: most of it, if several loops are over messages."""
    places: dict[int, tuple[int, int]] = {}
    current: dict[int, tuple[int, int]] = {}
    for note, position in notes:
        if note.loop == _BLOCK:
            continue
        message, start = current.get(note.loop, (_NO_MESSAGE, 0))
        if message != _NO_MESSAGE:
            before = places.get(message, (0, 0))
            places[message] = max(before, (start, position), key=lambda place: place[1] - place[0])
        current[note.loop] = (note.value, position)
    return [places.get(message) for message in range(length)]


def _marked(notes: _Notes) -> list[tuple[int, int, int]]:
    """Return what stands in the blocks that a template marks, and for which message."""
    marked, message, start = [], _NO_MESSAGE, 0
    for note, position in notes:
        if note.loop != _BLOCK:
            message = message if note.value == _NO_MESSAGE else note.value
        elif note.value:
            start = position
        elif message != _NO_MESSAGE:
            marked.append((message, start, position))
    return marked


@dataclass(frozen=True)
class _Compiled:
    """A template that is ready to be rendered.

    Attributes:
        program: The template.
        notices: What puts notes into its output.
        knows_tools: It speaks of `tools` at all.
    """

    program: jinja2.Template
    notices: _Notices
    knows_tools: bool


@lru_cache(maxsize=8)
def _compile(source: str, name: str) -> _Compiled:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Notices],
    )
    environment.filters["tojson"] = _to_json
    notices = environment.extensions[_Notices.identifier]
    assert isinstance(notices, _Notices)
    try:
        tree = environment.parse(source)
        knows_tools = any(name.name == "tools" for name in tree.find_all(jinja2.nodes.Name))
        code = environment.compile(_NotedLoops(notices).visit(tree))
        names = environment.make_globals(None)
        program = environment.template_class.from_code(environment, code, names)
        return _Compiled(program, notices, knows_tools)
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


class _Notices(jinja2.ext.Extension):
    """What a template tells of itself while it is rendered.

    Its tag is `{% generation %}…{% endgeneration %}`, which some templates put around what is to be
    trained.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)
    numbers: dict[int, int]  # number of a message by its identity

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the nodes of the body, between a note of its beginning and one of its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (jinja2.nodes.Const(begins) for begins in (True, False))
        return [self.note("block", line, begins), *body, self.note("block", line, ends)]

    def note(self, what: str, line: int, *values: jinja2.nodes.Expr) -> jinja2.nodes.Output:
        """Return the node that puts the note of a method below into the output."""
        return jinja2.nodes.Output([self.call_method(what, list(values), lineno=line)], lineno=line)

    def block(self, begins: bool) -> _Note:
        """Return the note of a block's beginning or end."""
        return _Note(_BLOCK, begins)

    def item(self, loop: int, value: Any) -> _Note:
        """Return the note that a loop has come to `value`."""
        return _Note(loop, self.numbers.get(id(value), _NO_MESSAGE))

    def end(self, loop: int) -> _Note:
        """Return the note that a loop has ended."""
        return _Note(loop, _NO_MESSAGE)


class _NotedLoops(jinja2.visitor.NodeTransformer):
    """Puts a note at the beginning of each loop's body, and one behind each loop."""

    def __init__(self, notices: _Notices) -> None:
        self._notices = notices
        self._loops = 0

    def visit_For(self, node: jinja2.nodes.For) -> list[jinja2.nodes.Node]:
        """Return the loop with its notes."""
        self.generic_visit(node)
        loop = jinja2.nodes.Const(self._loops)
        self._loops += 1
        if isinstance(node.target, jinja2.nodes.Name):
            value = jinja2.nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body.insert(0, self._notices.note("item", node.lineno, loop, value))
        return [node, self._notices.note("end", node.lineno, loop)]


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
