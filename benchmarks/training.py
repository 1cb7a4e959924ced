"""Lathe's own switches, one more in each row; and where the time of a step goes.

    python -m benchmarks.training [--models small] [--rounds 1] [--steps 4]
    python -m benchmarks.training --profile [--models tiny small medium …] [--steps 4]

The ladder runs each row in a process of its own, in turns, over the same rows in the same order,
and compares the losses first: fp32 rows within 1e-4 of the first one, bf16 within
`Fixture.bf16_bound`. Rows below the ladder change one thing of its last row.

The profile sums torch.profiler's own time of each operator by group, and states the share of this
machine's GEMM rate, measured in the same process, that the step's arithmetic reaches. Arithmetic
is counted as 4 N operations a token for a frozen weight (6 N for a trained one and for adapters),
causal attention and the head over the rows that have a target.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from benchmarks.fixtures import (
    EXAMPLES_IN_STEP,
    MODELS,
    ChildError,
    Fixture,
    LatheSide,
    answer,
    child,
    disagreement,
    largest_difference,
    operations_of_step,
    run_configuration,
    run_lathe,
    speed,
    write_base,
    write_rows,
)

# Padded, in fp32, with nothing switched on: each row adds to those before it.
_START = {
    "data.batching": "max_length",
    "train.precision": "fp32",
    "model.gradient_checkpointing": False,
}
_STEPS_UP: list[tuple[str, dict[str, Any]]] = [
    ("padded to max_length, fp32", {}),
    ("padded to the longest", {"data.batching": "longest"}),
    ("unpadded", {"data.batching": "unpadded"}),
    ("micro_batch_tokens=auto", {"train.micro_batch_tokens": "auto"}),
    ("precision=auto", {"train.precision": "auto"}),
]
_BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("attention=sdpa", {"model.attention": "sdpa"}),
    ("attention=eager", {"model.attention": "eager"}),
    ("kernels=reference", {"train.kernels": "reference"}),
    ("micro_batch_tokens=512", {"train.micro_batch_tokens": 512}),
    ("gradient_checkpointing=true", {"model.gradient_checkpointing": True}),
]
GPU_ROWS = ("E7", "E8")  # of benchmarks.gpu
FP32_BOUND = 1e-4  # absolute, on losses of about 8; rounding alone


def ladder() -> dict[str, dict[str, Any]]:
    """Return the settings of each row, in order."""
    rows: dict[str, dict[str, Any]] = {}
    settings = dict(_START)
    for name, switch in _STEPS_UP:
        settings |= switch
        rows[f"{'+ ' if rows else ''}{name}"] = dict(settings)
    for name, switch in _BESIDE:
        rows[f"last, {name}"] = {**settings, **switch}
    return rows


def compare(model: str, rounds: int, steps: int) -> None:
    """Measure the ladder in turns, check the losses, print and record every row."""
    fixture, rows = MODELS[model], ladder()
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(fixture, folder)
        write_rows(folder, fixture.warm_up, steps)
        for number in range(rounds):
            for row in list(rows)[:: 1 if number % 2 == 0 else -1]:
                task = {"model": model, "steps": fixture.warm_up + steps, "settings": rows[row]}
                arguments = ["--worker", json.dumps(task), str(folder)]
                try:
                    measured[row].append(child("benchmarks.training", arguments, folder, 3600))
                except ChildError as error:
                    sys.exit(str(error))
    reference = next(iter(measured.values()))[0]
    for row, figures in measured.items():
        bound = FP32_BOUND if rows[row]["train.precision"] == "fp32" else fixture.bf16_bound
        for of_round in figures:
            if (wrong := disagreement(of_round, reference, bound)) is not None:
                sys.exit(f"{model}: {row} computed {wrong}")
    print(f"{model}: real tokens/s (median of {rounds} rounds), peak memory of the process")
    first = 0.0
    for row, figures in measured.items():
        speeds = [speed(of_round, fixture.warm_up)[1] for of_round in figures]
        first = first or median(speeds)
        peak = median(of_round["peak_bytes"] for of_round in figures)
        print(
            f"  {row:<36} {median(speeds):9,.0f} tok/s  {median(speeds) / first:6.2f} ×"
            f"  {peak / 2**20:7,.0f} MiB"
        )
        record.append(
            "training",
            {
                "model": model,
                "row": row,
                "settings": rows[row],
                "rounds": rounds,
                "steps": steps,
                "tokens_per_second": median(speeds),
                "spread": [min(speeds), max(speeds)],
                "peak_bytes": peak,
                "process_threads": figures[0]["threads"],
                "loss_difference": largest_difference(figures[0], reference),
            },
        )


# --- profile -------------------------------------------------------------------------------------

# The first group whose pattern an operator's name matches. `addmm` and `mm` are the linear layers
# and the head; attention is the one user of batched products and of softmax.
_GROUPS: list[tuple[str, str]] = [
    ("attention", r"scaled_dot_product|flash_attention|\bbmm|baddbmm|softmax"),
    ("GEMM", r"\bmm\b|addmm|::linear|mkldnn|onednn|matmul"),
    ("cross-entropy", r"::exp_|::amax|::gather|scatter_add|::log\b|::index_select"),
    ("norm", r"layer_norm|rms_norm|rsqrt"),
    ("activation", r"gelu|silu|sigmoid"),
    ("optimizer and clipping", r"_foreach|_fused_adam|linalg_vector_norm|lerp|addcdiv|addcmul"),
    ("dropout", r"bitwise|random|bernoulli"),
    ("copies and casts", r"copy_|::cat\b|::clone|index_copy|::fill_|::zero_|::index\b"),
    ("embedding", r"embedding"),
    ("elementwise", r"::(add|sub|mul|div|neg|sum|pow|mean|sqrt|reciprocal|clamp|where)_?\b"),
]


def group_of(operator: str) -> str:
    """Return the group of an operator's name; `other` where none knows it."""
    for group, pattern in _GROUPS:
        if re.search(pattern, operator):
            return group
    return "other"


