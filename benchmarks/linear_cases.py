"""Adapted linear layers, PEFT's, torch's and ours, and the loss.

Legend: M token rows · K, N features in and out · r rank · J layers on one input
        H hidden size · V vocabulary

Bytes of the loss: logits are written by the product, read and overwritten by their gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import COMPILED, LATHE, TRITON, Case, Problem, Results, Room, Run, Side
from kernels.dropout import module_id
from kernels.operands import Operands
from kernels.segments import Segments

FLOOR = "frozen linear alone"
TWO_PRODUCTS = "its two products alone"
LOGITS = "logits, F.cross_entropy in fp32"
SCALE = 2.0  # alpha / r, as the presets have it
_PEFT = {"PEFT, fp32 adapters": torch.float32, "PEFT, adapters in bf16": torch.bfloat16}


def linears(
    part: str, rows: int, width: int, outputs: Sequence[int], rank: int, p: float, room: Room
) -> Case:
    """J adapted layers without bias on one input of `width` features."""
    m, k, ns = room.rows(rows), room.size(width), [room.size(n) for n in outputs]
    r, c, total = rank if not room.dry else 4, room.dtype.itemsize, sum(ns)
    leaves = {"x": room.draw(m, k)}
    for i, n in enumerate(ns):
        leaves[f"w{i}"] = room.draw(n, k, scale=k**-0.5)
        leaves[f"a{i}"] = room.draw(r, k, scale=k**-0.5).float()
        leaves[f"b{i}"] = room.draw(n, r, scale=r**-0.5).float()
    adapters = [f"{kind}{i}" for i in range(len(ns)) for kind in "ab"]
    problem = Problem(leaves, ["x", *adapters], [room.draw(m, n) for n in ns])
    segments = Segments.build([m], device=room.device, examples=[0], draw=(42, 1))

    def ours(side: str, p: float) -> Run:
        run = room.operations(side).linears

        def call(x: Tensor, **tensors: Tensor) -> Sequence[Tensor]:
            layers = [
                Operands(
                    *(tensors[f"w{i}"], None, tensors[f"a{i}"], tensors[f"b{i}"]),
                    *(SCALE, p, module_id(f"layer {i}")),
                )
                for i in range(len(ns))
            ]
            return run(x, layers, segments)

        return call

    def eager(x: Tensor, **tensors: Tensor) -> list[Tensor]:
        ys = []
        for i in range(len(ns)):
            a, b = (tensors[f"{kind}{i}"].to(x.dtype) for kind in "ab")
            ys.append(F.linear(x, tensors[f"w{i}"]) + SCALE * F.linear(F.linear(x, a), b))
        return ys

    def frozen(x: Tensor, **tensors: Tensor) -> list[Tensor]:
        return [F.linear(x, tensors[f"w{i}"]) for i in range(len(ns))]

    alone = Problem(leaves, ["x"], problem.upstream)
    sides: dict[str, Callable[[float], Side]] = {
        FLOOR: lambda _: dataclasses.replace(alone.side(frozen), compared=False),
        TRITON: lambda p: problem.side(ours(TRITON, p)),
        LATHE: lambda p: problem.side(ours(LATHE, p)),
    }
    for name, kind in _PEFT.items():
        sides[name] = functools.partial(_peft, room, problem, kind)
    if p == 0:
        sides[COMPILED] = lambda _: problem.side(room.compile(eager))
    one_way = c * (m * k + k * total + m * total) / 1e9
    product, small = 2 * m * k * total, 2 * m * r * (k * len(ns) + total)
    return Case(
        part=part,
        text=f"{m:,} rows, {k:,} → {' + '.join(f'{n:,}' for n in ns)}, r = {r}, p = {p}",
        sides=sides,
        exact=lambda p: problem.exact(ours(LATHE, p)),
        p=p,
        gigabytes=(one_way, 2 * one_way + c * m * k / 1e9),
        teraflops=((product + small) / 1e12, (2 * product + 3 * small) / 1e12),
        floor=FLOOR,
    )


def _peft(room: Room, problem: Problem, kind: torch.dtype, p: float) -> Side:
    """PEFT's own layers over frozen ones, under autocast as Trainer runs them."""
    from peft import LoraConfig, inject_adapter_in_model

    leaves, half = problem.leaves, room.dtype != torch.float32
    r, k = leaves["a0"].shape
    weights = {f"layer{i}": leaves[f"w{i}"] for i in range(len(problem.upstream))}
    with torch.device(room.device):
        plain = {
            name: torch.nn.Linear(k, len(w), bias=False, dtype=room.dtype)
            for name, w in weights.items()
        }
    targets = list(weights)
    config = LoraConfig(r=r, lora_alpha=int(SCALE * r), lora_dropout=p, target_modules=targets)
    model: Any = inject_adapter_in_model(config, torch.nn.ModuleDict(plain))
    needed = {"x": leaves["x"].detach().requires_grad_()}
    for i, (name, weight) in enumerate(weights.items()):
        layer = model[name]
        layer.base_layer.weight.data = weight
        for letter, factors in (("a", layer.lora_A), ("b", layer.lora_B)):
            parameter = needed[f"{letter}{i}"] = factors["default"].weight
            parameter.data = leaves[f"{letter}{i}"].to(room.dtype if room.dry else kind)
    model.train()

    def forward() -> Results:
        with torch.autocast(room.device.type, room.dtype, enabled=half):
            return {f"y{i}": model[name](needed["x"]) for i, name in enumerate(weights)}

    def full() -> Results:
        outputs = forward()
        gradients = torch.autograd.grad(
            list(outputs.values()), list(needed.values()), list(problem.upstream)
        )
        return outputs | {f"d {name}": g for name, g in zip(needed, gradients, strict=True)}

    return Side(forward, full, checked_without_dropout=True)


