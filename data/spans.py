"""Conversations to text: where each turn lies in it, and what of it is trained.

An answer is what stands between the header that a model is given (the generation prompt) and the
end of its turn. What that is, prefixes of the conversation define: the header of turn i ends where
the rendering of the turns before it does, asked for a generation prompt, and the turn ends where
the rendering of the turns up to it does. Rendering every prefix would cost the square of the turns,
though, and where a template writes earlier turns in another way (without their thinking, say) its
prefixes are no prefixes of the whole. So the template itself tells where its turns are
(`data/chat.py`), and prefixes are rendered for the headers alone: of those that follow a turn of
one role the first and the last, the others being alike if these are. Where a template does not
tell, or a turn is not where it says, all prefixes are rendered after all. A turn that nothing
stands before, or whose prefix the template refuses, has a header like the others'.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.chat import Conversation, Prefix, Rendering, common_characters
from data.messages import Messages, other_forms
from data.tokenizer import Tokenizer
from files.errors import UserError

# What `strftime_now` tells a chat template while rows are tokenised: a fixed day, so that the same
# data is the same tokens tomorrow. It is the day that Llama 3.2's own template falls back to.
TRAINING_DATE = datetime.datetime(2024, 7, 26)

_Place = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """A part of a text that is trained, in characters.

    Attributes:
        start: Where it begins.
        settled: It reaches to here in any case: an EOS before this is part of what was said.
        stop: It ends with the last EOS between `settled` and here, or here if there is none.
        marked: The template marks it, or all of the text is trained: it ends at `settled`, unless
            it holds no EOS and there is one between that and `stop`.
    """

    start: int
    settled: int
    stop: int
    marked: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: The whole text.
        trained: The spans that are trained, in order.
        chat: The text is a chat template's: its special tokens stand in it already.
        prompt: Characters before the completion, trained or not, or before the first answer that is
            trained; 0 where nothing stands before it.
        ends: The row ends with the last span: an EOS is due there.
        assistant_turns: Turns of the assistant in a row of messages.
        untrained_turns: Those of them that are to be trained and of which the text holds nothing.
        left_out_turns: Those of them that the row keeps out of the loss.
        thoughtless_turns: Those of them whose thinking is not in the text.
    """

    text: str
    trained: tuple[Span, ...]
    chat: bool = False
    prompt: int = 0
    ends: bool = True
    assistant_turns: int = 0
    untrained_turns: int = 0
    left_out_turns: int = 0
    thoughtless_turns: int = 0


@dataclass(frozen=True)
class Chat:
    """A row of messages before it is rendered.

    Attributes:
        where: The row's place.
        messages: All turns, without what says whether they are trained.
        left_out: Turns that the row keeps out of the loss.
        completion: The turn that the completion begins with, all of which is trained; None: each
            turn of the assistant is.
        everything: All of the text is trained (`data.completion_only=false`).
        tools: Descriptions of tools.
        added: Turns at the beginning that stand in no list of messages: the system turn.
        variables: What else the row tells its template.
    """

    where: str
    messages: Messages
    left_out: frozenset[int] = frozenset()
    completion: int | None = None
    everything: bool = False
    tools: Any = None
    added: int = 0
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """The assistant's turns that are trained, if nothing is left out."""
        turns = range(self.completion or 0, len(self.messages))
        return [turn for turn in turns if self.role(turn) == "assistant"]

    @property
    def first(self) -> int:
        """The turn before which the prompt ends; 0 if nothing stands before it."""
        return self.completion or next((i for i in self.answers if i not in self.left_out), 0)

    @property
    def sought(self) -> list[int]:
        """The turns whose place in the text must be known."""
        last = len(self.messages) - 1
        if self.everything:
            turns = {*self.left_out, *([self.first] if self.first else [])}
        elif self.completion is not None:
            turns = {self.completion, last, *(i for i in self.left_out if i > self.completion)}
        else:
            turns = {*self.answers} - self.left_out
        return sorted(turns)

    def has_header(self, turn: int) -> bool:
        """Whether a header stands before the turn that a model is given, not trained on."""
        return turn > 0 and (self.role(turn) == "assistant" or turn == self.completion)

    def role(self, turn: int) -> Any:
        """Return who speaks in a turn."""
        return self.messages[turn].get("role")

    def name(self, turn: int) -> str:
        """Return how a message of error calls a turn: as the row counts them."""
        if turn < self.added:
            return "the system turn (the column 'system', or data.system_prompt)"
        return f"turn {turn - self.added + 1} ({self.role(turn)})"


