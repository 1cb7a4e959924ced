"""The presets: what each sets, what its seed document claims, and where it departs from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.errors import UserError
from train.config.layers import PRESET_HEAD, preset_file, read_toml
from train.config.load import load_config
from train.config.schema import RunConfig
from train.config.toml import shown


@dataclass(frozen=True)
class Claim:
    """A number (or a sentence) that a seed document states, and whether the formulas confirm it.

    `quantity` names what `train.plan.claims.measure` computes for it (none: not computable from a
    plan); the claim agrees where the computed number is within `tolerance` (absolute) of `value`.
    `holds` is our verdict; where it is false, `right` is the right value.
    """

    statement: str
    where: str
    holds: bool
    quantity: str | None = None
    value: float | None = None
    right: float | None = None
    tolerance: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """One file of train/presets: its configuration, and what its seed says about it.

    `num_examples` is the number of training rows that the seed states, `num_valid` of valid rows:
    a plan made without data counts with them.
    """

    name: str
    description: str
    seed: str | None
    num_examples: int | None
    num_valid: int | None
    claims: tuple[Claim, ...]
    departures: tuple[str, ...]
    config: RunConfig


def read_preset(name: str) -> Preset:
    """Read a preset: its resolved configuration, its seed's claims and its departures.

    A preset that `extends` another takes over its values, seed, row counts and departures; claims
    belong to one preset alone, since they speak of its own settings.

    Raises:
        UserError: no preset of that name.
    """
    path = preset_file(name)
    head = read_toml(path)[0]
    for key, kind in PRESET_HEAD.items():
        if key in head and not isinstance(head[key], kind):
            raise UserError(f"{path}: {key} must be of type {kind.__name__}")
    config = load_config(preset=name)
    parent = read_preset(head["extends"]) if "extends" in head else None

    def own(key: str, otherwise: Any = None) -> Any:
        return head.get(key, getattr(parent, key) if parent else otherwise)

    return Preset(
        name=name,
        description=own("description", ""),
        seed=own("seed"),
        num_examples=own("num_examples"),
        num_valid=own("num_valid"),
        claims=tuple(_claim(path, claim) for claim in head.get("claims", [])),
        departures=(*(parent.departures if parent else ()), *head.get("departures", [])),
        config=config,
    )


def _claim(path: Path, values: Any) -> Claim:
    try:
        return Claim(**values)
    except TypeError:
        given = list(values) if isinstance(values, dict) else values
        names = ", ".join(field.name for field in dataclasses.fields(Claim))
        raise UserError(f"{path}: not a claim: {shown(given)}; its keys are {names}") from None
