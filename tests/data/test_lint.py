"""The parts of `data.lint`: each against what is known of the text by its making."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from data.duplicates import Duplicates, normalised, signature
from data.labels import IGNORED
from data.lint.answers import unfinished
from data.lint.characters import line_endings, odd_characters
from data.lint.findings import NOTES, PROBLEMS
from data.lint.languages import programming_language, scripts
from data.lint.lengths import Lengths
from data.lint.private import private_data
from data.own_texts import own_columns, own_texts
from data.prompt import PromptFormat

# --- characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text", ["café", "naïve “quotes”", "Größe", "it’s", "привет", "日本語", "🙂"]
)
def test_utf8_read_as_another_encoding_is_mojibake(text: str, encoding: str) -> None:
    garbled = text.encode().decode(encoding, errors="ignore" if encoding == "cp1252" else "strict")
    assert [kind for kind, _ in odd_characters(f"x = 1  # {garbled}\n")] == ["mojibake"]


@pytest.mark.parametrize(
    "text",
    [
        *("café, Größe, naïve, señor, São, ÇA VA, Åse", "« été », «\u00a0été\u00a0»", "привет мир"),
        *(
            "日本語 テスト",
            "x² ± 3 µm £5 §7",
            "it’s “so”…",
            "\tx = 1\r\n\ty = 2\r\n",
            "a\x0cb",
            "🙂",
        ),
    ],
)
def test_what_people_write_is_not_odd(text: str) -> None:
    assert list(odd_characters(text)) == []


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a\0b", ["nul"]),
        ("a\x1b[31mb", ["control_character"]),
        ("a\x85b", ["control_character"]),
        ("a\ufffdb", ["replacement_character"]),
        ("\ufeffimport os", ["byte_order_mark"]),
        ("admin\u202e", ["invisible_character"]),
        ("Ã©\x1b\0", ["nul", "mojibake", "control_character"]),
    ],
)
def test_odd_characters_are_told_apart(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in odd_characters(text)] == kinds


def test_line_endings_are_counted_by_kind() -> None:
    assert line_endings("a") == set()
    assert line_endings("a\nb") == {"LF"}
    assert line_endings("a\r\n\r\n") == {"CRLF"}
    assert line_endings("\ra\r\n\n") == {"CR", "CRLF", "LF"}


# --- secrets and personal data -------------------------------------------------------------------

# None of these was ever issued; each has the form that its issuer documents. They are put together
# here so that no scanner of repositories takes them for real.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789"
SECRETS = {
    "aws_access_key": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws_secret_key": "aws_secret_access_key = '"
    + "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"
    + "EXAMPLEKEY'",
    "github_token": "ghp_" + _LETTERS[:36],
    "gitlab_token": "glpat-" + _LETTERS[:20],
    "hugging_face_token": "hf_" + _LETTERS[:34],
    "openai_or_anthropic_key": "sk-proj-" + _LETTERS[:40],
    "google_api_key": "AIza" + _LETTERS[:35],
    "slack_token": "xoxb-" + "1234567890-abcdefghij",
    "stripe_key": "sk_live_" + _LETTERS[:24],
    "json_web_token": "eyJ" + _LETTERS[:20] + ".eyJ" + _LETTERS[:20] + "." + _LETTERS[:30],
    "private_key": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "password_in_url": "postgres://jane:" + "hunter2secret@db.local/x",
    "email_address": "jane.doe@" + "university.edu",
    "example_email_address": "jane@" + "mail.example.com",
    "ip_address": "8.8." + "4.4",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_never_shown_whole(kind: str) -> None:
    text = f"client = connect({SECRETS[kind]!r})  # by @property\n"
    found = list(private_data(text))
    assert [name for name, _ in found] == [kind]
    shown = found[0][1].partition("…")[0]
    assert 1 <= len(shown) <= 4 and shown in text
    assert set(SECRETS) <= set(PROBLEMS) | set(NOTES)


@pytest.mark.parametrize(
    "text",
    [
        "@property\ndef a(self): ...", "icon@2x.png", "a @ b.T", "192.168.0.1 and 127.0.0.1",
        "0.0.0.0", "version 300.1.2.3", "1.2.3.4.5", "AKIA is a prefix", "sk-learn", "hf_hub",
        "https://example.org/a@b", "https://{user}:{password}@host", "eyJ", "git@", "x = 'ghp_'",
        "decorator@dataclass(frozen=True)", "git@github.com:a/b.git", "BEGIN PUBLIC KEY",
    ],
)  # fmt: skip
def test_what_looks_a_little_like_a_secret_is_none(text: str) -> None:
    assert list(private_data(text)) == []


# --- languages -----------------------------------------------------------------------------------

PROGRAMS = {
    "Python": "import os\n\ndef add(a, b):\n    if a is not None:\n        return a + b\n",
    "JavaScript": "const a = 1;\nfunction f(x) {\n  console.log(x === a);\n}\n",
    "Java": "import java.util.*;\npublic class A {\n  public static void main(String[] a) {\n }}",
    "C": "#include <stdio.h>\nint main(void) {\n  printf(\"%d\", 1);\n  return 0;\n}\n",
    "C++": "#include <vector>\nint main() {\n  std::vector<int> v;\n  std::cout << v.size();\n}\n",
    "Go": "package main\nimport \"fmt\"\nfunc main() {\n\tx := 1\n\tfmt.Println(x)\n}\n",
    "Rust": "pub fn f(v: &mut Vec<i32>) {\n    let mut x = 1;\n    println!(\"{}\", x);\n}\n",
    "Shell": "#!/bin/bash\nif [ -f x ]; then\n  echo \"$1\"\nfi\n",
    "SQL": "SELECT a, b\nFROM t\nWHERE a > 1;\n",
    "HTML": "<!DOCTYPE html>\n<html>\n<div>x</div><p>y</p>\n</html>\n",
    "PHP": "<?php\nfunction f($x) {\n  echo $x;\n}\n",
    "Ruby": "require 'set'\ndef f(x)\n  x.each do |y|\n    puts y\n  end\nend\n",
}  # fmt: skip


@pytest.mark.parametrize("language", PROGRAMS)
def test_a_program_s_language_is_known_by_its_words(language: str) -> None:
    assert programming_language(PROGRAMS[language]) == language


@pytest.mark.parametrize("text", ["", "Add two numbers and return the result of it.", "x = 1"])
def test_without_evidence_no_language_is_named(text: str) -> None:
    assert programming_language(text) is None


def test_scripts_are_those_of_a_tenth_of_the_letters() -> None:
    assert scripts("def f(): pass") == ["Latin"] and scripts("1 + 1") == []
    assert scripts("привет, мир! a") == ["Cyrillic", "Latin"]
    assert scripts("привет, большой мир! a") == ["Cyrillic"]
    assert scripts("日本語のテスト") == ["Kana", "Han"]
    assert scripts("return number  # да") == ["Latin", "Cyrillic"]


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "is_python", "cut"),
    [
        ("def f(x):\n    return g(x,", True, True),
        ("def f(x):\n    return g(x\n", True, True),
        ("def f(x):", True, True),
        ('def f(x):\n    """Return', True, True),
        ("Here it is:\n```python\nx = 1\n", False, True),
        ("The list is [1, 2,", False, True),
        ("Use C++", False, False),
        ("| a | b |", False, False),
        ("aGVsbG8gd29ybGQ==", False, False),
        ("def f(x):\n    return '(' + x\n", True, False),
        ("Here it is:\n```python\nx = (1\n```\n", False, False),
        ("def f(x):\n    return g(x)\n", True, False),
        ("As follows:", False, False),
        ("", False, False),
    ],
)
def test_an_answer_that_ends_too_early(answer: str, is_python: bool, cut: bool) -> None:
    assert bool(unfinished({}, answer, is_python)) == cut