def render_chats(chats: Sequence[Chat], tokenizer: Tokenizer) -> list[Rendered]:
    """Return each row of messages as text with its trained spans.

    Raises:
        UserError: The chat template refuses a row, or leaves one of its turns or tools out; the
            message begins with the row's place.
    """
    try:
        return _render(chats, tokenizer)
    except UserError:
        if not any(True for chat in chats for _ in other_forms(chat.messages)):
            raise
    return [_in_the_form_that_fits(chat, tokenizer) for chat in chats]


def _in_the_form_that_fits(chat: Chat, tokenizer: Tokenizer) -> Rendered:
    """Return a row in the first form of its calls that the template takes and writes whole."""
    try:
        return _render([chat], tokenizer)[0]
    except UserError as error:
        first = error
    for messages in other_forms(chat.messages):
        with contextlib.suppress(UserError):
            return _render([replace(chat, messages=messages)], tokenizer)[0]
    raise first


def _render(chats: Sequence[Chat], tokenizer: Tokenizer) -> list[Rendered]:
    found = _located(chats, tokenizer, every_prefix=False)
    rest = [number for number, (_, places) in enumerate(found) if places is None]
    slowly = _located([chats[number] for number in rest], tokenizer, every_prefix=True)
    for number, item in zip(rest, slowly, strict=True):
        found[number] = item
    return [
        _rendered(chat, whole, places or {}, tokenizer)
        for chat, (whole, places) in zip(chats, found, strict=True)
    ]


# --- where turns are -----------------------------------------------------------------------------


def _located(
    chats: Sequence[Chat], tokenizer: Tokenizer, *, every_prefix: bool
) -> list[tuple[Rendering, dict[int, _Place] | None]]:
    """Return each whole rendering and the places of its turns; None: every prefix is needed."""
    if not chats:
        return []
    choose = _all_prefixes if every_prefix else _few_prefixes
    asked = []
    for chat in chats:
        prefixes = dict.fromkeys([(len(chat.messages), False), *choose(chat)])
        asked.append(
            Conversation(chat.messages, list(prefixes), chat.tools, chat.where, chat.variables)
        )
    answers = tokenizer.render_chats(asked, date=TRAINING_DATE)
    located = []
    for chat, conversation, renderings in zip(chats, asked, answers, strict=True):
        pairs = zip(conversation.prefixes, renderings, strict=True)
        by_prefix = {prefix: rendering for prefix, rendering in pairs if rendering is not None}
        search = _Search(chat, by_prefix, tokenizer)
        places = search.by_prefixes() if every_prefix else search.by_turns()
        located.append((search.whole, places))
    return located


def _few_prefixes(chat: Chat) -> list[Prefix]:
    """Return the prefixes that tell the headers: the first and the last after each role."""
    first: dict[Any, Prefix] = {}
    last: dict[Any, Prefix] = {}
    for turn in filter(chat.has_header, chat.sought):
        role = chat.role(turn - 1)
        last[role] = (turn, True)
        first.setdefault(role, last[role])
    return [*first.values(), *last.values(), *_headers_alone(chat)]


def _headers_alone(chat: Chat) -> list[Prefix]:
    """Return the prefixes that show a header where an answer stands first: nothing, and all."""
    begins = 0 in chat.sought and chat.role(0) == "assistant"
    return [(0, True), (len(chat.messages), True)] if begins else []


def _all_prefixes(chat: Chat) -> list[Prefix]:
    """Return the prefixes that define where the turns are."""
    found: list[Prefix] = []
    for turn in chat.sought:
        found += [(turn, False)] if turn else []
        found += [(turn, True)] if chat.has_header(turn) else []
        found.append((turn + 1, False))
    return [*found, *_headers_alone(chat)]


