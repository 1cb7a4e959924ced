"""What must not change while the house is rebuilt, as lines that two commits can be compared by.

    python -m tests.witness > before.txt           hashes of tiny runs, texts, plans, cache keys
    python -m pytest -q -p tests.witness           the same tests, and the text of every UserError
                                                   that they meet, in the file that WITNESS names

Hashes of runs depend on the machine: compare lines of one machine alone. Thread counts are fixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Of a plan, what the machine says.
_OF_THE_MACHINE = ("available_memory", "free_disk")
_RUNS = {
    f"{method}-{optimizer}-{precision}": {
        "train.method": method,
        "optimizer.name": optimizer,
        "train.precision": precision,
    }
    for method in ("lora", "full")
    for optimizer in ("adamw", "adafactor")
    for precision in ("fp32", "bf16")
}
_MORE_RUNS = {
    "split-rows": {"data.on_overflow": "split", "data.max_length": 16},
    "longest-by-tokens": {"data.batching": "longest", "train.micro_batch_tokens": 64},
    "recomputing": {"model.gradient_checkpointing": True},
    "eager-fp16": {"model.attention": "eager", "train.precision": "fp16"},
    "best-at-end": {"checkpoint.load_best_at_end": True, "eval.early_stopping_patience": 1},
}


def sha(value: object) -> str:
    """Return the first 20 hex digits of a hash of bytes, or of a value as JSON."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:20]


def runs(folder: Path) -> Iterator[str]:
    """Yield what `--prove-resume` compares, of runs that go through and of those resumed."""
    import torch
    from conftest import model_folder, rows_file

    from train.config import load_config
    from train.run import execute, run
    from train.saving.prove import results
    from train.saving.resume import find_run

    torch.set_num_threads(1)

    class Factory:
        def mktemp(self, name: str) -> Path:
            (folder / name).mkdir()
            return folder / name

    model = model_folder.__wrapped__(Factory())
    rows = rows_file.__wrapped__(Factory())
    common = {
        "model.path": str(model),
        **{f"data.{split}": str(rows / f"{split}.jsonl") for split in ("train", "valid", "test")},
        "train.device": "cpu",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.max_steps": 4,
        "lora.lora_dropout": 0.1,
        "checkpoint.steps": 2,
        "eval.steps": 2,
        "eval.samples": 1,
        "log.tensorboard": False,
        "log.progress": False,
    }
    for name, settings in {**_RUNS, **_MORE_RUNS}.items():
        output = folder / name
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(load_config(overrides={**common, **settings, "train.output_dir": str(output)}))
            whole = results(output)
            # What the run wrote of its steps and settings, without times, places and machine.
            config, resume = find_run(output / "checkpoints" / "step-00000002", {})
            assert resume is not None
            execute(config, resume)
        resumed = results(output)
        for result in sorted(whole):
            equal = whole[result] == resumed.get(result)
            yield f"{name} {result} {whole[result][:20]} {'resumed alike' if equal else 'DIFFERS'}"


def texts() -> Iterator[str]:
    """Yield hashes of what the command says without a model: presets, help, plans."""
    from train.config.command_line import show_text
    from train.config.layers import preset_names
    from train.config.load import load_config
    from train.plan.text import list_presets_text
    from train.run import main

    def said(*arguments: str) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main(list(arguments))
        return output.getvalue()

    yield f"list-presets {sha(list_presets_text().encode())}"
    os.environ["COLUMNS"] = "100"
    sys.argv = sys.argv[:1]
    yield f"help {sha(re.sub(r'python[^ ]* -m tests.witness', 'LATHE', said('--help')).encode())}"
    for name in preset_names():
        yield f"show {name} {sha(show_text(name).encode())}"
        plan = json.loads(said("--preset", name, "--plan", "--json"))
        yield f"plan {name} {sha(without_machine(plan))}"
        yield f"config {name} {sha(repr(load_config(name)).encode())}"
        plan = said("--preset", name, "--plan")
        yield f"plan-text {name} {sha(re.sub(r'[0-9.]+ GiB (free|there)', '', plan).encode())}"


def without_machine(value: Any) -> Any:
    """Return a plan without what the machine says: its memory and disk."""
    if isinstance(value, dict):
        return {
            key: without_machine(part) for key, part in value.items() if key not in _OF_THE_MACHINE
        }
    if isinstance(value, list):
        return [without_machine(part) for part in value]
    return re.sub(r"[0-9.]+ [KMGT]iB (free|there)", "", value) if isinstance(value, str) else value


def reports(folder: Path) -> Iterator[str]:
    """Yield hashes of report.md of three made-up runs."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    from test_report import make_run

    from train.report.page import write_report

    made = {
        "finished": {},
        "stopped": {"state": "preempted", "reason": "sigterm", "steps": 70},
        "few": {"valid_targets": 900, "grad_norm": 3.0, "state": "failed", "reason": "non_finite"},
    }
    for name, settings in made.items():
        run = make_run(folder / f"report-{name}", **settings)
        write_report(run)
        text = (run / "report.md").read_text().replace(str(folder), "FOLDER")
        yield f"report {name} {sha(re.sub(r'[0-9T:-]+Z', 'TIME', text).encode())}"


def cache_keys(folder: Path) -> Iterator[str]:
    """Yield the names of cache entries and the fingerprints of the demo's data, made in ways."""
    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer

    base, rows = ROOT / "data" / "demo" / "base", ROOT / "data" / "demo" / "valid.jsonl"
    tokenizer = Tokenizer.load(base)
    ways: dict[str, dict[str, Any]] = {
        "cut": {"max_length": 64, "on_overflow": "truncate"},
        "split": {"max_length": 64, "on_overflow": "split"},
        "dropped": {"max_length": 64, "on_overflow": "drop"},
    }
    field = next(iter(json.loads(rows.open().readline())))
    for name, way in ways.items():
        cache = folder / f"cache-{name}"
        examples = load_examples(
            str(rows),
            split_column=None,
            split=None,
            tokenizer=tokenizer,
            prompt_format=PromptFormat(text_field=field),
            cache_root=cache,
            **way,
        )
        keys = sorted(path.name for path in (cache / "examples").glob("*"))
        yield f"cache {name} {sha(keys)} {examples.fingerprint[:20]}"
    yield f"tokenizer {tokenizer.fingerprint[:20]}"


# -- as a plugin of pytest -------------------------------------------------------------------------

_errors: set[str] = set()


def pytest_configure() -> None:
    """Note the text of every UserError from here on."""
    from files.errors import UserError

    def noted(self: UserError, message: str) -> None:
        _errors.add(re.sub(r"/tmp/[^\s:'\"]*", "TMP", message))
        made(self, message)

    made, UserError.__init__ = UserError.__init__, noted


def pytest_sessionfinish() -> None:
    """Write them, sorted, to the file that WITNESS names."""
    lines = (json.dumps(text, ensure_ascii=False) for text in sorted(_errors))
    Path(os.environ["WITNESS"]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print all of it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LATHE_CACHE"] = str(folder / "cache")
        for lines in (cache_keys(folder), reports(folder), texts(), runs(folder)):
            for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    main()
