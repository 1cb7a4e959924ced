"""The sources of a mixture (`data.weights`) in a run's report: shares, and how often rows came."""

from __future__ import annotations

from train.plan.mixture import short_names, times_text
from train.report.record import Record
from train.text import markdown_table


def mixture(record: Record) -> str:
    """Return the section about a mixture, empty where a run has none."""
    sources = record.plan.get("mixture")
    if not sources:
        return ""
    epochs = record.train[-1]["epoch"] if record.train else 0.0
    rows = [
        (
            f"`{name}`",
            f"{source['rows']:,}",
            f"{source['weight']:g}",
            f"{source['examples_an_epoch']:,}",
            f"{source['share_of_examples']:.1%}",
            f"{source['share_of_targets']:.1%}",
            times_text(epochs * source["examples_an_epoch"] / source["examples"]),
            times_text(source["times_seen"]),
        )
        for name, source in zip(short_names(sources), sources, strict=True)
    ]
    head = ("source", "rows", "weight", "examples an epoch", "of the examples", "of the targets")
    table = markdown_table((*head, "each row seen", "planned"), rows, "lrrrrrrr")
    return (
        f"## Mixture\n\n{table}\n\nEvery example of a source is seen once before any is seen twice."
    )