class _Search:
    """The search for the turns of one conversation in its text.

    Args:
        chat: The conversation.
        renderings: Its prefixes as text.
        tokenizer: What tells where a header can be cut.
    """

    def __init__(
        self, chat: Chat, renderings: Mapping[Prefix, Rendering], tokenizer: Tokenizer
    ) -> None:
        self.whole = renderings[len(chat.messages), False]
        self._chat = chat
        self._renderings = renderings
        self._tokenizer = tokenizer
        self._eos: str | None = tokenizer.special_tokens.get("eos_token")
        self._headers: list[str] = []  # those that prefixes have shown
        self._ends: dict[str, list[int]] = {}  # where the tokens of a header end

    def by_turns(self) -> dict[int, _Place] | None:
        """Return where each turn's answer is, by what the template tells; None: it does not."""
        chat = self._chat
        if self.whole.marked and not chat.everything and chat.completion is None:
            return {}  # what is trained is marked
        places: dict[int, _Place] = {}
        headers: dict[Any, str] = {}  # by who spoke before
        for turn in chat.sought:
            place = self._told(turn)
            if place is None:
                return None
            places[turn] = place
            if chat.has_header(turn) and (turn, True) in self._renderings:
                header = self._header(turn, place[0])
                if header is None or headers.setdefault(chat.role(turn - 1), header) != header:
                    return None
        self._headers += headers.values()
        return {
            turn: self._answer(
                turn, place, headers.get(chat.role(turn - 1)) if chat.has_header(turn) else None
            )
            for turn, place in places.items()
        }

    def by_prefixes(self) -> dict[int, _Place]:
        """Return where each turn's answer is, by rendered prefixes; without those not found."""
        places: dict[int, tuple[_Place, str | None]] = {}
        for turn in self._chat.sought:
            place = self._told(turn) or self._defined(turn)
            if place is None:
                continue
            header = self._header(turn, place[0]) if self._chat.has_header(turn) else None
            places[turn] = place, header
            self._headers += [] if header is None else [header]
        return {turn: self._answer(turn, *found) for turn, found in places.items()}

    def _told(self, turn: int) -> _Place | None:
        """Return where the template says that it wrote a turn, if it did."""
        place = self.whole.turns[turn] if turn < len(self.whole.turns) else None
        if place is None or place[0] == place[1]:
            return None  # even an empty answer has an end; this one is written elsewhere
        text = self.whole.text[slice(*place)]
        if turn + 1 < len(self._chat.messages) and self._chat.role(turn + 1) == "tool":
            answered = self.whole.turns[turn + 1] or (0, 0)
            if answered[0] == answered[1] and holds(text, self._chat.messages[turn + 1]):
                return None  # the tool's answer is in it too
        return place if holds(text, self._chat.messages[turn]) else None

    def _defined(self, turn: int) -> _Place | None:
        """Return where a turn is by the renderings up to it, if it is there."""
        text = self.whole.text
        start = 0
        if turn:
            before = [self._renderings.get((turn, asked)) for asked in (False, True)]
            texts = [one.text for one in before if one is not None and text.startswith(one.text)]
            if not texts:
                return None
            start = min(len(one) for one in texts)
        upto = self._renderings.get((turn + 1, False))
        if upto is None:
            return None
        stop = common_characters(text, upto.text)
        place = (start, stop)
        return place if holds(text[start:stop], self._chat.messages[turn]) else None

    def _header(self, turn: int, start: int) -> str | None:
        """Return what a template writes after the turns before `turn` when it is asked to."""
        before = self._renderings.get((turn, True))
        if before is None:
            return None
        if before.text[:start] == self.whole.text[:start]:
            return before.text[start:]
        place = before.turns[turn - 1] if before.turns else None
        return None if place is None else before.text[place[1] :]

    def _answer(self, turn: int, place: _Place, header: str | None) -> _Place:
        """Return a turn without its header, and with what ends the text if it is the last.

        Args:
            turn: The turn.
            place: Where it is, header and all.
            header: Its header; None where it is not known.
        """
        text = self.whole.text
        start, stop = place
        if turn == len(self._chat.messages) - 1 and text[stop:] != header:
            stop = self._end(turn, place)
        return start + self._header_length(turn, text[start:stop], header), stop

    def _end(self, turn: int, place: _Place) -> int:
        """Return where the last turn ends: behind its own EOS, or with the text."""
        text, eos = self.whole.text, self._eos
        if not eos:
            return len(text)
        said = said_until(self._chat.messages[turn], text, place, eos)
        if eos in text[said : place[1]]:
            return place[1]
        behind = text.find(eos, place[1])
        return len(text) if behind < 0 else behind + len(eos)

    def _header_length(self, turn: int, written: str, header: str | None) -> int:
        """Return how many characters of a turn, as it was written, are its header."""
        if header is None:
            return self._length_like_others(turn, written)
        shared = common_characters(header, written[: len(header)])
        # What a template always ends with may stand before the header, at the end alone.
        starts = (n for n in range(len(header)) if written.startswith(header[n:]))
        if (end := len(header) - next(starts, len(header))) > shared:
            return end
        if shared < len(header):
            # Some of the header is there. What comes next is what is said, which may begin like the
            # rest of the header; with its end first, for a short content may stand anywhere.
            said = self._chat.messages[turn].get("content")
            said = said.strip() if isinstance(said, str) else ""
            for sought in (said + (self._eos or ""), said) if said else ():
                begins = written.rfind(sought, 0, shared + len(sought))
                if begins >= 0 and shared <= begins + len(said):
                    shared = min(shared, begins)
                    break
            shared = max((end for end in self._token_ends(header) if end <= shared), default=0)
        return shared

    def _token_ends(self, header: str) -> list[int]:
        """Return where the tokens of a header end, in characters."""
        if header not in self._ends:
            (encoding,) = self._tokenizer.encode_chats([header])
            self._ends[header] = [stop for _, stop in encoding.offsets]
        return self._ends[header]

    def _length_like_others(self, turn: int, written: str) -> int:
        """Return the header's length where no prefix tells it, from the headers that are known."""
        if self._chat.role(turn) != "assistant":
            return 0
        every = (len(self._chat.messages), True)
        known = [*self._headers]
        if every in self._renderings:
            known.append(self._renderings[every].text[len(self.whole.text) :])
        if (0, True) in self._renderings:
            known.append(self._renderings[0, True].text)
        known = [header for header in known if header]
        found = [place + len(header) for header in known if (place := written.find(header)) >= 0]
        if not found:
            # As much of one as is there, but its first token, which other turns begin with too.
            for header in known:
                for end in self._token_ends(header)[:0:-1]:
                    if (place := written.find(header[:end])) >= 0:
                        return place + end
        return max(found, default=0)


