"""How fast earlier runs were, by their folders: what `--plan --gpu … --records …` puts for its own.

Of the steps after the first ones, evaluation and saving left out, as `metrics.jsonl` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from files.errors import UserError, no_such_folder
from train.plan.cards import CARDS
from train.plan.profiled import STEPS_BEFORE
from train.plan.rent import OF_SPEED, Speed
from train.report.costs import card_of
from train.report.record import Record, read_record

# Fewer steps than this say little.
_LEAST_STEPS = 3


def speeds(places: Sequence[Path]) -> list[Speed]:
    """Return how fast runs were on cards that are known by name.

    Args:
        places: Folders of runs, or folders that hold such.

    Raises:
        UserError: A place is no folder or holds no run, or a run's file is damaged.
    """
    return list(filter(None, map(_speed, map(read_record, _runs(places)))))


def _runs(places: Sequence[Path]) -> Iterable[Path]:
    for place in places:
        if not place.is_dir():
            raise UserError(f"--records {place}: {no_such_folder(place)}")
        found = sorted(path.parent for path in place.glob("*/config.toml"))
        found = [place] if (place / "config.toml").is_file() else found
        if not found:
            raise UserError(
                f"--records {place}: is no run's folder and holds none; name one that a run has "
                "left, or the folder that such are in"
            )
        yield from found


def _speed(record: Record) -> Speed | None:
    card = card_of(record)
    rows = [row for row in record.train[STEPS_BEFORE:] if not row.get("skipped")]
    seconds = sum(row["seconds"] for row in rows)
    if card is None or len(rows) < _LEAST_STEPS or not seconds:
        return None
    facts = {**record.plan, "batching": record.section("data").get("batching")}
    return Speed(
        run=str(record.folder),
        card=next(name for name, one in CARDS.items() if one is card),
        device=str(record.environment.get("device_name")),
        tokens_per_second=sum(row["tokens"] for row in rows) / seconds,
        steps=len(rows),
        facts={name: facts.get(name) for name in OF_SPEED},
    )
