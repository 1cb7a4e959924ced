"""tokenizer.json: the attacks that are known, and every style of published file."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from data import tokenizer_file
from data.tokenizer_file import answer, check_parts, load_backend
from files.errors import UserError

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "Hello, World! How ARE you?  naïve 漢字 🙂",
]


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {token: number for number, token in enumerate([*ALPHABET, "Ġd", "Ġde", "re"])}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "d", "▁d"]
LLAMA = {piece: number for number, piece in enumerate(PIECES)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", ",", "re", "##turn", "def"]
BERT = {word: number for number, word in enumerate(WORDS)}
SCORED = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁de", -3.0), ("f", -4.0)]


def word_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "def": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def before_types() -> tokenizers.Tokenizer:
    """Return a tokenizer as the oldest GPT-2 files have it, with no type in the model."""
    tokenizer = tokenizers.Tokenizer(models.BPE(BYTES, [("Ġ", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>")])
    file = json.loads(tokenizer.to_str())
    del file["model"]["type"]
    return tokenizers.Tokenizer.from_str(json.dumps(file))


STYLES: dict[str, Callable[[], Any]] = {
    "Qwen2": lambda: transformers.Qwen2Tokenizer(vocab=dict(BYTES), merges=[("Ġ", "d")]),
    "GPT-2 (StarCoder2)": lambda: transformers.GPT2Tokenizer(
        vocab=dict(BYTES), merges=[("Ġ", "d"), ("Ġd", "e")]
    ),
    "Llama": lambda: transformers.LlamaTokenizer(vocab=dict(LLAMA), merges=[("▁", "d")]),
    "Gemma": lambda: transformers.GemmaTokenizer(vocab=dict(LLAMA), merges=[("▁", "d")]),
    "BERT": lambda: transformers.BertTokenizer(vocab=dict(BERT)),
    "T5": lambda: transformers.T5Tokenizer(vocab=list(SCORED), extra_ids=5),
    "XLM-R": lambda: transformers.XLMRobertaTokenizer(),
    "word level": word_level,
    "before types": before_types,
}


@pytest.fixture
def write(tokenizer_json: dict[str, Any]) -> Callable[..., bytes]:
    """Return a function that writes the small tokenizer with some keys changed."""

    def make(model: dict[str, Any] | None = None, **changes: Any) -> bytes:
        file = tokenizer_json | changes
        file["model"] = tokenizer_json["model"] | (model or {})
        return json.dumps(file).encode()

    return make


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def added(content: str, token_id: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True} | flags


@pytest.mark.parametrize("style", STYLES)
def test_published_styles_pass(style):
    made = STYLES[style]()
    text = (made if isinstance(made, tokenizers.Tokenizer) else made._tokenizer).to_str()
    assert list(answer([text, "FILE"])).count(None) > 5
    ours, theirs = tokenizer_file._load(text, "FILE"), tokenizers.Tokenizer.from_str(text)
    theirs.no_truncation()
    theirs.no_padding()
    for sample in TEXTS:
        assert ours.encode(sample).ids == theirs.encode(sample).ids != []


def test_precompiled_maps_of_sentencepiece_pass(write):
    # Two entries: one letter that becomes another, and the ligature that becomes 18.
    texts = b"a\0" + "صلى الله عليه وسلم".encode() + b"\0"
    charsmap = base64.b64encode((4).to_bytes(4, "little") + b"trie" + texts).decode()
    part = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    check_parts(json.loads(write(normalizer=sequence(part, spaces))), "FILE")


LONG_MAP = base64.b64encode(bytes(4) + b"\0" + b"x" * 1000).decode()
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000,
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Forty of these make a text 2**40 times as long.
        ({"normalizer": sequence(*[replace("a", "aa")] * 40)}, "1.1e.12 times as long"),
        ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 40)}, "1.1e.12 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 40}}, "decoder may"),
        ({"normalizer": replace("a", "a" * 10**6)}, r"content has 1000000 characters; at most 64"),
        ({"normalizer": sequence(*[{"type": "NFC"}] * 65)}, "has 65 items; at most 64"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_MAP}},
            "1e.03 times as long",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "no base64"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a?" * 5000}}},
            r"Regex has 10000 characters; at most 4096",
        ),
        ({"post_processor": TEMPLATE}, r"single has 1000 items; at most 64"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 2**32]}}, "is 4294967296"),
        ({"model": {"dropout": 0.1}}, r"dropout is 0\.1: a text would have other tokens"),
        ({"model": {"max_input_chars_per_word": 10**9}}, "must be from 1 to 1024"),
        ({"model": {"end_of_word_suffix": "w" * 65}}, "suffix has 65 characters"),
    ],
)
def test_a_part_that_is_not_allowed_is_one_sentence(write, changes, message):
    with pytest.raises(UserError, match=f"^FILE: .*{message}"):
        check_parts(json.loads(write(**changes)), "FILE")


def test_kinds_are_the_librarys_affair(write):
    """A file of tomorrow: the library that is installed knows its parts, and nobody else need."""
    part = {"type": "Tomorrow", "options": [{"type": "Other", "content": " "}]}
    changes = {role: part for role in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    check_parts(json.loads(write(**changes, model={"type": "Unknown"})), "FILE")
    grown = {
        "type": "Tomorrow",
        "parts": [replace("a", "a" * 20), {"inner": replace("b", "b" * 20)}],
    }
    with pytest.raises(UserError, match="normalizer may make a text 400 times as long"):
        check_parts(json.loads(write(normalizer=grown)), "FILE")


def test_nesting_has_a_bound(write):
    part = {"type": "NFC"}
    for _ in range(20):
        part = sequence(part)
    with pytest.raises(UserError, match="nested more than 8 levels deep"):
        check_parts(json.loads(write(normalizer=part)), "FILE")


def regex(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Eight times and again eight times and four: within the bound, and more than any needs.
        (
            {"normalizer": sequence(replace("a", "a" * 64), replace("a", "aaaa"))},
            "makes 65536 tokens of 256 bytes .*over 16 for each byte",
        ),
        ({"pre_tokenizer": regex("(x+x+)+y")}, "fails on 'xxxxxxxx' and more: .*retry-limit"),
        ({"pre_tokenizer": regex("(")}, "not a usable tokenizer: "),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on .*chunk size must be"),
        ({"model": {"merges": [["never", "there"]]}}, "not a usable tokenizer: .*out of vocab"),
        # What the library does not know is its own affair: a newer one may.
        (
            {"normalizer": {"type": "Lowercas"}},
            "usable tokenizer: .*; use the .* a newer tokenizers",
        ),
        ({"normalizer": {"type": ["NFC"]}}, "not a usable tokenizer: "),
        ({"normalizer": "NFC"}, "not a usable tokenizer: "),
        ({"normalizer": {"type": "Sequence"}}, "not a usable tokenizer: "),
        ({"normalizer": {"type": "Replace"}}, "not a usable tokenizer: "),
        ({"pre_tokenizer": {"type": "Shell"}}, "not a usable tokenizer: "),
        ({"post_processor": {"type": "Replace"}}, "not a usable tokenizer: "),
        ({"decoder": {"type": "Exec"}}, "not a usable tokenizer: "),
        ({"model": {"type": "LSTM"}}, "not a usable tokenizer: "),
        ({"model": {"vocab": None}}, "not a usable tokenizer: "),
        ({"model": {"vocab": {"a": -1}}}, "not a usable tokenizer: "),
        ({"model": {"vocab": {"a": True}}}, "not a usable tokenizer: "),
        ({"model": {"vocab": {"a": "0"}}}, "not a usable tokenizer: "),
        ({"model": {"vocab": [["a"], 3]}}, "not a usable tokenizer: "),
        ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "'a' and 'b' share the id 0"),
        ({"model": {"vocab": {"a": 2**32 - 1}, "merges": []}}, "the id 4294967295; ids run from 0"),
        ({"model": {"vocab": {"a" * 5000: 0}, "merges": []}}, "token has 5000 characters"),
        ({"model": {"vocab": {}, "merges": []}, "added_tokens": []}, "has no tokens"),
        ({"added_tokens": 3}, "not a usable tokenizer: "),
        ({"added_tokens": [{"id": 0}]}, "not a usable tokenizer: "),
        ({"added_tokens": [added("<a>", "5")]}, "not a usable tokenizer: "),
        ({"added_tokens": [added("<a>", 388), added("<b>", 388)]}, "'<b>' has the id 388 in the"),
        ({"added_tokens": [added("<a>", 2**32 - 1)]}, "id 4294967295 in the file and 388 in use"),
        ({"added_tokens": [added("<a>", 500)]}, "'<a>' has the id 500 in the file and 388 in use"),
        ({"added_tokens": [added("", 388)]}, "'' has the id 388 in the file and none in use"),
        ({"added_tokens": [added("ab", 388), added("ab", 389)]}, "id 389 in the file and 388 in"),
    ],
)
def test_what_only_a_trial_shows_is_one_sentence(write, changes, message):
    with pytest.raises(UserError, match=f"^FILE: .*{message}"):
        for _ in answer([write(**changes).decode(), "FILE"]):
            pass


def test_padding_of_the_file_is_switched_off(write):
    """Padding to a thousand million tokens aborts a process that encodes anything with it."""
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    assert len(load_backend(write(padding=padding), "FILE").encode("ab").ids) == 2


def test_a_trial_without_end_is_one_sentence(write, monkeypatch):
    """Each letter of a long line asks the regular expression to look at thousands of others."""
    monkeypatch.setattr(tokenizer_file, "ANSWER_SECONDS", 0.5)
    pattern = {"Regex": "a(?=a{5000})"}
    longer = {"type": "Replace", "pattern": pattern, "content": "a" * 64}
    with pytest.raises(UserError, match=r"^FILE: .*: trying it took more than .*published$"):
        load_backend(write(normalizer=longer), "FILE")


def test_a_file_is_tried_once(write, monkeypatch, tmp_path):
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path))
    tried: list[str] = []
    monkeypatch.setattr(tokenizer_file, "_try_in_child", lambda _, where: tried.append(where))
    content = write()
    load_backend(content, "first")
    load_backend(content, "second")
    assert tried == ["first"]
    load_backend(content + b"\n", "other content")
    (record, _) = sorted((tmp_path / "tokenizers").iterdir(), key=lambda path: path.stat().st_mtime)
    for damage in ("", "{", "[]", '{"check": 0}'):
        record.write_text(damage)
        load_backend(content, repr(damage))
    monkeypatch.setattr(tokenizers, "__version__", "other")
    load_backend(content, "other library")
    expected = ["first", "other content", "''", "'{'", "'[]'", "'{\"check\": 0}'", "other library"]
    assert tried == expected


def test_a_file_that_was_refused_is_tried_again(write, monkeypatch, tmp_path):
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path))
    content = write(normalizer={"type": "Evil"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"^FILE: not a usable tokenizer: "):
            load_backend(content, "FILE")
    assert not list(Path(tmp_path).rglob("*.json"))


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(write, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tokenizer_file, "_try_in_child", lambda *_: None)
    assert load_backend(write(), "FILE").encode("a").ids
