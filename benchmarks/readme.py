"""The measured tables of the README files, written from the records.

    python -m benchmarks.readme

Everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table of
`benchmarks/results/NAME.jsonl`, and a line that says where, with what and when it was measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks import data, generation, harness, kernels, memory, versus_peft

DOCUMENTS = tuple(harness.ROOT / place / "README.md" for place in ("", "benchmarks", "kernels"))
TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "ratios": versus_peft.ratios_table,
    "versus_peft": versus_peft.table,
    "data": data.table,
    "generation": generation.table,
    "kernels": kernels.table,
    "gpu": versus_peft.gpu_table,
    "memory": memory.table,
}
# Tables that are made of another one's records.
_RECORDS = {"ratios": "versus_peft"}
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def circumstances(records: list[dict[str, Any]]) -> str:
    """Return in one line where, with what and at which commits records were measured."""
    versions = [
        f"{package} {version}"
        for row in records
        for package, version in row["versions"].items()
        if package in ("torch", "transformers", "peft")
    ]
    told = (
        ("", [f"{row['device']}, {row['threads']} threads" for row in records]),
        ("", versions),
        ("", [row["utc"][:10] for row in records]),
        ("commit ", [row["commit"][:7] + " with changes" * row["dirty"] for row in records]),
        ("", [f"`{row['command']}`" for row in records]),
    )
    return "; ".join(what + ", ".join(dict.fromkeys(values)) for what, values in told)


def with_tables(text: str) -> str:
    """Return a document's text with every table as the records have it.

    Raises:
        KeyError: A place asks for a table that there is none of.
    """

    def filled(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        records = latest(harness.read(_RECORDS.get(name, name)))
        lines = [*TABLES[name](records), ""]
        if records:
            lines += [circumstances(records), ""]
        return opening + "\n".join(lines) + closing

    return _PLACE.sub(filled, text)


def latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that no later one of the same subject replaces, in order."""
    subjects = ("capability", "model", "part", "row", "case", "side")
    newest = {
        # Records of different cards stand beside each other; those of a CPU replace each other.
        (*(row.get(name) for name in subjects), row["device"] if "gemm_tflops" in row else ""): row
        for row in records
    }
    return list(newest.values())


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
