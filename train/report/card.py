"""The model card of a finished run: `README.md` in `final/`, as the Hub reads it.

Its header says the base, the base's licence, the library that loads the folder, tags, data sets and
losses; its text how it was trained and how it is used. What is not known is left out, and said. No
path of this machine goes into it: it is made to be given away.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.atomic import write_text
from files.errors import UserError, counted, note
from files.folders import CARD, MANIFEST, step_of
from files.hub import read_card
from files.strict_json import read_json_object
from train.log.metrics import Row
from train.plan.ledger import is_hub_id
from train.report.record import Record
from train.text import format_count, format_duration, format_loss, markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# The first two lines of licences that say which one it is, and the Hub's names of them.
_TITLES = {
    r"apache license\s+version 2\.0, january 2004": "apache-2.0",
    r"(the )?mit license( \(mit\))?\s+copyright": "mit",
    r"bsd 3-clause license\s+copyright": "bsd-3-clause",
}
_SIGNATURE = "<!-- Written by Lathe; sha256 of the text above: {} -->\n"
_MODEL = "THIS_FOLDER_OR_REPOSITORY"


@dataclass(frozen=True)
class Licence:
    """The licence of a base model: fields of a card's header, and what there is to say of it."""

    fields: dict[str, Any]
    sentence: str


def write_card(record: Record) -> Path | None:
    """Write `final/README.md` of a finished run, and return it.

    A card that somebody has changed or put there stays as it is.

    Returns:
        None where there is no `final/`, or the card is not ours.
    """
    final = record.folder / "final"
    if record.status.get("state") != "finished" or not (final / MANIFEST).is_file():
        return None
    path = final / CARD
    if path.exists() and not is_ours(path):
        note(f"{path} was not written by Lathe, or was changed since: it stays as it is")
        return None
    text = render_card(record)
    write_text(path, text + _SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()))
    return path


def is_ours(path: Path) -> bool:
    """Return whether a card is as `write_card` wrote it."""
    text, _, last = path.read_text("utf-8", "replace").rpartition("<!-- ")
    return f"<!-- {last}" == _SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest())


def render_card(record: Record) -> str:
    """Return the card of a finished run: the header, and the text."""
    from huggingface_hub import ModelCardData

    model, adapter = record.section("model"), record.section("train").get("method") == "lora"
    base = model.get("path") or ""
    known = is_hub_id(base)
    find = _finder(record, base, known)
    licence = licence_of(find)
    results = _results(record)
    specs = [spec for name in ("train", "valid", "test") for spec in _specs(record, name)]
    data = ModelCardData(
        base_model=base if known else None,
        base_model_relation=("adapter" if adapter else "finetune") if known else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lathe", "lora" if adapter else "full-fine-tuning"],
        datasets=list(dict.fromkeys(name for spec in specs if (name := _dataset(spec)))) or None,
        metrics=["loss"] if results else None,
        model_name=record.name if results else None,
        eval_results=_eval_results(results, record) or None,
        **licence.fields,
    )
    base_text = f"[{base}](https://huggingface.co/{base})" if known else "a base model"
    head = f"A LoRA adapter for {base_text}" if adapter else f"{base_text}, every weight fine-tuned"
    told = ""
    if not known:
        told = (
            f"The base model was a folder, `{Path(base).name}`, and none that the Hub is known to "
            "have: name it in the header (`base_model`) where it is there. "
        )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {record.name}",
        f"{head[0].upper()}{head[1:]}, trained with Lathe.",
        f"{told}{licence.sentence}",
        "## Results\n\n" + _results_text(record, results),
        "## Use\n\n" + _use(base if known else "THE_BASE_MODEL", adapter, data),
        "## How it was trained\n\n" + markdown_table(("", ""), _training(record)),
    ]
    return "\n\n".join(sections) + "\n\n"


def licence_of(find: Callable[[str], Path | None]) -> Licence:
    """Return the licence of a base model, from its own card or its file of the licence.

    Args:
        find: Returns where a file of the base is, None where it has none of that name.
    """
    card = find("README.md")
    if card is not None:
        try:
            header = read_card(card)
        except UserError:
            header = {}
        if isinstance(name := header.get("license"), str) and name:
            fields = {
                key: value
                for key in ("license", "license_name", "license_link")
                if isinstance(value := header.get(key), str)
            }
            called = fields.get("license_name", name)
            return Licence(fields, f"The base model's licence is `{called}`, as its card says.")
    file = next((path for name in LICENCE_FILES if (path := find(name)) is not None), None)
    if file is not None:
        with open(file, encoding="utf-8", errors="replace") as text:
            title = text.read(2000).strip().lower()
        for pattern, name in _TITLES.items():
            if re.match(pattern, title):
                said = (
                    f"The base model's licence is `{name}`, by the title of its file {file.name}."
                )
                return Licence({"license": name}, said)
        return Licence(
            {},
            f"The base model has a licence of its own, in its file {file.name}; it is none that "
            "could be named here, so the header says none: read it before you pass this on.",
        )
    return Licence(
        {},
        "The base model's files name no licence, so none is stated here: find out which it is "
        "before you pass this on.",
    )


