"""Damage and malice for files of every kind: a mutator of our own, reproducible from its seed.

Each function takes a `random.Random` and content, and returns other content. Nothing else is drawn
from, so that a seed names a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

INTERESTING_BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",  # a byte order mark
    b"\xff\xfe",  # that of UTF-16
    b"\xed\xa0\x80",  # half of a surrogate pair, which UTF-8 cannot hold
    b"\\ud800",  # the same as a JSON escape
    b"\r\n",
    b"\r",
    b"\n",
    b"\xe2\x80\xa8",  # a line separator
    b"\x1b[2J",  # clears a terminal
    b"\x1f\x8b\x08\x00",  # the start of a gzip file
    b"PAR1",
    b"\x80\x04\x95",  # the start of a pickle
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x7f" + b"\xff" * 7,
    b'"',
    b"{",
    b"}",
    b"[" * 2000,
    b"]",
    b",",
    b":",
    b"=",
    b"9" * 5000,
    b"a" * 70_000,
)

# Literals that JSON's grammar, or Python's reading of it, takes.
JSON_LITERALS = (
    "-1",
    "0",
    "-0.0",
    "1",
    "2",
    "3",
    "7",
    "1.5",
    "1e-320",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    str(2**31),
    str(2**53 + 1),
    str(2**63 - 1),
    str(2**63),
    str(10**9),
    "9" * 4000,
    "9" * 5000,
    "true",
    "false",
    "null",
    "[]",
    "{}",
    '""',
    "[[]]",
    "[null]",
    "[0]",
    "[-1, 1e999]",
    '[""]',
    '{"": null}',
    '{"a": {"a": 1}}',
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    "[" + "1," * 20_000 + "1]",
    json.dumps("a" * 100_000),
    json.dumps("é" * 3000),
    '"\\ud800"',
    '"\\u0000"',
    '"a\\u0000b"',
    '"line\\nbreak"',
    '"\\u001b[2J"',
    '"\\u202e"',
    '"../x"',
    '"/etc/passwd"',
    '"/dev/zero"',
    '"."',
    '".."',
    '"C:\\\\x"',
    '"~root"',
    '"none"',
    '"1"',
    '"{x}"',
    '"("',
    '"(\\\\w+\\\\.?)+!"',
    '".*.*.*.*.*.*.*.*.*.*.*.*x"',
    '"__class__"',
    '"%s%n"',
)

TOML_LITERALS = (
    "-1",
    "0",
    "1",
    "-0.0",
    "1e-320",
    "1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    str(2**63),
    "9" * 4000,
    "9" * 5000,
    "0x" + "f" * 5000,
    "0b" + "1" * 100,
    "1_000",
    "true",
    "false",
    '""',
    '"none"',
    '"auto"',
    "[]",
    "{}",
    '[""]',
    "[1, 2]",
    "[nan, inf]",
    '[1, "a"]',
    "{ a = 1 }",
    "[" * 500 + "]" * 500,
    "[" * 20_000 + "]" * 20_000,
    "{ a = " * 500 + "1" + " }" * 500,
    f'"{"a" * 100_000}"',
    '"\\u0000"',
    '"\\ud800"',
    '"line\\nbreak"',
    '"\\u001b[2J"',
    '"""\nmany\nlines\n"""',
    "'../x'",
    "'/etc/passwd'",
    "'/dev/zero'",
    "'{'",
    "'{x}'",
    "'('",
    "1979-05-27T07:32:00Z",
    "1979-05-27",
    "07:32:00",
    "2",
    "0.5",
    '"codellama-7b-improved"',
)


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Return the bytes after one to four small accidents."""
    data = bytearray(content)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(data))
        stop = min(len(data), start + random.choice((1, 1, 2, 8, 40, 1000)))
        match random.randint(0, 8):
            case 0 if start < len(data):
                data[start] ^= 1 << random.randint(0, 7)
            case 1 if start < len(data):
                data[start] = random.randint(0, 255)
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop] * random.choice((1, 2, 50))
            case 4:
                data[start:start] = random.choice(INTERESTING_BYTES)
            case 5:
                replacement = random.choice(INTERESTING_BYTES)
                data[start : start + len(replacement)] = replacement
            case 6:
                del data[start:]
            case 7:
                other = random.randint(0, len(data))
                data[start:stop] = data[other : other + stop - start]
            case _:
                data += random.choice(INTERESTING_BYTES)
    return bytes(data)


class _Literal(str):
    """Text that stands in a JSON document as it is."""


def mutate_json(random: Random, content: bytes) -> bytes:
    """Return a JSON document with one to three of its nodes, keys or entries changed.

    What comes out need not be JSON: NaN, keys that stand twice and endless nesting belong to it.
    """
    document = json.loads(content, object_pairs_hook=lambda pairs: [*map(list, pairs), _OBJECT])
    for _ in range(random.randint(1, 3)):
        document = _change(random, document)
    return _json_text(document).encode("utf-8", "surrogatepass")


# Ends the list of pairs that stands for an object, so that a key may stand in it twice.
_OBJECT = object()


def _is_object(node: Any) -> bool:
    return isinstance(node, list) and bool(node) and node[-1] is _OBJECT


def _json_text(node: Any) -> str:
    if isinstance(node, _Literal):
        return node
    if _is_object(node):
        return f"{{{', '.join(f'{json.dumps(k)}: {_json_text(v)}' for k, v in node[:-1])}}}"
    if isinstance(node, list):
        return f"[{', '.join(map(_json_text, node))}]"
    return json.dumps(node)


