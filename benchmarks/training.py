"""Lathe's own switches, one more in each row; and where the time of a step goes.

    python -m benchmarks.training [--models small] [--rounds 1] [--steps 4]
    python -m benchmarks.training --profile [--models tiny small medium …] [--steps 4]

The ladder's rows are sides of `benchmarks.versus_peft` among themselves. Rows below the ladder
change one thing of its last row.

The profile sums torch.profiler's own time of each operator by group, and states the share of this
machine's GEMM rate, measured in the same process, that the step's arithmetic reaches. Arithmetic
is counted as 4 N operations a token for a frozen weight (6 N for a trained one and for adapters),
causal attention and the head over the rows that have a target.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.fixtures import (
    EXAMPLES_IN_STEP,
    MODELS,
    operations_of_step,
    write_base,
    write_rows,
)
from benchmarks.versus_peft import Comparison, LatheSide, summary

# Each row adds to those before it; `last` ones change one thing of the last before them.
_START = {
    "data.batching": "max_length",
    "train.precision": "fp32",
    "model.gradient_checkpointing": False,
}
_STEPS_UP: dict[str, dict[str, Any]] = {
    "padded to max_length, fp32": {},
    "+ padded to the longest": {"data.batching": "longest"},
    "+ unpadded": {"data.batching": "unpadded"},
    "+ micro_batch_tokens=auto": {"train.micro_batch_tokens": "auto"},
    "+ precision=auto": {"train.precision": "auto"},
}
_BESIDE: dict[str, dict[str, Any]] = {
    "last, attention=sdpa": {"model.attention": "sdpa"},
    "last, attention=eager": {"model.attention": "eager"},
    "last, kernels=reference": {"train.kernels": "reference"},
    "last, micro_batch_tokens=512": {"train.micro_batch_tokens": 512},
    "last, gradient_checkpointing=true": {"model.gradient_checkpointing": True},
}


def ladder() -> dict[str, dict[str, Any]]:
    """Return the settings of each row, in order."""
    settings, rows = dict(_START), {}
    for name, switch in _STEPS_UP.items():
        settings = rows[name] = {**settings, **switch}
    return rows | {name: {**settings, **switch} for name, switch in _BESIDE.items()}


def compare(model: str, rounds: int, steps: int) -> None:
    """Measure the ladder in turns, each row compared with fp32, and record every row."""
    rows = ladder()
    print(f"\n{model}: seconds a step, real tokens/s, peak memory of the process")
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(model, steps, Path(folder), fp32_bound=1e-4)  # rounding alone
        measured = harness.in_turns(
            rows, rounds, lambda row, _: comparison.measure(row, LatheSide(rows[row]))
        )
    for of_row in map(summary, measured.values()):
        harness.append("training", {**of_row, "row": of_row.pop("side")})


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

    def rate(multiply: Callable[..., object], dtype: torch.dtype) -> float:
        best = 0.0
        for rows, inner, columns in ((2048, 1024, 1024), (2048, 512, 2048), (2048, 2048, 2048)):
            x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            multiply(x, weight)
            taken = [harness.timed(lambda x=x, w=weight: multiply(x, w))[0] for _ in range(5)]
            best = max(best, 2 * rows * inner * columns / min(taken))
        return best

    def onednn(x: torch.Tensor, weight: torch.Tensor) -> object:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    rates = {"fp32": rate(F.linear, torch.float32), "bf16": rate(F.linear, torch.bfloat16)}
    if torch.backends.mkldnn.is_available():
        rates["fp32 oneDNN"] = rate(onednn, torch.float32)
    return rates


def profiled(folder: Path, model: str, steps: int) -> dict[str, Any]:
    """Train a few steps at Lathe's defaults, then as many under the profiler; return the shares."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import product

    fixture = MODELS[model]
    wanted = {"train.micro_batch_tokens": "auto"}
    run = product.assemble(product.configuration(fixture, folder, "rows", 3 * steps, wanted))
    for _ in run.steps(1, steps):
        pass
    taken, tokens = 0.0, 0
    arithmetic: dict[str, float] = {}
    for seconds, batch in run.steps(1 + steps, steps):
        taken += seconds / steps
        tokens += sum(part.num_tokens for part in batch)
        lengths = [length for part in batch for length in part.lengths]
        targets = sum(part.num_targets for part in batch)
        full = fixture.method == "full"
        for name, count in operations_of_step(run.model, lengths, targets, full=full).items():
            arithmetic[name] = arithmetic.get(name, 0.0) + count / steps
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        watched = sum(seconds for seconds, _ in run.steps(1 + 2 * steps, steps)) / steps
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_cpu_time_total / 1e6 / steps
        group = group_of(event.key) if event.key.startswith(("aten::", "mkldnn::")) else "autograd"
        shares[group] = shares.get(group, 0.0) + own / watched
    shares["Python"] = max(0.0, 1 - sum(shares.values()))
    rates = gemm_rates()
    precision = run.precision.name
    peak = max(rate for name, rate in rates.items() if name.startswith(precision))
    rate = sum(arithmetic.values()) / taken
    return {
        "model": model,
        "precision": precision,
        "seconds_per_step": taken,
        "profiled_seconds_per_step": watched,
        "tokens_per_second": tokens / steps / taken,
        "shares": dict(sorted(shares.items(), key=lambda pair: -pair[1])),
        "operations_per_step": arithmetic,
        "gemm_rates": rates,
        "rate": rate,
        "share_of_gemm_peak": rate / peak,
    }


def print_profile(model: str, steps: int) -> None:
    """Profile one model in a process of its own, print and record it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(MODELS[model], folder)
        write_rows(folder, 0, 3 * steps)
        row = harness.in_process("training:profiled", folder, model=model, steps=steps)
    rates = "  ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in row["gemm_rates"].items())
    print(
        f"{model}, {row['precision']}: {row['seconds_per_step']:.3f} s a step of "
        f"{EXAMPLES_IN_STEP} examples, {row['tokens_per_second']:,.0f} tok/s, "
        f"{row['rate'] / 1e9:,.1f} GF/s = {row['share_of_gemm_peak']:.0%} of the GEMM peak "
        f"(GF/s: {rates})"
    )
    for group, share in row["shares"].items():
        print(f"  {group:<24} {share:6.1%}")
    harness.append("profile", row)


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each rung of the ladder as README's lines."""
    first: dict[str, float] = {}
    rows = []
    for row in records:
        rate = row["tokens_per_second"]
        ratio = rate / first.setdefault(row["model"], rate)
        cells = [row["model"], row["row"], harness.spread(rate, row["spread"])]
        rows.append([*cells, f"{ratio:.2f} ×", f"{row['peak_bytes'] / 2**20:,.0f} MiB"])
    return harness.table("model|switches|>real tokens/s (spread)|>|>peak memory", rows)


def profile_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the profile of each model as README's lines."""
    rows = []
    for row in records:
        parts = [f"{group} {share:.0%}" for group, share in row["shares"].items() if share >= 0.01]
        rate, share = row["tokens_per_second"], row["share_of_gemm_peak"]
        cells = [f"{row['model']}, {row['precision']}", f"{rate:,.0f}", f"{rate / share:,.0f}"]
        rows.append([*cells, f"{share:.0%}", ", ".join(parts)])
    columns = "model|>real tokens/s|>at the GEMM peak|>share|where the time goes"
    return harness.table(columns, rows)


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    options = parser.parse_args()
    for model in options.models:
        if options.profile:
            print_profile(model, options.steps)
        else:
            compare(model, options.rounds, options.steps)


if __name__ == "__main__":
    main()
