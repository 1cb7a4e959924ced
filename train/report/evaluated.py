"""What was measured of a run beside its losses: by `eval.metrics`, and by `lathe evaluate` later.

The latter lies in evaluations.jsonl in the run's folder.
"""

from __future__ import annotations

from typing import Any

from files.errors import UserError
from files.strict_json import parse_json_object
from train.config.schema import METRICS
from train.report.record import Record
from train.text import format_loss, markdown_table

EVALUATIONS_FILE = "evaluations.jsonl"


def evaluated(record: Record) -> str:
    """Return the sections of the report: what was measured at each step, and afterwards."""
    return "\n\n".join(filter(None, (_beside_the_loss(record), _afterwards(record))))


def _beside_the_loss(record: Record) -> str:
    found = [*record.valid, *record.test]
    names = [name for name in METRICS if any(name in row for row in found)]
    if not names:
        return ""
    rows = [
        (f"{row['step']:,}", row["split"], *(format_loss(row.get(name)) for name in names))
        for row in found
    ]
    header = ("step", "set", *(name.replace("_", " ") for name in names))
    text = "Beside the loss:\n\n" + markdown_table(header, rows, "rl" + "r" * len(names))
    completed = sorted({f"{n:,}" for row in found if (n := row.get("completed"))})
    if completed:
        text += f"\n\nOf completions: of {' and '.join(completed)} rows, greedy."
    return text


def _afterwards(record: Record) -> str:
    """Return the newest evaluation of each kind, a line for each."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for document in _read(record):
        about = {k: v for k, v in (document["completions"] or {}).items() if k != "unfinished"}
        newest[document["model"], document["data"], document["split"], str(about)] = document
    if not newest:
        return ""
    names = list(dict.fromkeys(n for one in newest.values() for n in one["metrics"]))
    rows = []
    for one in newest.values():
        split = f" ({one['split']})" if one["split"] else ""
        cells = [" ± ".join(filter(None, metric_text(n, one["metrics"].get(n)))) for n in names]
        rows.append((f"`{one['model']}`", f"`{one['data']}`{split}", f"{one['rows']:,}", *cells))
    header = ("weights", "rows of", "rows", *(name.replace("_", " ") for name in names))
    return (
        "## Evaluated afterwards\n\n"
        + markdown_table(header, rows, "llr" + "r" * len(names))
        + "\n\nBehind ± stands the standard error, clustered by row."
    )


def metric_text(name: str, metric: dict[str, Any] | None) -> tuple[str, str]:
    """Return a metric's value and its standard error as text, both empty where there is none."""
    if metric is None or metric["value"] is None:
        return "", ""
    digits = 4 if name in ("loss", "token_accuracy") else 3
    error = metric["standard_error"]
    return f"{metric['value']:.{digits}f}", "" if error is None else f"{error:.{digits}f}"


def _read(record: Record) -> list[dict[str, Any]]:
    path = record.folder / EVALUATIONS_FILE
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        document = parse_json_object(line, where)
        if not isinstance(document.get("metrics"), dict) or "completions" not in document:
            raise UserError(f"{where}: is no evaluation; delete this line to go on without it")
        found.append(document)
    return found
