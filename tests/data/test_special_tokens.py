"""Tokens that a model's files declare: what transformers makes one id is one id here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.tokenizer import Tokenizer
from files.errors import UserError
from tests.shown import shown

# No added token of tokenizer.json: the pieces of BPE would take it apart.
NEW = "<|call|>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
PLACES = [
    "{}",
    "a{}b",
    " {} ",
    "  {}  \n x",
    "{}{}",
    "a {}\n\n{} b",
    "{} a",
    "a\t{}",
    "É{}É",
    "A{}",
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **FLAGS, "special": True, **flags}


def decoder(*tokens: dict[str, Any], first: int) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + i): entry for i, entry in enumerate(tokens)}}


def texts(contents: list[str]) -> list[str]:
    """Return every token in every place, and each beside every other one."""
    filled = [place.replace("{}", content) for content in contents for place in PLACES]
    pairs = [
        first + between + second
        for first in contents
        for second in contents
        for between in ("", " ")
    ]
    return filled + pairs + ["def f(x):\n    return x\n"]


def compared(folder: Path, contents: list[str]) -> Tokenizer:
    """Return our tokenizer, once it has been found to be that of transformers."""
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts(contents):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded, text
    for content in contents:
        assert ours.encode(content, add_special_tokens=False) == [
            theirs.convert_tokens_to_ids(content)
        ]
    for name in ("bos", "eos"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id")
    return ours


@pytest.fixture(params=["byte level", "prepended", "metaspace", "lower case"])
def kind(request: pytest.FixtureRequest, tokenizer_json: dict[str, Any]) -> dict[str, Any]:
    """Return what tokenizer.json changes to: the ways in which families treat text before BPE."""
    if request.param == "byte level":
        return {}
    if request.param == "lower case":
        return {"normalizer": {"type": "Lowercase"}}
    # SentencePiece's: spaces are ▁, and what is unknown is bytes.
    letters = ["▁", *map(chr, range(33, 127))]
    words = [token["content"] for token in tokenizer_json["added_tokens"]]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "▁x"]
    model = tokenizer_json["model"] | {
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": [["▁", "a"], ["▁", "x"]],
        "byte_fallback": True,
        "fuse_unk": True,
    }
    prepend = {"type": "Prepend", "prepend": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    changes = {"model": model, "decoder": {"type": "Sequence", "decoders": decoders}}
    if request.param == "prepended":
        normalizer = {"type": "Sequence", "normalizers": [prepend, spaces]}
        return changes | {"normalizer": normalizer, "pre_tokenizer": None}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return changes | {"normalizer": None, "pre_tokenizer": metaspace}


def size(kind: dict[str, Any], tokenizer_json: dict[str, Any]) -> int:
    return len((tokenizer_json | kind)["model"]["vocab"])


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lstrip": True},
        {"rstrip": True},
        {"lstrip": True, "rstrip": True},
        {"single_word": True},
        {"normalized": True},
        {"special": False},
        {"special": False, "normalized": True, "rstrip": True},
    ],
    ids=lambda flags: "+".join(flags) or "none",
)
def test_a_token_of_the_configuration_keeps_its_flags(
    kind: dict[str, Any],
    flags: dict[str, bool],
    tokenizer_folder: Callable[..., Path],
    tokenizer_json: dict[str, Any],
) -> None:
    """`added_tokens_decoder`, for a token that is nowhere else and one that is there already."""
    new, known = token(NEW, **flags), token("</s>", **flags)
    declared = decoder(new, first=size(kind, tokenizer_json))
    declared["added_tokens_decoder"]["2"] = known
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | declared
    compared(tokenizer_folder(settings, kind), [NEW, "</s>", "<s>"])


def _folders(size: int) -> dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]]:
    """Return name → (tokenizer_config.json, other files, tokens that are one id)."""
    two = [token("<|a|>"), token("<|b|>", lstrip=True)]
    return {
        "extra": ({"extra_special_tokens": [NEW]}, {}, [NEW]),
        "additional": ({"additional_special_tokens": [NEW, "</s>"]}, {}, [NEW, "</s>"]),
        "extra before additional": (
            {"extra_special_tokens": [NEW], "additional_special_tokens": ["<|not|>"]},
            {},
            [NEW],
        ),
        "extra with flags": (
            {"extra_special_tokens": [token(NEW, lstrip=True) | {"__type": "AddedToken"}]},
            {},
            [NEW],
        ),
        "extra by name": ({"extra_special_tokens": {"call_token": NEW}}, {}, [NEW]),
        "a name of its own": ({"image_token": NEW}, {}, [NEW]),
        "added_tokens.json": ({}, {"added_tokens.json": {NEW: size}}, [NEW]),
        "added_tokens.json, named": (
            {"eos_token": NEW},
            {"added_tokens.json": {NEW: size, "<|a|>": size + 1}},
            [NEW, "<|a|>"],
        ),
        "added_tokens.json, listed": (
            {"additional_special_tokens": [NEW]},
            {"added_tokens.json": {NEW: size}},
            [NEW],
        ),
        "added_tokens.json is older than the configuration": (
            decoder(*two, first=size),
            {"added_tokens.json": {"<|a|>": size, "<|b|>": size + 1, "<|c|>": size + 2}},
            ["<|a|>", "<|b|>"],
        ),
        "decoder, named and listed": (
            {"eos_token": "<|a|>", "extra_special_tokens": ["<|b|>", NEW]}
            | decoder(*two, first=size),
            {},
            ["<|a|>", "<|b|>", NEW],
        ),
        "named, so special": (
            {"eos_token": NEW} | decoder(token(NEW, special=False), first=size),
            {},
            [NEW],
        ),
        "eos with flags": (
            {"eos_token": token(NEW, rstrip=True) | {"__type": "AddedToken"}},
            {},
            [NEW],
        ),
        "new names, in order": (
            {"pad_token": "<|p|>", "bos_token": "<|b|>", "eos_token": "<|e|>", "a_token": "<|a|>"},
            {},
            ["<|b|>", "<|e|>", "<|p|>", "<|a|>"],
        ),
        "map": ({}, {"special_tokens_map.json": {"eos_token": NEW}}, [NEW]),
        "map with flags": (
            {"eos_token": "</s>"},
            {"special_tokens_map.json": {"eos_token": {"content": NEW, **FLAGS, "lstrip": True}}},
            [NEW],
        ),
        "map, listed": (
            {"eos_token": "</s>", "extra_special_tokens": ["<|a|>"]},
            {"special_tokens_map.json": {"extra_special_tokens": ["<|a|>", NEW]}},
            ["<|a|>", NEW],
        ),
        "map, older list": (
            {"eos_token": "</s>"},
            {"special_tokens_map.json": {"additional_special_tokens": [NEW]}},
            [NEW],
        ),
        "map is older than the configuration": (
            {"eos_token": "<|a|>"} | decoder(*two, first=size),
            {"special_tokens_map.json": {"eos_token": "</s>"}},
            ["<|a|>"],
        ),
        "a piece of the vocabulary is EOS": ({"eos_token": "def"}, {}, ["def"]),
        "one within another": (
            {"extra_special_tokens": ["<|a", "<|a|>", "|>"]},
            {},
            ["<|a", "<|a|>", "|>"],
        ),
    }


@pytest.mark.parametrize("name", _folders(0))
def test_declared_tokens_are_those_of_transformers(
    kind: dict[str, Any],
    name: str,
    tokenizer_folder: Callable[..., Path],
    tokenizer_json: dict[str, Any],
) -> None:
    settings, files, contents = _folders(size(kind, tokenizer_json))[name]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    written = {file: json.dumps(content) for file, content in files.items()}
    compared(tokenizer_folder(settings, kind, files=written), contents)


def test_a_template_of_declared_tokens_trains_whole_ones(
    tokenizer_folder: Callable[..., Path], tokenizer_json: dict[str, Any], tmp_path: Path
) -> None:
    size = len(tokenizer_json["model"]["vocab"])
    template = (
        "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|done|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
    )
    declared = decoder(token("<|begin|>"), token("<|done|>"), first=size)
    settings = {"eos_token": "<|done|>", "chat_template": template} | declared
    turns = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add"}]
    model = tokenizer_folder(settings, name="model")
    [row] = shown(tmp_path, [{"messages": turns}], "data.format=messages", model=model)
    ids = [i for i in row["input_ids"] if i >= size]
    assert ids == [size, size + 1, size, size + 1]
    assert row["trained"][0].startswith("def add<|done|>")
    [row] = shown(tmp_path, [{"text": "add"}], model=model)
    assert row["input_ids"][-1] == row["labels"][-1] == size + 1


def test_what_is_declared_is_hashed_and_saved(
    tokenizer_folder: Callable[..., Path], tokenizer_json: dict[str, Any], tmp_path: Path
) -> None:
    size = len(tokenizer_json["model"]["vocab"])
    plain = Tokenizer.load(tokenizer_folder(name="plain"))
    files = {"added_tokens.json": json.dumps({NEW: size})}
    declared = Tokenizer.load(tokenizer_folder(name="declared", files=files))
    assert declared.fingerprint != plain.fingerprint
    assert declared.vocabulary_size == plain.vocabulary_size + 1
    declared.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.fingerprint == declared.fingerprint
    assert copy.encode(f"a{NEW}") == declared.encode(f"a{NEW}")


@pytest.mark.parametrize(
    ("settings", "files", "words"),
    [
        (decoder(token("</s>"), first=7), {}, "gives the token '</s>' the id 7, and .* 2; take"),
        # A gap: transformers gives the token the next free id, for which the model has another row.
        (decoder(token(NEW), first=1000), {}, "the id 1000, and tokenizer.json 388"),
        ({}, {"added_tokens.json": {"</s>": 7}}, "added_tokens.json gives the token '</s>' the id"),
        ({}, {"added_tokens.json": {"a": 1, "b": 1}}, "the id 1 stands twice"),
        ({}, {"added_tokens.json": {NEW: "388"}}, "'388' is no id"),
        ({}, {"added_tokens.json": {NEW: True}}, "True is no id"),
        ({"added_tokens_decoder": [NEW]}, {}, "must be an object of id and token"),
        ({"added_tokens_decoder": {"x": token(NEW)}}, {}, "'x' is no id"),
        ({"added_tokens_decoder": {"9" * 5000: token(NEW)}}, {}, "is no id"),
        ({"added_tokens_decoder": {"388": 3}}, {}, "not 3"),
        ({"added_tokens_decoder": {"388": {"content": None}}}, {}, "a token is text, or an object"),
        (
            decoder(token(NEW) | {"lstrip": "yes"}, first=388),
            {},
            "lstrip of the token .* must be true or false",
        ),
        ({"extra_special_tokens": "<a>"}, {}, "must be a list of tokens"),
        ({"extra_special_tokens": [3]}, {}, "not 3"),
        ({"eos_token": {"text": "</s>"}}, {}, "eos_token: a token is text, or an object"),
        ({"eos_token": "a\ud800"}, {}, r"eos_token: 'a\\ud800' is no token"),
        ({"eos_token": "x" * 5000}, {}, "eos_token: a token has 5000 characters"),
    ],
)
def test_declarations_that_cannot_be_kept(
    tokenizer_folder: Callable[..., Path],
    settings: dict[str, Any],
    files: dict[str, Any],
    words: str,
) -> None:
    written = {file: json.dumps(content) for file, content in files.items()}
    with pytest.raises(UserError, match=words) as raised:
        Tokenizer.load(tokenizer_folder(settings, files=written))
    assert "\n" not in str(raised.value)


def test_a_special_token_that_another_one_takes_apart_is_refused(
    tokenizer_folder: Callable[..., Path], tokenizer_json: dict[str, Any]
) -> None:
    """What is matched before the normalizer comes first: transformers splits such a token too."""
    size = len(tokenizer_json["model"]["vocab"])
    inner, outer = token("im"), token(NEW.replace("call", "im"), normalized=True)
    folder = tokenizer_folder(decoder(inner, outer, first=size))
    with pytest.raises(UserError, match=r"special token '<\|im\|>' has the id 389, but its text"):
        Tokenizer.load(folder)
