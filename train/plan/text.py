"""The plan's document as text for a terminal, and the presets as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from files.errors import counted
from train.config.layers import preset_names
from train.config.presets import Preset, read_preset
from train.plan.ledger import MEMORY_CATEGORIES, SHARE_OF_PEAK
from train.plan.mixture import mixture_rows
from train.plan.steps import effective_batch_size, plan_run
from train.text import aligned, size_text


def render_plan(document: Mapping[str, Any]) -> str:
    """Return a plan document as text for a terminal."""
    lines = ["Plan" + (f" of {document['preset']}" if document["preset"] else "")]
    rows = [*head_rows(document), *_cost_rows(document)]
    lines += [f"  {line}" for line in aligned(rows)]
    for heading, found in (
        ("The seed's claims, against its own settings", map(_claim_line, document["claims"])),
        (
            "Where this preset departs from its seed, or fills a gap",
            [f"- {departure}" for departure in document["departures"]],
        ),
        ("To look at", [f"! {warning}" for warning in document["warnings"]]),
    ):
        below = [f"  {line}" for line in found]
        lines += ["", heading, *below] if below else []
    return "\n".join(lines) + "\n"


def head_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is trained, on what, in how many steps, as named values.

    They are the head of the plan's text; what it costs is left out.
    """
    count = document["num_examples"]
    data = document["data"]
    examples = "unknown" if count is None else f"{count:,} ({document['num_examples_from']})"
    if "least_weight" in data:
        examples += f" of weight {data['least_weight']:g} to {data['most_weight']:g}"
    held = [
        f"{data[f'{name}_examples']:,} {name}"
        for name in ("valid", "test")
        if data.get(f"{name}_examples")
    ]
    batch = f"{counted(document['effective_batch_size'], 'example')} a step"
    if tokens := document["effective_batch_tokens"]:
        batch = f"at least {counted(tokens, 'target token')}, about {batch}"
    if document["world_size"] > 1:
        shares = "/".join(map(str, document["rank_shares"]))
        batch += f", on {document['world_size']} ranks {shares}"
    if document["micro_batches_per_step"]:
        micro_batches = counted(document["micro_batches_per_step"], "micro-batch", "micro-batches")
        batch += f", in {micro_batches} of {document['micro_batch_size']}"
    elif document["micro_batch_tokens"]:
        batch += f", in micro-batches of at most {document['micro_batch_tokens']:,} tokens"
    if document["world_size"] > 1:
        batch += f" a rank, about {document['tokens_per_rank']:,} tokens each"
    precision = document["precision"]
    if precision == "auto":
        precision = "precision auto (counted as bf16)"
    if kind := document["quantization"]:
        precision += f", base in {kind}"
    return [
        ("model", f"{document['model'] or 'unknown'}, {document['method']}, {precision}"),
        ("examples", ", ".join([examples, *held])),
        *mixture_rows(document),
        ("batch", batch),
        *_step_rows(document),
        *_parameter_rows(document),
    ]


def _step_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    if document["steps_per_epoch"] is None:
        total = document["total_steps"]
        unknown = "the rows' targets" if document["effective_batch_tokens"] else "data"
        return [("steps", f"{total:,}" if total else f"unknown without {unknown}")]
    rates = document["learning_rates"]
    about = "about " if document["effective_batch_tokens"] else ""
    steps = f"{document['total_steps']:,} ({about}{document['steps_per_epoch']:,} an epoch)"
    rows = [
        ("steps", f"{steps}, {document['warmup_steps']:,} of warm-up"),
        ("evaluations", _listed(document["eval_steps"]) + _without(document["eval_steps"])),
        *_measured_row(document["measured"]),
        ("checkpoints", _listed(document["save_steps"])),
    ]
    if rates:
        shown = list(rates.items())
        shown = shown if len(shown) <= 6 else [*shown[:3], *shown[-2:]]
        rows.append(("learning rate", ", ".join(f"{rate:.3g} at {step}" for step, rate in shown)))
    return rows


