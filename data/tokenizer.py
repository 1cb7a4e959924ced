"""A tokenizer read from its Hugging Face files: `tokenizer.json`, special tokens, chat template.

The file decides how text becomes ids; what it also holds about truncation and padding is switched
off at once, since lengths are the data's business. Special tokens that stand before a text (a BOS,
for most) are added here, in one place, so that no text ever begins with two.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from data.added_tokens import add_declared_tokens, read_declarations
from data.chat import ChatTemplate, Conversation, Rendering
from data.chat_templates import (
    TEMPLATE_FILE,
    chosen_name,
    in_one_folder,
    named_files,
    overriding,
    read_templates,
)
from data.tokenizer_file import library_errors, load_backend
from files.errors import UserError

# The files that decide what a text becomes; other tokenizer files are earlier forms of the same.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)
# The largest tokenizer.json published has some 35 MB, for a vocabulary of 260,000.
_MAX_BYTES = 64 * 2**20
# The others hold settings and a chat template; the largest published has 1 MB.
_MAX_SETTINGS_BYTES = 8 * 2**20
# Any of these is in the vocabulary of a tokenizer that can be trained with.
_PROBES = ("a", "0", "\n", " ")


class Tokenizer:
    """Text to ids and back, special tokens, chat template.

    Attributes:
        bos_id: Id of the token that begins a text, or None.
        eos_id: Id of the token that ends a text, or None.
        pad_id: Id that fills padded rows: the pad token, else EOS, else 0. Labels are masked by
            position, never by id, so a pad that equals EOS masks no EOS.
        prefix_ids: What stands before every plain text (most often BOS, or nothing).
        vocabulary_size: The largest id, plus one.
        chat_templates: Name → source of its Jinja chat templates; most have one, `default`.
        special_tokens: Name (`bos_token`, …) to text, as a chat template sees them.
        fingerprint: sha256 over the files that were read, independent of where they lie.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        chat_templates: Mapping[str, str],
        files: Mapping[str, bytes],
        where: str,
        template_where: str | None = None,
    ):
        self._backend = backend
        self._files = dict(files)
        self._where = where
        self._template_where = template_where or where
        self.chat_templates = dict(chat_templates)
        self.special_tokens = _special_tokens(settings)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        pad_id = self._id_of("pad_token")
        self.pad_id: int = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.vocabulary_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.prefix_ids = self._find_prefix(settings.get("add_bos_token"))
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{name} {len(files[name])}\n".encode())
            digest.update(files[name])
        self.fingerprint = digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Return the tokenizer whose files lie in `folder`.

        Args:
            folder: The folder.
            chat_template: The one chat template that it is to have (`data.chat_template`), a file
                or the name of one of its own; it is saved as one of its files. None: its own.

        Raises:
            UserError: There is no folder, no tokenizer.json, or a file that cannot be used.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: not a folder; a tokenizer is a folder that holds tokenizer.json"
            )
        names = [*TOKENIZER_FILES, *named_files(folder)]
        files = {name: _read(folder / name) for name in names if (folder / name).is_file()}
        files = in_one_folder(files, folder)
        if "tokenizer.json" not in files:
            raise UserError(_missing_tokenizer(folder))
        where = str(folder / "tokenizer.json")
        backend = load_backend(files["tokenizer.json"], where)
        declared = read_declarations(files, folder)
        add_declared_tokens(backend, declared, folder)
        templates = read_templates(files, declared.settings, folder)
        if chat_template is not None:
            source = overriding(chat_template, templates, str(folder))
            templates = {"default": source}
            # It is preferred to those in tokenizer_config.json, here and in transformers.
            files[TEMPLATE_FILE] = source.encode()
        asked = None if chat_template is None else f"data.chat_template={chat_template}"
        return cls(backend, declared.settings, templates, files, str(folder), asked)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, after the prefix unless the text already begins with it."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text; the library spreads the work over its own threads.

        Args:
            texts: The texts.
            add_special_tokens: Put `prefix_ids` before each text that does not begin with them. EOS
                is never added: whether a row ends is the data's business.

        Raises:
            UserError: The tokenizer cannot encode a text.
        """
        with library_errors(f"{self._where}: the tokenizer failed on a text"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            batch = [encoding.ids for encoding in encodings]
        if add_special_tokens and self.prefix_ids:
            prefix = self.prefix_ids
            batch = [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in batch]
        return batch

    def encode_chats(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Return the tokens of texts that a chat template made, each with its place in the text.

        Raises:
            UserError: The tokenizer cannot encode a text.
        """
        with library_errors(f"{self._where}: the tokenizer failed on a text"):
            return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`.

        Raises:
            UserError: The tokenizer cannot decode them.
        """
        with library_errors(f"{self._where}: the tokenizer cannot decode these ids"):
            return self._backend.decode(
                [int(i) for i in ids], skip_special_tokens=skip_special_tokens
            )

    def token_id(self, token: str) -> int | None:
        """Return the id of one token of the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """Return the text of one token of the vocabulary, or None."""
        return self._backend.id_to_token(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        date: datetime.datetime | None = None,
    ) -> str:
        """Return the text that the chat template makes of `messages`.

        It holds its special tokens already: encode it with `add_special_tokens=False`.

        Args:
            messages: Turns with `role` and `content`.
            add_generation_prompt: End with the header of an assistant's turn.
            tools: Descriptions of tools, for templates that know them.
            variables: What else the template is told.
            date: What `strftime_now` tells the template; None is the present.

        Raises:
            UserError: There is no template, it refuses the messages, it fails, or it takes too
                long or too much memory.
        """
        prefix = (len(messages), add_generation_prompt)
        conversation = Conversation(messages, [prefix], tools, variables=variables or {})
        ((whole,),) = self.render_chats([conversation], date=date)
        assert whole is not None  # the first of a conversation's prefixes is there, or an error
        return whole.text

    def render_chats(
        self, conversations: Sequence[Conversation], *, date: datetime.datetime | None = None
    ) -> list[list[Rendering | None]]:
        """Return the rendering of each prefix of each conversation, as `render_chat` would.

        Raises:
            UserError: As `render_chat`; the message begins with the conversation's place.
        """
        chosen = [
            chosen_name(self.chat_templates, bool(c.tools), self._where) for c in conversations
        ]
        rendered: list[list[Rendering | None]] = [[]] * len(chosen)
        for name in dict.fromkeys(chosen):
            places = [place for place, other in enumerate(chosen) if other == name]
            asked = [self._for_template(conversations[place], name) for place in places]
            renderings = self._templates[name].render(asked, date)
            for place, rendering in zip(places, renderings, strict=True):
                rendered[place] = rendering
        return rendered

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`, byte for byte as they were read.

        Two things differ: the chat template that `load` was given is among them, and those in a
        folder of their own stand in tokenizer_config.json.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self._files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise UserError(
                f"{folder}: the tokenizer cannot be written: {error.strerror}"
            ) from None

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {
            name: ChatTemplate(source, self.special_tokens, self._template_where)
            for name, source in self.chat_templates.items()
        }

    def _for_template(self, conversation: Conversation, name: str) -> Conversation:
        """Return a conversation whose developer's turns are system turns, unless `name` knows both.

        OpenAI renamed the role; most templates leave a developer's turn out.
        """
        roles = [message.get("role") for message in conversation.messages]
        if "developer" not in roles or "developer" in self.chat_templates[name]:
            return conversation
        messages = [
            {**message, "role": "system"} if role == "developer" else message
            for message, role in zip(conversation.messages, roles, strict=True)
        ]
        return dataclasses.replace(conversation, messages=messages)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    def _find_prefix(self, add_bos: Any) -> list[int]:
        """Return what the post-processor puts before a text, as `add_bos_token` corrects it."""
        prefix: list[int] = []
        with library_errors(f"{self._where}: the tokenizer failed on a text"):
            for probe in _PROBES:
                plain = self._backend.encode(probe, add_special_tokens=False).ids
                full = self._backend.encode(probe, add_special_tokens=True).ids
                if plain:
                    starts = range(len(full) - len(plain) + 1)
                    prefix = full[: next(k for k in starts if full[k : k + len(plain)] == plain)]
                    break
        begins_with_bos = self.bos_id is not None and prefix[:1] == [self.bos_id]
        if add_bos is True and self.bos_id is not None and not begins_with_bos:
            return [self.bos_id, *prefix]
        if add_bos is False and begins_with_bos:
            return prefix[1:]
        return prefix


def _read(path: Path) -> bytes:
    most = _MAX_BYTES if path.name == "tokenizer.json" else _MAX_SETTINGS_BYTES
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise UserError(f"{path}: larger than {most} bytes, which no tokenizer needs")
    return content


def _missing_tokenizer(folder: Path) -> str:
    slow = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    found = [name for name in slow if (folder / name).is_file()]
    if not found:
        return f"{folder}: no tokenizer.json; put the model's tokenizer files beside its weights"
    return (
        f"{folder}: has {found[0]} but no tokenizer.json, which is what Lathe reads; convert it "
        'once, where transformers is installed: python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that name one token: `*_token`, as text or as {"content": text}."""
    tokens: dict[str, str] = {}
    for name, value in settings.items():
        if not name.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens
