"""Where the turns of a conversation lie in the text that a chat template makes of it.

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

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.chat import Conversation, Prefix, Rendering, common_characters
from data.messages import Messages
from data.tokenizer import Tokenizer
from data.traces import holds, said_until

# What `strftime_now` tells a chat template while rows are tokenised: a fixed day, so that the same
# data is the same tokens tomorrow. It is the day that Llama 3.2's own template falls back to.
TRAINING_DATE = datetime.datetime(2024, 7, 26)

# (start, stop) in characters of a text.
Place = tuple[int, int]


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


def located(
    chats: Sequence[Chat], tokenizer: Tokenizer, *, every_prefix: bool
) -> list[tuple[Rendering, dict[int, Place] | None]]:
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
    found = []
    for chat, conversation, renderings in zip(chats, asked, answers, strict=True):
        pairs = zip(conversation.prefixes, renderings, strict=True)
        by_prefix = {prefix: rendering for prefix, rendering in pairs if rendering is not None}
        search = _Search(chat, by_prefix, tokenizer)
        places = search.by_prefixes() if every_prefix else search.by_turns()
        found.append((search.whole, places))
    return found


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
    """The search for the turns of one conversation in its text, given its prefixes as text."""

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

    def by_turns(self) -> dict[int, Place] | None:
        """Return where each turn's answer is, by what the template tells; None: it does not."""
        chat = self._chat
        if self.whole.marked and not chat.everything and chat.completion is None:
            return {}  # what is trained is marked
        places: dict[int, Place] = {}
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

    def by_prefixes(self) -> dict[int, Place]:
        """Return where each turn's answer is, by rendered prefixes; without those not found."""
        places: dict[int, tuple[Place, str | None]] = {}
        for turn in self._chat.sought:
            place = self._told(turn) or self._defined(turn)
            if place is None:
                continue
            header = self._header(turn, place[0]) if self._chat.has_header(turn) else None
            places[turn] = place, header
            self._headers += [] if header is None else [header]
        return {turn: self._answer(turn, *found) for turn, found in places.items()}

    def _told(self, turn: int) -> Place | None:
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

    def _defined(self, turn: int) -> Place | None:
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

    def _answer(self, turn: int, place: Place, header: str | None) -> Place:
        """Return a turn without its header, and with what ends the text if it is the last.

        `place` is where it is, header and all; the header may not be known.
        """
        text = self.whole.text
        start, stop = place
        if turn == len(self._chat.messages) - 1 and text[stop:] != header:
            stop = self._end(turn, place)
        return start + self._header_length(turn, text[start:stop], header), stop

    def _end(self, turn: int, place: Place) -> int:
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