# --- what is trained -----------------------------------------------------------------------------


def _rendered(
    chat: Chat, whole: Rendering, places: Mapping[int, _Place], tokenizer: Tokenizer
) -> Rendered:
    """Return a row, given where its answers are."""
    _check_traces(chat, whole)
    text, last = whole.text, len(chat.messages) - 1
    answers = [turn for turn in chat.answers if turn not in chat.left_out]
    eos = tokenizer.special_tokens.get("eos_token")
    untrained: list[int] = []
    first = 0
    if chat.everything or chat.completion is not None:
        spans, first = _one_span(chat, whole, places, eos)
        if not chat.everything and not spans:
            untrained = answers
        ends = last not in chat.left_out
    elif whole.marked:
        blocks = {turn: _blocks(turn, whole) for turn in answers}
        spans = [span for turn in answers for span in blocks[turn]]
        untrained = [turn for turn in answers if not blocks[turn]]
        ends = last in blocks and last not in untrained
    else:
        untrained = [turn for turn in answers if turn not in places]
        spans = [_span(chat, turn, whole, places[turn], eos) for turn in answers if turn in places]
        ends = last in answers and last in places
    return Rendered(
        text,
        tuple(spans),
        chat=True,
        prompt=first or next((span.start for span in spans if span.start), 0),
        ends=ends,
        assistant_turns=len(chat.answers),
        untrained_turns=len(untrained),
        left_out_turns=len(chat.left_out.intersection(chat.answers)),
        thoughtless_turns=sum(_loses_thinking(chat.messages[turn], text) for turn in chat.answers),
    )


def _span(chat: Chat, turn: int, whole: Rendering, place: _Place, eos: str | None) -> Span:
    """Return the span of one answer."""
    start, stop = place
    if chat.role(turn) != "assistant":
        return Span(start, stop, stop)
    settled = start
    if eos:
        settled = said_until(chat.messages[turn], whole.text, place, eos)
    return Span(start, settled, stop)


def said_until(message: Mapping[str, Any], text: str, place: _Place, eos: str) -> int:
    """Return up to where a turn's text is what was said, so that an EOS in it ends nothing."""
    start, stop = place
    said = message.get("content")
    if not isinstance(said, str) or eos not in said:
        return start
    line = _last_line(said)
    return max(start, text.rfind(line, start, stop) + len(line))


