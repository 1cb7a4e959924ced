"""The cases of `benchmarks.kernels` at the shapes of the seeds' models; linear_cases has the first.

Legend: M token rows · H hidden size · I intermediate size · d head size
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import COMPILED, LATHE, TRITON, Case, Problem, Results, Room, Run, Side
from benchmarks.fixtures import ragged_rows
from benchmarks.linear_cases import from_liger, linears, loss
from kernels.attention import attention, kernel
from kernels.dispatch import Operations
from kernels.operands import Operands, value_of
from kernels.segments import Segments

# The fields of `Operations` that stand or fall with a part; an addition alone draws its mask as one
# inside a norm does. Of the rest nothing is decided: the
# reference's GELU has its bias from the product before it, and attention is no kernel of ours.
FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("linears",),
    "shared-input": ("linears",),
    "loss": ("linear_cross_entropy",),
    "layer-norm": ("layer_norm", "add", "add_layer_norm"),
    "rms-norm": ("rms_norm", "add", "add_rms_norm"),
    "linear-gelu": ("linear_gelu",),
    "swiglu": ("swiglu",),
    "rotary": ("rotary",),
    "adamw": ("adamw_",),
    "adafactor": ("adafactor_",),
}


# --- norms, rotary embeddings and activations ----------------------------------------------------


def _pointwise(
    room: Room,
    part: str,
    text: str,
    problem: Problem,
    literal: Run,
    ours: Callable[[Operations], Run],
    moved: tuple[float, float],
    liger: Run | None = None,
) -> Case:
    """A case bound by memory: `moved` are the elements moved forward and in both passes."""
    sides = {name: problem.makes(ours(room.operations(name))) for name in (TRITON, LATHE)}
    sides["eager"] = problem.makes(literal)
    sides[COMPILED] = lambda _: problem.side(room.compile(literal))
    if liger is not None and not room.dry:
        sides["Liger"] = problem.makes(lambda **xs: liger(*(x.clone() for x in xs.values())))
    c = room.dtype.itemsize / 1e9
    gigabytes = (c * moved[0], c * moved[1])
    return Case(part, text, sides, lambda _: problem.exact(literal), gigabytes=gigabytes)


def norm(rows: int, hidden: int, centred: bool, room: Room, *, frozen: bool = True) -> Case:
    """The residual addition and the norm behind it; frozen, as a layer of a LoRA run has it."""
    m, h = room.rows(rows), room.size(hidden)
    leaves = {"x": room.draw(m, h), "change": room.draw(m, h), "weight": 1 + room.draw(h) / 8}
    if centred:
        leaves["bias"] = room.draw(h)
    needed = ["x", "change"] if frozen else list(leaves)
    problem = Problem(leaves, needed, [room.draw(m, h) for _ in range(2)])

    def layer_norm(x: Tensor, change: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        total = x + change
        return [total, F.layer_norm(total, (h,), weight, bias, 1e-5)]

    def rms_norm(x: Tensor, change: Tensor, weight: Tensor) -> list[Tensor]:
        total = x + change
        exact = total.float() if total.dtype != torch.float64 else total
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
        return [total, weight * normed.to(x.dtype)]

    def ours(run: Operations) -> Run:
        function = run.add_layer_norm if centred else run.add_rms_norm
        return lambda **tensors: [value_of(x) for x in function(**tensors, eps=1e-5)]

    def liger(*tensors: Tensor) -> list[Tensor]:
        return list(from_liger("liger_fused_add_rms_norm")(*tensors, 1e-5, in_place=False))[::-1]

    part, literal = ("layer-norm", layer_norm) if centred else ("rms-norm", rms_norm)
    moved = (4 * m * h, 8 * m * h)
    text = f"{m:,} × {h:,}"
    return _pointwise(room, part, text, problem, literal, ours, moved, None if centred else liger)


def rotary(rows: int, heads: int, kv: int, d: int, room: Room) -> Case:
    """Queries and keys, rotated."""
    m, d = room.rows(rows), 10 if room.dry else d
    powers = 10_000.0 ** -(torch.arange(0, d, 2, device=room.device) / d)
    angles = torch.outer(torch.arange(m, device=room.device), powers).repeat(1, 2)
    leaves = {"q": room.draw(m, heads, d), "k": room.draw(m, kv, d)}
    leaves |= {"cos": angles.cos().to(room.dtype), "sin": angles.sin().to(room.dtype)}
    problem = Problem(leaves, ["q", "k"], [room.draw(m, heads, d), room.draw(m, kv, d)])

    def literal(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        def rotated(x: Tensor) -> Tensor:
            low, high = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

        return [rotated(q), rotated(k)]

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        swapped = (x.transpose(0, 1)[None] for x in (q, k))
        found = from_liger("liger_rope")(*swapped, cos[None], sin[None])
        return [x[0].transpose(0, 1) for x in found]

    moved = 2 * m * (heads + kv) * d
    text = f"{m:,} rows, {heads} + {kv} heads of {d}"
    ours, passes = (lambda run: run.rotary), (moved, 2 * moved)
    return _pointwise(room, "rotary", text, problem, literal, ours, passes, liger)


def swiglu(rows: int, intermediate: int, room: Room) -> Case:
    """silu(gate) · up."""
    m, i = room.rows(rows), room.size(intermediate)
    leaves = {"gate": room.draw(m, i), "up": room.draw(m, i)}
    problem = Problem(leaves, ["gate", "up"], [room.draw(m, i)])

    def literal(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def liger(gate: Tensor, up: Tensor) -> Tensor:
        return from_liger("liger_swiglu")(gate, up)

    ours, moved = (lambda run: lambda gate, up: run.swiglu(gate, up).value), (3 * m * i, 8 * m * i)
    return _pointwise(room, "swiglu", f"{m:,} × {i:,}", problem, literal, ours, moved, liger)


def linear_gelu(rows: int, hidden: int, intermediate: int, room: Room) -> Case:
    """A frozen layer with its bias and GELU: with either backend the whole of it."""
    m, h, i = room.rows(rows), room.size(hidden), room.size(intermediate)
    leaves = {"x": room.draw(m, h), "weight": room.draw(i, h, scale=h**-0.5), "bias": room.draw(i)}
    problem = Problem(leaves, ["x"], [room.draw(m, i)])

    def literal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def ours(run: Operations) -> Run:
        return lambda x, weight, bias: run.linear_gelu(x, Operands(weight, bias)).value

    text = f"{m:,} rows, {h:,} → {i:,}"
    moved = (m * h + i * h + 2 * m * i, 2 * (m * h + i * h) + 5 * m * i)
    case = _pointwise(room, "linear-gelu", text, problem, literal, ours, moved)
    product = 2 * m * h * i / 1e12
    return replace(case, teraflops=(product, 2 * product))


# --- attention -----------------------------------------------------------------------------------


@functools.cache
def _token_counts() -> list[int]:
    return [tokens for _, tokens in ragged_rows(300)]


def documents(rows: int, longest: int, shrink: int) -> list[int]:
    """Return the token counts of real functions, shrunk and cut, that fill `rows` exactly."""
    lengths: list[int] = []
    for tokens in _token_counts():
        left = rows - sum(lengths)
        if left == 0:
            break
        lengths.append(min(-(-tokens // shrink), longest, left))
    return lengths


def attend(rows: int, heads: int, kv: int, d: int, room: Room) -> Case:
    """Causal attention inside ragged documents, unpadded but for the side that pads."""
    m, d = room.rows(rows), 8 if room.dry else d
    lengths = documents(m, 1024, 1) if not room.dry else documents(m, 9, 40)
    segments = Segments.build(lengths, device=room.device)
    scale, longest, count = d**-0.5, max(lengths), len(lengths)
    leaves = {"q": room.draw(m, heads, d), "k": room.draw(m, kv, d), "v": room.draw(m, kv, d)}
    problem = Problem(leaves, list(leaves), [room.draw(m, heads * d)])
    ends = torch.tensor(lengths, device=room.device).unsqueeze(1)
    inside = torch.arange(longest, device=room.device) < ends
    causal = torch.ones(longest, longest, dtype=torch.bool, device=room.device).tril()
    document, place = inside.nonzero(as_tuple=True)
    # Pads see real keys too: what they compute is thrown away, and no row is without a key.
    mask = (causal & inside[:, None, :]).unsqueeze(1)

    def padded(**qkv: Tensor) -> Tensor:
        wide = [
            x.new_zeros(count, longest, *x.shape[1:]).index_put((document, place), x)
            for x in qkv.values()
        ]
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in wide), attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)[document, place].flatten(1)

    def ours(**chosen: Any) -> Run:
        return lambda **qkv: attention(**qkv, segments=segments, scale=scale, **chosen)

    which = kernel(leaves["q"], leaves["k"], segments, None)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    moved = room.dtype.itemsize * m * d * (2 * heads + 2 * kv) / 1e9
    sides = {
        LATHE: problem.makes(ours()),
        "padded, SDPA with a mask": problem.makes(padded),
    }
    return Case(
        part="attention",
        text=f"{m:,} rows, {count} documents, {heads} + {kv} heads of {d} (ours: {which})",
        sides=sides,
        exact=lambda _: problem.exact(ours(implementation="eager")),
        gigabytes=(moved, 3 * moved),
        teraflops=(4 * heads * d * pairs / 1e12, 14 * heads * d * pairs / 1e12),
    )


# --- optimizers ----------------------------------------------------------------------------------

RATE, CHECKED_STEPS = 1e-2, 3


def optimizer(name: str, shapes: Sequence[tuple[int, ...]], text: str, room: Room) -> Case:
    """One update of fp32 masters; what is compared are all updates and our states."""
    from benchmarks.product import build_optimizer

    shapes = [tuple(room.size(n) if n > 64 else n for n in shape) for shape in shapes]
    shapes = shapes[:6] if room.dry else shapes
    # Small beside their updates, which are compared and must not drown in the weights' rounding.
    values = [room.draw(*shape, scale=0.01, dtype=torch.float32) for shape in shapes]
    gradients = [
        [room.draw(*shape, dtype=torch.float32) for shape in shapes] for _ in range(CHECKED_STEPS)
    ]

    def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(value.to(dtype, copy=True)) for value in values]

    def side_of(
        step: Callable[[float], Any],
        weights: Sequence[Tensor],
        state: Callable[[], Results] | None = None,
    ) -> Side:
        """Do the steps that are compared, each with a gradient and a scale of its own.

        Whoever has a state to compare scales the gradients itself.
        """
        for number, of_step in enumerate(gradients):
            scale = 1.0 - 0.25 * number
            for weight, gradient in zip(weights, of_step, strict=True):
                drawn = gradient.to(weight.dtype, copy=True)
                weight.grad = drawn if state else drawn.mul_(scale)
            step(scale)
        starts = zip(weights, values, strict=True)
        after = {f"update {i}": w.detach() - v.to(w.dtype) for i, (w, v) in enumerate(starts)}
        after |= {key: value.clone() for key, value in (state() if state else {}).items()}

        def forward() -> Results:
            step(1.0)
            return {}

        return Side(forward, lambda: after)

    def lathe(side: str, dtype: torch.dtype = torch.float32) -> Side:
        weights = parameters(dtype)
        model = torch.nn.ParameterDict({f"p{i}": w for i, w in enumerate(weights)})
        of_side = room.operations(side)
        ours = build_optimizer(name, model, weight_decay=0.1, operations=of_side)
        return side_of(lambda scale: ours.step(RATE, scale), weights, ours.state_tensors)

    def theirs(make: Callable[..., Any], **more: Any) -> Side:
        weights = parameters()
        other = make(weights, lr=RATE, weight_decay=0.1, **more)
        return side_of(lambda _: other.step(), weights)

    def stack(_: float) -> Side:
        from transformers.optimization import Adafactor

        return theirs(Adafactor, scale_parameter=False, relative_step=False)

    sides: dict[str, Callable[[float], Side]] = {
        TRITON: lambda _: lathe(TRITON),
        LATHE: lambda _: lathe(LATHE),
    }
    if name == "adamw":
        sides["torch, foreach"] = lambda _: theirs(torch.optim.AdamW, foreach=True)
        sides["torch, fused"] = lambda _: theirs(torch.optim.AdamW, fused=True)
    else:
        sides["transformers"] = stack
    elements = sum(math.prod(shape) for shape in shapes)
    moved = elements * (28 if name == "adamw" else 20) / 1e9
    return Case(
        part=name,
        text=f"{text}: {len(shapes)} tensors, {elements:,} parameters",
        sides=sides,
        exact=lambda _: lathe(LATHE, torch.float64).results(),
        gigabytes=(moved, moved),
        passes=("forward",),
        graph=False,  # torch's optimizers refuse to be captured
    )


# --- the table of cases --------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Callable[[Room], Case]]]:
    """Yield (part, maker) of every case, in the order that they are measured in."""

    def adapted(part: str, k: int, ns: Sequence[int], rank: int, p: float, rows: int = 8192) -> Any:
        return part, functools.partial(linears, part, rows, k, ns, rank, p)

    for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
        yield from (adapted("linear", k, [n], 16, p) for p in (0.0, 0.1))
    for k, n in ((1536, 8960), (8960, 1536), (4096, 11008)):
        yield from (adapted("linear", k, [n], 32, p) for p in (0.0, 0.05))
    for p in (0.0, 0.1):
        yield adapted("linear", 3072, [12288], 16, p, rows=24576)
        yield adapted("shared-input", 3072, [3072, 256, 256], 16, p)
        yield adapted("shared-input", 1536, [8960, 8960], 32, p)
    for h, v in ((3072, 49_152), (1536, 151_936), (4096, 32_000)):
        for masked in (0.0, 0.5):
            yield "loss", functools.partial(loss, 8192, h, v, masked)
    for m in (8192, 24576):
        yield "layer-norm", functools.partial(norm, m, 3072, True)
        for h in (1536, 4096):
            yield "rms-norm", functools.partial(norm, m, h, False)
        yield "linear-gelu", functools.partial(linear_gelu, m, 3072, 12_288)
        for i in (8960, 11_008):
            yield "swiglu", functools.partial(swiglu, m, i)
        for heads in ((24, 2), (12, 2), (32, 32)):
            yield "rotary", functools.partial(rotary, m, *heads, 128)
    for m in (8192, 24576):
        yield "attention", functools.partial(attend, m, 24, 2, 128)
    h, kv, i, rank = 3072, 256, 12_288, 16  # StarCoder2-3B's 30 layers
    linear = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (i, h)]
    adapters = [shape for k, n in linear for shape in ((rank, k), (n, rank))] * 30
    layers = [(h, h), (i, h), (h, i), (h,)] * 4
    for name in ("adamw", "adafactor"):
        yield name, functools.partial(optimizer, name, adapters, "StarCoder2-3B's adapters")
        yield name, functools.partial(optimizer, name, layers, "4 layers in full")


PARTS = tuple(dict.fromkeys(part for part, _ in cases()))