def _measured_row(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = [", ".join(measured["metrics"])] if measured["metrics"] else []
    if rows := measured["completed_rows"]:
        parts.append(
            f"{counted(rows, 'row')} completed at each, by up to {measured['max_new_tokens']:,} "
            f"tokens in up to {measured['passes']:,} passes of the model"
        )
    if "pass@1" in measured["metrics"]:
        parts.append("pass@1 runs what the model writes on this machine")
    if holes := measured["holes"]:
        parts.append(f"up to {counted(holes, 'hole')} filled at each (eval.holes)")
    return [("measured", "; ".join(parts))] if parts else []


def _parameter_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not document["total_parameters"]:
        return []
    trained, total = document["trainable_parameters"], document["total_parameters"]
    share = f"({document['trainable_percent']:.2f} %)"
    return [("parameters", f"{trained:,} trained of {total:,} {share}")]


# What a policy computes again, of `models.recompute`'s table.
_AGAIN = {
    "none": "keeps all",
    "norms": "norms and activations again",
    "mlp": "the MLP too",
    "layers": "keeps layers' inputs",
    "offload": "those on the host",
}
# Of `document["kernels"]`, where it says more.
_KERNELS = {
    None: "Triton's on a CUDA card from Ampere on, else the reference",
    "triton": "Triton's, checked against the reference at the start where no record tells of the "
    "card",
}


def _cost_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: dict[str, str] = {}
    memory, disk, compute = document["memory"], document["disk"], document["compute"]
    if memory["total"]:
        rank = " a rank" if document["world_size"] > 1 else ""
        held = {name: size_text(memory[name]) for name in MEMORY_CATEGORIES if memory[name]}
        parts = ", ".join(f"{name} {size}" for name, size in held.items())
        without = ""
        if other := document["memory_recomputing"]:
            without = f" without recomputing, {size_text(other['total'])} with it"
        rows[f"memory{rank}"] = f"about {size_text(memory['total'])}{without}: {parts}"
        rows |= _fitting_rows(document)
        policy = document["gradient_checkpointing"] or "not decided"
        rows["recomputing"] = f"{policy} ({document['gradient_checkpointing_because']})"
        if offloaded := document["offloaded_memory"]:
            rows["recomputing"] += f", {size_text(offloaded)} of layers' inputs in host memory"
        rows["policies"] = "; ".join(
            f"{name} {size_text(total)}" + (f" ({_AGAIN[name]})" if name in _AGAIN else "")
            for name, total in document["memory_by_policy"].items()
        )
        if (saves := document["paging_saves"]) > 0:
            words = {None: "not decided", True: "on", False: "off"}
            told = f"moments in host memory save {size_text(saves)} of the device's"
            rows["paging"] = f"{words[document['paging']]} ({document['paging_because']}): {told}"
        if streamed := document["streamed_memory"]:
            told = f"{size_text(streamed)} of frozen layers in host memory, two on the device"
            rows["streaming"] = f"on ({document['streaming_because']}): {told}"
    kernels = document["kernels"]
    rows["kernels"] = _KERNELS.get(kernels) or str(kernels)
    if sent := document["communication_bytes"]:
        how = "each has the model whole" if document["sharding"] == "replicate" else "they share it"
        rows["ranks"] = f"{how} (train.sharding); each sends {size_text(sent)} a step"
    if disk["total"]:
        minutes = disk["one_more_each_minutes"]
        more = f" (and one each {minutes:g} minutes)" if minutes else ""
        kept = (
            f"{counted(disk['checkpoints_kept'], 'checkpoint')} of {size_text(disk['checkpoint'])}"
        )
        ends = f"best and final {size_text(disk['best_and_final'])}"
        rows["disk"] = f"{size_text(disk['total'])}: {kept}{more}, {ends}"
    if compute["flops"]:
        hours = compute["a100_hours"]
        estimate = f"; one A100 at {SHARE_OF_PEAK:.0%} of its bf16 peak: about {hours:.1f} h"
        tokens = f"{compute['tokens_are']} {compute['tokens']:,} tokens"
        rows["work"] = tokens + (estimate if hours >= 0.05 else "")
    return [*rows.items()]


def _fitting_rows(document: Mapping[str, Any]) -> dict[str, str]:
    """Say whether the run fits, with what it would, and what would do for it."""
    found = document["fitting"]
    if found is None:
        return {}
    room = size_text(document["available_memory"])
    rows: dict[str, str] = {}
    for way in found["ways"]:
        name = "or with" if rows else "fits with" if way["settings"] else "fits"
        rows[name] = f"{_way_text(way)} of {room}"
        if way["settings"] or way["slower"] > 1:
            changes = " and ".join(way["changes"])
            result = f"another result: {changes}" if changes else "the same result"
            rows[name] += f"; {result}; a step predicted {way['slower']:.2f} × as long as with room"
    if found["ways"]:
        return rows
    would = []
    if (least := found["least"]) is not None:
        would.append(f"the least of all settings is {_way_text(least)}")
        if card := found["would_fit"]["card"]:
            would.append(f"which fits --gpu {card}")
        if ranks := found["would_fit"]["ranks"]:
            would.append(f"as asked it fits on {ranks} such cards (--ranks {ranks})")
    return {"does not fit": f"{room} are there; {', '.join(would) or 'nothing here needs less'}"}


def _way_text(way: Mapping[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in way["settings"].items())
    return f"{settings or 'as it is'}: {size_text(way['needed'])}"


def _claim_line(claim: Mapping[str, Any]) -> str:
    mark = "✓" if claim["holds"] else "✗"
    value = claim["planned"]
    planned = ""
    if value is not None and not claim["holds"]:
        planned = f" → {value:,}" if isinstance(value, int) else f" → {value:.3g}"
    note = f" ({claim['note']})" if claim["note"] else ""
    return f"{mark} {claim['statement']}{planned}{note}"


def _without(evaluations: Sequence[int]) -> str:
    remedy = " (data.valid_fraction=0.1 eval.steps=epoch hold rows out and draw a valid curve)"
    return "" if evaluations else remedy


def _listed(steps: Sequence[int]) -> str:
    if not steps:
        return "none"
    if len(steps) == 1:
        return f"after step {steps[0]:,}"
    if len(steps) <= 6:
        return "after steps " + ", ".join(f"{step:,}" for step in steps)
    shown = ", ".join(f"{step:,}" for step in steps[:3])
    return f"after steps {shown}, … {steps[-1]:,} ({len(steps)} in all)"


def list_presets_text() -> str:
    """Return the presets as a table; steps are those of the rows that the seed states."""
    header = ("preset", "method", "batch", "steps", "seed", "what it does")
    return "\n".join(aligned([header, *map(_preset_row, map(read_preset, preset_names()))]))


def _preset_row(preset: Preset) -> tuple[str, ...]:
    config = preset.config
    steps = "-"
    if preset.num_examples is not None:
        steps = f"{plan_run(config, preset.num_examples).total_steps:,}"
    seed = preset.seed.split("_")[0] if preset.seed else "-"
    batch = str(effective_batch_size(config))
    return preset.name, config.train.method, batch, steps, seed, preset.description
