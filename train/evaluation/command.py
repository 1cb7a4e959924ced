"""`python -m train.evaluate RUN_OR_MODEL --data FILE`: how good a model is on rows of its own.

Loss, perplexity and token accuracy of every row's targets; and where rows have a prompt, what the
model makes of some of them: whether that parses, is the reference, is near it, and passes the row's
tests. Every mean has its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.arrays import Writer, in_memory
from data.examples import Examples, check_vocabulary
from data.labels import labelled_rows
from data.prompt import PromptFormat
from data.source import Row, read_rows
from files.atomic import write_text
from files.errors import UserError, counted, note
from files.hub import resolve_model
from train.batches import evaluation_batching
from train.config.command_line import parse
from train.config.load import load_config, resolve_key
from train.config.schema import AT_ONCE, RunConfig
from train.evaluation.likelihood import Estimate, score
from train.evaluation.problems import Problem, problem_of, with_columns
from train.evaluation.programs import require_limits, warning
from train.evaluation.tasks import (
    Task,
    check_room,
    complete_tasks,
    rates,
    run_tests,
    tasks_of_examples,
    tasks_of_problems,
)
from train.generation.loaded import Generator, load_from_adapter, load_from_model, load_run
from train.generation.sampling import Sampling
from train.inputs.dataset import examples_of, prompt_format
from train.plan.decide import decide_device, decide_precision
from train.precision import COMPUTE_DTYPES, Precision
from train.process.command import CommandParser, run_command
from train.report.evaluated import EVALUATIONS_FILE, metric_text
from train.report.page import write_report
from train.saving.artifact import run_and_trained
from train.saving.checkpoints import STEP_FOLDER
from train.text import aligned

# Rows that are completed where --complete does not say; of rows with tests all are.
_COMPLETED = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names, print what was found; return the exit code."""
    return run_command(lambda: _answer(arguments))