def _blocks(turn: int, whole: Rendering) -> list[Span]:
    """Return the spans that the template marks in a turn."""
    marked = [(start, stop) for message, start, stop in whole.marked if message == turn]
    spans = [Span(start, stop, stop, marked=True) for start, stop in marked]
    place = whole.turns[turn]
    if spans and place is not None:
        stop = len(whole.text) if turn == len(whole.turns) - 1 else place[1]
        spans[-1] = replace(spans[-1], stop=max(stop, spans[-1].stop))
    return spans


def _one_span(
    chat: Chat, whole: Rendering, places: Mapping[int, _Place], eos: str | None
) -> tuple[list[Span], int]:
    """Return the one span of a completion or of all, without what is left out, and the prompt."""
    length, last = len(whole.text), len(chat.messages) - 1
    first = places[chat.first][0] if chat.first in places else 0
    if chat.everything:
        span = Span(0, length, length, marked=True)
    elif chat.completion not in places:
        return [], 0
    else:
        place = places.get(last, (0, length))
        span = replace(_span(chat, last, whole, place, eos), start=first)
        span = replace(span, settled=max(span.settled, first))
    spans = [span]
    for turn in sorted(chat.left_out):
        if turn < (chat.completion or 0) and not chat.everything:
            continue
        if turn not in places:
            raise UserError(
                f"{chat.where}: {chat.name(turn)} is to be kept out of the loss, and cannot be "
                "found in what the chat template makes of the row; use data.format=messages with "
                "data.completion_only=true"
            )
        start, stop = places[turn]
        tail = spans.pop()
        if start > tail.start:
            spans.append(Span(tail.start, start, start, marked=True))
        spans.append(replace(tail, start=stop))
    return [span for span in spans if span.start < span.stop], first


# --- turns that a template leaves out ------------------------------------------------------------


def _check_traces(chat: Chat, whole: Rendering) -> None:
    """Refuse a row of which the template left something out.

    Raises:
        UserError: A turn with a content, or a tool, has left no trace in the text.
    """
    remedy = (
        "use a chat template that writes it (data.chat_template=FILE), or take it out of the row"
    )
    for turn in range(len(chat.messages)):
        if not _leaves_trace(turn, chat, whole):
            raise UserError(
                f"{chat.where}: {chat.name(turn)} leaves no trace in what the chat template makes "
                f"of the row; {remedy}"
            )
    names = _names(chat.tools)
    missing = [name for name in names if name not in whole.text]
    if chat.tools and (missing or not whole.knows_tools):
        name = f"the tool '{(missing or names)[0]}'" if names else "the column 'tools'"
        raise UserError(
            f"{chat.where}: {name} leaves no trace in what the chat template makes of the row, and "
            "its answers would be trained without it; use a template that writes tools "
            "(data.chat_template=FILE), or leave the column 'tools' out"
        )


def _leaves_trace(turn: int, chat: Chat, whole: Rendering) -> bool:
    """Return whether a turn is in the text, and not only what others say alike."""
    message = chat.messages[turn]
    place = whole.turns[turn] if whole.turns else None
    written = "" if place is None else whole.text[slice(*place)]
    content = message.get("content")
    content = content.strip() if isinstance(content, str) else ""
    if not (written and says(written, message)):
        if not says(whole.text, message):
            return False
        signs = [sign for sign in _signs(content, message.get("role")) if sign in whole.text]
        if signs and not any(_is_said_more(sign, chat, whole, but=turn) for sign in signs):
            return False
    if any(_is_python(call, whole.text) for call in message.get("tool_calls") or []):
        return False
    for name in _names(message.get("tool_calls")):
        # A name that the content speaks of is not the call.
        spoken = content.count(name) if content in written else 0
        if written.count(name) <= spoken and not _is_said_more(name, chat, whole):
            return False
    return True


def _is_python(call: Mapping[str, Any], text: str) -> bool:
    """Return whether a template wrote a call's arguments as Python does, and not as JSON."""
    arguments = call.get("function", call).get("arguments")
    if not isinstance(arguments, dict) or not arguments:
        return False
    return str(arguments) in text and str(arguments) != json.dumps(arguments, ensure_ascii=False)


