"""Rows as `train.show_data --json` shows them: what tests of rows look at."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from files.errors import UserError
from train.show_data import main

DEMO_MODEL = Path(__file__).resolve().parent.parent / "data" / "demo" / "base"


def shown(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] | str | Path,
    *settings: str,
    split: str = "train",
    model: Path | None = None,
) -> list[dict[str, Any]]:
    """Return what the command prints of `rows`, one object an example.

    Args:
        folder: Where the rows are written, as `rows.jsonl`.
        rows: The rows, or the value of `data.train`.
        settings: Further arguments of the command.
        split: The split to show.
        model: Folder of the tokenizer; None is the demo's model.

    Raises:
        UserError: The command ended with exit code 2 and this one sentence.
    """
    if not isinstance(rows, str | Path):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rows = path
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = main(
            [
                *(f"model.path={model or DEMO_MODEL}", f"data.train={rows}"),
                *("--json", "--split", split, *settings),
            ]
        )
    if code == 2:
        sentence = complaint.getvalue()
        assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
        raise UserError(sentence.removeprefix("error: ").rstrip("\n"))
    assert code == 0, complaint.getvalue()
    return [json.loads(line) for line in printed.getvalue().splitlines()]
