"""The tests turn red where the code is wrong: `tests/mutations.py` says where, and is tried out."""

import ast
from collections import Counter
from collections.abc import Callable

import pytest

from tests.mutations import FOLDERS, MUTATIONS, ROOT, Mutation, check_that_all_pass, run, table


@pytest.mark.parametrize("path", sorted({mutation.path for mutation in MUTATIONS}))
def test_every_mutation_still_fits(path: str) -> None:
    """Where this fails, code has moved on: put the same fault into what it is now."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        if mutation.path == path:
            assert text.count(mutation.old) == 1, f"{mutation.why}: not there once:\n{mutation.old}"
            changed = text.replace(mutation.old, mutation.new)
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutation.why


def test_every_mutation_has_a_test_that_is_there() -> None:
    functions: dict[str, set[str]] = {}
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.why
        for test in mutation.tests:
            path, name = test.split("[")[0].split("::")
            if path not in functions:
                tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
                functions[path] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in functions[path], f"{mutation.path}: {mutation.why}: no {test}"


def test_there_are_a_hundred_over_every_folder() -> None:
    assert len(MUTATIONS) == len({(m.path, m.old, m.new) for m in MUTATIONS}) >= 100
    counts = Counter(mutation.path.split("/")[0] for mutation in MUTATIONS)
    assert set(counts) == set(FOLDERS)
    assert min(counts.values()) >= 10


@pytest.mark.slow
def test_what_a_run_says_of_a_mutation() -> None:
    """The runner itself must be able to say each of its four words."""
    path, test = "kernels/cpu/rounding.py", "tests/kernels/test_rounding.py::"
    old, rows = (
        "rows.bit_length() - 4",
        test + "test_at_most_an_eighth_is_wasted_and_few_sizes_are_left",
    )
    tried = [
        Mutation(path, "seen", old, "rows.bit_length() - 3", (rows,)),
        Mutation(path, "not seen", old, "rows.bit_length() - (5 - 1)", (rows,)),
        Mutation(path, "no Python", old, "rows.bit_length( - 4", (rows,)),
        Mutation(path, "no such name", old, "row.bit_length() - 4", (rows,)),
        Mutation(path, "no such test", old, "rows.bit_length() - 3", (test + "test_nothing",)),
        Mutation(path, "no such text", "rows.bit_size()", "rows", (rows,)),
    ]
    before = (ROOT / path).read_bytes()
    results = [outcome.result for outcome in run(tried)]
    assert results == ["red", "survived", "broken", "broken", "broken", "gone"]
    assert (ROOT / path).read_bytes() == before
    with pytest.raises(RuntimeError, match="without a mutation, already"):
        check_that_all_pass(tried[4:5])


@pytest.mark.slow
def test_mutations_turn_tests_red(record_property: Callable[[str, object], None]) -> None:
    """A quarter of an hour on two cores; `python -m tests.mutations FILE` is for one file."""
    check_that_all_pass(MUTATIONS)
    outcomes = run(MUTATIONS, lambda one: print(one.result, one.mutation.path, one.mutation.why))
    counts = Counter(outcome.result for outcome in outcomes)
    record_property("mutations", dict(counts))
    print(table(outcomes))
    assert counts["gone"] == counts["broken"] == 0, table(outcomes)
    assert counts["red"] >= 0.95 * len(outcomes), table(outcomes)
