"""Chat templates shaped like those of published models, tokenizers of several kinds, a definition.

The definition is what comparing prefixes says is trained; `data.spans` is held to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>", "<|header|>"),
    *("<|eot|>", "<think>", "</think>", "<|User|>", "<|Assistant|>"),
)
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# A default system turn, white space outside of expressions, `loop` asked for.
QWEN2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}\
{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\\n'}}{% endif %}\
{% endfor %}
{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}\
{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The thinking of turns before the last question is left out; a backward loop finds it.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and ns.last == 0 %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' + call.function | tojson + '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}\
{% for message in rest %}\
{% if message['role'] == 'user' %}\
{% set text = (system if loop.first else '') + message['content'].strip() %}\
{{ bos_token + '[INST] ' + text + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|header|>' + message['role'] + '<|header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|header|>\\n\\n' }}{%- endif %}"""
# The header of an answer stands at the end, asked for or not.
STARCODER2 = """\
{{bos_token}}{{'You are a coding assistant.\\n\\n'}}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
{{'### Instruction\\n' + message['content'] + '\\n\\n'}}
    {%- else %}
{{'### Response\\n' + message['content'] + eos_token + '\\n\\n'}}
    {%- endif %}
{%- endfor %}
{{'### Response\\n'}}"""
# The system turn moves to the last question: no prefix is a prefix.
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}\
{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif -%}
{{ bos_token }}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- set late = loop.index0 >= rest | length - 2 %}
{{- '[INST] ' + (system if late else '') + message.content + '[/INST]' }}
{%- else %}{{- ' ' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
# The header that is asked for begins to think; past turns do not.
DEEPSEEK = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{{ '<|User|>' + message.content }}{% elif message.role == 'assistant' %}\
{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% else %}\
{{ message.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
PHI3 = """\
{% for message in messages %}{{'<|' + message.role + '|>\\n' + message.content + '<|end|>\\n'}}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
VICUNA = """\
{% for message in messages %}\
{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}\
{% elif message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% else %}{{ ' ' + message.content + '</s>' }}{% endif %}{% endfor %}"""
PLAIN = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TRIMMED = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Headers that count.
ROUNDS = """\
{% for message in messages %}{% if message.role == 'assistant' %}\
{{ 'Answer ' ~ loop.index ~ ': ' ~ message.content ~ eos_token }}{% else %}\
{{ message.role ~ ': ' ~ message.content ~ '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Answer ' ~ (messages | length + 1) ~ ': ' }}{% endif %}"""
# Templates that cannot tell where their turns are.
MACRO = """\
{%- macro turn(message) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endmacro %}
{%- macro all(messages) %}{% for message in messages %}{{ turn(message) }}{% endfor %}{% endmacro %}
{{- all(messages) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GATHERED = """\
{%- set ns = namespace(text='') %}
{%- for message in messages %}
{%- set ns.text = ns.text + '<|im_start|>' + message.role + '\\n' + message.content %}
{%- set ns.text = ns.text + '<|im_end|>\\n' %}
{%- endfor %}
{{- ns.text }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# name: (template, bos, eos)
TEMPLATES = {
    "chatml": (CHATML, None, "<|im_end|>"),
    "chatml of a base model": (CHATML, None, "</s>"),
    "qwen2": (QWEN2, None, "<|im_end|>"),
    "qwen3": (QWEN3, None, "<|im_end|>"),
    "llama2": (LLAMA2, "<s>", "</s>"),
    "llama3": (LLAMA3, "<s>", "<|eot|>"),
    "starcoder2": (STARCODER2, "</s>", "</s>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "deepseek": (DEEPSEEK, "<s>", "</s>"),
    "phi3": (PHI3, "<s>", "</s>"),
    "vicuna": (VICUNA, None, "</s>"),
    "plain": (PLAIN, None, "</s>"),
    "trimmed": (TRIMMED, None, "<|im_end|>"),
    "rounds": (ROUNDS, None, "</s>"),
    "macro": (MACRO, None, "<|im_end|>"),
    "gathered": (GATHERED, None, "<|im_end|>"),
}
_CORPUS = [
    "def add(first, second):\n    return first + second\n\n\nclass Stack:\n    pass\n",
    "user assistant system You are a helpful assistant. Answer 2: 3: ### Instruction ### Response",
    "[INST] question [/INST] answer USER: ASSISTANT: hello world  two   spaces naïve café",
] * 4
KINDS = ("byte-level", "byte-level, lines", "llama", "metaspace", "greedy space")


def write_tokenizer(folder: Path, kind: str, template: str, bos: str | None, eos: str) -> Path:
    """Write the files of a tokenizer of a kind; "greedy space": special tokens take it in."""
    settings: dict[str, Any] = {}
    if kind in ("llama", "metaspace"):
        tokenizer = tokenizers.Tokenizer(
            models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        )
        letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        if kind == "llama":
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "byte-level, lines":
            tokenizer.normalizer = normalizers.NFC()
            words = tokenizers.Regex(r"[^\S\n]*\n+| ?[^\s]+|[^\S\n]+")  # lines end words
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(words, "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        letters = []
    settings["special_tokens"] = letters
    settings["initial_alphabet"] = [] if letters else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **settings)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    greedy = kind == "greedy space"
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=greedy) for text in SPECIAL]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": eos, "chat_template": template} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


class Definition:
    """What is trained of a conversation by comparing the ids of its prefixes.

    Texts are transformers'. An answer is the ids behind those that it shares with the conversation
    before it, up to those that it shares with the conversation up to it; it ends with its EOS: the
    last in it, else the one that follows at once.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self._template = settings["chat_template"]
        self._backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = {name: settings[name] for name in ("bos_token", "eos_token") if name in settings}
        self._transformers = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), **names
        )
        self.eos_id = self._backend.token_to_id(settings["eos_token"])

    def ids(self, messages: list[dict[str, Any]], header: bool = False) -> list[int]:
        """Return the ids of a conversation."""
        text = self._transformers.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=header,
        )
        return self._backend.encode(text, add_special_tokens=False).ids

    def labels(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Return ids, labels, and where prefixes are no prefixes: nothing is defined there."""
        ids = self.ids(messages)
        labels = [-100] * len(ids)
        unknown: list[tuple[int, int]] = []
        stop, open_since = 0, None
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.ids(messages[:turn], header=True)
            start = _common(before, ids)
            if open_since is not None and start == len(before):
                unknown.append((open_since, start))
                open_since = None
            after = self.ids(messages[: turn + 1]) if turn < len(messages) - 1 else ids
            stop = _common(after, ids)
            found = [place for place in range(start, stop) if ids[place] == self.eos_id]
            if start < len(before):
                open_since = start if open_since is None else open_since
            elif not found and stop < len(after):
                open_since = stop
            stop = found[-1] + 1 if found else stop + (ids[stop : stop + 1] == [self.eos_id])
            labels[start:stop] = ids[start:stop]
        unknown += [] if open_since is None else [(open_since, len(ids))]
        if messages[-1]["role"] == "assistant" and ids[stop - 1] != self.eos_id:
            ids, labels = [*ids[:stop], self.eos_id], [*labels[:stop], self.eos_id]
        return ids, labels, unknown


def _common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second))
    )
