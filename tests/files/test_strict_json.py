"""JSON that others wrote is refused where Python's parser is lenient or fails in its own way."""

from pathlib import Path

import pytest

from files.errors import UserError
from files.strict_json import parse_json_at, parse_json_object, read_json_object


def test_an_object_is_read() -> None:
    assert parse_json_object(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', "x") == {
        "a": [1, 2.5, None, "é"]
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"deep": {"b": 1, "b": 1}}', "key 'b' stands twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is beyond any number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number with too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": \xff}', "not UTF-8 at byte 6"),
        (b'{"a": }', "line 1, column 7"),
        (b"", "not JSON"),
        (b"[1]", "must hold a JSON object, holds a list"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=r"^folder/config\.json: ") as caught:
        parse_json_object(data, "folder/config.json")
    assert reason in str(caught.value)


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_json_object(path)
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_json_object(path, max_bytes=4)


def test_values_that_follow_one_another_are_read_from_a_position() -> None:
    text = '{"a": 1} [2] {"b": NaN}'
    assert parse_json_at(text, 0, str) == ({"a": 1}, 8)
    assert parse_json_at(text, 9, str) == ([2], 12)
    with pytest.raises(UserError, match=r"^13: NaN is no JSON number; write null$"):
        parse_json_at(text, 13, str)
    with pytest.raises(UserError, match=r"^8: not JSON \(Expecting value at column 9\); "):
        parse_json_at(text, 8, str)
