"""Fill-in-the-middle: texts come together again byte for byte, in the format of each family."""

import ast
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from infilling import CODELLAMA, FAMILIES, QWEN, STARCODER, library_files, write_tokenizer
from tokenised import tokenise
from tokenizers import normalizers

from data.examples import Example, Examples
from data.fim import ROOM, FillInTheMiddle, FimTokens
from data.holes import below, hole, parses
from data.prompt import PromptFormat
from data.tokenizer import Tokenizer
from files.errors import UserError

UNITS = ("character", "line", "syntax")
NAMES = {"starcoder2": STARCODER, "qwen2.5-coder": QWEN, "codellama": CODELLAMA[:3]}
ENDS = {"starcoder2": "<|endoftext|>", "qwen2.5-coder": "<|endoftext|>", "codellama": "▁<EOT>"}
PROGRAM = """\
import os


@decorated
def first(numbers: list[int], größe="ä") -> int:
    # a comment
    total = sum(n * 2 for n in numbers if n > 1)
    if total > 3:
        print(f"{total!r} of {größe}")
    return total


class Second(Base):
    value = {"a": 1, **rest}

    def method(self):
        try:
            return self.value
        except (KeyError, ValueError) as error:
            raise
"""
SHORT = ["def add(a, b):\n    return a + b\n", "  x = 1", "π = 3.14\r\nprint( π )\r\n", PROGRAM]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {family: write_tokenizer(place / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {family: Tokenizer.load(folder) for family, folder in folders.items()}


def infilling(tokenizer: Tokenizer, **changes: Any) -> FillInTheMiddle:
    settings = {"rate": 1.0, "spm_rate": 0.5, "unit": "character", "targets": "all", "seed": 7}
    return FillInTheMiddle(FimTokens(tokenizer), **{**settings, "max_length": 2**20, **changes})


def holed(texts: list[str], fim: FillInTheMiddle, **changes: Any) -> Examples:
    form = PromptFormat(system_prompt=changes.pop("system_prompt", None))
    limit = {"max_length": fim.max_length, **changes}
    rows = [{"text": text} for text in texts]
    return tokenise(rows, fim.tokens.tokenizer, form, fim=fim, **limit)


def written(tokenizer: Tokenizer, ids: list[int], *, begins: bool) -> str:
    """Return the text of ids, by the vocabulary alone: no decoder is asked."""
    alphabet = _bytes_of_letters()
    content = b""
    pieces = [tokenizer.token(int(i)) or "" for i in ids]
    if tokenizer.token_id(CODELLAMA[0]) is None:
        content = bytes(alphabet[letter] for piece in pieces for letter in piece)
        return content.decode()
    for piece in pieces:
        byte = piece.startswith("<0x") and len(piece) == 6
        content += bytes([int(piece[3:5], 16)]) if byte else piece.replace("▁", " ").encode()
    return content.decode().removeprefix(" ") if begins else content.decode()


def _bytes_of_letters() -> dict[str, int]:
    """Return GPT-2's letters for bytes: the printable ones themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def taken_apart(
    example: Example, family: str, tokenizer: Tokenizer, *, first: bool = False
) -> tuple[str, str, str]:
    """Return prefix, middle and suffix of an example as text; `first`: its suffix comes first.

    SentencePiece's prefix and middle are one text then, which is returned as the prefix.
    """
    prefix, suffix, middle = (tokenizer.token_id(name) for name in NAMES[family])
    head = tokenizer.prefix_ids
    ids = example.input_ids.tolist()
    at = {one: ids.index(one) for one in (prefix, suffix, middle)}
    assert [ids.count(one) for one in (prefix, suffix, middle)] == [1, 1, 1]
    assert ids[: len(head) + 1] == [*head, prefix]
    assert ids[-1] == tokenizer.token_id(ENDS[family])
    before, rest = ids[at[prefix] + 1 : at[suffix]], ids[at[middle] + 1 : -1]
    ending = written(tokenizer, ids[at[suffix] + 1 : at[middle]], begins=False)
    cut = example.prompt_length - at[middle] - 1
    if first:
        assert not before
        if family == "codellama":
            return written(tokenizer, rest, begins=True), "", ending
        return (
            written(tokenizer, rest[:cut], begins=True),
            written(tokenizer, rest[cut:], begins=False),
            ending,
        )
    assert cut == 0
    return written(tokenizer, before, begins=True), written(tokenizer, rest, begins=False), ending


def assert_whole(texts: list[str], family: str, tokenizer: Tokenizer, unit: str) -> int:
    """Check that every example of texts is its text again, in both orders; return how many are."""
    found = 0
    for spm_rate in (0.0, 1.0):
        examples = holed(texts, infilling(tokenizer, unit=unit, spm_rate=spm_rate))
        assert len(examples) == len(texts)
        for text, example in zip(texts, examples, strict=True):
            start, middle, end = taken_apart(example, family, tokenizer, first=bool(spm_rate))
            assert start + middle + end == text
            found += 1
    return found


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_with_a_hole_is_the_text_again(
    loaded: dict[str, Tokenizer], family: str, unit: str
) -> None:
    assert assert_whole(SHORT * 8, family, loaded[family], unit) == 64


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_files_of_the_standard_library_come_together_again(
    loaded: dict[str, Tokenizer],
    family: str,
    unit: str,
    record_property: Callable[[str, object], None],
) -> None:
    texts = list(_exact_files())[:1000]
    record_property("files", len(texts))
    assert assert_whole(texts, family, loaded[family], unit) == 2 * len(texts) == 2000


def _exact_files() -> Iterator[str]:
    """Yield files that every tokenizer keeps as they are: Qwen's composes, Llama's has no ▁."""
    special = {*ENDS.values(), "<s>", "</s>", "<unk>", "<|im_end|>"}
    for text in library_files():
        exact = unicodedata.is_normalized("NFC", text) and "▁" not in text
        if exact and 1 < len(text) < 12_000 and not any(name in text for name in special):
            yield text


def test_prompts_are_as_each_family_publishes_them(loaded: dict[str, Tokenizer]) -> None:
    """StarCoder's and Qwen's cards write their prompts as one text."""
    before, after = "def f(x):\n    ", "\n    return y\n"
    for family in ("starcoder2", "qwen2.5-coder"):
        prefix, suffix, middle = NAMES[family]
        expected = loaded[family].encode(f"{prefix}{before}{suffix}{after}{middle}")
        assert FimTokens(loaded[family]).prompt_ids(before, after) == expected


@pytest.mark.parametrize(
    ("before", "after"), [("def f(x):\n    ", "  return y\n"), ("", " x"), (" a", "")]
)
def test_code_llama_s_prompts_are_those_of_its_authors(
    folders: dict[str, Path], loaded: dict[str, Tokenizer], before: str, after: str
) -> None:
    """`infilling_prompt_tokens`: the prefix with SentencePiece's space, the suffix without."""
    plain = tokenizers.Tokenizer.from_file(str(folders["codellama"] / "tokenizer.json"))
    plain.normalizer = normalizers.Replace(" ", "▁")

    def ids(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    bos, prefix, suffix, middle, end = (
        plain.token_to_id(name) for name in ["<s>", *CODELLAMA[:1], "▁<SUF>", "▁<MID>", "▁<EOT>"]
    )
    start = ids(" " + before) if before else []
    tokens = FimTokens(loaded["codellama"])
    assert tokens.prompt_ids(before, after) == [bos, prefix, *start, suffix, *ids(after), middle]
    made = tokens.parts(before, "  y =", after, suffix_first=False, most=999)
    assert made is not None
    assert made.before == [bos, prefix, *start, suffix, *ids(after), middle]
    assert made.middle == [*ids("  y ="), end]
    made = tokens.parts(before, "  y =", after, suffix_first=True, most=999)
    assert made is not None
    whole = [bos, prefix, suffix, *ids(after), middle, *ids(" " + before + "  y ="), end]
    assert made.before + made.middle == whole
    assert tokens.text(ids("  y =")) == "  y ="


def test_a_node_is_cut_where_the_parser_says(loaded: dict[str, Tokenizer]) -> None:
    nodes = [node for node in ast.walk(ast.parse(PROGRAM)) if hasattr(node, "lineno")]
    segments = {ast.get_source_segment(PROGRAM, node) for node in nodes}
    blocks = {
        PROGRAM[PROGRAM.index("total = sum") : PROGRAM.index("\n\n\nclass")],
        PROGRAM[PROGRAM.index("if total") : PROGRAM.index("\n    return total")],
        PROGRAM[PROGRAM.index("value = {") :].rstrip("\n"),
    }
    random = np.random.default_rng(0)
    found = set()
    for first, second in random.integers(0, 2**63, (600, 2)).tolist():
        start, stop = hole(PROGRAM, "syntax", 2 * first, 2 * second) or (0, 0)
        assert start < stop
        found.add(PROGRAM[start:stop])
    assert found <= segments | blocks
    assert blocks <= found
    assert {"total", "total > 3", "return total", 'f"{total!r} of {größe}"'} <= found
    assert len(found) > 30


def test_an_f_string_is_cut_as_a_whole() -> None:
    """Its parts have no places of their own before Python 3.12."""
    text = 'print(f"{total!r} of {size + 1}")\nx = 1\n'
    string, end = text.index("f"), text.index(")\n")
    words = [
        (place * 2**64 // len(text) + 2**50, n * 2**60)
        for place in range(string, end)
        for n in range(16)
    ]
    found = {hole(text, "syntax", *both) for both in words}
    assert found == {(0, end + 1), (string, end)}


def test_a_node_leaves_something_around_it() -> None:
    """What is not blank, that is; where there is no such node, lines are cut."""
    text = "def f(a):\n    return a\n"
    words = range(0, 2**64, 2**58)
    found = {hole(text, "syntax", x, y) for x in words for y in words}
    assert found == {(6, 7), (14, 22), (21, 22)}  # a, return a, a
    blank = {hole("\nx\n", "syntax", x, y) for x in words for y in words}
    assert blank == {(0, 1), (0, 3), (1, 3)}


def test_rows_that_are_alike_have_holes_of_their_own(loaded: dict[str, Tokenizer]) -> None:
    examples = holed([PROGRAM] * 6, infilling(loaded["starcoder2"]))
    assert len({tuple(example.input_ids.tolist()) for example in examples}) == 6
    split = holed(
        ["abcdefgh" * 40], infilling(loaded["starcoder2"], max_length=64), on_overflow="split"
    )
    assert len(split) > 3 and set(split.rows.tolist()) == {0}
    assert len({example.prompt_length for example in split}) > 1


def test_lines_are_cut_at_their_beginnings_and_characters_anywhere() -> None:
    text = "ab\ncd\r\nef"
    places = [0, 3, 7, 9]
    pairs = [(a, b) for a in places for b in places if a < b]
    words = range(0, 2**64, 2**58)
    assert {hole(text, "line", x, y) for x in words for y in words} == set(pairs)
    cut = {hole("abc", "character", x, y) for x in words for y in words}
    assert cut == {(a, b) for a in range(4) for b in range(4) if a < b}
    assert hole("", "character", 0, 0) is None and hole("", "line", 0, 0) is None
    assert {hole("one line", "line", x, 2**63) for x in words} > {(0, 5)}
    # Refused by the parser: by lines.
    assert not parses("def f(:\n") and hole("def f(:\n x\n", "syntax", 0, 0) == (0, 8)
    assert below(2**64 - 1, 10) == 9 and below(0, 10) == 0


def test_every_pair_of_places_is_alike() -> None:
    random = np.random.default_rng(1)
    counts = np.zeros((6, 6))
    for first, second in random.integers(0, 2**64, (15_000, 2), dtype=np.uint64).tolist():
        counts[hole("abcde", "character", first, second)] += 1
    pairs = counts[np.triu_indices(6, 1)]
    assert counts.sum() == pairs.sum()
    chi_squared = ((pairs - 1000) ** 2 / 1000).sum()
    assert chi_squared < 36.1  # 14 degrees of freedom: one in a thousand is above


def test_holes_are_a_function_of_seed_epoch_and_row(loaded: dict[str, Tokenizer]) -> None:
    texts = [f"value_{n} = {n} + {n * n}\n" * 3 for n in range(40)]
    fim = infilling(loaded["starcoder2"], rate=0.5)
    examples = holed(texts, fim)

    def of(some: Examples, epoch: int) -> list[list[int]]:
        return [example.input_ids.tolist() for example in some.at_epoch(epoch)]

    first = of(examples, 0)
    assert of(examples, 1) != first and of(examples, 0) == first
    assert [e.input_ids.tolist() for e in examples] == first
    # Any order, any subset, another set with the same rows.
    subset = examples.subset([30, 3, 17]).at_epoch(5)
    assert [e.input_ids.tolist() for e in subset] == [of(examples, 5)[i] for i in (30, 3, 17)]
    assert of(holed(texts, fim), 3) == of(examples, 3)
    assert of(holed(texts, infilling(loaded["starcoder2"], rate=0.5, seed=8)), 0) != first
    prefix = loaded["starcoder2"].token_id("<fim_prefix>")
    share = np.mean([prefix in ids for epoch in range(25) for ids in of(examples, epoch)])
    assert 0.5 - 0.05 < share < 0.5 + 0.05  # three deviations of 1,000 draws


def test_the_share_with_the_suffix_first_is_as_asked(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["starcoder2"]
    examples = holed(["abcdefgh" * 30] * 40, infilling(tokenizer, spm_rate=0.25))
    prefix, suffix = tokenizer.token_id(STARCODER[0]), tokenizer.token_id(STARCODER[1])
    first = [
        e.input_ids[:2].tolist() == [prefix, suffix]
        for n in range(25)
        for e in examples.at_epoch(n)
    ]
    assert 0.25 - 0.05 < np.mean(first) < 0.25 + 0.05


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_hole_is_trained_and_with_middle_nothing_before_it(
    loaded: dict[str, Tokenizer], family: str, spm_rate: float
) -> None:
    tokenizer = loaded[family]
    every = holed(SHORT, infilling(tokenizer, spm_rate=spm_rate))
    middle = holed(SHORT, infilling(tokenizer, spm_rate=spm_rate, targets="middle"))
    for one, other in zip(every, middle, strict=True):
        assert one.labels.tolist() == one.input_ids.tolist() == other.input_ids.tolist()
        cut = other.prompt_length
        assert set(other.labels[:cut].tolist()) == {-100}
        assert other.labels[cut:].tolist() == other.input_ids[cut:].tolist()
        assert other.labels[-1] == tokenizer.token_id(ENDS[family])
        assert len(other.labels) - cut >= 2 or family == "codellama"


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_example_exceeds_its_bound_and_only_the_suffix_loses_its_end(
    loaded: dict[str, Tokenizer], family: str, overflow: str
) -> None:
    tokenizer = loaded[family]
    fim = infilling(tokenizer, max_length=64, spm_rate=0.0)
    examples = holed([PROGRAM, PROGRAM[:30]], fim, on_overflow=overflow)
    plain = tokenise(
        [{"text": PROGRAM}, {"text": PROGRAM[:30]}], tokenizer, PromptFormat(),
        max_length=64, on_overflow=overflow,
    )  # fmt: skip
    assert examples.rows.tolist() == plain.rows.tolist()
    assert examples.lengths.tolist() == np.minimum(plain.lengths + ROOM, 64).tolist()
    assert examples.counts.tokens == plain.counts.tokens
    whole = short = 0
    position = {}
    for index, row in enumerate(examples.rows.tolist()):
        position.setdefault(row, index)
    for epoch in range(30):
        for index, example in enumerate(examples.at_epoch(epoch)):
            assert len(example.input_ids) <= examples.lengths[index]
            if example.input_ids[len(tokenizer.prefix_ids)] != tokenizer.token_id(NAMES[family][0]):
                continue  # no room for prefix and middle
            start, middle, end = taken_apart(example, family, tokenizer)
            text = start + middle + end
            source = [PROGRAM, PROGRAM[:30]][examples.rows[index]]
            assert text in source
            if index in position.values():
                assert source.startswith(start + middle)
            whole += text == source
            short += 1
    assert short > 30 and whole > 10


def test_the_parts_of_a_split_row_are_its_text(loaded: dict[str, Tokenizer]) -> None:
    """Each part has a hole of its own, and the parts' texts follow one another without a gap."""
    for family in FAMILIES:
        fim = infilling(loaded[family], max_length=2**20)
        tokenizer = loaded[family]
        text = PROGRAM.replace("ö", "o").replace("ß", "s").replace("ä", "a")
        (row,) = _labelled(text, tokenizer)
        parts = [(0, 50), (50, 100), (100, len(row.input_ids))]
        pieces = fim.pieces(row, parts)
        assert "".join(piece.text for piece in pieces) == text
        for (start, stop), piece in zip(parts, pieces, strict=True):
            ids = [i for i in row.input_ids[start:stop] if i not in (1, 2) or family != "codellama"]
            ids = [i for i in ids if i != tokenizer.eos_id]
            assert piece.text == written(tokenizer, ids, begins=start == 0)


def _labelled(text: str, tokenizer: Tokenizer) -> list[Any]:
    from data.labels import label_rows
    from data.source import Row

    return label_rows([Row({"text": text}, "rows:1")], tokenizer, PromptFormat())


def test_the_system_prompt_is_never_in_a_hole(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["starcoder2"]
    examples = holed([PROGRAM], infilling(tokenizer, spm_rate=0.0), system_prompt="Be brief.")
    for epoch in range(40):
        (example,) = examples.at_epoch(epoch)
        start, middle, end = taken_apart(example, "starcoder2", tokenizer)
        assert start.startswith("Be brief.\n\n")
        assert start + middle + end == "Be brief.\n\n" + PROGRAM


def test_what_cannot_be_cut_stays_whole_and_is_counted(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["qwen2.5-coder"]
    texts = [
        "x = 1\n<|fim_middle|>\ny = 2\n",
        "a = 1\n<|endoftext|>b = 2\n",
        "def f(:\n  x\n",
        "x = 1\ny = 2\n",
    ]
    examples = holed(texts, infilling(tokenizer, unit="syntax"))
    assert (examples.counts.holeless, examples.counts.unparsed) == (2, 3)
    plain = tokenise([{"text": text} for text in texts], tokenizer, PromptFormat(), max_length=99)
    for epoch in range(5):
        for index in (0, 1):
            assert (
                examples.at_epoch(epoch)[index].input_ids.tolist()
                == plain[index].input_ids.tolist()
            )
    assert examples.lengths[:2].tolist() == plain.lengths[:2].tolist()
    assert (examples.subset([1, 2]).counts.holeless, examples.subset([3]).counts.unparsed) == (1, 0)
    assert plain.counts.unparsed == plain.counts.holeless == 0


def test_texts_without_a_character_have_no_hole(loaded: dict[str, Tokenizer]) -> None:
    fim = infilling(loaded["codellama"])
    examples = holed(["", ""], fim)
    assert [e.input_ids.tolist() for e in examples] == [[1, 2], [1, 2]]
    assert not any(example.has_hole for example in examples)


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    from byte_tokenizer import write_byte_tokenizer

    write_byte_tokenizer(tmp_path, "<eos>")
    with pytest.raises(UserError, match="needs a tokenizer with tokens for prefix, suffix"):
        FimTokens(Tokenizer.load(tmp_path))


def test_texts_are_kept_only_where_holes_are_asked_for(
    loaded: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """The same rows without holes lie in a folder of their own, as they always did."""
    from data.examples import load_examples

    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": PROGRAM}) + "\n")

    def load(fim: FillInTheMiddle | None) -> Examples:
        return load_examples(
            str(tmp_path / "rows.jsonl"), split_column=None, split=None,
            tokenizer=loaded["starcoder2"], prompt_format=PromptFormat(), max_length=2**20,
            on_overflow="truncate", cache_root=tmp_path / "cache", fim=fim,
        )  # fmt: skip

    def kept() -> dict[str, set[str]]:
        folders = (tmp_path / "cache").iterdir()
        return {folder.name: {file.stem for file in folder.iterdir()} for folder in folders}

    plain = load(None)
    (before,) = kept().values()
    assert "texts" not in before
    holes = load(infilling(loaded["starcoder2"]))
    both = kept()
    assert len(both) == 2
    assert {"texts", "text_offsets", "holes_from"} == set.union(*both.values()) - before
    assert holes.fingerprint != plain.fingerprint == load(None).fingerprint
    # What is drawn with asks for no other cache; of the unit, rows are counted.
    load(infilling(loaded["starcoder2"], rate=0.3, spm_rate=0.0, targets="middle", seed=9))
    assert len(kept()) == 2
    load(infilling(loaded["starcoder2"], unit="syntax"))
    assert len(kept()) == 3
    # A text that was damaged is noticed.
    (damaged,) = [f for f in (tmp_path / "cache").iterdir() if (f / "texts.npy").exists()][:1]
    content = bytearray((damaged / "texts.npy").read_bytes())
    content[-1] ^= 1
    (damaged / "texts.npy").write_bytes(content)
    again = load(infilling(loaded["starcoder2"], spm_rate=0.0))
    assert "".join(taken_apart(again[0], "starcoder2", loaded["starcoder2"])) == PROGRAM
