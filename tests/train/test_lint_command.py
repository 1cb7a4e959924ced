"""`lathe lint`: a planted bad data set is caught on every count, and a clean one raises nothing."""

import io
import json
import random
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import Refused
from shown import DEMO_MODEL, shown

from data.examples import load_examples
from data.tokenizer import Tokenizer
from train.config.load import load_config
from train.inputs.dataset import load_data, prompt_format
from train.inputs.lint import main

Row = dict[str, Any]
MODEL = f"model.path={DEMO_MODEL}"
PAIRS = (MODEL, "data.format=completion", "data.max_length=256")
WORDS = (
    *("amount", "buffer", "column", "degree", "engine", "factor", "galaxy", "handle", "insert"),
    *("jacket", "kernel", "ladder", "market", "needle", "object", "parcel", "quartz", "record"),
)
AWS_KEY = "AKIA" + "QWERTYUIOPASDFGH"
EMAIL = "jane.doe@" + "university.edu"


def pair(number: int) -> Row:
    """Return a row like no other: a function of eight statements drawn at random."""
    rng = random.Random(number)
    lines = [
        f"    {rng.choice(WORDS)}_{rng.randrange(1000)} = {rng.choice(WORDS)} * {rng.random():.6f}"
        for _ in range(4)
    ]
    name = f"{rng.choice(WORDS)}_{number}"
    return {
        "prompt": f"Write {name} about {' '.join(rng.sample(WORDS, 6))}.\n",
        "completion": f"def {name}(x):\n" + "\n".join(lines) + "\n    return x\n",
    }


def write(path: Path, rows: Sequence[Mapping[str, Any] | bytes]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def lint(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int | None = None
) -> dict[str, Any]:
    """Return the object that the command prints, after checking its exit code against it."""
    answered = main([str(argument) for argument in (*arguments, "--json")])
    printed = capsys.readouterr()
    assert answered != 2, printed.err
    found = json.loads(printed.out)
    assert answered == (1 if found["problems"] else 0)
    assert code is None or answered == code, found["findings"]
    return found


def kinds(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return kind → where, as `FILE:LINE` without the folder."""
    return {
        finding["kind"]: [Path(row["source"]).name for row in finding["rows"]]
        for finding in document["findings"]
    }


@pytest.fixture
def clean(tmp_path: Path) -> list[Path]:
    """Return the three files of a clean set: no two of its rows are alike."""
    return [
        write(tmp_path / "train.jsonl", [pair(number) for number in range(80)]),
        write(tmp_path / "valid.jsonl", [pair(number) for number in range(80, 90)]),
        write(tmp_path / "test.jsonl", [pair(number) for number in range(90, 100)]),
    ]


def test_a_clean_set_raises_nothing(clean: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = lint(capsys, *clean, *PAIRS, code=0)
    assert found["findings"] == [] and found["problems"] == 0
    assert {name: one["rows"] for name, one in found["sets"].items()} == {
        "train": 80, "valid": 10, "test": 10,
    }  # fmt: skip
    assert found["sets"]["train"]["languages"] == {"Python": 80}
    assert main([*map(str, clean), *PAIRS]) == 0
    assert "nothing found that would spoil a run" in capsys.readouterr().out


# Kind → the row, or the line, that is put into train.
PLANTED: dict[str, Row | bytes] = {
    "unreadable": b'{"prompt": "caf\xe9", "completion": "x"}',
    "empty_answer": {"prompt": "Say nothing at all, for a while, and stop.\n", "completion": ""},
    "cut_before_answer": {"prompt": "very\n" * 300, "completion": "yes"},
    "answer_cut": {"prompt": "Count to nine hundred.\n", "completion": "one and " * 300},
    "answer_unfinished": {**pair(201), "completion": "def f(x):\n    return sorted(x, key=len,\n"},
    "duplicate": pair(7),
    "near_duplicate": {
        **pair(8),
        "completion": pair(8)["completion"].replace("return x", "return xx"),
    },
    "mojibake": {**pair(202), "completion": "café — naïve".encode().decode("latin-1")},
    "replacement_character": {**pair(203), "completion": "caf\ufffd\n"},
    "byte_order_mark": {**pair(204), "completion": "\ufeffimport os\n"},
    "nul": {**pair(205), "completion": "a\0b\n"},
    "control_character": {**pair(206), "completion": "a\x1b[31m b\n"},
    "invisible_character": {**pair(207), "completion": "user\u202eadmin\n"},
    "mixed_line_endings": {**pair(208), "completion": "x = 1\r\ny = 2\nz = 3\n"},
    "other_line_endings": {"prompt": "Two lines please.\r\n", "completion": "x = 1\r\ny = 2\r\n"},
    "aws_access_key": {**pair(209), "completion": f"key = '{AWS_KEY}'\n"},
    "email_address": {**pair(210), "completion": f"# {EMAIL}\nx = 1\n"},
    "ip_address": {**pair(211), "completion": "host = '8.8." + "4.4'\n"},
    "wrong_set": {**pair(212), "split": "test"},
}


def test_a_planted_bad_set_is_caught_on_every_count(
    clean: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fault once, in its row, and nothing else."""
    train = [pair(number) for number in range(80)]
    write(clean[0], [*train, *PLANTED.values()])
    leaked_nearly = {**pair(11), "prompt": pair(11)["prompt"].replace("Write", "Please write")}
    write(clean[1], [*(pair(number) for number in range(80, 90)), pair(10)])
    write(clean[2], [*(pair(number) for number in range(90, 100)), leaked_nearly])
    found = lint(capsys, *clean, *PAIRS, code=1)
    lines = {kind: [f"train.jsonl:{80 + n}"] for n, kind in enumerate(PLANTED, 1)}
    lines |= {"leaked": ["valid.jsonl:11"], "leaked_nearly": ["test.jsonl:11"]}
    assert kinds(found) == lines
    assert found["problems"] == len(lines) and found["unreadable"] == 1
    details = {one["kind"]: one["rows"][0]["detail"] for one in found["findings"]}
    assert details["duplicate"].endswith("train.jsonl:8")
    assert details["near_duplicate"].endswith("train.jsonl:9")
    assert details["leaked"].endswith("train.jsonl:11")
    assert details["leaked_nearly"].endswith("train.jsonl:12")
    assert "not UTF-8" in details["unreadable"]


def test_no_secret_is_printed_whole(clean: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(clean[0], [PLANTED["aws_access_key"], PLANTED["email_address"]])
    for more in ([], ["--json"]):
        assert main([str(clean[0]), *PAIRS, *more]) == 1
        said = capsys.readouterr()
        assert AWS_KEY[:4] in said.out
        assert AWS_KEY not in said.out + said.err and EMAIL not in said.out + said.err


def test_rows_whose_end_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(1), pair(2)])
    found = lint(capsys, path, *PAIRS, "data.append_eos=false")
    assert kinds(found) == {"eos_untrained": ["rows.jsonl:1", "rows.jsonl:2"]}


def test_rows_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(1), {**pair(2), "completion": ""}])
    found = lint(capsys, path, *PAIRS, "data.append_eos=false")
    assert kinds(found) == {"no_target": ["rows.jsonl:2"], "eos_untrained": ["rows.jsonl:1"]}
    assert "no_target" not in kinds(lint(capsys, path, *PAIRS))


