"""What a run's model writes behind held-out prompts comes to: the `eval.metrics` of completions.

Completions are greedy, and draw nothing: whether they are made changes no bit of the training. They
are made in batches of `AT_ONCE`, which ranks share whole, so that their number changes none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.examples import Examples
from files.errors import UserError, counted
from models.config import DecoderConfig
from train.config.schema import AT_ONCE, RunConfig
from train.evaluation.problems import problem_of, with_columns
from train.evaluation.programs import run_programs
from train.evaluation.tasks import (
    Task,
    check_room,
    complete_tasks,
    rates,
    run_tests,
    tasks_of_examples,
    tasks_of_problems,
)
from train.generation.loaded import find_stop_ids
from train.generation.sampling import Sampling
from train.inputs.dataset import Data
from train.plan.refusals import of_completions
from train.process.world import World
from train.state import EvalResult, Run

RUNS_PROGRAMS = "eval.metrics=pass@1"
_JUDGED = ("parse_rate", "exact_match", "edit_similarity", "passed")


def refuse_uncompleted(config: RunConfig, data: Data, decoder: DecoderConfig) -> None:
    """Refuse held-out rows that are not what `eval.metrics` need, before weights are read.

    Raises:
        UserError: No row has a prompt, or one fills the model's context; or of pass@1 a row has no
            tests, or this machine cannot run programs.
    """
    names = of_completions(config)
    sets = {"valid": data.valid, "test": data.test}
    asked = f"eval.metrics={','.join(config.eval.metrics or ())}"
    if "exact_match" in (config.eval.metrics or ()) and not names:  # of holes
        if not any(example.has_hole for rows in sets.values() for example in rows or ()):
            raise UserError(f"{asked}: no held-out row has a hole; raise data.fim_rate")
        return
    if not names:
        return
    if not any(sets.values()):
        raise UserError(
            f"{asked} is of held-out rows, and there are none; give data.valid, data.split_column "
            "or data.valid_fraction, or leave it out"
        )
    for split, examples in sets.items():
        if examples is not None:
            check_room(tasks_of(config, data, split, examples), decoder, f"the {split} set")
    if "pass@1" in names:
        run_programs([], asked=RUNS_PROGRAMS)


def tasks_of(config: RunConfig, data: Data, split: str, examples: Examples) -> list[Task]:
    """Return what is completed of a held-out set: as `lathe evaluate` does, so many rows.

    Raises:
        UserError: No row has a prompt, or of pass@1 one has no tests.
    """
    most, tokenizer = config.eval.complete, data.tokenizer
    if "pass@1" in (config.eval.metrics or ()):
        fitted, problems = [], []
        for row in data.tested.get(split, ()):
            if (problem := problem_of(row)) is None:
                raise UserError(
                    f"{row.where}: has no tests (HumanEval's columns prompt, test and entry_point, "
                    f"or MBPP's code and test_list), which {RUNS_PROGRAMS} needs; leave it out"
                )
            problems.append(problem)
            fitted.append(with_columns(row, problem, data.prompt_format))
        rows, form = [row for row, _ in fitted], fitted[0][1]
        return tasks_of_problems(problems, rows, form, tokenizer, most)
    tasks = tasks_of_examples(examples, tokenizer, most)
    if not tasks:
        raise UserError(
            f"eval.metrics={','.join(of_completions(config))}: none of the {split} set's "
            f"{counted(len(examples), 'example')} that were looked at is whole and has a prompt; "
            "raise data.max_length, or leave them out"
        )
    return tasks


def with_rates(run: Run, examples: Examples, result: EvalResult) -> EvalResult:
    """Return an evaluation with the metrics of completions that were asked for, if any.

    Raises:
        UserError: Memory does not suffice for a single completion.
    """
    names = of_completions(run.config)
    if not names:
        return result
    if not math.isfinite(result.loss):  # a text of such numbers is none
        return replace(result, rates=dict.fromkeys(names, math.nan))
    started, data, world = time.perf_counter(), run.data, run.world
    split = "test" if examples is data.test else "valid"
    tasks = tasks_of(run.config, data, split, examples)
    tasks.sort(key=lambda task: -len(task.prompt_ids))  # as they are completed
    own = [one for at, one in enumerate(tasks) if at // AT_ONCE % world.size == world.rank]
    stop_ids = find_stop_ids(run.model.config, data.tokenizer, run.source.folder)
    sampling = Sampling(run.config.eval.max_new_tokens, stop_ids)
    with run.precision.autocast():
        for _ in complete_tasks(run.model, own, data.tokenizer, sampling):
            pass
    if "pass@1" in names:
        run_tests(own, asked=RUNS_PROGRAMS, neighbours=world.local_size)
    found = rates(_of_all_ranks(tasks, world), (1,))
    return replace(
        result,
        completed=len(tasks),
        rates={name: found[name].value for name in names},
        seconds=result.seconds + time.perf_counter() - started,
    )


def _of_all_ranks(tasks: Sequence[Task], world: World) -> list[dict[str, Any]]:
    """Return the verdict on every task, each of which one rank has completed."""
    own = [next(iter(task.verdicts()), {}) for task in tasks]
    given = [float(one.get(name, 0)) for one in own for name in _JUDGED]
    told = iter(world.sums(*given))  # zeros of all ranks but one: exact
    verdicts = []
    for task in tasks:
        values = {name: next(told) for name in _JUDGED}
        passed = bool(values.pop("passed"))
        tested = {} if task.problem is None else {"passed": passed}
        verdicts.append({"row": task.row, **values, **tested})
    return verdicts