def _places(node: Any) -> list[tuple[list[Any], int]]:
    """Return (list, index) of every node below `node`."""
    found: list[tuple[list[Any], int]] = []
    if isinstance(node, list):
        for index, item in enumerate(node[:-1] if _is_object(node) else node):
            place = (item, 1) if _is_object(node) else (node, index)
            found += [place, *_places(place[0][place[1]])]
    return found


def _objects(node: Any) -> list[list[Any]]:
    """Return every object with an entry, `node` itself included."""
    inside = [place[0][place[1]] for place in _places(node)]
    return [one for one in (node, *inside) if _is_object(one) and len(one) > 1]


def _change(random: Random, document: Any) -> Any:
    places, objects = _places(document), _objects(document)
    kind = random.randint(0, 9)
    if not places or random.random() < 0.02:
        return _Literal(random.choice(JSON_LITERALS))
    holder, index = random.choice(places)
    if kind <= 3 or not objects:
        holder[index] = _Literal(random.choice(JSON_LITERALS))
        return document
    if kind == 4:
        holder[index] = _near(random, holder[index])
        return document
    if kind == 5:
        other, place = random.choice(places)
        holder[index], other[place] = other[place], _Literal(_json_text(holder[index]))
        return document
    entries = random.choice(objects)
    entry = random.randrange(len(entries) - 1)
    key, value = entries[entry]
    if kind == 6:
        del entries[entry]
    elif kind == 7:
        entries.insert(entry, [key, random.choice((value, _Literal(random.choice(JSON_LITERALS))))])
    elif kind == 8:
        entries[entry][0] = _other_key(random, key, entries)
    else:
        name = _other_key(random, key, entries)
        entries.insert(entry, [name, _Literal(random.choice(JSON_LITERALS))])
    return document


def _near(random: Random, value: Any) -> Any:
    """Return a value much like another, or of another type."""
    if isinstance(value, bool) or value is None:
        return random.choice((True, False, None, 0, 1, "true"))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value / 2, value * 1000, str(value))
        return random.choice((*near, [value], float(value)))
    if isinstance(value, str) and not isinstance(value, _Literal):
        near = (value[:-1], value + value, value.upper(), "../" + value, value + "\n", [value])
        return random.choice((*near, f" {value}", f"{value}\x00", value[::-1]))
    return [value]


def _other_key(random: Random, key: str, entries: list[Any]) -> str:
    others = [entry[0] for entry in entries[:-1]]
    names = ("", "../x", "/etc/passwd", "a" * 3000, "\ud800", "line\nbreak", "\x00", "\x1b[2J")
    return random.choice((*names, key + "x", key[:-1], key.upper(), "__class__", *others))


def mutate_json_lines(random: Random, content: bytes) -> bytes:
    """Return JSON Lines with one line changed, or lines lost, doubled or joined."""
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    match random.randint(0, 5):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[place])
        case 2:
            lines[place] += random.choice((b" ", b"\r", b"{}", b"]", b"\x00", b"# comment"))
        case 3:
            lines[place] = random.choice(JSON_LITERALS).encode()
        case _:
            if lines[place].strip():
                lines[place] = mutate_json(random, lines[place])
    return random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"")).join(lines)


def mutate_toml(random: Random, content: bytes) -> bytes:
    """Return a TOML document with values, keys, tables or lines changed."""
    lines = content.decode("utf-8").split("\n")
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(lines))
        settings = [number for number, line in enumerate(lines) if re.match(r"[\w.]+ *=", line)]
        kind = random.randint(0, 9)
        if kind <= 4 and settings:
            place = random.choice(settings)
            key = lines[place].partition("=")[0]
            lines[place] = f"{key}= {random.choice(TOML_LITERALS)}"
        elif kind == 5 and settings:
            place = random.choice(settings)
            key, _, value = lines[place].partition("=")
            names = (
                key.strip() + "x",
                "x." + key,
                f'"{key.strip()}"',
                '""',
                "a.b.c",
                "é",
                "preset",
                "extends",
            )
            lines[place] = f"{random.choice(names)} ={value}"
        elif kind == 6:
            lines.insert(place, random.choice(lines))
        elif kind == 7:
            lines[place], lines[-1] = lines[-1], lines[place]
        elif kind == 8:
            tables = ("[train]", "[[train]]", "[lora.r]", "[x]", "[" * 900, "[a." * 900 + "]", "[]")
            lines.insert(place, random.choice(tables))
        else:
            del lines[place]
            lines = lines or [""]
    return "\n".join(lines).encode("utf-8")


def mutate_csv(random: Random, content: bytes) -> bytes:
    """Return comma-separated rows with a field, a quote or a column changed."""
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    fields = lines[place].split(b",")
    field = random.randrange(len(fields))
    odd = (b'"', b'""', b'"a', b'a"b', b"\x00", b"\xff", b"a" * 200_000, b"", b"\r", b'"a\nb"')
    match random.randint(0, 3):
        case 0:
            fields[field] = random.choice(odd)
        case 1:
            fields.insert(field, random.choice(odd))
        case 2:
            del fields[field]
        case _:
            fields.append(fields[field])
    lines[place] = b",".join(fields)
    return b"\n".join(lines)


Mutator = Callable[[Random, bytes], bytes]


def one_of(*mutators: Mutator) -> Mutator:
    """Return a mutator that is one of several, drawn anew for each file."""
    return lambda random, content: random.choice(mutators)(random, content)


def mutate_json_or_bytes(random: Random, content: bytes) -> bytes:
    """Return content changed as JSON where it is JSON, and byte by byte elsewhere."""
    try:
        return mutate_json(random, content)
    except ValueError:
        return mutate_bytes(random, content)
