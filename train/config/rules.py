"""How a key of the configuration says what it takes: its rule, its types, and both in words.

This module never imports torch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Table(tuple[tuple[str, float], ...]):
    """Names with a number each, in the order in which they were written: `dict(table)`."""


@dataclass(frozen=True)
class Rule:
    """What one key takes: a line of documentation, words, and bounds for numbers.

    `words` are the allowed strings (empty: any string), `aliases` other spellings of them.
    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; of a table they bound its
    numbers, which `whole` wants to be integers. `recommended` is advice, not a check. `on_resume`
    marks the keys that `--resume` lets change.
    """

    doc: str
    words: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    recommended: str = ""
    on_resume: bool = False


def key(default: Any, doc: str, **rule: Any) -> Any:
    """Return a dataclass field with its rule: what `Rule` takes."""
    return dataclasses.field(default=default, metadata={"rule": Rule(doc, **rule)})


@dataclass(frozen=True)
class Key:
    """One key of the configuration: `section.name`, the types it takes, and its rule."""

    section: str
    name: str
    default: Any
    optional: bool
    scalars: frozenset[type]
    item: type | None
    length: int | None
    table: bool
    rule: Rule

    @property
    def path(self) -> str:
        """The key as it is written: `section.name`."""
        return f"{self.section}.{self.name}"

    def allowed(self) -> str:
        """Say in words what the key takes."""
        parts: list[str] = []
        if bool in self.scalars:
            parts.append("true or false")
        if int in self.scalars and float not in self.scalars:
            parts.append(f"an integer{self._bounds()}")
        if float in self.scalars:
            parts.append(f"a number{self._bounds()}")
        if self.rule.words:
            parts.append(" | ".join(self.rule.words))
        elif str in self.scalars:
            parts.append("text")
        if self.item is not None:
            names = "them" if self.rule.words else "names"
            what = names if self.item is str else f"numbers{self._bounds()}"
            parts.append(f"a list of {f'{self.length} ' if self.length else ''}{what}")
        if self.table:
            number = "an integer" if self.rule.whole else "a number"
            parts.append(f"a table of names, each with {number}{self._bounds()}")
        if self.optional:
            parts.append("none")
        return ", or ".join(parts)

    def _bounds(self) -> str:
        rule = self.rule
        signs = {"≥": rule.minimum, ">": rule.above, "≤": rule.maximum, "<": rule.below}
        told = [f"{sign} {bound:g}" for sign, bound in signs.items() if bound not in (None, 2**63)]
        return f" {' and '.join(told)}" if told else ""


def section_keys(section: str, settings: type) -> list[Key]:
    """Return the keys of a section, in the order of its dataclass."""
    keys = []
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        tuples = [member for member in members if typing.get_origin(member) is tuple]
        items = typing.get_args(tuples[0]) if tuples else ()
        keys.append(
            Key(
                section=section,
                name=field.name,
                default=field.default,
                optional=types.NoneType in members,
                scalars=frozenset(m for m in members if m in (bool, int, float, str)),
                item=items[0] if items else None,
                length=len(items) if items and Ellipsis not in items else None,
                table=Table in members,
                rule=field.metadata["rule"],
            )
        )
    return keys
