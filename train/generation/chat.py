"""A conversation on the terminal: the run's own format, its history, and what of it is known."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from data.labels import common_prefix
from data.prompt import PromptFormat
from files.errors import UserError, counted, note
from models.cache import KeyValueCache
from train.generation.decode import Asked, context_length, decode
from train.generation.loaded import Generator
from train.generation.sampling import Sampling
from train.generation.stream import TextStream


class Chat:
    """A conversation with a model.

    Of every turn only those tokens are fed that the cache does not hold: the history is written as
    training had it, so that a template may have changed what it says of turns that are past.

    Attributes:
        messages: The turns so far, without the system's.
        fed: How many tokens of the last prompt were fed.
    """

    def __init__(self, loaded: Generator, form: PromptFormat, sampling: Sampling):
        self._loaded = loaded
        self._form = form
        self._sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages: list[dict[str, str]] = []
        self.fed = 0
        self._cache = KeyValueCache(0)
        self._known: list[int] = []  # ids that the cache holds

    def answer(self, text: str) -> Iterator[str]:
        """Say something, and yield the model's answer piece by piece.

        Raises:
            UserError: The conversation fills the model's context, or the template refuses it: it is
                what it was before.
        """
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        turns = [*self.messages, {"role": "user", "content": text}]
        prompt = self._form.prompt_ids({"messages": turns}, tokenizer)
        context = context_length(model.config)
        if len(prompt) >= context:
            raise UserError(
                f"the conversation has {counted(len(prompt), 'token')} and the model's context "
                f"{context}: /reset begins a new one"
            )
        self._cache.length = self._held_of(prompt)
        self.fed = len(prompt) - self._cache.length
        self._known = prompt[: self._cache.length]
        # Each turn has draws of its own.
        one, stream = Asked(prompt, (len(self.messages),)), TextStream(tokenizer, tokenizer.decode)
        for _ in decode(model, [one], self._sampling, self._cache):
            yield stream.new(one.ids)
        yield stream.rest(one.ids)
        self._known = [*prompt, *one.ids][: self._cache.length]
        self.messages = [*turns, {"role": "assistant", "content": tokenizer.decode(one.ids)}]
        if not one.ended:
            full = len(prompt) + len(one.ids) == context
            end = f"the end of the model's context of {context} tokens; /reset begins a new one"
            note(f"stopped at {end if full else f'--max-new-tokens {len(one.ids)}'}")

    def _held_of(self, prompt: list[int]) -> int:
        """Return how many tokens at the beginning of a prompt the cache holds; one is always fed.

        Frequencies that depend on the length are other ones for every prompt.
        """
        if self._loaded.model.config.rope.rope_type == "dynamic":
            return 0
        return min(common_prefix(prompt, self._known), len(prompt) - 1)


def talk(chat: Chat) -> None:
    """Answer line by line what standard input says, until it ends (Ctrl-D)."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print("[/reset begins a new conversation, Ctrl-D ends]", file=sys.stderr)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None
        if line == "/reset":
            chat.reset()
            continue
        if not line:
            continue
        try:
            for piece in chat.answer(line):
                print(piece, end="", flush=True)
            print(flush=True)
        except UserError as error:
            note(str(error))