def _finder(record: Record, base: str, on_hub: bool) -> Callable[[str], Path | None]:
    """Return what finds a file of the base: in its folder, or in the Hub's cache, never online."""
    revision = record.section("model").get("revision")
    document = record.folder / "final" / "adapter_config.json"
    if document.is_file():
        revision = read_json_object(document).get("revision") or revision

    def find(name: str) -> Path | None:
        if not on_hub:
            path = Path(base) / name
            return path if base and path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, name, revision=revision)
        return Path(cached) if isinstance(cached, str) else None

    return find


def _results(record: Record) -> list[tuple[str, Row]]:
    """Return the evaluations of the very weights in `final/`, by their split."""
    step = step_of(record.folder / "final")
    valid = [row for row in record.valid if row["step"] == step and row["loss"] is not None]
    # The test set is evaluated on `final/` itself, whichever step that is of, when a run ends.
    test = [row for row in record.test if row["step"] and row["loss"] is not None]
    return [(name, rows[-1]) for name, rows in (("valid", valid), ("test", test)) if rows]


def _eval_results(results: Sequence[tuple[str, Row]], record: Record) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=next(filter(None, map(_dataset, _specs(record, split))), "local"),
            dataset_name=f"{split} rows",
            dataset_split=split,
            metric_type="loss",
            metric_name="loss (nats per target)",
            metric_value=row["loss"],
        )
        for split, row in results
    ]


def _results_text(record: Record, results: Sequence[tuple[str, Row]]) -> str:
    rows = [
        (f"{name} loss", format_loss(row["loss"]), f"{row['targets']:,} targets")
        for name, row in results
    ]
    if not rows:
        return "No loss was measured of these weights."
    step = step_of(record.folder / "final")
    of = f"Of the weights of step {step:,} of {record.step:,}, nats per target, token means:\n\n"
    return of + markdown_table(("", "loss", "over"), rows, "lrr")


def _use(base: str, adapter: bool, data: ModelCardData) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base}")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{_MODEL}")')
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{_MODEL}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{_MODEL}")')
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\n`prompt_format.json` says how rows were put into prompts."


def _training(record: Record) -> list[tuple[str, str]]:
    train, lora, data, optimizer, schedule = (
        record.section(name) for name in ("train", "lora", "data", "optimizer", "schedule")
    )
    method = "every weight"
    if train.get("method") == "lora":
        targets = lora.get("target_modules", "")
        targets = targets if isinstance(targets, str) else ", ".join(targets)
        method = f"LoRA, r {lora.get('r')}, alpha {lora.get('lora_alpha')}, on {targets}"
        if lora.get("init_from"):
            method += ", going on from another adapter"
    size = f"{record.plan.get('effective_batch_size')} examples"
    if tokens := record.plan.get("effective_batch_tokens"):
        size = f"at least {counted(tokens, 'target')}"
    rows: dict[str, Any] = {
        "method": method,
        "base quantised": record.section("model").get("quantization"),
        "optimizer": f"{optimizer.get('name')}, learning rate {optimizer.get('learning_rate')}, "
        f"weight decay {optimizer.get('weight_decay')}",
        "schedule": f"{schedule.get('name')}, "
        f"{counted(record.plan.get('warmup_steps') or 0, 'step')} of warm-up",
        "steps": f"{record.step:,}, of {size} each",
        "precision": train.get("precision"),
        "length": f"at most {data.get('max_length')} tokens",
        "rows": f"{', '.join(map(_name, _specs(record, 'train')))}, format {data.get('format')}",
        "seed": train.get("seed"),
    }
    if record.train:
        tokens, targets, seconds = (
            sum(row[name] for row in record.train) for name in ("tokens", "targets", "seconds")
        )
        rows["trained on"] = f"{format_count(tokens)} tokens, {format_count(targets)} targets"
        device = record.environment.get("device_name") or record.environment.get("device")
        rows["time in steps"] = f"{format_duration(seconds)} on {device}"
    rows["torch"] = (record.environment.get("versions") or {}).get("torch")
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def _specs(record: Record, split: str) -> list[str]:
    """Return what a split's setting names: files, folders, data sets of the Hub."""
    value = record.section("data").get(split) or []
    return [value] if isinstance(value, str) else list(value)


def _dataset(spec: str) -> str | None:
    """Return the Hub's name of a data set, None for a file or folder."""
    found = re.match(r"hub:([\w.-]+/[\w.-]+)", spec)
    return found[1] if found else None


def _name(spec: str) -> str:
    """Return what the rows are called, without the folders that a file lies in."""
    return f"`{_dataset(spec) or Path(spec).name}`"
