"""The parts that LOG.md quotes: dropout alone and in whole steps, the optimizer, changing shapes.

    python -m benchmarks.parts [dropout steps adamw adafactor attention products memory]

Both sides of each comparison take turns in one process (memory: a process each, since peaks do not
come down). Every line printed is also a record in benchmarks/results/parts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import record
from kernels.cpu.process import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 30


def milliseconds(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each side over rounds in which they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: round(median(times[2:]), 3) for name, times in taken.items()}


def report(part: str, case: str, figures: dict[str, float], unit: str) -> None:
    """Print a line and append its record."""
    print(f"{part:<8} {case:<44} " + "  ".join(f"{k} {v:,.2f} {unit}" for k, v in figures.items()))
    record.append("parts", {"part": part, "case": case, "unit": unit, **figures})


def dropout() -> None:
    """Our counter-based masks against torch's generator, forward, on a 2,048 × 1,024 activation."""
    from kernels.dropout import drop, keep_mask
    from kernels.segments import Segments

    x = torch.randn(2048, 1024)
    rows = Segments.build([2048], device="cpu", examples=[0], draw=(42, 1)).dropout_rows
    assert rows is not None
    sides: dict[str, Callable[[], object]] = {
        "torch": lambda: F.dropout(x, 0.1, training=True),
        "lathe": lambda: drop(x, keep_mask(rows, 7, 1024, 0.1), 0.1),
    }
    report("dropout", "2048 × 1024, p 0.1, fp32", milliseconds(sides), "ms")


def steps() -> None:
    """Whole LoRA steps with dropout 0.1 against 0, on real functions of ragged length, unpadded.

    4 × 2 examples a step, r = 16 on all linear layers. Both sides train the same weights on the
    same 8 batches and change places each round; a ratio is of two neighbouring steps, so that what
    else the machine does slows both.
    """
    for precision in ("fp32", "bf16"):
        for family in ("starcoder2", "qwen2"):
            step, set_lora_dropout, set_model_dropout = trainer(family, precision)
            compare_steps(f"{family}, {precision}, lora_dropout", step, set_lora_dropout)
            if family == "starcoder2":
                compare_steps(f"{family}, {precision}, model.dropout", step, set_model_dropout)


def trainer(
    family: str, precision_name: str
) -> tuple[Callable[[int], object], Callable[[float], None], Callable[[float], None]]:
    """Return a function that trains on batch i, and those that set the adapters' and the model's p.

    The model has 3.8 M parameters (StarCoder2 style) or 5.4 M (Qwen2 style).
    """
    from data.batch import Batching, micro_batches
    from data.examples import load_examples
    from data.prompt import PromptFormat
    from data.tokenizer import Tokenizer
    from lora import LoraConfig, inject, lora_layers
    from models import build
    from models.config import parse_config
    from models.layers import set_dropout
    from models.weights import initialise
    from train.optim.adamw import AdamW
    from train.precision import Precision
    from train.step import train_step

    base = ROOT / "data" / "demo" / "base"
    document = json.loads((base / "config.json").read_text())
    if family == "qwen2":
        document |= {"model_type": "qwen2", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    model = build(parse_config(document, family), device="meta")
    device = torch.device("cpu")
    precision = Precision(precision_name, device)
    initialise(model, 0, precision.compute_dtype, device, initializer_range=0.02)
    inject(model, LoraConfig(r=16, lora_alpha=32))
    examples = load_examples(
        str(base.parent / "train.jsonl"),
        split_column=None,
        split=None,
        tokenizer=Tokenizer.load(base),
        prompt_format=PromptFormat(text_field="solution"),
        max_length=512,
        on_overflow="truncate",
        cache_root=None,
    )
    batches = [
        micro_batches(
            examples,
            range(8 * i, 8 * i + 8),
            Batching(micro_batch_size=4, layout="unpadded", max_length=512, pad_id=0),
        )
        for i in range(8)
    ]
    optimizer = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad})

    def step(number: int) -> object:
        return train_step(
            model,
            optimizer,
            batches[number % len(batches)],
            learning_rate=1e-4,
            max_grad_norm=1.0,
            precision=precision,
            scaler=None,
            draw=(42, number),
        )

    def set_lora_dropout(p: float) -> None:
        for layer in lora_layers(model).values():
            layer.dropout = p

    return step, set_lora_dropout, lambda p: set_dropout(model, p)


