"""The tokenizer against transformers, and every kind of file that it must refuse."""

import datetime
import json
from pathlib import Path

import pytest
from children import python
from transformers import PreTrainedTokenizerFast

from data.tokenizer import Tokenizer
from files.errors import UserError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "  leading and trailing  ",
    "naïve café — 漢字 🙂\t\r\n",
    "a<|endoftext|>b</s>",
    "",
]
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & 'so'?"},
    {"role": "assistant", "content": "Yes: é 漢."},
]


def oracle(folder: Path, **settings: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)


def test_encodes_and_decodes_as_transformers(tokenizer_folder):
    folder = tokenizer_folder()
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    assert ours.encode_batch(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.vocabulary_size == len(theirs)
    assert ours.token(0) == "<|endoftext|>" and ours.token(10**6) is None


def test_bos_of_the_post_processor_stands_once(tokenizer_folder, bos_template):
    folder = tokenizer_folder({"bos_token": "<s>", "eos_token": "</s>"}, bos_template)
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    assert ours.prefix_ids == [1]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == plain
    # transformers puts a second one here.
    assert theirs("<s>hello")["input_ids"][:2] == [1, 1]
    assert ours.encode("<s>hello") == theirs("hello")["input_ids"]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_add_bos_token_rules_over_the_file(tokenizer_folder, bos_template, add_bos, in_file):
    """As the Llama tokenizers of transformers 4 do; 5.23 reads tokenizer.json alone."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos}
    folder = tokenizer_folder(settings, bos_template if in_file else None)
    plain = oracle(folder)("hello", add_special_tokens=False)["input_ids"]
    assert Tokenizer.load(folder).encode("hello") == [1] * add_bos + plain


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizer_folder):
    changes = {
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    }
    plain = Tokenizer.load(tokenizer_folder(name="plain"))
    trapped = Tokenizer.load(tokenizer_folder(changes=changes, name="trapped"))
    assert trapped.encode_batch(TEXTS) == plain.encode_batch(TEXTS)


@pytest.mark.parametrize(
    ("settings", "special_tokens_map", "ids"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}, {}, (1, 2, 0)),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}, {}, (1, 2, 2)),
        ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, (1, 2, 2)),
        ({"eos_token": None, "pad_token": None}, {"eos_token": "</s>"}, (None, 2, 2)),
        # As transformers 5: the map rules, but for a configuration that lists the added tokens.
        ({"eos_token": "<|im_end|>"}, {"eos_token": "</s>"}, (None, 2, 2)),
        (
            {"eos_token": "<|im_end|>", "added_tokens_decoder": {}},
            {"eos_token": "</s>", "bos_token": "<s>"},
            (1, 4, 4),
        ),
        ({"eos_token": "<not there>"}, {}, (None, 388, 388)),
        ({}, {}, (None, None, 0)),
    ],
)
def test_special_tokens(tokenizer_folder, settings, special_tokens_map, ids):
    files = {"special_tokens_map.json": json.dumps(special_tokens_map)}
    tokenizer = Tokenizer.load(tokenizer_folder(settings, files=files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


TEMPLATES = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}"
    "{% endfor %}",
    "blocks are trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}\n    "
    "{{ m.content }}\n  {% endif %}\n{% endfor %}\nend",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}"
    "{% endgeneration %};{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}",
    "undefined": "{{ nothing }}{% if documents is none %}none{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_chats_as_transformers(tokenizer_folder, name, add_generation_prompt):
    folder = tokenizer_folder({"bos_token": "<s>", "eos_token": "</s>"})
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    tools = [{"type": "function", "function": {"name": "f", "description": "<f> & 'g' é"}}]
    theirs = oracle(folder, bos_token="<s>", eos_token="</s>")
    rendered = theirs.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[name],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    ours = Tokenizer.load(folder).render_chat(MESSAGES, add_generation_prompt, tools=tools)
    assert ours == rendered


def test_the_date_of_a_template_can_be_given(tokenizer_folder):
    tokenizer = Tokenizer.load(
        tokenizer_folder({"chat_template": "{{ strftime_now('%d %b %Y') }}"})
    )
    date = datetime.datetime(2024, 7, 26)
    assert tokenizer.render_chat(MESSAGES, date=date) == "26 Jul 2024"
    before = datetime.datetime.now().strftime("%d %b %Y")
    assert tokenizer.render_chat(MESSAGES) in (
        before,
        datetime.datetime.now().strftime("%d %b %Y"),
    )


def test_chat_template_precedence(tokenizer_folder):
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "default"}]
    for number, (settings, files, expected) in enumerate(
        [
            ({"chat_template": "config"}, {"chat_template.jinja": "file"}, "file"),
            ({"chat_template": "config"}, {}, "config"),
            ({"chat_template": named}, {}, "default"),
            ({"chat_template": named[:1]}, {}, "tool"),
        ]
    ):
        folder = tokenizer_folder(settings, files=files, name=str(number))
        assert Tokenizer.load(folder).render_chat(MESSAGES) == expected


def test_messages_without_a_template_say_what_to_do(tokenizer_folder):
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        Tokenizer.load(tokenizer_folder()).render_chat(MESSAGES)


def test_saved_files_are_those_that_were_read(tokenizer_folder, tmp_path):
    folder = tokenizer_folder({"eos_token": "</s>"}, files={"chat_template.jinja": "a\r\nb"})
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "copy" / "below")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / "below" / name).read_bytes() == (folder / name).read_bytes()
    copy = Tokenizer.load(tmp_path / "copy" / "below")
    assert copy.fingerprint == tokenizer.fingerprint
    (tmp_path / "copy" / "below" / "chat_template.jinja").write_bytes(b"other")
    other = Tokenizer.load(tmp_path / "copy" / "below")
    assert other.fingerprint != tokenizer.fingerprint


def test_a_folder_with_tokenizer_model_only_says_how_to_convert(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(UserError) as raised:
        Tokenizer.load(tmp_path)
    message = str(raised.value)
    assert "has tokenizer.model but no tokenizer.json" in message
    assert f"AutoTokenizer.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in message


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json: not JSON at line 1"),
        ({"tokenizer.json": '{"version": "1.0"}'}, r"tokenizer\.json: not a .*: Model missing"),
        ({"tokenizer.json": "\x00\x01"}, r"tokenizer\.json: not JSON at line 1"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: must hold a JSON object"),
        ({"special_tokens_map.json": "{"}, r"special_tokens_map\.json: not JSON"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template must be text"),
    ],
)
def test_files_that_cannot_be_used(tokenizer_folder, files, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tokenizer_folder(files=files))


def test_bytes_that_are_not_utf8(tokenizer_folder):
    folder = tokenizer_folder()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer\.json: not UTF-8 at byte 0"):
        Tokenizer.load(folder)
    folder = tokenizer_folder(name="second")
    (folder / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 at byte 2"):
        Tokenizer.load(folder)


def test_a_file_without_vocabulary_is_refused(tokenizer_folder, tokenizer_json):
    empty = tokenizer_json | {"added_tokens": []}
    empty["model"] = tokenizer_json["model"] | {"vocab": {}, "merges": []}
    with pytest.raises(UserError, match=r"tokenizer\.json: has no tokens"):
        Tokenizer.load(tokenizer_folder(changes=empty))


def test_a_panic_in_the_library_is_one_sentence(tokenizer_folder):
    """Its exception does not derive from Exception; no trial knows every letter."""
    split = {
        "type": "Split",
        "pattern": {"Regex": "(ŧ+ŧ+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = Tokenizer.load(tokenizer_folder(changes={"pre_tokenizer": split}))
    assert tokenizer.encode("ŧŧy")
    with pytest.raises(UserError, match="the tokenizer failed on a text"):
        tokenizer.encode("ŧ" * 60)


def test_a_text_that_is_no_unicode_is_one_sentence(tokenizer_folder):
    with pytest.raises(UserError, match="the tokenizer failed on a text"):
        Tokenizer.load(tokenizer_folder()).encode("a\ud800b")


def test_neither_torch_nor_transformers_is_needed(tokenizer_folder):
    code = (
        "import sys\nfrom data.tokenizer import Tokenizer\n"
        f"Tokenizer.load({str(tokenizer_folder())!r}).encode('a')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    python("-c", code)
