"""The message of an error is one line that a terminal can show, whatever it quotes."""

import pytest

from files.errors import UserError, listed, shown


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ("a name: naïve 漢字", "a name: naïve 漢字"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[2J clears a terminal", "\\x1b[2J clears a terminal"),
        ("\u202ebackwards", "\\u202ebackwards"),
        ("half a pair \ud800", "half a pair \\ud800"),
    ],
)
def test_what_does_not_print_is_shown_by_its_escape(given: str, printed: str) -> None:
    assert str(UserError(given)) == printed


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    text = str(UserError("x.json: key " + "a" * 5000 + "; fetch it again"))
    assert len(text) < 2000
    assert text.startswith("x.json: key aaa")
    assert text.endswith("aaa; fetch it again")
    assert " […] " in text


def test_a_value_is_quoted_and_cut_where_it_is_long() -> None:
    assert shown("a") == "'a'"
    assert shown("a" * 100, 10) == "'aaaaaaaa…"
    assert len(shown(list(range(1000)))) == 60


def test_names_are_listed_and_the_rest_counted() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(22)]).endswith(", 18, 19 and 2 more")
