"""Completions of a file's rows: one row out for each row in, in their order.

What is done is kept in `OUT.partial` after every batch, so that a command that was stopped goes on
where it was when it is typed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.source import Row, read_rows
from files.atomic import write_text
from files.errors import UserError, counted, note
from files.strict_json import parse_json_object
from train.generation.sampling import Sampling

if TYPE_CHECKING:
    from train.generation.loaded import Generator


def rows_to_complete(spec: str, column: str) -> list[Row]:
    """Return the rows of a file; the column of the completions must not be one of theirs.

    Raises:
        UserError: It is, there are no rows, or one of them breaks a rule or fits no JSON.
    """
    rows = list(read_rows(spec, every_column=True))
    if not rows:
        raise UserError(f"--prompts {spec}: holds no rows")
    for row in rows:
        if column in row.values:
            raise UserError(
                f"{row.where}: has a column '{column}' already, whose place the completion would "
                "take: name another with --column, such as --column generated"
            )
        try:
            json.dumps(row.values, default=str, allow_nan=False)
        except ValueError:
            raise UserError(
                f"{row.where}: holds NaN or an infinity, which no JSON Lines can hold; fill it in "
                "or drop the row"
            ) from None
    return rows


def complete_rows(
    loaded: Generator,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    column: str,
    out: Path | None,
) -> list[int]:
    """Complete every row and write all of them, with the completions, as JSON Lines.

    Args:
        loaded: The model and what belongs to it.
        rows: The rows.
        prompts: The ids of their prompts.
        sampling: How tokens are chosen.
        batch_size: Rows that are completed together.
        column: The name of the column that the completion stands in.
        out: The file, written whole or not at all; None prints.

    Returns:
        How many tokens each row's completion has.

    Raises:
        UserError: `OUT.partial` is of another command, a prompt fills the context, or as
            `complete_all`.
    """
    from train.generation.decode import Asked, complete_all, room

    for row, ids in zip(rows, prompts, strict=True):
        try:
            room(loaded.model.config, ids)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    kept = None if out is None else Kept(out, _fingerprint(loaded, prompts, sampling))
    done: dict[int, list[int]] = {} if kept is None else kept.read()
    asked = [Asked(ids, (row,)) for row, ids in enumerate(prompts) if row not in done]
    if done:
        note(f"{counted(len(done), 'row')} of {out}.partial are taken as they are")
    with tqdm(total=len(rows), initial=len(done), unit=" rows", disable=None, leave=False) as bar:
        try:
            for batch in complete_all(loaded.model, asked, sampling, batch_size):
                new = {one.key[0]: one.ids for one in batch}
                done |= new
                if kept is not None:
                    kept.add(new)
                bar.update(len(batch))
        except KeyboardInterrupt:
            if kept is not None and done:
                note(
                    f"{len(done)} of {counted(len(rows), 'row')} are in {kept.path}: the same "
                    "command goes on from there"
                )
            raise
    texts = [loaded.tokenizer.decode(done[row]) for row in range(len(rows))]
    lines = [
        json.dumps({**row.values, column: text}, ensure_ascii=False, default=str) + "\n"
        for row, text in zip(rows, texts, strict=True)
    ]
    if kept is None or out is None:
        print("".join(lines), end="", flush=True)
    else:
        write_text(out, "".join(lines))
        kept.path.unlink(missing_ok=True)
    return [len(done[row]) for row in range(len(rows))]


class Kept:
    """The completions that are done, beside the file that they will be written to.

    Its first line says of which prompts, settings and weights they are; a last line that is not
    whole is no line.
    """

    def __init__(self, out: Path, fingerprint: str):
        self.path = out.with_name(f"{out.name}.partial")
        self._fingerprint = fingerprint

    def read(self) -> dict[int, list[int]]:
        """Return row → ids of what is done, and begin the file where there is none.

        Raises:
            UserError: What is there is of another command.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            lines = []
        if len(lines) < 2:  # nothing is done
            self.path.write_text(json.dumps({"of": self._fingerprint}) + "\n", encoding="utf-8")
            return {}
        where = str(self.path)
        if parse_json_object(lines[0], where) != {"of": self._fingerprint}:
            raise UserError(
                f"{where}: holds completions of other prompts, weights or settings, from a command "
                "that was stopped: type that one again to end it, or delete the file"
            )
        whole = b"".join(line + b"\n" for line in lines)
        with open(self.path, "r+b") as file:  # what stands behind the last line end goes
            file.truncate(len(whole))
        found = [parse_json_object(line, where) for line in lines[1:]]
        return {one["row"]: one["ids"] for one in found}

    def add(self, done: dict[int, list[int]]) -> None:
        """Keep what a batch has come to."""
        if not self.path.exists():  # the same command, typed twice, has ended and taken it away
            self.read()
        lines = [json.dumps({"row": row, "ids": ids}) + "\n" for row, ids in done.items()]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)


def _fingerprint(loaded: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> str:
    """Return a hash of prompts, settings and weights, these by their files' sizes and times.

    Those of an adapter's base are among them.
    """
    weights = sorted(
        path for folder in {loaded.source, loaded.trained} for path in folder.glob("*.safetensors")
    )
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    settings = {**asdict(sampling), "stop_ids": sorted(sampling.stop_ids)}
    dtype = str(loaded.model.head_weight().dtype)
    told = json.dumps([loaded.name, dtype, stamps, settings, [list(ids) for ids in prompts]])
    return hashlib.sha256(told.encode()).hexdigest()
