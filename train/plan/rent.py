"""What a run would take on cards that can be rented: does it fit, how long, for how much.

`--plan --gpu a100,4090 --price 1.50,0.35`. Each card is planned for as `--gpu` plans for one, and
the settings are the fastest that fit it and leave the result as it is, else those that change least
of it (`train.plan.fitting`). No card has been asked: every time is a prediction, from two shares of
a card's bf16 peak. The lower is what the plan counts with everywhere. The upper is what the traffic
ledger (`python -m benchmarks.traffic`) counts for the steps of the LoRA presets with Triton's
kernels, within 12 % (`pytest -m slow tests/train/test_rent.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def rent_document(
    config: RunConfig,
    data: KnownData | Unknown,
    decoder: DecoderConfig | Unknown,
    cards: Sequence[str],
    prices: Sequence[float],
    world_size: int,
) -> dict[str, Any]:
    """Return, ready for JSON, the plan of the first card and under `cards` what each would take.

    Args:
        config: What is asked.
        data: What is known of the rows.
        decoder: The architecture.
        cards: Names of `train.plan.cards`.
        prices: Of one card an hour, one for all or one each; empty where none is known.
        world_size: How many such cards share a step.

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
    rows = [_card(*row) for row in zip(cards, documents, every, strict=True)]
    return {**documents[0], "cards": rows}


def _card(name: str, document: Mapping[str, Any], price: float | None) -> dict[str, Any]:
    fitting = document["fitting"]
    way = next(iter(fitting["ways"]), None) if fitting else None
    row = {"card": name, "memory": document["available_memory"], "price": price, "fits": None}
    empty = dict.fromkeys(("predicted_tokens_per_second", "hours", "cost"))
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
    return row | {
        "predicted_tokens_per_second": [tokens / (3600 * h) for h in reversed(hours)]
        if hours and tokens
        else None,
        "hours": hours,
        "cost": [h * price * hired for h in hours] if hours and price is not None else None,
    }


def render_rent(document: Mapping[str, Any]) -> str:
    """Return the cards as a table for a terminal."""
    hired = document["world_size"]
    with_price = any(row["price"] is not None for row in document["cards"])
    head = ["card", "memory", "fits", "tokens/s", "hours", *(["cost"] if with_price else [])]
    table = [tuple(head)]
    for row in document["cards"]:
        cells = [row["card"], size_text(row["memory"]), _fits(row)]
        cells += [_range(row[name], form) for name, form in _COLUMNS[: 3 if with_price else 2]]
        table.append(tuple(cells))
    peak = f"{SHARE_OF_PEAK:.0%} and {LEDGER_SHARE:.0%}"
    notes = [
        f"tokens/s and hours are predicted, no card was asked: at {peak} of the card's bf16 peak, "
        "the latter what the traffic ledger counts",
        "evaluation, saving and loading come on top",
    ]
    if hired > 1:
        notes.append(f"{hired} cards share each step; what they send each other comes on top")
    if with_price:
        notes.append("the cost is hours × price" + (f" × {hired} cards" if hired > 1 else ""))
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


_COLUMNS = (("predicted_tokens_per_second", ",.0f"), ("hours", ",.1f"), ("cost", ",.2f"))


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
    return "-" if ends is None else "–".join(f"{end:{form}}" for end in ends)