@pytest.mark.parametrize("overflow", ["truncate", "drop", "split"])
@pytest.mark.parametrize("max_length", [40, 130])
def test_what_is_counted_is_what_training_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overflow: str, max_length: int
) -> None:
    rows = [pair(number) for number in range(30)]
    rows += [{"prompt": "a " * n, "completion": "b " * n} for n in (0, 1, 20, 200)]
    path = write(tmp_path / "rows.jsonl", rows)
    settings = ("data.format=completion", f"data.max_length={max_length}")
    settings += (f"data.on_overflow={overflow}",)
    overrides = dict(setting.split("=") for setting in settings)
    counts = load_examples(
        str(path), split_column=None, split="train", tokenizer=Tokenizer.load(DEMO_MODEL),
        prompt_format=prompt_format(load_config(overrides=overrides).data), max_length=max_length,
        on_overflow=overflow, cache_root=None,
    ).counts  # fmt: skip
    found = lint(capsys, path, MODEL, *settings)
    number = {finding["kind"]: finding["count"] for finding in found["findings"]}
    lengths = found["sets"]["train"]["lengths"]
    assert lengths["longest"] == counts.longest_row
    fates = ("no_target", "dropped", "cut_before_answer")
    assert sum(number.get(kind, 0) for kind in fates) == counts.dropped
    assert number.get("answer_cut", 0) == counts.eos_lost
    lost = next(one for one in lengths["lost"] if one["max_length"] == max_length)
    if overflow == "truncate":
        assert lengths["targets"] - lost["targets_lost"] == counts.targets
        assert lost["rows_cut"] >= counts.truncated
    if overflow == "drop":
        assert lost["rows_cut"] == number["dropped"]


def test_an_overflow_that_ends_the_run_is_told_of_each_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(number) for number in range(3)])
    settings = ("data.format=completion", "data.max_length=32", "data.on_overflow=error")
    assert kinds(lint(capsys, path, MODEL, *settings)) == {
        "too_long": ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    }


def test_every_fault_of_a_file_is_told_not_the_first_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b"{", pair(1), b"[1]", {"prompt": "x"}, b"\xff", {"prompt": 1, "completion": "x"}]
    path = write(tmp_path / "rows.jsonl", [pair(0), *lines, pair(2)])
    found = lint(capsys, path, *PAIRS, code=1)
    # Three are met while reading, two while rendering, a batch later.
    assert sorted(kinds(found)["unreadable"]) == [f"rows.jsonl:{n}" for n in (2, 4, 5, 6, 7)]
    assert found["sets"]["train"]["rows"] == 3
    assert [shown_row["source"] for shown_row in shown(tmp_path, [pair(0)], *PAIRS[1:])]


