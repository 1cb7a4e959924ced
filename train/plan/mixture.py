"""What a mixture (`data.weights`) is over a run: shares of its sources, how often a row comes.

The same numbers stand in `--plan`, in plan.json, in the opening panel and, of the epochs that were
done, in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from files.errors import counted, listed
from train.inputs.known import KnownData
from train.plan.steps import RunPlan

# Repeated more than about four times, rows were worth little to models that are pretrained
# (Muennighoff et al. 2023, arXiv 2305.16264).
MOST_REPEATS = 4
_MOST_TOLD = 10


def mixture_document(known: KnownData, plan: RunPlan) -> list[dict[str, Any]] | None:
    """Return what is known of each source, ready for JSON; None without `data.weights`.

    Shares are of an epoch, where an example of a source is any of its own: of targets they are
    what to expect.
    """
    if not known.sources:
        return None
    targets = [source.places * source.targets / source.examples for source in known.sources]
    epochs = plan.epoch_of(plan.total_steps)
    return [
        {
            "source": source.name,
            "weight": source.weight,
            "rows": source.rows,
            "examples": source.examples,
            "examples_an_epoch": source.places,
            "share_of_examples": source.places / plan.num_examples,
            "share_of_targets": own / sum(targets),
            "times_seen": epochs * source.places / source.examples,
        }
        for source, own in zip(known.sources, targets, strict=True)
    ]


def mixture_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a named value for each source of a plan document, of many for the first ten."""
    sources = document.get("mixture") or []
    rows = [
        (
            f"source {number}",
            f"{name}: {source['share_of_examples']:.1%} of the examples, "
            f"{source['share_of_targets']:.1%} of the targets; {counted(source['rows'], 'row')}, "
            f"each seen {times_text(source['times_seen'])}",
        )
        for number, (name, source) in enumerate(zip(short_names(sources), sources, strict=True), 1)
    ]
    left = len(rows) - _MOST_TOLD
    return rows[:_MOST_TOLD] + ([("sources", f"{left} more, in plan.json")] if left > 0 else [])


def mixture_objections(document: Mapping[str, Any]) -> list[str]:
    """Return what is to be looked at: rows that come often, and rows that do not come."""
    sources = document["mixture"] or []
    seen = dict(zip(short_names(sources), (one["times_seen"] for one in sources), strict=True))
    found = []
    if often := [
        f"{name} {times_text(times)}" for name, times in seen.items() if times > MOST_REPEATS
    ]:
        found.append(
            f"data.weights: rows are seen again and again, those of {listed(often)}: beyond about "
            f"{MOST_REPEATS} times, pretrained models gained little from them (Muennighoff et al. "
            "2023); watch the valid loss, lower the weight or train.num_train_epochs"
        )
    if seldom := [f"{name} ({times:.0%})" for name, times in seen.items() if times < 1]:
        found.append(
            f"data.weights: the run ends before all is seen of {listed(seldom)}; raise its weight "
            "or train.num_train_epochs to train on the rest"
        )
    return found


def short_names(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sources' names without what is above them, where they differ so."""
    names = [source["source"] for source in sources]
    last = [name if name.startswith("hub:") else PurePath(name).name for name in names]
    return last if len(set(last)) == len(last) else names


def times_text(times: float) -> str:
    """Return how often rows come: `2.5 times`, `once`."""
    return "once" if times == 1 else f"{times:.3g} times"