def gemm_rates() -> dict[str, float]:
    """Return this machine's best GEMM rate in operations a second: fp32 (MKL, oneDNN) and bf16."""
    import torch

    def rate(multiply: Callable[[torch.Tensor, torch.Tensor], object], dtype: torch.dtype) -> float:
        best = 0.0
        for rows, inner, columns in ((2048, 1024, 1024), (2048, 512, 2048), (2048, 2048, 2048)):
            x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            multiply(x, weight)
            for _ in range(5):
                started = time.perf_counter()
                multiply(x, weight)
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
        return best

    rates = {
        "fp32": rate(torch.nn.functional.linear, torch.float32),
        "bf16": rate(torch.nn.functional.linear, torch.bfloat16),
    }
    if torch.backends.mkldnn.is_available():

        def onednn(x: torch.Tensor, weight: torch.Tensor) -> object:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        rates["fp32 oneDNN"] = rate(onednn, torch.float32)
    return rates


def profiled(model_name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train a few steps at Lathe's defaults, then as many under the profiler; return the shares."""
    from torch.profiler import ProfilerActivity, profile

    from models.config import read_config
    from train.assemble import set_up
    from train.base_model import base_dtype, find_model, load_base, make_trainable
    from train.batches import StepBatches
    from train.dataset import load_data
    from train.optim import build_optimizer
    from train.plan.decide import decide, this_machine
    from train.plan.steps import plan_run
    from train.precision import Precision
    from train.step import train_step

    fixture = MODELS[model_name]
    wanted = {"train.micro_batch_tokens": "auto"}
    config = run_configuration(fixture, folder, "rows", 3 * steps, wanted)
    machine = this_machine(config)
    config = decide(config, machine)
    device = set_up(config, machine)
    source = find_model(config, weights=True)
    data = load_data(config, source.folder, read_config(source.folder))
    plan = plan_run(config, len(data.train), num_valid=0)
    model = load_base(config, source, base_dtype(config), device)
    make_trainable(model, config)
    optimizer = build_optimizer(config.optimizer.name, model)
    precision = Precision(config.train.precision, device)
    batches = StepBatches.of(config, plan, data)

    def train(first: int) -> tuple[float, dict[str, float], int]:
        """Do `steps` steps; return seconds and arithmetic of a step, and its tokens (means)."""
        seconds, tokens = 0.0, 0
        arithmetic: dict[str, float] = {}
        for step in range(first, first + steps):
            started = time.perf_counter()
            batch = batches.cut(*plan.batch(step))
            train_step(
                model,
                optimizer,
                batch,
                learning_rate=plan.learning_rate(step),
                max_grad_norm=config.optimizer.max_grad_norm,
                precision=precision,
                scaler=None,
                draw=(config.train.seed, step),
            )
            seconds += time.perf_counter() - started
            tokens += sum(part.num_tokens for part in batch)
            lengths = [length for part in batch for length in part.lengths]
            targets = sum(part.num_targets for part in batch)
            full = fixture.method == "full"
            for name, count in operations_of_step(model, lengths, targets, full=full).items():
                arithmetic[name] = arithmetic.get(name, 0.0) + count / steps
        return seconds / steps, arithmetic, tokens // steps

    train(1)
    seconds, arithmetic, tokens = train(1 + steps)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        watched, _, _ = train(1 + 2 * steps)
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_cpu_time_total / 1e6 / steps
        group = group_of(event.key) if event.key.startswith(("aten::", "mkldnn::")) else "autograd"
        shares[group] = shares.get(group, 0.0) + own / watched
    shares["Python"] = max(0.0, 1 - sum(shares.values()))
    rates = gemm_rates()
    peak = max(rate for name, rate in rates.items() if name.startswith(precision.name))
    rate = sum(arithmetic.values()) / seconds
    return {
        "model": model_name,
        "precision": precision.name,
        "seconds_per_step": seconds,
        "profiled_seconds_per_step": watched,
        "tokens_per_second": tokens / seconds,
        "shares": dict(sorted(shares.items(), key=lambda pair: -pair[1])),
        "operations_per_step": arithmetic,
        "gemm_rates": rates,
        "rate": rate,
        "share_of_gemm_peak": rate / peak,
    }


def print_profile(model: str, steps: int) -> None:
    """Profile one model in a process of its own, print and record it."""
    fixture = MODELS[model]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(fixture, folder)
        write_rows(folder, 0, 3 * steps)
        arguments = ["--worker-profile", model, str(folder), "--steps", str(steps)]
        try:
            row = child("benchmarks.training", arguments, folder, 3600)
        except ChildError as error:
            sys.exit(str(error))
    rates = "  ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in row["gemm_rates"].items())
    print(
        f"{model}, {row['precision']}: {row['seconds_per_step']:.3f} s a step of "
        f"{EXAMPLES_IN_STEP} examples, {row['tokens_per_second']:,.0f} tok/s, "
        f"{row['rate'] / 1e9:,.1f} GF/s = {row['share_of_gemm_peak']:.0%} of the GEMM peak "
        f"(GF/s: {rates})"
    )
    for group, share in row["shares"].items():
        print(f"  {group:<24} {share:6.1%}")
    record.append("profile", row)


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest record of each rung of the ladder as README's lines."""
    newest = {(row["model"], row["row"]): row for row in records}
    first: dict[str, float] = {}
    lines = [
        "| model | switches | real tokens/s (spread) | | peak memory |",
        "|---|---|---:|---:|---:|",
    ]
    for (model, name), row in newest.items():
        start = first.setdefault(model, row["tokens_per_second"])
        low, high = row["spread"]
        lines.append(
            f"| {model} | {name} | {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {row['tokens_per_second'] / start:.2f} × | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    return lines


def profile_table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest profile of each model as README's lines."""
    profiles = {row["model"]: row for row in records}
    lines = [
        "| model | real tokens/s | at the GEMM peak | share | where the time goes |",
        "|---|---:|---:|---:|---|",
    ]
    for model, row in profiles.items():
        parts = [f"{group} {share:.0%}" for group, share in row["shares"].items() if share >= 0.01]
        speed, share = row["tokens_per_second"], row["share_of_gemm_peak"]
        lines.append(
            f"| {model}, {row['precision']} | {speed:,.0f} | {speed / share:,.0f} | {share:.0%} "
            f"| {', '.join(parts)} |"
        )
    return lines


def work(task: dict[str, Any], folder: Path) -> None:
    """Be one row of the ladder."""
    fixture: Fixture = MODELS[task["model"]]
    answer(run_lathe(fixture, LatheSide(task["settings"]), folder, task["steps"]))


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", nargs="+", choices=GPU_ROWS, help="with --device cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="with --device cuda")
    parser.add_argument("--dry-run", action="store_true", help="with --device cuda: small, no GPU")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker-profile", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda":
        from benchmarks import gpu  # not above: a peer's process imports nothing of ours

        gpu.main(GPU_ROWS, options, "benchmarks.training")
        return
    if options.rows or options.dry_run:
        parser.error("--rows and --dry-run go with --device cuda")
    if options.worker:
        work(json.loads(options.worker[0]), Path(options.worker[1]))
    elif options.worker_profile:
        model, folder = options.worker_profile
        answer(profiled(model, Path(folder), options.steps))
    else:
        for model in options.models:
            if options.profile:
                print_profile(model, options.steps)
            else:
                compare(model, options.rounds, options.steps)


if __name__ == "__main__":
    main()
