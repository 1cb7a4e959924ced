"""What a scan has found, as one JSON object and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from data.lint.findings import MOST_PLACES, NOTES, PROBLEMS
from data.lint.lengths import LIMITS, Lengths
from data.lint.scan import Scan, Settings
from files.errors import counted

_PERCENTILES = (0.5, 0.9, 0.95, 0.99)
_MOST_SHOWN = 5


def lint_document(scan: Scan, settings: Settings, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return what was found, for JSON; the text is made of nothing else.

    Args:
        scan: What was found.
        settings: How rows become what is trained.
        sources: Set → where its rows are from.
    """
    limit = settings.max_length
    sets = {}
    for name, lengths in scan.lengths.items():
        sets[name] = {
            "source": sources[name],
            "rows": scan.rows[name],
            "lengths": _lengths(lengths, limit),
            "languages": _counts(scan.languages[name]),
            "scripts": _counts(scan.scripts[name]),
            "labels": {
                column: None if counts is None else _counts(counts)
                for column, counts in scan.labels[name].items()
            },
        }
    return {
        "format": settings.prompt_format.format,
        "max_length": limit,
        "on_overflow": settings.on_overflow,
        "unreadable": scan.unreadable,
        "sets": sets,
        "recommended_max_length": scan.lengths["train"].recommended(),
        "problems": scan.findings.problems,
        "findings": [
            {
                "kind": kind,
                "severity": "problem" if kind in PROBLEMS else "note",
                "count": found.count,
                "meaning": (PROBLEMS | NOTES)[kind].format(limit=limit),
                "rows": [asdict(place) for place in found.places],
            }
            for kind, found in scan.findings
        ],
    }


def _lengths(lengths: Lengths, limit: int) -> dict[str, Any]:
    lost = [lengths.lost_at(at) for at in sorted({*LIMITS, limit})]
    return {
        "tokens": lengths.tokens,
        "targets": lengths.targets,
        "longest": lengths.longest,
        "mean": lengths.tokens / lengths.rows if lengths.rows else None,
        "percentiles": {f"{share:.0%}": lengths.percentile(share) for share in _PERCENTILES},
        "lost": [
            {
                **asdict(one),
                "share_of_rows_cut": _share(one.rows_cut, lengths.rows),
                "share_of_targets_lost": _share(one.targets_lost, lengths.targets),
            }
            for one in lost
        ],
    }


def _counts(counts: Counter[Any]) -> dict[str, int]:
    return {"none" if key is None else str(key): number for key, number in counts.most_common()}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def lint_text(document: Mapping[str, Any]) -> str:
    """Return the document for a reader."""
    lines = []
    for name, found in document["sets"].items():
        lines += list(_about_set(name, found, document["max_length"]))
    recommended = document["recommended_max_length"]
    if recommended is not None:
        lines.append(
            f"recommended data.max_length={recommended}: cuts at most 1 % of the training rows, "
            "and loses at most 1 % of their targets"
        )
    lines.append("")
    for finding in document["findings"]:
        lines += list(_about_finding(finding))
    problems = document["problems"]
    lines.append(
        f"{counted(problems, 'kind')} of problem found"
        if problems
        else "nothing found that would spoil a run"
    )
    return "\n".join(lines)


def _about_set(name: str, found: Mapping[str, Any], limit: int) -> Iterator[str]:
    lengths = found["lengths"]
    yield f"{name}: {counted(found['rows'], 'row')} of {_plain(found['source'])}"
    if not found["rows"]:
        return
    shares = ", ".join(f"{share} ≤ {n:,}" for share, n in lengths["percentiles"].items())
    yield (
        f"  {lengths['tokens']:,} tokens, {lengths['targets']:,} of them targets; tokens a row: "
        f"mean {lengths['mean']:.0f}, {shares}, longest {lengths['longest']:,}"
    )
    yield f"  {'max_length':>12}{'rows cut':>20}{'targets lost':>24}{'rows without a target':>24}"
    for lost in lengths["lost"]:
        mark = "*" if lost["max_length"] == limit else " "
        yield (
            f"  {lost['max_length']:>11}{mark}"
            f"{_with_share(lost['rows_cut'], lost['share_of_rows_cut']):>20}"
            f"{_with_share(lost['targets_lost'], lost['share_of_targets_lost']):>24}"
            f"{lost['rows_without_target']:>24,}"
        )
    yield "  * data.max_length"
    yield f"  languages: {_listed(found['languages'])}; scripts: {_listed(found['scripts'])}"
    for column, counts in found["labels"].items():
        yield f"  {column}: {'many values' if counts is None else _listed(counts)}"


def _with_share(number: int, share: float) -> str:
    return f"{number:,} ({share:.2%})"


def _listed(counts: Mapping[str, int], most: int = 8) -> str:
    named = [f"{_plain(name)} {number:,}" for name, number in counts.items()]
    more = len(named) - most
    return ", ".join(named[:most]) + (f" and {more} more" if more > 0 else "") or "none"


def _about_finding(finding: Mapping[str, Any]) -> Iterator[str]:
    mark = "✗" if finding["severity"] == "problem" else "·"
    count = counted(finding["count"], "row")
    yield f"{mark} {finding['kind']}: {count}; such rows {finding['meaning']}"
    for place in finding["rows"][:_MOST_SHOWN]:
        row = "" if place["row"] is None else f" ({place['set']} row {place['row']})"
        detail = f": {_plain(place['detail'])}" if place["detail"] else ""
        yield f"    {_plain(place['source'])}{row}{detail}"
    if finding["count"] > _MOST_SHOWN:
        more = finding["count"] - _MOST_SHOWN
        yield f"    and {more:,} more (--json names the first {MOST_PLACES:,})"


def _plain(text: str) -> str:
    """Return a text with what could move a terminal's cursor spelled out."""
    return text if text.isprintable() else repr(text)[1:-1]