def test_a_column_that_names_the_sets_is_read_once_for_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**pair(n), "split": "validation" if n % 5 == 0 else "train"} for n in range(20)]
    rows += [{**pair(1), "split": "validation"}]
    path = write(tmp_path / "rows.jsonl", [*rows, b"{", {**pair(30), "split": "rest"}])
    found = lint(capsys, path, *PAIRS, "data.split_column=split", code=1)
    assert kinds(found) == {
        "unreadable": ["rows.jsonl:22", "rows.jsonl:23"], "leaked": ["rows.jsonl:21"],
    }  # fmt: skip
    assert {name: one["rows"] for name, one in found["sets"].items()} == {
        "train": 16, "valid": 5, "test": 0,
    }  # fmt: skip
    assert found["sets"]["train"]["labels"] == {"split": {"train": 16}}


def test_rows_that_a_fraction_holds_out_are_the_run_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is there twice: a held-out row is leaked where its twin is trained."""
    rows = [pair(number) for number in range(20)] * 2
    path = write(tmp_path / "rows.jsonl", [PLANTED["cut_before_answer"], *rows])
    settings = {"data.format": "completion", "data.max_length": 256, "data.valid_fraction": 0.3}
    config = load_config(overrides={**settings, "data.train": str(path)})
    data = load_data(config, DEMO_MODEL, None)
    assert data.valid is not None
    valid, train = set(data.valid.rows.tolist()), set(data.train.rows.tolist())
    leaked = [row for row in sorted(valid) if (row + 20 if row <= 20 else row - 20) in train]
    found = kinds(lint(capsys, path, *PAIRS, "data.valid_fraction=0.3"))
    assert found["leaked"] == [f"rows.jsonl:{row + 1}" for row in leaked] and leaked


def test_sets_are_told_by_the_names_of_files_and_folders(
    clean: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([tmp_path], [f"{tmp_path}/*.jsonl"], [*clean]):
        assert set(lint(capsys, *arguments, *PAIRS)["sets"]) == {"train", "valid", "test"}
    assert set(lint(capsys, clean[1], *PAIRS)["sets"]) == {"train"}
    both = lint(capsys, clean[2], f"data.train={clean[0]}", *PAIRS)["sets"]
    assert set(both) == {"train", "test"} and both["test"]["rows"] == 10


def test_other_kinds_of_files_and_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**pair(n), "language": "Python"} for n in (1, 2, 1)]
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    found = lint(capsys, table, *PAIRS)
    assert kinds(found) == {"duplicate": ["rows.parquet:3"]}
    assert found["sets"]["train"]["labels"] == {"language": {"Python": 3}}
    tree = tmp_path / "src"
    tree.mkdir()
    for number in range(3):
        (tree / f"a{number}.py").write_text(pair(number % 2)["completion"])
    assert kinds(lint(capsys, tree, MODEL)) == {"duplicate": ["a2.py:1"]}
    system = {"role": "system", "content": "Answer as shortly as you can. " * 20}
    chats = [
        {
            "messages": [
                system,
                {"role": "user", "content": pair(n)["prompt"]},
                {"role": "assistant", "content": pair(n)["completion"]},
            ]
        }
        for n in range(4)
    ]
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}\n{% endfor %}"
    )
    settings = ("data.format=messages", f"data.chat_template={template}", MODEL)
    path = write(tmp_path / "chats.jsonl", chats)
    assert lint(capsys, path, *settings)["findings"] == []  # the system turn makes none alike


def test_bad_input_is_one_sentence(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(1)])
    assert "data.format=completion reads such rows" in refused(main, path, MODEL)
    assert "no such file" in refused(main, tmp_path / "nothing.jsonl", MODEL)
    assert "model.path is not set" in refused(main, path)
    assert "no rows are named" in refused(main, MODEL)
    assert "both name the train rows" in refused(main, path, MODEL, f"data.train={path}")
    assert "belongs to a run" in refused(main, path, MODEL, "--plan")
    assert "unknown option" in refused(main, path, MODEL, "--bogus")
    assert "no rows" in refused(main, write(tmp_path / "none.jsonl", []), MODEL)
    assert "matplotlib" in refused(main, path, *PAIRS, "--picture", tmp_path / "a.png")


@pytest.mark.usefixtures("matplotlib")
def test_lengths_are_drawn(clean: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    picture = clean[0].parent / "lengths.png"
    found = lint(capsys, *clean, *PAIRS, "--picture", picture)
    assert found["picture"] == str(picture)
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5000


def test_on_a_terminal_a_bar_shows_how_many_rows_are_to_come(
    clean: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([*map(str, clean), *PAIRS]) == 0
    assert "train:" in terminal.getvalue() and "/80 " in terminal.getvalue()


def test_python_m_data_lint_is_the_same(
    clean: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["data.lint", *map(str, clean), *PAIRS, "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("data.lint", run_name="__main__")
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["problems"] == 0