def from_liger(name: str) -> Callable[..., Any]:
    """Return a function of Liger where it is installed; its kernels write into their inputs."""
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    return getattr(functional, name)


def loss(rows: int, hidden: int, vocabulary: int, masked: float, room: Room) -> Case:
    """Cross-entropy of a frozen linear head: summed loss and gradients of hidden states."""
    m, h, v = room.rows(rows), room.size(hidden), room.size(vocabulary)
    leaves = {"x": room.draw(m, h), "weight": room.draw(v, h, scale=h**-0.5)}
    targets = torch.randint(v, (m,), generator=room.generator, device=room.device)
    targets[torch.rand(m, generator=room.generator, device=room.device) < masked] = -100
    wanted = (targets != -100).nonzero().squeeze(1)
    problem = Problem(leaves, ["x"], [torch.ones((), device=room.device)])

    def ours(side: str) -> Run:
        run = room.operations(side).linear_cross_entropy
        return lambda x, weight: run(x, weight, targets, rows=wanted)

    def logits_first(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    def liger(x: Tensor, weight: Tensor) -> Tensor:
        return from_liger("liger_fused_linear_cross_entropy")(x, weight, targets, reduction="sum")

    def products(_: float) -> Side:
        x, weight = leaves["x"].index_select(0, wanted), leaves["weight"]

        def run() -> Results:
            out = torch.empty_like(x)
            for some, of_out in zip(x.split(2048), out.split(2048), strict=True):
                torch.mm(some @ weight.t(), weight, out=of_out)
            return {"products": out}

        return Side(run, run, compared=False)

    sides: dict[str, Callable[[float], Side]] = {
        TWO_PRODUCTS: products,
        TRITON: lambda _: problem.side(ours(TRITON)),
        LATHE: lambda _: problem.side(ours(LATHE)),
        LOGITS: problem.makes(logits_first),
        COMPILED: lambda _: problem.side(room.compile(logits_first)),
    }
    if not room.dry:  # its kernels are CUDA's
        sides["Liger"] = problem.makes(liger)
    s = len(wanted)
    moved = room.dtype.itemsize * (2 * s * h + v * h + 3 * s * v) / 1e9
    return Case(
        part="loss",
        text=f"{m:,} rows, hidden {h:,}, vocabulary {v:,}, {masked:.0%} masked",
        sides=sides,
        exact=lambda _: problem.exact(ours(LATHE)),
        gigabytes=(moved, moved),
        teraflops=(4 * s * h * v / 1e12, 4 * s * h * v / 1e12),
        floor=TWO_PRODUCTS,
        passes=("full",),  # the gradient is made in the forward pass
    )
