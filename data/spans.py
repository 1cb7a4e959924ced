"""Conversations to text: what of it is trained, and what a template may not leave out.

A span is an answer: what stands between the header that a model is given and the end of its turn.
Where that is, `data/turns.py` finds.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.chat import Rendering
from data.messages import Messages, other_forms
from data.tokenizer import Tokenizer
from data.traces import called_names, said_until, says, signs
from data.turns import Chat, Place, located
from files.errors import UserError


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
    found = located(chats, tokenizer, every_prefix=False)
    rest = [number for number, (_, places) in enumerate(found) if places is None]
    slowly = located([chats[number] for number in rest], tokenizer, every_prefix=True)
    for number, item in zip(rest, slowly, strict=True):
        found[number] = item
    return [
        _rendered(chat, whole, places or {}, tokenizer)
        for chat, (whole, places) in zip(chats, found, strict=True)
    ]


# --- what is trained -----------------------------------------------------------------------------


def _rendered(
    chat: Chat, whole: Rendering, places: Mapping[int, Place], tokenizer: Tokenizer
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


def _span(chat: Chat, turn: int, whole: Rendering, place: Place, eos: str | None) -> Span:
    """Return the span of one answer."""
    start, stop = place
    if chat.role(turn) != "assistant":
        return Span(start, stop, stop)
    settled = start
    if eos:
        settled = said_until(chat.messages[turn], whole.text, place, eos)
    return Span(start, settled, stop)


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
    chat: Chat, whole: Rendering, places: Mapping[int, Place], eos: str | None
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
    """Refuse a row of which a turn with a content, or a tool, has left no trace in the text."""
    remedy = (
        "use a chat template that writes it (data.chat_template=FILE), or take it out of the row"
    )
    for turn in range(len(chat.messages)):
        if not _leaves_trace(turn, chat, whole):
            raise UserError(
                f"{chat.where}: {chat.name(turn)} leaves no trace in what the chat template makes "
                f"of the row; {remedy}"
            )
    names = called_names(chat.tools)
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
        there = [sign for sign in signs(content, message.get("role")) if sign in whole.text]
        if there and not any(_is_said_more(sign, chat, whole, but=turn) for sign in there):
            return False
    if any(_is_python(call, whole.text) for call in message.get("tool_calls") or []):
        return False
    for name in called_names(message.get("tool_calls")):
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
