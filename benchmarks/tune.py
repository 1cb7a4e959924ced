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

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

if "--dry-run" in sys.argv:  # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernel_cases import TRITON, Room, gelu, norm, swiglu
from benchmarks.kernels import FLUSHED, TOLERANCE, on_device
from kernels.triton import launch as triton_launch

GAIN = 0.98  # of the defaults' time
Workload = Callable[[], list[Tensor]]


def candidates(kernel: str) -> Iterator[dict[str, int]]:
    """Yield the parameters that are tried for a kernel, the defaults first."""
    default = triton_launch.DEFAULTS[kernel]
    rows_of_logits = kernel == "cross_entropy"
    values = {
        "BLOCK": [1024, 2048, 4096, 8192, 16384] if rows_of_logits else [512, 1024, 2048],
        "BLOCK_ROWS": [8, 16, 32] if kernel == "adafactor" else [32, 64, 128],
        "BLOCK_COLUMNS": [128, 256, 512] if kernel == "adafactor" else [32, 64, 128],
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
    """Return what a kernel is timed at: calls that return their results."""
    if kernel in ("low_rank", "input_gradient", "adapter_gradient"):
        return [
            _linears(room, kernel, width, count, rank, p)
            for width, count, rank in ((3072, 1, 16), (12_288, 1, 16), (1536, 2, 32), (3072, 3, 16))
            for p in (0.0, 0.1)
        ]
    if kernel in ("adamw", "adafactor"):
        return [_update(room, kernel)]
    if kernel == "cross_entropy":
        return [_cross_entropy(room, v) for v in (49_152, 151_936, 32_000)]
    if kernel == "norms":
        cases = [norm(room, 8192, 3072, centred=True), norm(room, 8192, 1536, centred=False)]
    else:
        cases = [swiglu(room, 8192, 8960), gelu(room, 8192, 12_288)]
    sides = [case.sides[TRITON](0.0).full for case in cases]
    return [lambda full=full: list(full().values()) for full in sides if full is not None]


def _linears(room: Room, kernel: str, width: int, count: int, rank: int, p: float) -> Workload:
    from kernels.segments import Segments
    from kernels.triton import linears as triton_linears

    m, k = room.rows(8192), room.size(width)
    x = room.draw(m, k)
    a = triton_linears.stacked_factors([room.draw(rank, k) for _ in range(count)], room.dtype)
    d_low = room.draw(m, count, a.shape[1])
    rows = Segments.build([m], device=room.device, examples=[0], draw=(42, 1)).dropout_rows
    draws = triton_linears.Draws([(p, module) for module in range(count)], rows)

    def input_gradient() -> list[Tensor]:
        dx = x.clone()
        triton_linears.add_input_gradient(dx, d_low, a, draws)
        return [dx]

    return {
        "low_rank": lambda: [triton_linears.low_rank_product(x, a, draws)],
        "input_gradient": input_gradient,
        "adapter_gradient": lambda: [triton_linears.adapter_gradient(x, d_low, draws)],
    }[kernel]


def _cross_entropy(room: Room, vocabulary: int) -> Workload:
    from kernels.loss import chunk_rows_of
    from kernels.triton.loss import cross_entropy_

    v = room.size(vocabulary)
    rows = room.rows(chunk_rows_of(vocabulary, torch.bfloat16, "cuda"))
    logits = room.draw(rows, v)
    targets = torch.randint(v, (rows,), generator=room.generator, device=room.device)
    return lambda: list(cross_entropy_(logits.clone(), targets, 1.0))


def _update(room: Room, kernel: str) -> Workload:
    from kernels.triton.updates import adafactor_, adamw_
    from train.optim.buffers import alone

    shape = (1, room.size(12_288), room.size(3072))
    weight, gradient = (room.draw(*shape, dtype=torch.float32) for _ in range(2))
    state = torch.rand(shape, generator=room.generator, device=room.device)

    def adamw() -> list[Tensor]:
        tensors = [weight.clone(), gradient, state.clone(), state.clone()]
        adamw_(
            *(tensor.view(-1) for tensor in tensors),
            step=3,
            learning_rate=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=1.0,
            gradient_factor=0.5,
        )
        return tensors

    def adafactor() -> list[Tensor]:
        tensors = [weight.clone(), gradient, state[..., 0].clone(), state[:, 0].clone()]
        adafactor_(
            *tensors,
            beta2=0.5,
            learning_rate=1e-3,
            weight_decay=1.0,
            gradient_factor=0.5,
            epsilon=1e-30,
            reduce=alone,
            shares=1,
        )
        return tensors

    return adamw if kernel == "adamw" else adafactor


def differs(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Return whether results are further apart than their roundings explain."""
    return any(
        not (one.double() - other.double()).norm() <= tolerance * other.double().norm()
        for one, other in zip(found, expected, strict=True)
    )


def tune(
    kernel: str, room: Room, flush: Tensor | None, deadline: float = math.inf
) -> tuple[dict[str, int] | None, list[object]]:
    """Try a kernel's candidates.

    Args:
        kernel: A name of `triton_launch.DEFAULTS`.
        room: Where the workloads are built.
        flush: What the L2 cache is overwritten with; None times nothing.
        deadline: `time.monotonic()` after which no candidate is begun.

    Returns:
        The fastest parameters, None where not all could be tried; and what each candidate took, or
        why it has no time.
    """
    entry = triton_launch.entries().setdefault(triton_launch.capability(room.device), {})
    launch = entry.setdefault("launch", {})
    calls = workloads(kernel, room)
    exact = kernel in ("adamw", "adafactor")  # fp32 whatever the room is
    tolerance = TOLERANCE[torch.float32 if exact else room.dtype]
    expected: list[list[Tensor]] = []
    tried: list[object] = []
    best: dict[str, int] | None = triton_launch.DEFAULTS[kernel]
    best_score = default_score = math.inf
    before = launch.get(kernel)
    for settings in candidates(kernel):
        if time.monotonic() > deadline:
            best = None
            break
        launch[kernel] = settings
        score = 0.0
        fault = None
        try:
            found = [call() for call in calls]
            expected = expected or found
            if any(differs(*pair, tolerance) for pair in zip(found, expected, strict=True)):
                fault = "results differ from those of the defaults"
            elif flush is not None:
                times = [median(on_device(call, flush)) for call in calls]
                score = math.exp(sum(map(math.log, times)) / len(times))
        except Exception as error:  # too large a tile for the card, in Triton's words
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        tried.append({**settings, **({"fault": fault} if fault else {"ms": score})})
        print(f"  {settings}  {fault or f'{score:.4f} ms'}", flush=True)
        if fault is None:
            default_score = min(default_score, score) if len(tried) == 1 else default_score
            if score < best_score and (len(tried) == 1 or score < GAIN * default_score):
                best, best_score = settings, score
    if before is None:
        launch.pop(kernel, None)
    else:
        launch[kernel] = before
    return best, tried


def main() -> None:
    """Answer the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
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
    flush = None
    if not options.dry_run:
        flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
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
        record.append("tune", row)
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