def test_a_column_may_say_that_an_answer_was_cut() -> None:
    assert unfinished({"finish_reason": "length"}, "done.", False)
    assert not unfinished({"finish_reason": "stop"}, "done.", False)


def test_a_row_s_own_texts_are_those_of_its_format() -> None:
    template = PromptFormat(
        "template", prompt_template="Q: {a}\n{?b}{b}{/b}", completion_template="{c}"
    )
    assert own_columns(template) == ("a", "b", "c")
    messages = [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": [{"type": "text", "text": "Add."}]},
        {"role": "assistant", "content": "5"},
    ]
    columns = own_columns(PromptFormat("messages"))
    assert own_texts({"messages": messages, "id": "7"}, columns) == ["Add.", "5"]


# --- lengths -------------------------------------------------------------------------------------


def labelled(length: int, prompt: int) -> np.ndarray:
    ids = np.arange(length, dtype=np.int32)
    return np.where(ids < prompt, IGNORED, ids)


def test_what_a_length_costs_is_what_cutting_each_row_loses() -> None:
    rng = random.Random(1)
    rows = [labelled(n := rng.randint(1, 900), rng.randint(0, n)) for _ in range(200)]
    lengths = Lengths()
    for row in rows:
        lengths.add(row)
    targets = [np.flatnonzero(row[1:] != IGNORED) + 1 for row in rows]
    sizes = np.array([len(row) for row in rows])
    for limit in (2, 64, 300, 899, 900, 5000):
        lost = lengths.lost_at(limit)
        assert lost.rows_cut == sum(sizes > limit)
        assert lost.targets_lost == sum(int((places >= limit).sum()) for places in targets)
        assert lost.rows_without_target == sum(
            len(places) > 0 and not (places < limit).any() for places in targets
        )
    assert lengths.tokens == sizes.sum() and lengths.longest == sizes.max()
    assert lengths.targets == sum(map(len, targets))
    for share in (0.5, 0.9, 0.99):
        assert lengths.percentile(share) == np.percentile(sizes, 100 * share, method="inverted_cdf")


