"""What `lathe evaluate` does: a model loaded, its rows scored, some of them completed."""

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

from data.arrays import Writer, in_memory
from data.examples import Examples, check_vocabulary
from data.labels import labelled_rows
from data.prompt import PromptFormat
from data.source import Row
from files.atomic import write_text
from files.errors import UserError, counted, note
from train.batches import evaluation_batching
from train.config.load import load_config
from train.config.schema import AT_ONCE, RunConfig
from train.evaluation.likelihood import Estimate, score
from train.evaluation.problems import Problem, with_columns
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
from train.inputs.dataset import examples_of, prompt_format
from train.plan.decide import decide_device, decide_precision
from train.precision import COMPUTE_DTYPES, Precision
from train.process.progress import progress
from train.report.evaluated import EVALUATIONS_FILE, metric_text
from train.report.page import write_report
from train.saving.artifact import run_and_trained
from train.text import aligned


def evaluate_asked(
    options: argparse.Namespace,
    run: Path | None,
    config: RunConfig | None,
    overrides: dict[str, str],
    problems: Sequence[tuple[Row, Problem]],
) -> str:
    """Evaluate what the command's options name, keep it with its run, and return what was found.

    Args:
        options: The options, checked.
        run: The folder of the run that the model is of, None of any other model.
        config: The run's configuration with `overrides`.
        overrides: Settings of how rows are read.
        problems: The rows with their tests, none where rows have none.

    Raises:
        UserError: The model cannot be had, or the rows are not what they must be.
    """
    started = time.perf_counter()
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
    with progress(len(examples), "row") as tell:
        metrics = score(loaded.model, examples, batching, precision, tell).estimates()
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
    return json.dumps(document, ensure_ascii=False) if options.json else _text(document)


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
        tasks = tasks_of_examples(examples, tokenizer, most) if most else []
        if most and not tasks:
            note("no row has a prompt of its own: the loss alone is measured, nothing is completed")
    check_room(tasks, loaded.model.config, options.data)
    return tasks


def _complete(
    options: argparse.Namespace, loaded: Generator, tasks: Sequence[Task], precision: Precision
) -> list[dict[str, Any]]:
    """Complete the tasks, run what is to be run, and return what each completion is worth."""
    sampling = replace(options.sampling, stop_ids=loaded.stop_ids)
    how = {"samples": options.samples, "batch_size": options.batch_size or AT_ONCE}
    completed = complete_tasks(loaded.model, tasks, loaded.tokenizer, sampling, **how)
    done = 0
    with (
        precision.autocast(),
        progress(len(tasks) * options.samples, "completion") as tell,
    ):
        for number in completed:
            done += number
            tell(done)
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
