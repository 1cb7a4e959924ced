"""Tokens that a model's files declare beside tokenizer.json: whatever they are, each is one id.

tokenizer.json holds most added tokens itself. What the other files declare beyond it is added to
the library's tokenizer here, with the flags that they give, by the rules of transformers 5:

* `added_tokens_decoder` of tokenizer_config.json gives ids and flags, and that file rules over
  special_tokens_map.json. Without it, added_tokens.json gives ids, tokenizer.json the flags of what
  it knows itself, and special_tokens_map.json rules;
* then follow the names (`eos_token`, …) and the lists (`extra_special_tokens`, else
  `additional_special_tokens`) that are no added tokens yet. A piece of the vocabulary keeps its id;
  what is nowhere gets the next free one, for which a model may have no row
  (`data.examples.check_vocabulary` says so where the data needs it).

A declared id that is not the one in use is an error, since the files are not of one model then, and
so is a special token whose own text does not come to its one id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from data.tokenizer_file import MAX_ID, MAX_TOKEN, library_errors
from files.errors import UserError, shown
from files.strict_json import parse_json_object

# In the order in which transformers adds them, which decides the ids of those that are new.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG, _ADDED, _MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


@dataclass(frozen=True)
class Declarations:
    """What the files beside tokenizer.json say.

    Attributes:
        settings: key → value of tokenizer_config.json and special_tokens_map.json, nulls left out.
        by_id: id → token that has it.
        flags_rule: The flags in `by_id` rule over tokenizer.json's.
        special: The tokens that are named and listed, in the order in which new ones get their ids.
    """

    settings: dict[str, Any]
    by_id: dict[int, AddedToken]
    flags_rule: bool
    special: tuple[AddedToken, ...]


def read_declarations(files: Mapping[str, bytes], folder: Path) -> Declarations:
    """Return what the settings files declare; any of them may be missing.

    Args:
        files: name → content.
        folder: Where they lie, for messages.

    Raises:
        UserError: A file is no JSON object, or a token in it is not what a token must be.
    """
    config, older = _read(files, _CONFIG, folder), _read(files, _MAP, folder)
    has_ids = "added_tokens_decoder" in config
    if has_ids:
        older = {key: value for key, value in older.items() if key not in config}
    settings = config | older
    place = {key: str(folder / (_MAP if key in older else _CONFIG)) for key in settings}
    named = {
        key: _token(value, f"{place[key]}: {key}", special=True)
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    listed: dict[str, AddedToken] = {}
    extra, additional = "extra_special_tokens", "additional_special_tokens"
    further = config.get(extra) or config.get(additional) or older.get(additional)
    for tokens in (further, older.get(extra)):
        where = f"{folder}: {extra} or {additional}"
        if isinstance(tokens, dict):  # name → token
            named |= {name: _token(token, where, True) for name, token in tokens.items()}
        elif isinstance(tokens, list):
            listed |= {token.content: token for token in (_token(value, where) for value in tokens)}
        elif tokens is not None:
            raise UserError(f"{where} must be a list of tokens, not {shown(tokens)}")
    known = [named[name] for name in _NAMES if name in named]
    others = [token for name, token in named.items() if name not in _NAMES]
    if has_ids:
        by_id = _ids_of_config(config["added_tokens_decoder"], f"{folder / _CONFIG}")
    else:
        special = {token.content for token in known} | listed.keys()
        by_id = _ids_of_older_file(_read(files, _ADDED, folder), str(folder / _ADDED), special)
    return Declarations(settings, by_id, has_ids, (*known, *others, *listed.values()))


def add_declared_tokens(
    backend: tokenizers.Tokenizer, declared: Declarations, folder: Path
) -> None:
    """Add to `backend` what is declared and no added token yet, and check every special token.

    Raises:
        UserError: A token has another id than its declaration says, or a special token's text does
            not come to its id alone.
    """
    with library_errors(f"{folder}: the tokens declared beside tokenizer.json cannot be added"):
        present = backend.get_added_tokens_decoder().values()
        added = {token.content: repr(token) for token in present}
        tokens = [
            token
            for _, token in sorted(declared.by_id.items())
            if token.content not in added
            or (declared.flags_rule and added[token.content] != repr(token))
        ]
        names = {token.content for token in declared.special}
        for token in tokens:
            if token.content in names:
                token.special = True
        known = added.keys() | {token.content for token in tokens}
        tokens += [token for token in declared.special if token.content not in known]
        backend.add_tokens(tokens)
    for token_id, token in declared.by_id.items():
        used = backend.token_to_id(token.content)
        if used != token_id:
            source = f"{_CONFIG}: added_tokens_decoder" if declared.flags_rule else _ADDED
            raise UserError(
                f"{folder / source} gives the token {shown(token.content)} the id {token_id}, and "
                f"tokenizer.json {used}; take all tokenizer files from one model, or make the two "
                "agree"
            )
    _check_special_tokens(backend, folder)


def _check_special_tokens(backend: tokenizers.Tokenizer, folder: Path) -> None:
    special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special}
    with library_errors(f"{folder}: the tokenizer failed on the text of its special tokens"):
        encodings = backend.encode_batch_fast(
            [token.content for token in special.values()], add_special_tokens=False
        )
    for (token_id, token), encoding in zip(special.items(), encodings, strict=True):
        if encoding.ids != [token_id]:
            raise UserError(
                f"{folder / 'tokenizer.json'}: the special token {shown(token.content)} has the id "
                f"{token_id}, but its text comes to the ids {shown(encoding.ids)}; another token "
                "or the normalizer takes it apart: mend its entry in added_tokens"
            )


def _read(files: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    if name not in files:
        return {}
    read = parse_json_object(files[name], str(folder / name))
    return {key: value for key, value in read.items() if value is not None}


def _ids_of_config(declared: Any, where: str) -> dict[int, AddedToken]:
    at = f"{where}: added_tokens_decoder"
    if not isinstance(declared, dict):
        raise UserError(f"{at} must be an object of id and token")
    return {
        _id(int(key) if re.fullmatch(r"[0-9]{1,10}", key) else key, at): _token(value, at)
        for key, value in declared.items()
    }


def _ids_of_older_file(
    declared: Mapping[str, Any], where: str, special: set[str]
) -> dict[int, AddedToken]:
    tokens: dict[int, AddedToken] = {}
    for content, token_id in declared.items():
        if _id(token_id, where) in tokens:
            raise UserError(f"{where}: the id {token_id} stands twice; each id is of one token")
        tokens[token_id] = _token({"content": content, "special": content in special}, where)
    return tokens


def _id(value: Any, at: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_ID:  # `type`, because True is an int too
        raise UserError(f"{at}: {shown(value)} is no id; ids run from 0 to {MAX_ID - 1}")
    return value


def _token(value: Any, at: str, special: bool | None = None) -> AddedToken:
    """Return a token that is given as its text or as an object with `content` and flags."""
    if isinstance(value, str):
        value = {"content": value, "special": True}
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise UserError(
            f"{at}: a token is text, or an object with its text as content, not {shown(value)}"
        )
    if len(content) > MAX_TOKEN:
        raise UserError(
            f"{at}: a token has {len(content)} characters; at most {MAX_TOKEN} are allowed"
        )
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    if special is not None:
        flags["special"] = special
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UserError(f"{at}: {name} of the token {shown(content)} must be true or false")
    with library_errors(f"{at}: {shown(content)} is no token"):  # half of a surrogate pair
        return AddedToken(content, **flags)
