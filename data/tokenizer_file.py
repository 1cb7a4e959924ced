"""tokenizer.json before it is trusted: a child has tried it.

The tokenizers library does what the file says. A regular expression may make it panic, a
replacement may multiply the text until the process is aborted, and ids may be anything. So a child
with limits (`data/limited.py`) reads the file as strict JSON, checks what no trial need meet (how
much longer a rare letter may become), loads it, and encodes texts of the kind that break
tokenizers. Which kinds of parts there are, the library knows. A file that has passed is remembered
by its sha256 in the cache folder, and loaded without a child from then on.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from data.cache import cache_folder
from data.limited import ANSWER_SECONDS, MEMORY_BYTES, LimitedChild, one_line
from files.atomic import write_json
from files.errors import UserError, shown
from files.strict_json import parse_json_object, read_json_object

# Token ids are kept as int32.
MAX_ID = 2**31 - 1
# Raised whenever the check becomes stricter: files that passed the last one are checked again.
_CHECK_VERSION = 1
# Bounds that published files stay far below: the longest Sequences have about ten parts, the
# longest regular expressions 500 characters, a SentencePiece character map 320 KB.
_MAX_ITEMS, _MAX_DEPTH, _MAX_TEXT, _MAX_PATTERN, _MAX_MAP = 64, 8, 64, 4096, 4 * 2**20
# How often longer all parts of a role together may make a text (Llama's space becomes three bytes).
_MAX_GROWTH = 256
_MAX_WORD = 1024
MAX_TOKEN = 4096
# Tokens for each byte of a text. One byte may become three (a space that is written as ▁), and a
# ligature 11 (NFKD of U+FDFA), each a token of its own under byte fallback.
_MAX_TOKENS_PER_BYTE = 16
_REMEDY = "use the tokenizer.json that the model's authors published"


def load_backend(content: bytes, where: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer for the content of a tokenizer.json.

    Truncation and padding that the file asks for are switched off.

    Args:
        content: The file's bytes.
        where: The file that messages name.

    Raises:
        UserError: The file breaks a rule, or breaks the library.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; the file is damaged") from None
    passed = {"check": _CHECK_VERSION, "tokenizers": tokenizers.__version__}
    record = cache_folder("tokenizers") / f"{hashlib.sha256(content).hexdigest()}.json"
    try:
        remembered = read_json_object(record) == passed
    except UserError:  # it was never seen, or the record is damaged
        remembered = False
    if not remembered:
        _try_in_child(text, where)
        # Where nothing can be written, the check is merely repeated.
        with contextlib.suppress(OSError, UserError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, passed)
    return _load(text, where)


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn every failure of the tokenizers library into one sentence.

    A panic in its Rust code (a catastrophic regular expression, for instance) arrives as an
    exception that does not derive from Exception, hence the wide net.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = one_line(str(error)) or type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def _try_in_child(text: str, where: str) -> None:
    # Measured: a file of 21 MiB needs 0.5 GiB in all, and 1.8 s for its longest answer.
    size = len(text.encode())
    child = LimitedChild(
        "data.tokenizer_file",
        memory=MEMORY_BYTES + 32 * size,
        seconds=ANSWER_SECONDS + size / (4 * 2**20),
    )
    try:
        child.ask(
            json.dumps([text, where]),
            lambda answers: f"{where}: not a usable tokenizer: trying it",
            _REMEDY,
        )
    finally:
        child.close()


def _load(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        with library_errors(f"{where}: not a usable tokenizer"):
            backend = tokenizers.Tokenizer.from_str(text)
    except UserError as error:
        raise UserError(
            f"{error}; {_REMEDY}, and a newer tokenizers than {tokenizers.__version__} if it has "
            "parts that this one does not know"
        ) from None
    # At once: the file may ask for any truncation or padding, and nothing would show it.
    backend.no_truncation()
    backend.no_padding()
    return backend


def answer(request: list[str]) -> Iterator[None]:
    """Check and try a file; the child's side of `load_backend`."""
    text, where = request
    file = parse_json_object(text.encode(), where)
    check_parts(file, where)
    added = file.get("added_tokens") or ()
    del file
    yield
    backend = _load(text, where)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    _check_vocabulary(vocabulary, where)
    for token, token_id in ((token["content"], token["id"]) for token in added):
        if vocabulary.get(token) != token_id:
            raise UserError(
                f"{where}: the added token {shown(token)} has the id {shown(token_id)} in the file "
                f"and {vocabulary.get(token, 'none')} in use; added tokens stand in the "
                "vocabulary, or follow it without a gap"
            )
    yield
    for probe in _probes():
        yield _try(backend, probe, where)


def check_parts(file: Mapping[str, Any], where: str) -> None:
    """Check what a parsed tokenizer.json could do to texts that no trial meets.

    Raises:
        UserError: Parts that are too many, too long, or could make a text far longer; a model that
            splits a text by chance, or long words in no bounded time.
    """
    for role in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = _check_part(file.get(role), f"{where}: {role}")
        if growth > _MAX_GROWTH:
            raise UserError(
                f"{where}: {role} may make a text {growth:.3g} times as long; at most "
                f"{_MAX_GROWTH} is allowed"
            )
    model, at = file.get("model"), f"{where}: model"
    if not isinstance(model, dict):
        return  # the library says so
    if model.get("dropout"):
        raise UserError(
            f"{at}.dropout is {shown(model['dropout'])}: a text would have other tokens each time; "
            "set it to null"
        )
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        _check_text(model.get(name), _MAX_TEXT, f"{at}.{name}")
    longest = model.get("max_input_chars_per_word")
    if longest is not None and not (isinstance(longest, int) and 0 < longest <= _MAX_WORD):
        raise UserError(
            f"{at}.max_input_chars_per_word is {shown(longest)}; it must be from 1 to {_MAX_WORD}, "
            "since the time for a word grows with its square"
        )


