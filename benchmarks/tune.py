"""Find the Triton kernels' launch parameters for this class of GPU, and write them down.

    python -m benchmarks.tune [--kernels low_rank adamw …] [--minutes 9]
    python -m benchmarks.tune --dry-run

Each candidate runs at the shapes of the seeds' models, its results are compared with those of the
defaults, and it is timed as in `benchmarks.kernels`. The fastest by the product of its times is
written to kernels/triton/launch.json where it gains 2 % on the defaults, under the card's compute
capability; what all of them took is recorded. Commit both: a user's run reads them and never tries
anything. `--dry-run` compares all candidates at small shapes, interpreted on a CPU.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.case import TRITON, Problem, Results, Room, triton
from benchmarks.harness import told
from benchmarks.kernel_cases import norm, optimizer, swiglu
from benchmarks.kernels import TOLERANCE, difference
from kernels.loss import chunk_rows_of
from kernels.segments import Segments
from kernels.triton import launch as triton_launch

GAIN = 0.98  # of the defaults' time
_OF_ADAPTERS = ("low_rank", "input_gradient", "adapter_gradient", "through_b")
_OF_ADAPTERS += ("activation_forward", "activation_backward")
Workload = tuple[Callable[[], Results], Callable[[], object]]  # compared, timed


def candidates(kernel: str) -> Iterator[dict[str, int]]:
    """Yield the parameters that are tried for a kernel, the defaults first."""
    default = triton_launch.DEFAULTS[kernel]
    rows_of_logits = kernel == "cross_entropy"
    values = {
        "BLOCK": [1024, 2048, 4096, 8192, 16384] if rows_of_logits else [512, 1024, 2048],
        "BLOCK_ROWS": [8, 16, 32] if kernel == "adafactor" else [32, 64, 128],
        "BLOCK_COLUMNS": [128, 256, 512] if kernel in ("adafactor", "through_b") else [32, 64, 128],
        "num_warps": [2, 4, 8, 16] if rows_of_logits else [4, 8],
        "num_stages": [2, 3, 4],
        "warp_elements": [128, 256, 512, 1024],
        "programs": [1, 2, 4, 8],
    }
    yield default
    for choice in itertools.product(*(values[name] for name in default)):
        settings = dict(zip(default, choice, strict=True))
        # The loss gives a warp 512 columns at least.
        clamped = rows_of_logits and 512 * settings["num_warps"] > settings["BLOCK"]
        if settings != default and not clamped:
            yield settings


def workloads(kernel: str, room: Room) -> list[Workload]:
    """Return what a kernel is compared and timed at."""
    if kernel in _OF_ADAPTERS:
        sizes = ((3072, 1, 16), (12_288, 1, 16), (1536, 2, 32), (3072, 3, 16))
        if kernel.startswith("activation"):
            sizes = ((12_288, 1, 16), (8960, 1, 32))
        drops = (0.0,) if kernel == "through_b" else (0.0, 0.1)  # no mask is read there
        calls = [_linears(room, kernel, *size, p) for size in sizes for p in drops]
    elif kernel == "cross_entropy":
        calls = [_cross_entropy(room, v) for v in (49_152, 151_936, 32_000)]
    elif kernel in ("adamw", "adafactor"):
        make = optimizer(kernel, [(12_288, 3072)], "", room).sides[TRITON]
        return [(lambda: make(0.0).results(), make(0.0).forward)]
    elif kernel == "norms":
        cases = [norm(8192, 3072, True, room), norm(8192, 1536, False, room)]
        calls = [case.sides[TRITON](0.0).results for case in cases]
    else:
        calls = [swiglu(8192, 8960, room).sides[TRITON](0.0).results, _gelu(room)]
    return [(call, call) for call in calls]


def _linears(
    room: Room, kernel: str, width: int, count: int, rank: int, p: float
) -> Callable[[], Results]:
    adapters, activations = triton("adapters"), triton("activations")
    m, k = room.rows(8192), room.size(width)
    x = room.draw(m, k)
    factors = [(room.draw(rank, k), room.draw(k, rank)) for _ in range(count)]
    a, b = triton("linears").stacked_factors(factors, room.dtype)
    low, d_low = (room.draw(m, count, a.shape[1]) for _ in range(2))
    dys = [room.draw(m, k) for _ in range(count)]
    rows = Segments.build([m], device=room.device, examples=[0], draw=(42, 1)).dropout_rows
    draws = adapters.Draws([(p, module) for module in range(count)], rows)
    of_gelu = triton("inputs").gelu_again, (x, None)
    return {
        "low_rank": lambda: {"low": adapters.low_rank_product(x, a, draws)},
        "input_gradient": lambda: {"dx": adapters.input_gradient(d_low, a, draws)},
        "adapter_gradient": lambda: {"dA": adapters.adapter_gradient(None, [x], d_low, draws)},
        "activation_forward": lambda: dict(
            zip("zs", activations.activated(*of_gelu, a, draws), strict=True)
        ),
        # The gradient that arrives is overwritten.
        "activation_backward": lambda: dict(
            zip(
                ("dA", "dx"),
                activations.activation_gradients(
                    *(*of_gelu, dys[0].clone(), d_low, a, draws), needs_bias=False
                )[:2],
                strict=True,
            )
        ),
        "through_b": lambda: dict(
            zip(("ds", "dB"), adapters.through_b(dys, b, low, [1.0] * count), strict=True)
        ),
    }[kernel]


def _cross_entropy(room: Room, vocabulary: int) -> Callable[[], Results]:
    v = room.size(vocabulary)
    rows = room.rows(chunk_rows_of(vocabulary, torch.bfloat16, "cuda"))
    logits = room.draw(rows, v)
    targets = torch.randint(v, (rows,), generator=room.generator, device=room.device)
    cross_entropy_ = triton("loss").cross_entropy_
    return lambda: dict(zip("yd", cross_entropy_(logits.clone(), targets, 1.0), strict=True))


def _gelu(room: Room) -> Callable[[], Results]:
    m, i = room.rows(8192), room.size(12_288)
    problem = Problem({"x": room.draw(m, i), "bias": room.draw(i)}, ["x"], [room.draw(m, i)])
    return problem.side(triton("elementwise").gelu_tanh).results


def tune(
    kernel: str, room: Room, flush: Tensor | None, deadline: float = math.inf
) -> tuple[dict[str, int] | None, list[object]]:
    """Try a kernel's candidates.

    `flush` is what the L2 cache is overwritten with, None times nothing; no candidate is begun
    after `deadline`. Returns the fastest parameters, None where not all could be tried; and what
    each candidate took, or why it has no time.
    """
    entry = triton_launch.entries().setdefault(triton_launch.capability(room.device), {})
    launch = entry.setdefault("launch", {})
    calls = workloads(kernel, room)
    exact = kernel in ("adamw", "adafactor")  # fp32 whatever the room is, and not in a graph
    tolerance = TOLERANCE[torch.float32 if exact else room.dtype]
    expected: list[Results] = []
    tried: list[object] = []
    best: dict[str, int] | None = triton_launch.DEFAULTS[kernel]
    best_score = default_score = math.inf
    before = dict(launch)
    for settings in candidates(kernel):
        if time.monotonic() > deadline:
            best = None
            break
        launch[kernel] = settings
        score = 0.0
        fault = None
        try:
            found = [results() for results, _ in calls]
            expected = expected or found
            pairs = zip(found, expected, strict=True)
            if any(not difference(*pair)[0] <= tolerance for pair in pairs):
                fault = "results differ from those of the defaults"
            elif flush is not None:
                times = [median(harness.on_device(call, flush, not exact)) for _, call in calls]
                score = math.exp(sum(map(math.log, times)) / len(times))
        except Exception as error:  # too large a tile for the card, in Triton's words
            fault = told(error)
        tried.append({**settings, **({"fault": fault} if fault else {"ms": score})})
        print(f"  {settings}  {fault or f'{score:.4f} ms'}", flush=True)
        if fault is None:
            default_score = score if len(tried) == 1 else default_score
            if score < best_score and (len(tried) == 1 or score < GAIN * default_score):
                best, best_score = settings, score
    launch.clear()
    launch.update(before)
    return best, tried


def main() -> None:
    """Answer the command line."""
    parser = harness.parser(__doc__)
    names = list(triton_launch.DEFAULTS)
    parser.add_argument("--kernels", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA device; --dry-run compares the candidates without one")
        sys.exit(2)
    device, dtype = ("cpu", torch.float32) if options.dry_run else ("cuda", torch.bfloat16)
    room = Room(torch.device(device), dtype, dry=options.dry_run)
    flush = None if options.dry_run else harness.flusher()
    deadline = time.monotonic() + 60 * options.minutes
    faults = 0
    for kernel in options.kernels:
        if time.monotonic() > deadline:
            print(f"{kernel}: left out after {options.minutes:g} minutes")
            continue
        print(kernel)
        best, tried = tune(kernel, room, flush, deadline)
        faults += sum("differ" in str(row) for row in tried)
        if options.dry_run:
            continue
        capability = triton_launch.capability(room.device)
        row = {"part": kernel, "capability": capability, "best": best, "tried": tried}
        harness.append("tune", row)
        if best is None:
            print(f"{kernel}: not all candidates were tried in {options.minutes:g} minutes")
            continue
        launch = triton_launch.entries()[capability]["launch"]
        launch.pop(kernel, None)
        if best != triton_launch.DEFAULTS[kernel]:
            launch[kernel] = best
        triton_launch.write_entries()
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
