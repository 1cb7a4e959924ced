"""What a run would take on cards that can be rented: does it fit, how long, for how much.

`--plan --gpu a100,4090 --price 1.50,0.35`. Each card is planned for as `--gpu` plans for one, and
the settings are the fastest that fit it and leave the result as it is, else those that change least
of it (`train.plan.fitting`). No card has been asked: a time is a prediction, from two shares of a
card's bf16 peak, unless an earlier run like this one is on record there (`--records`). The lower
share is what the plan counts with everywhere. The upper is what the traffic ledger (`python -m
benchmarks.traffic`) counts for the steps of the LoRA presets with Triton's kernels, within 12 %
(`pytest -m slow tests/train/test_rent.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from files.errors import counted
from train.config.schema import RunConfig
from train.inputs.known import KnownData, Unknown
from train.plan.decide import machine_elsewhere
from train.plan.document import plan_document
from train.plan.ledger import SHARE_OF_PEAK
from train.plan.text import head_rows
from train.text import aligned, size_text

if TYPE_CHECKING:
    from models.config import DecoderConfig

LEDGER_SHARE = 0.57
# What an earlier run has in common with this one, where its speed is taken for this one's. A model
# is told by its parameters.
OF_SPEED = (
    *("method", "trainable_parameters", "total_parameters", "precision", "quantization"),
    *("gradient_checkpointing", "kernels", "world_size", "batching"),
)


@dataclass(frozen=True)
class Speed:
    """How fast an earlier run was (`train.report.speeds`).

    Attributes:
        run: Its folder.
        card: The card it ran on, of `train.plan.cards`.
        device: That card's name, as it calls itself.
        tokens_per_second: Tokens a second of all its ranks, padding left out.
        steps: How many steps that was measured over.
        facts: What its speed depends on (`OF_SPEED`).
    """

    run: str
    card: str
    device: str
    tokens_per_second: float
    steps: int
    facts: Mapping[str, Any]


def rent_document(
    config: RunConfig,
    data: KnownData | Unknown,
    decoder: DecoderConfig | Unknown,
    cards: Sequence[str],
    prices: Sequence[float],
    world_size: int,
    records: Sequence[Speed] = (),
) -> dict[str, Any]:
    """Return, ready for JSON, the plan of the first card and under `cards` what each would take.

    Args:
        config: What is asked.
        data: What is known of the rows.
        decoder: The architecture.
        cards: Names of `train.plan.cards`.
        prices: Of one card an hour, one for all or one each; empty where none is known.
        world_size: How many such cards share a step.
        records: What earlier runs were measured to do; of like runs on that card it takes the place
            of the prediction.

    Raises:
        UserError: A card is not known, or settings that contradict each other there.
    """
    documents = [
        plan_document(config, data, decoder, machine_elsewhere(config, card, None), world_size)
        for card in cards
    ]
    every = (
        prices if len(prices) == len(cards) else list(prices) * len(cards) or [None] * len(cards)
    )
    rows = [
        _card(name, {**document, "batching": config.data.batching}, price, records)
        for name, document, price in zip(cards, documents, every, strict=True)
    ]
    return {**documents[0], "cards": rows}


def _card(
    name: str, document: Mapping[str, Any], price: float | None, records: Sequence[Speed]
) -> dict[str, Any]:
    fitting = document["fitting"]
    way = next(iter(fitting["ways"]), None) if fitting else None
    row = {"card": name, "memory": document["available_memory"], "price": price, "fits": None}
    empty: dict[str, Any] = dict.fromkeys(("predicted_tokens_per_second", "hours", "cost"))
    empty |= {"measured_tokens_per_second": None, "measured": [], "unlike": []}
    if fitting is None:
        return row | {"with": None, "needed": document["memory"]["total"]} | empty
    row["fits"] = way is not None
    row["host_memory"] = document["streamed_memory"] if way and not way["settings"] else 0
    least = way or fitting["least"]
    row |= {
        "with": way and way["settings"],
        "changes": way and way["changes"],
        "needed": least["needed"] if least else document["memory"]["total"],
    }
    if way is None:
        return row | empty
    times = [way["seconds"] * SHARE_OF_PEAK / share for share in (LEDGER_SHARE, SHARE_OF_PEAK)]
    tokens, steps = document["compute"]["tokens"], document["total_steps"]
    hours = [steps * seconds / 3600 for seconds in times] if steps else None
    hired = document["world_size"]
    predicted = [tokens / (3600 * h) for h in reversed(hours)] if hours and tokens else None
    facts = {key.split(".")[1]: value for key, value in way["settings"].items()}
    facts = {fact: facts.get(fact, document[fact]) for fact in OF_SPEED}
    there = [one for one in records if one.card == name.lower().replace(" ", "-")]
    like = [one for one in there if one.facts == facts]
    measured = [one.tokens_per_second for one in like]
    if measured:
        ends = max(measured), min(measured)
        hours = [tokens / speed / 3600 for speed in ends] if tokens else None
    return row | {
        "predicted_tokens_per_second": predicted,
        "measured_tokens_per_second": [min(measured), max(measured)] if measured else None,
        "measured": [{"run": o.run, "device": o.device, "steps": o.steps} for o in like],
        "unlike": [
            {"run": one.run, **{f: one.facts[f] for f in OF_SPEED if one.facts[f] != facts[f]}}
            for one in there
            if one not in like
        ],
        "hours": hours,
        "cost": [h * price * hired for h in hours] if hours and price is not None else None,
    }


def render_rent(document: Mapping[str, Any]) -> str:
    """Return the cards as a table for a terminal."""
    hired = document["world_size"]
    with_price = any(row["price"] is not None for row in document["cards"])
    head = ["card", "memory", "fits", "tokens/s", "time"]
    table = [(*head, "price/h", "cost") if with_price else tuple(head)]
    for row in document["cards"]:
        speed = row["measured_tokens_per_second"]
        how = " measured" if speed else ""
        speed = _range(speed or row["predicted_tokens_per_second"], ",.0f") + how
        cells = [row["card"], size_text(row["memory"]), _fits(row), speed, _time(row["hours"])]
        if with_price:
            cells += [f"{row['price']:,.2f}", _range(row["cost"], ",.2f")]
        table.append(tuple(cells))
    notes = [note for row in document["cards"] for note in _on_records(row)]
    if any(row["hours"] and not row["measured"] for row in document["cards"]):
        other = "else " if notes else ""
        notes.append(
            f"tokens/s and time are {other}predicted, no card was asked: at {SHARE_OF_PEAK:.0%} "
            f"and {LEDGER_SHARE:.0%} of the card's bf16 peak, the latter what the traffic ledger "
            "counts"
        )
    if tokens := document["compute"]["tokens"]:
        at_most = "at most " if document["compute"]["tokens_are"] == "at most" else ""
        notes.append(f"time is that of {at_most}{tokens:,} tokens")
    notes.append("evaluation, saving and loading come on top")
    if hired > 1:
        notes.append(f"{hired} cards share each step; what they send each other comes on top")
    if with_price:
        times = f"time × price × {hired} cards" if hired > 1 else "time × price"
        notes.append(f"the cost is {times}, in the price's currency")
    heading = "Plan" + (f" of {document['preset']}" if document["preset"] else "") + ", to rent by"
    facts = [f"  {line}" for line in aligned(head_rows(document))]
    lines = [f"  {line}" for line in aligned(table)]
    # What fits where is said by the table; the rest is the same on every card.
    looked = [text for text in document["warnings"] if not text.startswith("memory: ")]
    if looked:
        notes += ["", "To look at", *(f"! {warning}" for warning in looked)]
    return (
        "\n".join([heading, *facts, "", *lines, "", *(f"  {note}".rstrip() for note in notes)])
        + "\n"
    )


def _on_records(row: Mapping[str, Any]) -> list[str]:
    """Say in which runs a card's speed was measured, or why another run on it is no measure."""
    predicted = _range(row["predicted_tokens_per_second"], ",.0f")
    notes = [
        f"{row['card']}: measured in {one['run']} ({one['device']}, {counted(one['steps'], 'step')}"
        f"), predicted {predicted}"
        for one in row["measured"]
    ]
    for one in row["unlike"] if not notes else ():
        other = ", ".join(f"{name} {value}" for name, value in one.items() if name != "run")
        notes.append(f"{row['card']}: {one['run']} is no measure of this run: it had {other}")
    return notes


def _time(hours: Sequence[float] | None) -> str:
    """Return hours as people say them, both ends in one unit."""
    if hours is None or hours[-1] >= 2:
        return _range(hours, ",.1f") + (" h" if hours else "")
    minutes = [60 * end for end in hours]
    return "under 1 min" if minutes[-1] < 1 else f"{_range(minutes, '.0f')} min"


def _fits(row: Mapping[str, Any]) -> str:
    if row["fits"] is None:
        return "not known"
    if not row["fits"]:
        return f"no, needs {size_text(row['needed'])}"
    if not row["with"]:
        host = row["host_memory"]
        return "as it is" + (f", {size_text(host)} of it on the host" if host else "")
    settings = " ".join(f"{key}={value}" for key, value in row["with"].items())
    return f"with {settings}" + (" (another result)" if row["changes"] else "")


def _range(ends: Sequence[float] | None, form: str) -> str:
    return "-" if ends is None else "–".join(dict.fromkeys(f"{end:{form}}" for end in ends))