@pytest.mark.parametrize(
    ("sizes", "recommended"),
    [
        ([100] * 200, 128),  # all are whole in the next multiple of 64
        ([100] * 1999 + [2000], 128),  # one row may be cut: 0.94 % of the targets are lost
        ([100] * 199 + [2000], 2048),  # 8.6 % would be
        ([100] * 90 + [700] * 10, 704),  # a tenth of the rows would be cut
        ([500] * 199 + [520], 576),  # the longest costs hardly more
        ([7], 64),
    ],
)
def test_the_recommended_length_cuts_little(sizes: list[int], recommended: int) -> None:
    lengths = Lengths()
    for size in sizes:
        lengths.add(labelled(size, 1))
    lost = lengths.lost_at(recommended)
    assert lost.rows_cut <= 0.01 * len(sizes)
    assert lengths.recommended() == recommended


def test_without_rows_no_length_is_recommended() -> None:
    assert Lengths().recommended() is None and Lengths().longest == 0


# --- duplicates ----------------------------------------------------------------------------------


def shingles(text: bytes) -> set[bytes]:
    return {text[start : start + 16] for start in range(len(text) - 15)}


def jaccard(one: bytes, other: bytes) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


@pytest.fixture
def program() -> Callable[[int], str]:
    """Return a maker of long texts, no two of which have a shingle in common."""
    rng = random.Random(7)
    return lambda size: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz_()=+", k=size))


def changed(text: str, characters: int) -> str:
    return text[:40] + "0" * characters + text[40 + characters :]


def test_signatures_agree_as_often_as_the_jaccard_similarity_says(
    program: Callable[[int], str],
) -> None:
    """Each place agrees with that probability: of 96 × 150 places, within four deviations."""
    errors, variance = 0.0, 0.0
    for number in range(150):
        text = program(200 + 20 * number)
        one, other = text.encode(), changed(text, 10 + number).encode()
        expected = jaccard(one, other)
        errors += float((signature(one) == signature(other)).mean()) - expected
        variance += expected * (1 - expected) / 96
    assert abs(errors) < 4 * variance**0.5


def test_long_texts_are_hashed_in_pieces(program: Callable[[int], str]) -> None:
    text = program(5000).encode()
    parts = [signature(text[:2600]), signature(text[2585:])]
    # The minimum over a union is the lesser of the minima; of 16 bits only equality can be seen.
    whole = signature(text)
    assert ((whole == parts[0]) | (whole == parts[1])).all()


def test_what_copies_differ_in_is_normalised_away() -> None:
    one = "# Copyright 2020\ndef F(x):\n\n    return x + 1\n"
    other = "// (c) me\ndef f( x ):\r\n\treturn  x+1"
    assert normalised(one) == normalised(other) == b"deff(x):returnx+1"


def test_duplicates_are_found_and_others_are_not(program: Callable[[int], str]) -> None:
    texts = [program(600) for _ in range(300)]
    near = changed(texts[17], 20)
    assert jaccard(texts[17].encode(), near.encode()) > 0.88
    far = changed(texts[18], 220)
    assert jaccard(texts[18].encode(), far.encode()) < 0.6
    short = ["x = 1", "x = 1", "x = 2"]
    everything = [*texts, texts[5], near, far, *short, f"# note\n{texts[9].upper()}"]
    duplicates = Duplicates()
    for text in everything:
        duplicates.add(text, text)
    exact = duplicates.exact()
    roots = duplicates.near(exact)
    duplicates.close()
    rows = np.arange(len(everything))
    assert {(int(row), int(exact[row])) for row in rows[exact != rows]} == {(300, 5), (304, 303)}
    assert {(int(row), int(roots[row])) for row in rows[roots != rows]} == {
        *((300, 5), (301, 17), (304, 303), (306, 9)),
    }


def test_likeness_is_passed_on(program: Callable[[int], str]) -> None:
    text = program(1000)
    chain = [text[start : start + 500] for start in range(0, 250, 25)]
    duplicates = Duplicates()
    for text in chain:
        duplicates.add(text, text)
    assert jaccard(chain[0].encode(), chain[-1].encode()) < 0.5
    assert duplicates.near(duplicates.exact()).tolist() == [0] * len(chain)
