"""What is completed, and what the completions come to: rates, and pass@k where there are tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.examples import Examples
from data.labels import IGNORED
from data.prompt import PromptFormat
from data.source import Row
from data.tokenizer import Tokenizer
from files.errors import UserError
from models.config import DecoderConfig
from models.layers import CausalLM
from train.config.schema import AT_ONCE
from train.evaluation.code import edit_similarity, exact_match, parses
from train.evaluation.likelihood import Estimate, mean
from train.evaluation.problems import Problem, pass_at_k
from train.evaluation.programs import Outcome, run_programs
from train.generation.decode import Asked, complete_all, room
from train.generation.sampling import Sampling

# How many examples are looked at for one that is completed: not all are whole and have a prompt.
_LOOKED_AT = 20


@dataclass
class Task:
    """A prompt to complete, and what came of it.

    Attributes:
        row: The row of the data that it comes from, counted from 0.
        prompt: Its text, as a parser is given it before the completion.
        prompt_ids: Its tokens.
        reference: What the row says comes next.
        problem: Its tests, None where there are none.
        completions: What the model says, a text for each sample.
        ended: Whether each came to an end by itself.
        outcomes: How each one's program ended, where there are tests.
    """

    row: int
    prompt: str
    prompt_ids: list[int]
    reference: str
    problem: Problem | None = None
    completions: list[str] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def asked(self, samples: int, tokenizer: Tokenizer) -> list[Asked]:
        """Return what asks for so many completions."""
        problem = self.problem

        def is_over(ids: list[int]) -> bool:
            text = tokenizer.decode(ids)
            return problem is not None and any(stop in text for stop in problem.stops)

        over = None if problem is None else is_over
        return [Asked(self.prompt_ids, (self.row, number), over) for number in range(samples)]

    def take(self, asked: Sequence[Asked], tokenizer: Tokenizer) -> None:
        """Take in the completions that were asked for."""
        texts = [tokenizer.decode(one.ids) for one in asked]
        self.completions = [self.problem.answer(text) if self.problem else text for text in texts]
        self.ended = [one.ended for one in asked]

    def programs(self) -> list[str]:
        """Return the programs that test the completions, none without a problem."""
        return [self.problem.program(text) for text in self.completions] if self.problem else []

    def verdicts(self) -> Iterator[dict[str, Any]]:
        """Yield what each completion is worth, as JSON values."""
        for number, completion in enumerate(self.completions):
            found = {
                "row": self.row,
                "sample": number,
                "prompt": self.prompt,
                "completion": completion,
                "reference": self.reference,
                "ended": self.ended[number],
                "parse_rate": parses(completion, self.prompt),
                "exact_match": exact_match(completion, self.reference),
                "edit_similarity": edit_similarity(completion, self.reference),
            }
            if self.outcomes:
                outcome = self.outcomes[number]
                found |= {"passed": outcome.passed, "why": outcome.why}
            yield found


def tasks_of_examples(examples: Examples, tokenizer: Tokenizer, most: int) -> list[Task]:
    """Return at most so many of the examples that have a prompt, evenly spread.

    What was cut at `data.max_length`, or into pieces, is none: its end would not be the row's.
    """
    pieces = np.bincount(examples.rows)[examples.rows]
    tasks = []
    for position in _spread(len(examples), _LOOKED_AT * most):
        example = examples[position]
        whole = pieces[position] == 1 and not examples.subset([position]).counts.truncated
        if not (example.prompt_length and whole):
            continue
        ids, cut = example.input_ids.tolist(), example.prompt_length
        untrained = np.flatnonzero(example.labels[cut:] == IGNORED)
        stop = cut + int(untrained[0]) if len(untrained) and untrained[0] else len(ids)
        prompt, reference = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:stop])
        tasks.append(Task(int(examples.rows[position]), prompt, ids[:cut], reference))
    return [tasks[number] for number in _spread(len(tasks), most)]


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many of 0 … count - 1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def tasks_of_problems(
    problems: Sequence[Problem],
    rows: Sequence[Row],
    form: PromptFormat,
    tokenizer: Tokenizer,
    most: int | None,
) -> list[Task]:
    """Return the first `most` problems (None: all), their prompts in the model's format."""
    return [
        Task(
            row=number,
            prompt=problem.head,
            prompt_ids=form.prompt_ids(row.values, tokenizer),
            reference=problem.reference,
            problem=problem,
        )
        for number, (problem, row) in enumerate(zip(problems[:most], rows, strict=False))
    ]


def check_room(tasks: Sequence[Task], config: DecoderConfig, where: str) -> None:
    """Refuse prompts that fill a model's context; `where` names the rows that they come from."""
    for task in tasks:
        try:
            room(config, task.prompt_ids)
        except UserError as error:
            raise UserError(f"{where}, row {task.row + 1}: {error}") from None


def complete_tasks(
    model: CausalLM,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = AT_ONCE,
) -> Iterator[int]:
    """Have tasks completed, as `complete_all` does; yield how many completions each batch adds."""
    asked = [task.asked(samples, tokenizer) for task in tasks]
    flat = [one for some in asked for one in some]
    for batch in complete_all(model, flat, sampling, batch_size):
        yield len(batch)
    for task, some in zip(tasks, asked, strict=True):
        task.take(some, tokenizer)


def run_tests(tasks: Sequence[Task], **how: Any) -> None:
    """Run the tests of completed tasks that have any, as `run_programs` does."""
    programs = [program for task in tasks for program in task.programs()]
    outcomes = iter(run_programs(programs, **how) if programs else [])
    for task in tasks:
        task.outcomes = [next(outcomes) for _ in task.programs()]


def rates(verdicts: Sequence[dict[str, Any]], k: Sequence[int]) -> dict[str, Estimate]:
    """Return the means of what completions are worth, and pass@k of those with tests.

    Errors are clustered by row, of which each may have several completions.
    """
    rows = [one["row"] for one in verdicts]
    names = ("parse_rate", "exact_match", "edit_similarity")
    found = {name: mean([one[name] for one in verdicts], [1] * len(rows), rows) for name in names}
    tested = [one for one in verdicts if "passed" in one]
    passed: dict[int, list[bool]] = {}
    for one in tested:
        passed.setdefault(one["row"], []).append(one["passed"])
    for number in k if passed else ():
        each = [pass_at_k(len(ways), sum(ways), number) for ways in passed.values()]
        found[f"pass@{number}"] = mean(each, [1] * len(each), list(passed))
    return found
