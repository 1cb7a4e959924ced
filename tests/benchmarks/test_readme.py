"""README's tables are those of the records."""

import pytest

from benchmarks import readme


def test_every_table_is_the_one_that_the_records_make() -> None:
    texts = [document.read_text(encoding="utf-8") for document in readme.DOCUMENTS]
    for name in readme.TABLES:
        assert any(f"<!-- table: {name} -->" in text for text in texts)
    for text in texts:
        assert readme.with_tables(text) == text, "run python -m benchmarks.readme"


def test_only_the_last_record_of_a_subject_counts_and_says_where_it_is_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def row(side: str, figure: float, commit: str, dirty: bool = False) -> dict:
        return {
            "part": "plan",
            "side": side,
            "median": figure,
            "spread": [figure, figure],
            "unit": "ms",
            "device": "a processor",
            "threads": 2,
            "versions": {"torch": "2.13.0", "numpy": "2"},
            "commit": commit,
            "dirty": dirty,
            "utc": "2026-11-21T10:00:00+00:00",
            "command": "python -m benchmarks.data",
        }

    rows = [row("cut", 1.0, "a" * 40), row("cut", 2.0, "b" * 40), row("order", 3.0, "c" * 40, True)]
    monkeypatch.setattr(readme.harness, "read", lambda name: rows)
    text = readme.with_tables("before\n<!-- table: data -->\nold\n<!-- end -->\nafter\n")
    assert text == (
        "before\n<!-- table: data -->\n"
        "| what | side | median (spread) |\n|---|---|---:|\n"
        "| plan | cut | 2.000 ms (2.000 to 2.000) |\n"
        "| plan | order | 3.000 ms (3.000 to 3.000) |\n\n"
        "a processor, 2 threads; torch 2.13.0; 2026-11-21; commit bbbbbbb, ccccccc with changes; "
        "`python -m benchmarks.data`\n<!-- end -->\nafter\n"
    )