def compare_steps(
    case: str, step: Callable[[int], object], set_dropout: Callable[[float], None]
) -> None:
    """Report the median milliseconds of either side, and of the ratios median and quartiles."""
    taken: dict[float, list[float]] = {0.0: [], 0.1: []}
    for number in range(8 + 2 * ROUNDS):
        for p in (0.0, 0.1) if number % 2 else (0.1, 0.0):
            set_dropout(p)
            started = time.perf_counter()
            step(number)
            taken[p].append(1000 * (time.perf_counter() - started))
    set_dropout(0.0)
    without, dropped = taken[0.0][8:], taken[0.1][8:]
    ratios = [b / a for a, b in zip(without, dropped, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    figures = {
        "0, ms": median(without),
        "0.1, ms": median(dropped),
        "ratio": middle,
        "lower quartile": low,
        "upper quartile": high,
    }
    report("steps", case, {name: round(figure, 3) for name, figure in figures.items()}, "")


def adamw() -> None:
    """One AdamW step over 196 LoRA tensors of three sizes."""
    from train.optim.adamw import AdamW

    for width in (256, 1024, 3072):
        shapes = {f"l{i}": s for i, s in enumerate([(16, width), (width, 16)] * 98)}
        foreach = torch.optim.AdamW(with_gradients(shapes).values(), lr=1e-3, foreach=True)
        fused = torch.optim.AdamW(with_gradients(shapes).values(), lr=1e-3, fused=True)
        ours = AdamW(with_gradients(shapes))
        sides: dict[str, Callable[[], object]] = {
            "torch foreach": foreach.step,
            "torch fused": fused.step,
            "lathe": lambda ours=ours: ours.step(1e-3),
        }
        elements = sum(a * b for a, b in shapes.values())
        report("adamw", f"196 tensors, {elements / 1e6:.2f} M elements", milliseconds(sides), "ms")


def adafactor() -> None:
    """One update by Adafactor and by transformers', which takes the parameters one by one."""
    from transformers.optimization import Adafactor as StackAdafactor

    from train.optim.adafactor import Adafactor

    cases = {
        "196 LoRA tensors": {f"l{i}": s for i, s in enumerate([(16, 256), (256, 16)] * 98)},
        "full, width 512": {
            "embed_tokens": (16384, 512),
            **{f"{i}.up": (2048, 512) for i in range(8)},
            **{f"{i}.down": (512, 2048) for i in range(8)},
            **{f"{i}.norm": (512,) for i in range(33)},
        },
    }
    for case, shapes in cases.items():
        parameters, others = with_gradients(shapes), with_gradients(shapes)
        ours = Adafactor(parameters)
        theirs = StackAdafactor(
            others.values(), lr=1e-3, scale_parameter=False, relative_step=False
        )
        elements = sum(parameter.numel() for parameter in parameters.values())
        sides: dict[str, Callable[[], object]] = {
            "transformers": theirs.step,
            "lathe": lambda ours=ours: ours.step(1e-3),
        }
        report("adafactor", f"{case}, {elements / 1e6:.2f} M elements", milliseconds(sides), "ms")


def with_gradients(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    """Return random parameters with random gradients."""
    made = {}
    for name, shape in shapes.items():
        made[name] = torch.nn.Parameter(torch.randn(shape))
        made[name].grad = torch.randn(shape)
    return made


def attention() -> None:
    """Attention of a ragged micro-batch, forward and backward: torch's fused kernel, and blocks."""
    from kernels.cpu import attention as module
    from kernels.segments import Segments

    blocks = module.BLOCKS_MAX_LENGTH
    cases = {
        "8 documents of 24 to 66 tokens": range(24, 72, 6),
        "8 documents of 100 to 240 tokens": range(100, 260, 20),
        "8 documents of 260 to 512 tokens": range(260, 513, 36),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for case, lengths in cases.items():
            rows = sum(lengths)
            q, k, v = (torch.randn(rows, h, 64).to(dtype).requires_grad_() for h in (8, 2, 2))
            out_gradient = torch.randn(rows, 512).to(dtype)
            segments = Segments.build(lengths, device="cpu")

            def attend(limit: int, q=q, k=k, v=v, segments=segments, g=out_gradient) -> None:
                module.BLOCKS_MAX_LENGTH = limit
                module.attention(q, k, v, segments, scale=0.125).backward(g)

            sides: dict[str, Callable[[], object]] = {
                "torch fused": lambda attend=attend: attend(0),
                "blocks": lambda attend=attend: attend(blocks),
            }
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            report("attention", name, milliseconds(sides), "ms")
    module.BLOCKS_MAX_LENGTH = blocks


def products() -> None:
    """Matrix products: fp32 through MKL and through oneDNN, and bf16, in GFLOP/s."""
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    for rows, inputs, outputs in ((512, 256, 1024), (1072, 512, 2048), (256, 512, 8192)):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        half_x, half_weight = x.bfloat16(), weight.bfloat16()

        def product(precision: str, x=x, weight=weight) -> None:
            settings.fp32_precision = precision
            F.linear(x, weight)
            settings.fp32_precision = "ieee"

        sides: dict[str, Callable[[], object]] = {
            "MKL": lambda product=product: product("ieee"),
            "oneDNN": lambda product=product: product("bf16"),
            "bf16": lambda x=half_x, weight=half_weight: F.linear(x, weight),
        }
        operations = 2 * rows * inputs * outputs / 1e6
        rates = {name: operations / ms for name, ms in milliseconds(sides).items()}
        report("products", f"{rows} × {inputs} × {outputs}", rates, "GFLOP/s")


def memory() -> None:
    """Peak memory and speed of bf16 LoRA steps over ever new lengths, by what is done about them.

    Rounding of sizes, the capacity of oneDNN's caches (its own is 1,024 shapes), whether freed
    memory is kept; and fp32, through MKL and through oneDNN.
    """
    cases: list[tuple[str, int | None, list[str]]] = [
        ("bf16, oneDNN's own caches", None, []),
        ("bf16, 256 shapes", 256, []),
        ("bf16, 256 shapes, memory kept", 256, ["kept"]),
        ("bf16, 128 shapes, memory kept, rounded", 128, ["kept", "rounded"]),
        ("bf16, 256 shapes, memory kept, rounded", 256, ["kept", "rounded"]),
        ("bf16, 1024 shapes, memory kept, rounded", 1024, ["kept", "rounded"]),
        ("fp32, MKL, memory kept", 256, ["fp32", "kept"]),
        ("fp32, oneDNN, memory kept, rounded", 256, ["fp32", "onednn", "kept", "rounded"]),
    ]
    taken: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in cases}
    for _ in range(3):
        for name, capacity, switches in cases:
            environment = dict(os.environ)
            for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                environment.pop(variable, None)
                if capacity is not None:
                    environment[variable] = str(capacity)
            command = [sys.executable, "-m", "benchmarks.parts", "--changing-shapes", *switches]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            taken[name].append(json.loads(done.stdout))
    for name, rounds in taken.items():
        figures = {key: median(each[key] for each in rounds) for key in rounds[0]}
        report("memory", name, figures, "")


def changing_shapes(switches: Sequence[str]) -> None:
    """Train on micro-batches whose lengths never repeat; print peak MiB and tokens a second."""
    import resource

    import kernels.cpu.rounding
    from data.batch import MicroBatch
    from lora import LoraConfig, inject
    from models import build
    from models.config import read_config
    from models.weights import initialise
    from train.loss import loss_sum

    if "kept" in switches:
        keep_freed_memory()
    if "onednn" in switches:
        settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
        settings.fp32_precision = "bf16"
    kernels.cpu.rounding.rounds = lambda device, dtype: "rounded" in switches
    dtype = torch.float32 if "fp32" in switches else torch.bfloat16
    model = build(read_config(ROOT / "data" / "demo" / "base"), device="meta")
    initialise(model, 0, dtype, "cpu", initializer_range=0.02)
    inject(model, LoraConfig(r=16, lora_alpha=32))
    random = np.random.default_rng(0)
    speeds = []
    for step in range(64):
        lengths = tuple(random.integers(40, 400, 8).tolist())
        ids = torch.from_numpy(random.integers(0, 4096, sum(lengths)))
        every = torch.arange(len(ids))
        batch = MicroBatch(ids, ids, lengths, None, tuple(range(8)), every, len(ids))
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled="fp32" not in switches):
            loss_sum(model, batch, torch.device("cpu"), (42, step)).backward()
        speeds.append(sum(lengths) / (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak MiB": round(peak), "tok/s": round(median(speeds[32:]))}))


def main() -> None:
    """Answer the command line."""
    parts = {
        "dropout": dropout,
        "steps": steps,
        "adamw": adamw,
        "adafactor": adafactor,
        "attention": attention,
        "products": products,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--changing-shapes", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.changing_shapes is not None:
        changing_shapes(options.changing_shapes)
        return
    keep_freed_memory()  # as a run on a CPU does
    for name in options.parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
