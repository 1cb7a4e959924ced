"""Chat templates as programs of strangers: each attack is one sentence, and the next row works."""

from collections.abc import Iterator

import pytest

from data import chat
from data.chat import ChatTemplate, Conversation, Rendering
from data.limited import LimitedChild
from files.errors import UserError

HARMLESS = [{"role": "user", "content": "hello"}]
TRIGGER = [{"role": "user", "content": "go"}]
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{% set n = namespace(a=1) %}{{ n.__init__.__globals__ }}",
    "attr": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "map of attributes": "{{ messages | map(attribute='__class__') | list | tojson }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format_map": "{{ '{m.__class__}'.format_map({'m': 1}) }}",
    "indirect format": "{{ ['{0.__class__}'] | map('format') | first }}"
    "{{ ('{0.__class__}'.format)(1) }}",
    "our function": "{{ raise_exception.__globals__ }}",
    "bound method": "{{ strftime_now.__self__.__class__.__base__ }}",
    "template": "{{ self.__init__.__globals__ }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "item": "{{ messages['__class__']['__mro__'] }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a message": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends '/etc/passwd' %}",
}
EXCESSES = {
    "range": ("{{ range(10**9 * n) | list }}", "range"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "output": (
        "{% for i in range(99) %}{{ messages[0].role * 10**6 }}{% endfor %}",
        "more than 32 Mi characters",
    ),
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "took more than",
    ),
    "power": ("{{ 10 ** (10 ** 8 * n) }}", "took more than"),
    "string": ("{{ 'a' * (10**10 * n) }}", "needed more than 1024 MiB"),
    "list": ("{% set x = [messages] * (10**9 * n) %}", "needed more than 1024 MiB"),
    "center": ("{{ 'a'.center(10**10 * n) }}", "needed more than 1024 MiB"),
    "ljust": ("{{ 'a'.ljust(10**10 * n) }}", "needed more than 1024 MiB"),
    "center filter": ("{{ 'a' | center(10**10 * n) }}", "needed more than 1024 MiB"),
    "format filter": ("{{ '%10000000000d' | format(n) }}", "needed more than 1024 MiB|failed on"),
    "indent": ("{{ messages | tojson(indent=10**10 * n) }}", "needed more than 1024 MiB"),
    "doubling": (
        "{% set s = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set s.x = s.x + s.x %}"
        "{% endfor %}",
        "(needed|took) more than",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _quick_child() -> Iterator[None]:
    """Let all tests share a child that waits for one second instead of five."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        child = LimitedChild("data.chat", seconds=1.0)
        monkeypatch.setattr(chat, "_CHILD", child)
        yield
        child.close()


def render(source: str, messages: list, prefixes=((1, False),), **settings: object) -> list[str]:
    template = ChatTemplate(source, {"bos_token": "<s>"}, "FOLDER")
    conversation = Conversation(messages, prefixes, where="rows.jsonl:7", **settings)  # type: ignore[arg-type]
    return [rendering.text for rendering in template.render([conversation])[0]]


def texts(renderings: list[list[Rendering]]) -> list[list[str]]:
    return [[rendering.text for rendering in each] for each in renderings]


def on_trigger(payload: str) -> str:
    """Return a template that does its harm on one row alone, which no trial would find."""
    harm = f"{{% set n = messages | length %}}{payload}"
    return f"{{% if messages[0].content == 'go' %}}{harm}{{% endif %}}{{{{ bos_token }}}}ok"


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_is_one_sentence(name):
    source = on_trigger(ESCAPES[name]) if name != "extends" else ESCAPES[name]
    with pytest.raises(UserError) as raised:
        render(source, TRIGGER)
    message = str(raised.value)
    assert message.startswith("rows.jsonl:7: the chat template of FOLDER failed on the messages: ")
    assert "\n" not in message and "Traceback" not in message
    if name != "extends":
        assert render(source, HARMLESS) == ["<s>ok"]


@pytest.mark.parametrize("name", EXCESSES)
def test_an_excess_is_one_sentence_and_the_next_row_is_rendered(name):
    payload, expected = EXCESSES[name]
    source = on_trigger(payload)
    assert render(source, HARMLESS) == ["<s>ok"]
    with pytest.raises(UserError, match=f"({expected})") as raised:
        render(source, TRIGGER)
    message = str(raised.value)
    assert message.startswith("rows.jsonl:7: the chat template of FOLDER ") and "\n" not in message
    assert render(source, HARMLESS) == ["<s>ok"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 10 ** (10 ** 8) }}", "took more than"),  # constants are folded when it is parsed
        ("{{ 'a' * 10 ** 10 }}", "needed more than"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be parsed"),
        ("{{ " + "+".join("1" * 20000) + " }}", "cannot be parsed|failed on the messages"),
        ("{% for i in [] %}" * 30 + "{% endfor %}" * 30, "cannot be parsed"),
        ("a\n{% if %}", "cannot be parsed, at its line 2"),
    ],
)
def test_a_template_that_cannot_even_be_parsed(source, message):
    with pytest.raises(UserError, match=message) as raised:
        render(source, HARMLESS)
    assert "the chat template of FOLDER " in str(raised.value)
    assert render("{{ bos_token }}", HARMLESS) == ["<s>"]


def test_the_row_that_does_the_harm_is_named():
    """Also among many that were sent at once, and where the child is killed over it."""
    template = ChatTemplate(on_trigger("{{ 'a' * (10**10 * n) }}"), {}, "FOLDER")
    rows = [
        Conversation(
            TRIGGER if number == 17 else HARMLESS, ((1, False), (1, True)), None, f"r:{number}"
        )
        for number in range(40)
    ]
    with pytest.raises(UserError, match=r"^r:17: the chat template of FOLDER needed more than"):
        template.render(rows)
    assert texts(template.render(rows[:3])) == [["ok", "ok"]] * 3


def test_many_conversations_keep_their_order_across_requests(monkeypatch):
    monkeypatch.setattr(chat, "_REQUEST_CHARACTERS", 1000)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{{ add_generation_prompt }}",
        {},
        "FOLDER",
    )
    rows = [
        Conversation(
            [{"content": f"{number}é\ud800"}] * 3,
            [(length, length == 2) for length in range(number % 4)],
            [number],
        )
        for number in range(200)
    ]
    expected = [
        [f"{number}é\ud800" * length + f"[{number}]{length == 2}" for length in range(number % 4)]
        for number in range(200)
    ]
    assert texts(template.render(rows)) == expected
    assert template.render([]) == []


def test_a_message_of_error_is_one_line_and_short():
    source = "{{ raise_exception('a\\n\\x1b[31m' ~ 'b' * 100000) }}"
    with pytest.raises(UserError) as raised:
        render(source, HARMLESS)
    message = str(raised.value)
    assert "failed on the messages: a [31mbbb" in message and len(message) < 500


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), {(1, 2): 3}])
def test_what_json_cannot_hold_is_one_sentence(value):
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: messages and tools may hold .*FOLDER"):
        render("ok", HARMLESS, tools=[value])
