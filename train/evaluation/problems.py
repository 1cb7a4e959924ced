"""Rows with tests, HumanEval's and MBPP's, and what part of the completions passes them.

* HumanEval's columns are `task_id`, `prompt`, `canonical_solution`, `test`, `entry_point`: the
  program is the prompt, the completion, the test, and `check(entry_point)`.
* MBPP's are `text` (or `prompt`), `code`, `test_list`, `test_setup_code` (or `test_imports`),
  `challenge_test_list`: the program is the set-up, the completion, and the tests of `test_list`.
  The challenge tests are left out, as in all published figures.

Source: Chen et al. 2021, Austin et al. 2021, and the data sets of these names on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.messages import describe
from data.prompt import PromptFormat
from data.source import Row
from files.errors import UserError
from train.evaluation.code import code_of

_HUMAN_EVAL = frozenset({"prompt", "test", "entry_point"})
_MBPP = frozenset({"code", "test_list"})
# Where a model that was not told to stop has left the function that it was asked for. Source: Chen
# et al. 2021, section 2.1; for MBPP, whose solutions hold several functions, Fried et al. 2022.
_STOPS_OF_A_BODY = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
_STOPS_OF_A_FILE = ("\nassert", '\n"""', "\nprint", "\nif __name__", "\n```", "\n<|")


@dataclass(frozen=True)
class Problem:
    """A task with tests.

    Attributes:
        task: Its name.
        prompt: What a model that knows no format of prompts is given.
        reference: The solution that the row gives, "" where it gives none.
        stops: Texts at which a completion ends.
        head: What stands before the completion in the program.
        tests: What stands behind it.
        entry_point: The function that is asked for, where the head holds its beginning.
    """

    task: str
    prompt: str
    reference: str
    stops: tuple[str, ...]
    head: str
    tests: str
    entry_point: str | None

    def answer(self, completion: str) -> str:
        """Return the code of a completion: a fenced block where there is one, else up to a stop."""
        fenced = code_of(completion)
        if fenced is not completion:
            return fenced
        ends = [at for stop in self.stops if (at := completion.find(stop)) >= 0]
        return completion[: min(ends, default=len(completion))]

    def program(self, completion: str) -> str:
        """Return the program that comes to its end only if the completion passes the tests.

        A chat model writes the whole function again, behind the prompt's, which is a docstring.
        """
        answer = self.answer(completion)
        again = self.entry_point and re.search(rf"^def {self.entry_point}\b", answer, re.MULTILINE)
        between = "\n" if again else ""
        return f"{self.head}{between}{answer}\n{self.tests}\n"


def problem_of(row: Row) -> Problem | None:
    """Return a row's problem, None where it has no tests.

    Raises:
        UserError: A column of it is not what it must be; the message names the file and line.
    """
    values = row.values
    if values.keys() >= _HUMAN_EVAL:
        entry_point = _text(row, "entry_point")
        if not entry_point.isidentifier():
            raise UserError(
                f"{row.where}: entry_point is {entry_point!r}, but must name a function"
            )
        return Problem(
            task=str(values.get("task_id", row.where)),
            prompt=_text(row, "prompt"),
            reference=_text(row, "canonical_solution", ""),
            stops=_STOPS_OF_A_BODY,
            head=_text(row, "prompt"),
            tests=f"{_text(row, 'test')}\n\ncheck({entry_point})",
            entry_point=entry_point,
        )
    if values.keys() >= _MBPP:
        tests = _texts(row, "test_list")
        text = _text(row, "text" if "text" in values else "prompt")
        setup = [_text(row, "test_setup_code", ""), *_texts(row, "test_imports", [])]
        return Problem(
            task=f"MBPP/{values['task_id']}" if "task_id" in values else row.where,
            prompt=f'"""\n{text}\n{tests[0]}\n"""\n',
            reference=_text(row, "code"),
            stops=_STOPS_OF_A_FILE,
            head="".join(f"{line}\n" for line in setup if line),
            tests="\n".join(tests),
            entry_point=None,
        )
    return None


def with_columns(row: Row, problem: Problem, form: PromptFormat | None) -> tuple[Row, PromptFormat]:
    """Return the row as one of the model's own format, and that format.

    Columns that the format asks for and the row has are taken as they are; a chat gets the prompt
    as the user's turn. Where the format knows only plain text, or other columns, the prompt stands
    as it is, before the solution.
    """
    form = form or PromptFormat()
    own = {"prompt": problem.prompt, "completion": problem.reference}
    plain = PromptFormat(format="completion", append_eos=form.append_eos)
    if form.format in ("text", "completion"):
        return Row(own, row.where), replace(plain, system_prompt=form.system_prompt)
    if form.format == "messages":
        turns = [
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": problem.reference},
        ]
        return Row({"messages": turns}, row.where), form
    if form.format == "instruction":
        asked = {"instruction": problem.prompt, "input": "", "output": problem.reference}
        return Row(asked, row.where), form
    columns = {**row.values, **{name: own[name] for name in own if name not in row.values}}
    return (
        (Row(columns, row.where), form) if _fills(form, columns) else (Row(own, row.where), plain)
    )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes.

    1 − C(n − c, k) / C(n, k), as the product 1 − ∏ (1 − k / i) over i from n − c + 1 to n.

    Source: Chen et al. 2021, section 2.1.

    Raises:
        ValueError: k is above the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, but must be from 1 to the {samples} samples")
    if samples - passed < k:
        return 1.0
    missed = 1.0
    for i in range(samples - passed + 1, samples + 1):
        missed *= 1 - k / i
    return 1 - missed


def _fills(form: PromptFormat, columns: Mapping[str, Any]) -> bool:
    needed = form.columns() or form.prompt_columns()
    return all(isinstance(columns.get(name), str) for name in needed)


def _text(row: Row, name: str, default: str | None = None) -> str:
    value = row.values.get(name, default)
    value = default if value is None else value
    if not isinstance(value, str):
        raise UserError(f"{row.where}: the column '{name}' must hold text, holds {describe(value)}")
    return value.replace("\r\n", "\n")


def _texts(row: Row, name: str, default: list[str] | None = None) -> list[str]:
    values = row.values.get(name, default)
    texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    if not texts or (not values and default is None):
        raise UserError(
            f"{row.where}: the column '{name}' must hold a list of texts, holds {describe(values)}"
        )
    return [value.replace("\r\n", "\n") for value in values]