def _answer(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    started = time.perf_counter()
    _check(options)
    overrides = _overrides(options.settings)
    run = _run_of(Path(options.model))
    config = load_config(file=run / "config.toml", overrides=overrides) if run else None
    if run is None and not Path(options.model, "adapter_config.json").is_file():
        resolve_model(options.model, weights=False)  # a wrong name is said before any row is read
    column = overrides.get("data.split_column") or (config and config.data.split_column)
    if options.split and not column and Path(options.data).expanduser().is_file():
        raise UserError(
            f"--split {options.split}: {options.data} is one file, and nothing says which of its "
            "rows are of that split; name their column with data.split_column=COLUMN, or give a "
            "file of that split and leave --split out"
        )
    problems = _problems(options, column if options.split else None)
    device = torch.device(decide_device(options.device))
    wanted = options.dtype if options.dtype != "auto" or not config else config.train.precision
    precision = Precision(decide_precision(wanted, device.type), device)
    loaded = _load(options, run, config, precision)
    if config is None:
        config = _config_of(loaded, overrides)
    form = prompt_format(config.data)
    rows: list[Row] = []
    if problems:
        fitted = [with_columns(row, problem, form) for row, problem in problems]
        rows, form = [row for row, _ in fitted], fitted[0][1]
    examples = _examples(options, config, loaded, form, rows)
    batching = evaluation_batching(config, loaded.tokenizer.pad_id)
    if options.batch_size is not None:
        batching = replace(batching, micro_batch_size=options.batch_size)
    tasks = _tasks(options, loaded, examples, problems, rows, form)
    metrics = score(loaded.model, examples, batching, precision).estimates()
    verdicts = _complete(options, loaded, tasks, precision)
    metrics |= rates(verdicts, options.k) if verdicts else {}
    document = {
        "model": loaded.name,
        "data": options.data,
        "split": options.split,
        "precision": precision.name,
        "device": device.type,
        "rows": examples.counts.rows,
        "targets": int(examples.num_targets.sum()),
        "cut_rows": examples.counts.truncated,
        "dropped_rows": examples.counts.dropped,
        "metrics": {name: _about(metric) for name, metric in metrics.items()},
        "completions": _about_completions(options, tasks) if verdicts else None,
        "seconds": time.perf_counter() - started,
    }
    if options.completions is not None:
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in verdicts]
        write_text(options.completions, "".join(lines))
    if run is not None:
        _record(run, document)
    print(json.dumps(document, ensure_ascii=False) if options.json else _text(document))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "evaluate",
        description="Measure a run, an adapter or a model on rows: loss, perplexity and token "
        "accuracy, and of completions whether they parse, match and pass tests.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="folder, or a model's hub id")
    parser.add_argument("settings", nargs="*", metavar="data.key=value", help="how rows are read")
    parser.add_argument("--data", required=True, metavar="FILE", help="as data.train names rows")
    parser.add_argument("--split", choices=["train", "valid", "test"], help="its rows alone")
    parser.add_argument("--base", help="the adapter's base, if not as adapter_config.json says")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--complete",
        type=int,
        metavar="N",
        help=f"rows to complete, evenly spread (default {_COMPLETED}, of rows with tests all; 0: "
        "the loss alone)",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the completions of rows with tests on this machine, limited; see the warning",
    )
    parser.add_argument("--k", default="1", metavar="K,…", help="pass@k for these k (default 1)")
    parser.add_argument("--samples", type=int, metavar="N", help="completions of a row")
    parser.add_argument("--completions", type=Path, metavar="FILE", help="write them as JSON Lines")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows computed at once")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *COMPUTE_DTYPES])
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and fill in what follows from others."""
    _sampling(options)
    try:
        options.k = sorted({int(number) for number in options.k.split(",")})
    except ValueError:
        raise UserError(f"--k {options.k}: must be whole numbers, as in --k 1,10") from None
    if options.samples is None:
        options.samples = max(1, options.k[-1])
    least = {"complete": 0, "samples": 1, "batch_size": 1, "seed": 0}
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value}: must be at least {lowest}")
    if options.k[0] < 1 or options.k[-1] > options.samples:
        raise UserError(
            f"--k {','.join(map(str, options.k))}: must be from 1 to --samples {options.samples}"
        )
    if options.samples > 1 and options.temperature == 0:
        raise UserError(
            f"{options.samples} greedy completions of a row are all the same: give a --temperature "
            "above 0, such as 0.8"
        )
    if options.run_code:
        require_limits()


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def _overrides(settings: Sequence[str]) -> dict[str, str]:
    written = parse(settings).overrides if settings else {}
    overrides = {resolve_key(name): value for name, value in written.items()}
    for name, key in zip(written, overrides, strict=True):
        if not key.startswith("data.") or key in ("data.train", "data.valid", "data.test"):
            raise UserError(
                f"{name}: an evaluation takes settings of how rows are read (data.format, "
                "data.max_length, …) and has options for all else; --help shows them"
            )
    return overrides


def _run_of(place: Path) -> Path | None:
    """Return the run that a folder is, or is a part of."""
    if (place / "config.toml").is_file():
        return place
    whole = place.resolve()
    is_checkpoint = STEP_FOLDER.fullmatch(whole.name) and whole.parent.name == "checkpoints"
    run = whole.parent.parent if is_checkpoint else whole.parent
    is_part = is_checkpoint or whole.name in ("final", "best")
    return run if is_part and (run / "config.toml").is_file() else None


def _problems(options: argparse.Namespace, column: str | None) -> list[tuple[Row, Problem]]:
    """Return the rows with their tests, none where rows have none.

    Raises:
        UserError: Rows behind the first have no tests, or nobody has allowed to run programs.
    """
    found: list[tuple[Row, Problem]] = []
    for row in read_rows(options.data, split_column=column, split=options.split):
        problem = problem_of(row)
        if problem is None:
            if found:
                raise UserError(f"{row.where}: has no tests, as the rows before it have; part them")
            break
        found.append((row, problem))
    if found and options.complete != 0:
        if not options.run_code:
            raise UserError(
                f"{found[0][0].where}: rows with tests are measured by running what the model "
                "writes on this machine, which may do harm: allow that with --run-code, or give "
                "--complete 0 for the loss alone"
            )
        note(warning())
    if options.run_code and not found:
        raise UserError(
            f"--run-code: {options.data} has no rows with tests (HumanEval's columns prompt, test "
            "and entry_point, or MBPP's code and test_list); leave it out"
        )
    return found


def _load(
    options: argparse.Namespace, run: Path | None, config: RunConfig | None, precision: Precision
) -> Generator:
    device, dtype, place = precision.device, precision.compute_dtype, Path(options.model)
    if config is not None and config.train.method == "lora" and config.model.dtype:
        dtype = COMPUTE_DTYPES[config.model.dtype]  # as which the run keeps its base
    adapter = (place / "adapter_config.json").is_file()
    if options.base is not None and (run or not adapter):
        raise UserError("--base goes with an adapter's folder alone")
    if run is not None:
        run_and_trained(place)
        return load_run(place, device, dtype)
    if adapter:
        return load_from_adapter(place, options.base, device, dtype)
    return load_from_model(options.model, device, dtype)


def _config_of(loaded: Generator, overrides: dict[str, str]) -> RunConfig:
    """Return the configuration of what no run here has trained: its prompt format, and defaults."""
    form = loaded.prompt_format
    stored = {} if form is None else form.to_dict()
    given = {f"data.{name}": value for name, value in stored.items() if value is not None}
    return load_config(overrides={**given, **overrides})


def _examples(
    options: argparse.Namespace,
    config: RunConfig,
    loaded: Generator,
    form: PromptFormat,
    rows: Iterable[Row],
) -> Examples:
    data, tokenizer = config.data, loaded.tokenizer
    if rows:

        def build(folder: Path) -> None:
            writer = Writer(folder, data.max_length, data.on_overflow)
            for row in labelled_rows(rows, tokenizer, form):
                writer.add(row)
            writer.close(options.data)

        examples = Examples(in_memory(build))
    else:
        column = data.split_column if options.split else None
        examples = examples_of(options.data, options.split, data, tokenizer, form, column=column)
    padded = data.batching != "unpadded"
    check_vocabulary(examples, loaded.model.config.vocab_size, tokenizer, padded=padded)
    if cut := examples.counts.truncated:
        note(f"{counted(cut, 'row')} cut at data.max_length={data.max_length}; raise it to see all")
    return examples


def _tasks(
    options: argparse.Namespace,
    loaded: Generator,
    examples: Examples,
    problems: Sequence[tuple[Row, Problem]],
    rows: Sequence[Row],
    form: PromptFormat,
) -> list[Task]:
    """Return what is completed.

    Raises:
        UserError: A prompt fills the model's context.
    """
    most, tokenizer = options.complete, loaded.tokenizer
    if problems:
        tasks = tasks_of_problems([one for _, one in problems], rows, form, tokenizer, most)
    else:
        most = _COMPLETED if most is None else most
        tasks = tasks_of_examples(examples, tokenizer, most) if most else []
        if most and not tasks:
            note("no row has a prompt of its own: the loss alone is measured, nothing is completed")
    check_room(tasks, loaded.model.config, options.data)
    return tasks


def _complete(
    options: argparse.Namespace, loaded: Generator, tasks: Sequence[Task], precision: Precision
) -> list[dict[str, Any]]:
    """Complete the tasks, run what is to be run, and return what each completion is worth."""
    sampling = replace(_sampling(options), stop_ids=loaded.stop_ids)
    how = {"samples": options.samples, "batch_size": options.batch_size or AT_ONCE}
    total = len(tasks) * options.samples
    with (
        precision.autocast(),
        tqdm(total=total, unit=" completions", disable=None, leave=False) as bar,
    ):
        for done in complete_tasks(loaded.model, tasks, loaded.tokenizer, sampling, **how):
            bar.update(done)
    run_tests(tasks)
    return [verdict for task in tasks for verdict in task.verdicts()]


def _about(metric: Estimate) -> dict[str, float | int | None]:
    """Return an estimate as JSON values, which know no number that is not finite."""
    return {
        "value": metric.value if math.isfinite(metric.value) else None,
        "standard_error": metric.error if math.isfinite(metric.error or 0.0) else None,
        "rows": metric.rows,
    }


def _about_completions(options: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, Any]:
    names = ("samples", "max_new_tokens", "temperature", "top_p", "seed")
    return {
        "rows": len(tasks),
        **{name: getattr(options, name) for name in names},
        "unfinished": sum(not ended for task in tasks for ended in task.ended),
    }


def _record(run: Path, document: dict[str, Any]) -> None:
    """Keep the evaluation in the run's folder, and write its report again."""
    try:
        with open(run / EVALUATIONS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
        write_report(run)
    except OSError as error:
        note(f"{run}: the evaluation is not kept there ({error.strerror})")


def _text(document: dict[str, Any]) -> str:
    lines = [
        f"{document['model']} on {document['data']}: {counted(document['rows'], 'row')}, "
        f"{counted(document['targets'], 'target')}, {document['precision']} on "
        f"{document['device']}"
    ]
    table = [("", "value", "± standard error", "rows")]
    for name, one in document["metrics"].items():
        value, error = metric_text(name, one)
        table.append((name.replace("_", " "), value, error, f"{one['rows']:,}"))
    lines += [f"  {line}".rstrip() for line in aligned(table)]
    if (about := document["completions"]) is not None:
        way = "greedy" if about["temperature"] == 0 else f"temperature {about['temperature']:g}"
        each = counted(about["samples"], "completion")
        lines.append(
            f"{each} of each of {counted(about['rows'], 'row')}, {way}; {about['unfinished']:,} "
            f"did not end within {counted(about['max_new_tokens'], 'token')}"
        )
    lines.append("errors are clustered by row; losses are nats per target")
    return "\n".join(lines)
