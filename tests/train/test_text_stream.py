"""Streamed text: each piece is what stays, and together they are the text, byte for byte."""

import random
from pathlib import Path

import pytest
from infilling import FAMILIES, write_tokenizer

from data.fim import FimTokens
from data.tokenizer import Tokenizer
from train.generation.stream import TextStream

TEXT = "def añadir(π):\n    return '☃ 😀' + \"\t  ß\"\n"


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def pieces(tokenizer: Tokenizer, ids: list[int], *, hole: bool = False) -> list[str]:
    decode = FimTokens(tokenizer).text if hole else tokenizer.decode
    stream = TextStream(tokenizer, decode)
    said = [stream.new(ids[:count]) for count in range(1, len(ids) + 1)]
    said.append(stream.rest(ids))
    assert "".join(said) == decode(ids)
    return said


def test_characters_come_whole_and_as_soon_as_they_are(tokenizer: Tokenizer) -> None:
    said = pieces(tokenizer, tokenizer.encode(TEXT))
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in said)
    # Nearly every token of plain text says something at once.
    assert sum(map(bool, said)) > 10 and max(map(len, said)) < 12


@pytest.mark.parametrize("hole", [False, True])
def test_any_tokens_give_their_whole_text(tokenizer: Tokenizer, hole: bool) -> None:
    """Bytes that are no text, special tokens and spaces in all places among them."""
    draw = random.Random(0)
    text = tokenizer.encode(TEXT, add_special_tokens=False)
    for _ in range(150):
        ids = [
            draw.randrange(tokenizer.vocabulary_size) if draw.random() < 0.5 else draw.choice(text)
            for _ in range(draw.randrange(1, 25))
        ]
        pieces(tokenizer, ids, hole=hole)


def test_bytes_of_a_character_after_which_one_too_many_comes_are_held(tmp_path: Path) -> None:
    """SentencePiece's decoder takes back the whole run of them."""
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, "codellama"))
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in (*"☃".encode(), 0xFF)]
    assert (
        pieces(tokenizer, [*ids, *tokenizer.encode("a", add_special_tokens=False)])[:3] == [""] * 3
    )