def _is_said_more(sign: str, chat: Chat, whole: Rendering, but: int | None = None) -> bool:
    """Return whether the text says something more often than the contents of turns, `but` one, do.

    What the descriptions of tools say is known too; a content that is not in the text is not.
    """
    known = json.dumps(chat.tools, ensure_ascii=False).count(sign) if chat.tools else 0
    for number, message in enumerate(chat.messages):
        content = message.get("content")
        if number != but and isinstance(content, str) and content.strip() in whole.text:
            known += content.count(sign)
    return whole.text.count(sign) > known


def _loses_thinking(message: Mapping[str, Any], text: str) -> bool:
    """Return whether an answer's thinking, in its content or beside it, is not in the text."""
    content, beside = (message.get(key) for key in ("content", "reasoning_content"))
    within = content.partition("</think>") if isinstance(content, str) else ("", "", "")
    thoughts = [within[0].replace("<think>", "")] if within[1] else []
    thoughts += [beside] if isinstance(beside, str) else []
    return not all(says(text, {"content": thought}) for thought in thoughts)


def holds(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether `text` can be what a template made of `message`, its calls included."""
    return all(name in text for name in _names(message.get("tool_calls"))) and says(text, message)


def says(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether the content of `message` can be in `text`.

    White space may differ, and the beginning of what an assistant says may be missing (most
    templates leave the thinking out of earlier turns). Other contents must be there by their
    longest line, perhaps as JSON.
    """
    content = message.get("content")
    if not isinstance(content, str):
        return True
    content = content.strip()
    if content in text:
        return True
    lines = _signs(content, message.get("role"))
    if not lines[-1]:
        return True  # an assistant that thinks and says nothing
    words = " ".join(text.split())
    for line in lines:
        line = " ".join(line.split())
        escaped = (json.dumps(line, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        if line in words or any(form in words for form in escaped):
            return True
    return False


def _signs(content: str, role: Any = None) -> list[str]:
    """Return the lines by which a content is known in a text; the last is empty if all is thought.

    The longest line; of an assistant, whose thinking may be left out, the answer's last one too.
    """
    lines = [max(content.strip().splitlines() or [""], key=len)]
    return [*lines, _last_line(content.rpartition("</think>")[2])] if role == "assistant" else lines


def _last_line(content: str) -> str:
    """Return the last line of a content that is not blank, without the space around it."""
    return content.rstrip().rpartition("\n")[2].strip()


def _names(calls: Any) -> list[str]:
    """Return the names of the functions in `tools` or `tool_calls`."""
    names = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        names += [name] if isinstance(name, str) else []
    return names


# --- turns that a row leaves out -----------------------------------------------------------------

# Keys of a message that say whether it is trained: OpenAI's, ms-swift's, and axolotl's.
_SAYS = re.compile(r"weight|loss|train(ing)?(_detail)?")


def without_weights(messages: Messages) -> tuple[Messages, list[int]]:
    """Return the messages as a template is to see them, and those that are not to be trained.

    Raises:
        UserError: A value that says neither yes nor no, or a yes on what is not trained.
    """
    kept: Messages = []
    left_out: list[int] = []
    for turn, message in enumerate(messages):
        said = {key: value for key, value in message.items() if _SAYS.fullmatch(key)}
        kept.append({key: value for key, value in message.items() if key not in said})
        name = f"turn {turn + 1} ({message.get('role')})"
        answers = [
            _is_trained(key, value, message, name)
            for key, value in said.items()
            if value is not None
        ]
        if not all(answers):
            left_out.append(turn)
    return kept, left_out


def _is_trained(key: str, value: Any, message: Mapping[str, Any], name: str) -> bool:
    if key.endswith("_detail"):
        raise UserError(
            f"{name}: '{key}' weights parts of a message, which is not supported; give the whole "
            "message 'train': true or false"
        )
    if key == "weight":
        if isinstance(value, bool) or value not in (0, 1):
            raise UserError(f"{name}: 'weight' must be 0 or 1, is {value!r}")
    elif not isinstance(value, bool):
        raise UserError(f"{name}: '{key}' must be true or false, is {value!r}")
    elif value and message.get("role") != "assistant":
        raise UserError(
            f"{name}: '{key}' is true, and only turns of the assistant are trained; say false, or "
            "leave the key out"
        )
    return bool(value)