def _check_part(value: Any, at: str, depth: int = 0) -> float:
    """Check that nothing in a part is longer, deeper or larger than any published file has it.

    Return how often longer it may make a text, with all parts in it.
    """
    if depth > _MAX_DEPTH:
        raise UserError(f"{at} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict | list):
        if len(value) > _MAX_ITEMS:
            raise UserError(f"{at} has {len(value)} items; at most {_MAX_ITEMS} are allowed")
        growth = _growth(value, at) if isinstance(value, dict) else 1.0
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            if name == "precompiled_charsmap":
                _check_text(item, _MAX_MAP, f"{at}.{name}")
            elif name in ("Regex", "pattern") and isinstance(item, str):
                _check_text(item, _MAX_PATTERN, f"{at}.{name}")
            else:
                growth *= _check_part(item, f"{at}.{name}", depth + 1)
        return growth
    if isinstance(value, str):
        _check_text(value, _MAX_TEXT, at)
    elif isinstance(value, int) and not 0 <= value < MAX_ID:
        raise UserError(f"{at} is {value}; it must be from 0 to {MAX_ID - 1}")
    return 1.0


def _growth(part: Mapping[str, Any], at: str) -> float:
    """Return how often longer a part may make a text, those in it left out."""
    pattern, content = part.get("pattern"), part.get("content")
    if isinstance(pattern, dict) and isinstance(content, str):
        literal = pattern.get("String")
        # A regular expression may match the nothing between any two bytes.
        before = len(literal.encode("utf-8", "surrogatepass")) if isinstance(literal, str) else 0
        after = len(content.encode("utf-8", "surrogatepass"))
        return max(after / before, 1) if before else 1 + after
    if "precompiled_charsmap" in part:
        return _longest_mapped(part["precompiled_charsmap"], at)
    # A byte that is no printable letter becomes a letter of two bytes, a space a ▁ of three.
    growths = {"ByteLevel": 2.0, "Metaspace": 3.0}
    return growths.get(str(part.get("type")), 1.0)


def _longest_mapped(charsmap: Any, at: str) -> float:
    """Return the bytes of the longest text that a SentencePiece character map puts for a letter.

    The map is a 32-bit size, a trie of that size, and the texts, each ended by a zero byte.
    """
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError):
        raise UserError(f"{at} has a character map that is no base64") from None
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0) or 1


def _check_text(value: Any, most: int, at: str) -> None:
    if isinstance(value, str) and len(value) > most:
        raise UserError(f"{at} has {len(value)} characters; at most {most} are allowed")


def _check_vocabulary(vocabulary: Mapping[str, int], where: str) -> None:
    """Check tokens and ids, as the library holds them."""
    if not vocabulary:
        raise UserError(f"{where}: has no tokens; it is not the tokenizer of a model")
    owner: dict[int, str] = {}
    for token, token_id in vocabulary.items():
        if token_id >= MAX_ID:
            raise UserError(
                f"{where}: the token {shown(token)} has the id {token_id}; ids run from 0 to "
                f"{MAX_ID - 1}"
            )
        if token_id in owner:
            first, second = sorted((owner[token_id], token))
            raise UserError(
                f"{where}: the tokens {shown(first)} and {shown(second)} share the id {token_id}; "
                "each id stands for one token"
            )
        owner[token_id] = token
    _check_text(max(vocabulary, key=len), MAX_TOKEN, f"{where}: its longest token")


def _probes() -> Iterator[list[str]]:
    """Yield texts that break tokenizers which can be broken; together they are half a MiB."""
    # Runs of one letter are what regular expressions that backtrack fail on.
    yield [chr(letter) * 256 for letter in range(32, 127)]
    yield [letter * 4096 for letter in "\n\t\r0_-é🙂"]
    # Whatever takes the square of a line's length shows here.
    for letter in "a 漢":
        yield [letter * 2**16]
    source = "def add(first, second):\n    return first + second  # naïve\n\n\n"
    yield [source * 300, source.replace("\n", " ") * 1000, source.replace("\n", "\r\n") * 100]
    yield [" \t\r\n\u00a0\u2003\u3000\u200b\ufeff" * 500]
    # Ligatures that normal forms take apart, combining marks without end, every kind of letter.
    yield ["\ufdfaﬁ½Ⅷ" * 1000, "e" + "\u0301" * 4000, "\u202e\u200d\U000e0001\x00\x7f" * 500]
    yield ["".join(map(chr, range(0x20, 0xD800, 7))), "".join(map(chr, range(0x1F000, 0x20000, 7)))]


def _try(backend: tokenizers.Tokenizer, texts: list[str], where: str) -> None:
    """Encode and decode the texts, and check that they come to no more tokens than they should."""
    for text in texts:
        begins = shown(text[:8])
        with library_errors(f"{where}: not a usable tokenizer: it fails on {begins} and more"):
            try:
                ids = backend.encode(text, add_special_tokens=True).ids
                backend.decode(ids)
            except Exception:
                # No unknown token, for instance: the text that needs one will say so. A panic is
                # no Exception.
                continue
        size = len(text.encode())
        if len(ids) > _MAX_TOKENS_PER_BYTE * size + _MAX_ITEMS:
            raise UserError(
                f"{where}: not a usable tokenizer: it makes {len(ids)} tokens of {size} bytes "
                f"({begins} and more), over {_MAX_TOKENS_PER_BYTE} for each byte"
            )
