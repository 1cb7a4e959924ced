"""Which files `.gitignore` leaves out, as git decides it, without git.

Patterns are read from the `.gitignore` of each folder, from the top of the repository (where `.git`
lies; without one, the folder that was asked for) down to the file; the last that matches decides,
and the nearest file asks last. What lies in a folder that is left out is left out with it. A
repository within a repository begins anew.

What only one machine knows does not count, so that each clone gives the same rows: neither
`.git/info/exclude` nor `core.excludesFile`, nor what was committed in spite of a pattern. Upper and
lower case differ on every system.

Source: gitignore(5); dir.c and wildmatch.c of git 2.39, byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CLASSES = {
    b"alnum": rb"0-9A-Za-z",
    b"alpha": rb"A-Za-z",
    b"blank": rb" \t",
    b"cntrl": rb"\x00-\x1f\x7f",
    b"digit": rb"0-9",
    b"graph": rb"!-~",
    b"lower": rb"a-z",
    b"print": rb" -~",
    b"punct": rb"!-/:-@\[-`{-~",
    b"space": rb"\t-\r ",
    b"upper": rb"A-Z",
    b"xdigit": rb"0-9A-Fa-f",
}
_NEVER = rb"(?!)"


@dataclass(frozen=True)
class Rule:
    """One line of a `.gitignore`.

    Attributes:
        keeps: It began with `!`: what matches is not left out.
        folders_only: It ended in a slash.
        by_name: It has no other slash, and is held against the last part of a path.
        pattern: What the path below the `.gitignore`, or its last part, must match whole.
    """

    keeps: bool
    folders_only: bool
    by_name: bool
    pattern: re.Pattern[bytes]


def files_left_out(folder: Path, names: Iterable[str]) -> set[str]:
    """Return those of the files that `.gitignore` leaves out; `folder` itself is never left out.

    Args:
        folder: Where the names begin.
        names: POSIX paths below it, of files.
    """
    folder = folder.resolve()
    top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)
    start = "".join(f"{part}/" for part in folder.relative_to(top).parts)

    @cache
    def rules_in(place: str) -> tuple[tuple[int, tuple[Rule, ...]], ...] | None:
        """Return what holds in a folder, the nearest file's last; None where it is left out."""
        above = () if not place else rules_in(place[: place.rfind("/", 0, -1) + 1])
        if above is None or (not start.startswith(place) and _matches(place, above)):
            return None
        if (top / place / ".git").exists():
            above = ()
        rules = _read(top / place / ".gitignore")
        return (*above, (len(os.fsencode(place)), rules)) if rules else above

    def left_out(path: str) -> bool:
        rules = rules_in(path[: path.rfind("/") + 1])
        return rules is None or _matches(path, rules)

    return {name for name in names if left_out(start + name)}


def _matches(path: str, scopes: tuple[tuple[int, tuple[Rule, ...]], ...]) -> bool:
    """Whether the last rule that matches a path leaves it out; a folder's ends in a slash."""
    whole = os.fsencode(path.removesuffix("/"))
    last = whole[whole.rfind(b"/") + 1 :]
    for begin, rules in reversed(scopes):
        for rule in reversed(rules):
            if rule.folders_only and not path.endswith("/"):
                continue
            if rule.pattern.fullmatch(last if rule.by_name else whole[begin:]):
                return not rule.keeps
    return False


def _read(path: Path) -> tuple[Rule, ...]:
    """Return the rules of a file, if there is one; git follows no link there."""
    try:
        data = b"" if path.is_symlink() else path.read_bytes()
    except OSError:
        return ()
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rules = (parse_rule(line.removesuffix(b"\r")) for line in lines)
    return tuple(rule for rule in rules if rule is not None)


def parse_rule(line: bytes) -> Rule | None:
    """Return the rule of a line; None where it has none."""
    if line.startswith(b"#"):
        return None
    line = _without_spaces_at_the_end(line)
    keeps, line = line.startswith(b"!"), line.removeprefix(b"!")
    folders_only, line = line.endswith(b"/"), line.removesuffix(b"/")
    if not line:
        return None
    return Rule(keeps, folders_only, b"/" not in line, _compiled(line.removeprefix(b"/")))


def _without_spaces_at_the_end(line: bytes) -> bytes:
    """Return a line without them; one that a backslash stands before is kept."""
    at = end = 0
    while at < len(line):
        space = line[at] == b" "[0]
        at += 2 if line[at] == b"\\"[0] else 1
        end = end if space else at
    return line[:end]


def _compiled(pattern: bytes) -> re.Pattern[bytes]:
    """Return the regular expression of a pattern, its leading slash gone."""
    # What is literal is compared first, and ** may stand at the beginning of what is left of it.
    special = re.search(rb"[*?\[\\]", pattern)
    at = begin = special.start() if special else len(pattern)
    made = re.escape(pattern[:begin])
    while at < len(pattern):
        match pattern[at : at + 1]:
            case b"*":
                stars = at
                while pattern[at : at + 1] == b"*":
                    at += 1
                after = pattern[at:]
                if at - stars == 1 or (stars > begin and pattern[stars - 1 : stars] != b"/"):
                    made += rb"[^/]*"
                elif after.startswith(b"/"):
                    made += rb"(?:.*/)?"
                    at += 1
                else:
                    made += rb".*" if not after or after.startswith(b"\\/") else rb"[^/]*"
            case b"?":
                made += rb"[^/]"
                at += 1
            case b"[":
                chosen, at = _class(pattern, at + 1)
                made += chosen
            case char:
                at += char == b"\\"
                made += re.escape(pattern[at : at + 1]) if at < len(pattern) else _NEVER
                at += 1
    return re.compile(made, re.DOTALL)


def _class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """Return the expression of a class, and where it ends; `at` is behind its bracket."""
    negated = pattern[at : at + 1] in (b"!", b"^")
    at = first = at + negated
    chosen: set[bytes] = set()
    before = b""  # what a range would begin with
    while at == first or pattern[at : at + 1] != b"]":
        char = pattern[at : at + 1]
        if char == b"[" and pattern[at + 1 : at + 2] == b":":
            close = pattern.find(b"]", at + 2)
            if close > at + 2 and pattern[close - 1 : close] == b":":
                name = pattern[at + 2 : close - 1]
                if name not in _CLASSES:
                    return _NEVER, len(pattern)
                chosen |= set(re.findall(rb"[%s]" % _CLASSES[name], bytes(range(128))))
                at, before = close + 1, b""
                continue
        ranges = char == b"-" and before != b"" and pattern[at + 1 : at + 2] not in (b"", b"]")
        at += ranges
        at += pattern[at : at + 1] == b"\\"
        if at >= len(pattern):
            return _NEVER, at
        char = pattern[at : at + 1]
        chosen |= {bytes([code]) for code in range(before[0], char[0] + 1)} if ranges else {char}
        at, before = at + 1, b"" if ranges else char
    if negated:
        chosen = {bytes([code]) for code in range(256)} - chosen
    members = b"".join(map(re.escape, sorted(chosen - {b"/"})))
    return (b"[%s]" % members if members else _NEVER), at + 1
