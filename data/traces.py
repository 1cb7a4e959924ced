"""The traces that messages leave in the text that a chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def holds(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether `text` can be what a template made of `message`, its calls included."""
    names = called_names(message.get("tool_calls"))
    return all(name in text for name in names) and says(text, message)


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
    lines = signs(content, message.get("role"))
    if not lines[-1]:
        return True  # an assistant that thinks and says nothing
    words = " ".join(text.split())
    for line in lines:
        line = " ".join(line.split())
        escaped = (json.dumps(line, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        if line in words or any(form in words for form in escaped):
            return True
    return False


def signs(content: str, role: Any = None) -> list[str]:
    """Return the lines by which a content is known in a text; the last is empty if all is thought.

    The longest line; of an assistant, whose thinking may be left out, the answer's last one too.
    """
    lines = [max(content.strip().splitlines() or [""], key=len)]
    return [*lines, _last_line(content.rpartition("</think>")[2])] if role == "assistant" else lines


def _last_line(content: str) -> str:
    """Return the last line of a content that is not blank, without the space around it."""
    return content.rstrip().rpartition("\n")[2].strip()


def called_names(calls: Any) -> list[str]:
    """Return the names of the functions in `tools` or `tool_calls`."""
    names = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        names += [name] if isinstance(name, str) else []
    return names


def said_until(message: Mapping[str, Any], text: str, place: tuple[int, int], eos: str) -> int:
    """Return up to where a turn's text is what was said, so that an EOS in it ends nothing."""
    start, stop = place
    said = message.get("content")
    if not isinstance(said, str) or eos not in said:
        return start
    line = _last_line(said)
    return max(start, text.rfind(line, start, stop) + len(line))
