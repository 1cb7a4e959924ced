"""What `benchmarks.kernels` compares: cases, their sides, and the exact result of each.

Legend: M token rows · K, N features in and out · r rank · J layers on one input · H hidden size
        V vocabulary · I intermediate size · d head size · c bytes of an element

A case is one operation at one shape of the seeds' models. `exact` computes it in fp64 with the
reference, which the tests hold to literal formulas; a side is anything that computes the same. A
name in a side's results that `exact` has is checked before the side is timed.

Bytes and operations are the fewest that the operation can do with: each tensor read or written once
a pass (the loss: logits written by the product, read and overwritten by their gradient), 2·M·K·N
operations a product. All sides of a case are credited with them, the floors too, so what a side
does beyond them shows as a lower rate, and what a floor leaves out as a higher one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fixtures import ragged_rows
from kernels import varlen
from kernels.attention import attention
from kernels.dispatch import Operations, operations
from kernels.dropout import module_id
from kernels.operands import Operands
from kernels.segments import Segments

Results = dict[str, Tensor]

# The fields of `Operations` that stand or fall with a part. Of the rest nothing is decided: the
# reference's GELU has its bias from the product before it, and attention is no kernel of ours.
FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("linears",),
    "shared-input": ("linears",),
    "loss": ("linear_cross_entropy",),
    "layer-norm": ("layer_norm", "add_layer_norm"),
    "rms-norm": ("rms_norm", "add_rms_norm"),
    "linear-gelu": ("linear_gelu",),
    "swiglu": ("swiglu",),
    "rotary": ("rotary",),
    "adamw": ("adamw_",),
    "adafactor": ("adafactor_",),
}

FLOOR = "frozen linear alone"
LATHE, TRITON = "lathe, reference", "lathe, triton"
COMPILED = "torch.compile"
SCALE = 2.0  # alpha / r, as the presets have it


@dataclass(frozen=True)
class Side:
    """One way to compute a case: the forward pass, and both passes with all gradients.

    Attributes:
        forward: Returns the outputs by name.
        full: Returns outputs and gradients by name; None where there is no backward pass.
        checked_without_dropout: Its dropout is drawn by a generator of its own, so that only what
            it computes at p = 0 can be compared.
    """

    forward: Callable[[], Results]
    full: Callable[[], Results] | None
    checked_without_dropout: bool = False


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        part: The operation's name.
        text: The shape in words.
        sides: What builds each side, from the probability of dropout.
        exact: The results in fp64, from the probability of dropout.
        p: Probability of dropout.
        gigabytes: (forward, both passes) at least.
        teraflops: The same of operations, counted in 10¹².
        floor: The side whose time the others are compared with.
        passes: Which are timed, `forward`, `full` or both.
        graph: Whether a CUDA graph is timed; else the host's launches count too.
    """

    part: str
    text: str
    sides: dict[str, Callable[[float], Side]]
    exact: Callable[[float], Results]
    p: float = 0.0
    gigabytes: tuple[float, float] = (0.0, 0.0)
    teraflops: tuple[float, float] = (0.0, 0.0)
    floor: str = LATHE
    passes: tuple[str, ...] = ("forward", "full")
    graph: bool = True


@dataclass
class Room:
    """Where cases are built: the device, the type, and whether shapes are small ones."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed the generator that every tensor is drawn from."""
        self.generator = torch.Generator(self.device).manual_seed(0)

    def size(self, size: int) -> int:
        """Return a width of the real models, or a small one that is odd where it can be."""
        return size if not self.dry else size // 128 + 5

    def rows(self, rows: int) -> int:
        """Return a number of token rows."""
        return rows if not self.dry else rows // 512 + 1

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers, rounded to the type."""
        made = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return made.to(dtype or self.dtype)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the compiled function; a dry run only traces it."""
        torch._dynamo.reset()
        return torch.compile(function, backend="eager" if self.dry else "inductor", dynamic=False)

    def operations(self, side: str) -> Operations:
        """Return the operations of one of our sides."""
        return operations("triton" if side == TRITON else "reference", self.device)


def differentiated(
    run: Callable[..., Tensor | Sequence[Tensor]],
    leaves: dict[str, Tensor],
    needed: Sequence[str],
    upstream: Sequence[Tensor],
) -> Side:
    """Return the side that calls `run` with the leaves, and differentiates by those `needed`.

    Args:
        run: Takes the leaves by name and returns one output or several.
        leaves: The inputs.
        needed: Names of those whose gradient is asked for: `d name` in the results.
        upstream: Gradient of each output.
    """
    inputs = {name: x.detach().requires_grad_(name in needed) for name, x in leaves.items()}

    def forward() -> Results:
        outputs = run(**inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return {f"y{i}": y for i, y in enumerate(outputs)}

    def full() -> Results:
        outputs = forward()
        ys = list(outputs.values())
        gradients = torch.autograd.grad(
            ys,
            [inputs[name] for name in needed],
            [u.to(y.dtype) for u, y in zip(upstream, ys, strict=True)],
        )
        return outputs | {f"d {name}": g for name, g in zip(needed, gradients, strict=True)}

    return Side(forward, full)


def on_copies(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` on copies of its inputs: Liger's kernels write into what they are given."""
    return lambda **tensors: run(**{name: x.clone() for name, x in tensors.items()})


def in_fp64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same numbers in fp64; whole numbers stay as they are."""
    return {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}


# --- adapted linear layers -----------------------------------------------------------------------

_PEFT = {"PEFT, fp32 adapters": torch.float32, "PEFT, adapters in bf16": torch.bfloat16}
SMALL_FIRST = "small product first, in PyTorch"
AUGMENTED = "augmented K, in PyTorch"


def linears(
    room: Room, rows: int, width: int, outputs: Sequence[int], rank: int, p: float, name: str
) -> Case:
    """J adapted layers without bias on one input of `width` features."""
    m, k = room.rows(rows), room.size(width)
    ns = [room.size(n) for n in outputs]
    r = rank if not room.dry else 4
    leaves = {"x": room.draw(m, k)}
    for i, n in enumerate(ns):
        leaves[f"w{i}"] = room.draw(n, k, scale=k**-0.5)
        leaves[f"a{i}"] = room.draw(r, k, scale=k**-0.5).float()
        leaves[f"b{i}"] = room.draw(n, r, scale=r**-0.5).float()
    upstream = [room.draw(m, n) for n in ns]
    segments = Segments.build([m], device=room.device, examples=[0], draw=(42, 1))
    adapters = [f"{kind}{i}" for i in range(len(ns)) for kind in "ab"]
    needed = ["x", *adapters]

    def ours(run: Callable[..., list[Tensor]], p: float) -> Callable[..., list[Tensor]]:
        def call(x: Tensor, **tensors: Tensor) -> list[Tensor]:
            layers = [
                Operands(
                    tensors[f"w{i}"],
                    None,
                    tensors[f"a{i}"],
                    tensors[f"b{i}"],
                    SCALE,
                    p,
                    module_id(f"layer {i}"),
                )
                for i in range(len(ns))
            ]
            return run(x, layers, segments)

        return call

    def lathe(side: str) -> Callable[[float], Side]:
        run = room.operations(side).linears
        return lambda p: differentiated(ours(run, p), leaves, needed, upstream)

    def eager(p: float) -> Callable[..., list[Tensor]]:
        def call(x: Tensor, **tensors: Tensor) -> list[Tensor]:
            ys = []
            for i in range(len(ns)):
                a, b = (tensors[f"{kind}{i}"].to(x.dtype) for kind in "ab")
                low_rank = F.linear(F.dropout(x, p, training=True), a)
                ys.append(F.linear(x, tensors[f"w{i}"]) + SCALE * F.linear(low_rank, b))
            return ys

        return call

    def compiled(p: float) -> Side:
        side = differentiated(room.compile(eager(p)), leaves, needed, upstream)
        return Side(side.forward, side.full, checked_without_dropout=True)

    def frozen(_: float) -> Side:
        def call(x: Tensor, **tensors: Tensor) -> list[Tensor]:
            return [F.linear(x, tensors[f"w{i}"]) for i in range(len(ns))]

        side = differentiated(call, leaves, ["x"], upstream)
        # Another function: nothing of it can be compared with the adapted layer.
        return Side(_renamed(side.forward), _renamed(side.full))

    sides: dict[str, Callable[[float], Side]] = {
        FLOOR: frozen,
        TRITON: lathe(TRITON),
        LATHE: lathe(LATHE),
        **{
            side: lambda p, kind=kind: _peft(room, leaves, ns, p, kind, upstream)
            for side, kind in _PEFT.items()
        },
    }
    if p == 0:
        sides[SMALL_FIRST] = lambda _: _small_first(leaves, len(ns), upstream)
        sides[AUGMENTED] = lambda _: _augmented(leaves, ns, upstream)
        sides[COMPILED] = compiled

    def exact(p: float) -> Results:
        run = ours(operations("reference").linears, p)
        side = differentiated(run, in_fp64(leaves), needed, upstream)
        assert side.full is not None
        return side.full()

    c, total = room.dtype.itemsize, sum(ns)
    one_way = c * (m * k + k * total + m * total) / 1e9
    product, small = 2 * m * k * total, 2 * m * r * (k * len(ns) + total)
    return Case(
        part=name,
        text=f"{m:,} rows, {k:,} → {' + '.join(f'{n:,}' for n in ns)}, r = {r}, p = {p}",
        sides=sides,
        exact=exact,
        p=p,
        gigabytes=(one_way, 2 * one_way + c * m * k / 1e9),
        teraflops=((product + small) / 1e12, (2 * product + 3 * small) / 1e12),
        floor=FLOOR,
    )


def _renamed(function: Callable[[], Results] | None) -> Callable[[], Results]:
    assert function is not None
    return lambda: {f"frozen {name}": value for name, value in function().items()}


def _peft(
    room: Room,
    leaves: dict[str, Tensor],
    ns: Sequence[int],
    p: float,
    kind: torch.dtype,
    upstream: Sequence[Tensor],
) -> Side:
    """PEFT's own layers over frozen ones, under autocast as Trainer runs them."""
    from peft import LoraConfig, inject_adapter_in_model

    kind = kind if not room.dry else room.dtype
    names = [f"layer{i}" for i in range(len(ns))]
    r, k = leaves["a0"].shape
    with torch.device(room.device):
        plain = {
            name: torch.nn.Linear(k, n, bias=False, dtype=room.dtype)
            for name, n in zip(names, ns, strict=True)
        }
    config = LoraConfig(r=r, lora_alpha=int(SCALE * r), lora_dropout=p, target_modules=names)
    model: Any = inject_adapter_in_model(config, torch.nn.ModuleDict(plain))
    x = leaves["x"].detach().requires_grad_()
    needed = [x]
    for i, name in enumerate(names):
        layer = model[name]
        factors = layer.lora_A["default"], layer.lora_B["default"]
        layer.base_layer.weight.data = leaves[f"w{i}"]
        for factor, values in zip(factors, (leaves[f"a{i}"], leaves[f"b{i}"]), strict=True):
            factor.weight.data = values.to(kind)
            needed.append(factor.weight)
    model.train()
    half = room.dtype != torch.float32

    def forward() -> Results:
        with torch.autocast(room.device.type, room.dtype, enabled=half):
            return {f"y{i}": model[name](x) for i, name in enumerate(names)}

    def full() -> Results:
        outputs = forward()
        gradients = torch.autograd.grad(list(outputs.values()), needed, list(upstream))
        gradient_names = ["x", *(f"{kind}{i}" for i in range(len(ns)) for kind in "ab")]
        return outputs | {f"d {name}": g for name, g in zip(gradient_names, gradients, strict=True)}

    return Side(forward, full, checked_without_dropout=True)


def _small_first(leaves: dict[str, Tensor], layers: int, upstream: Sequence[Tensor]) -> Side:
    """The low-rank product first, the large one added to it in cuBLAS's epilogue (beta = 1)."""
    x = leaves["x"]
    ws = [leaves[f"w{i}"] for i in range(layers)]
    factors = [[leaves[f"{kind}{i}"].to(x.dtype) for kind in "ab"] for i in range(layers)]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        ys, lows = [], []
        for w, (a, b) in zip(ws, factors, strict=True):
            low = torch.mm(x, a.t())
            y = x.new_empty(len(x), len(w)).addmm_(low, b.t(), beta=0, alpha=SCALE)
            ys.append(y.addmm_(x, w.t()))
            lows.append(low)
        return ys, lows

    def full() -> Results:
        ys, lows = run()
        found = {f"y{i}": y for i, y in enumerate(ys)}
        d_lows = [torch.mm(dy, b).mul_(SCALE) for dy, (_, b) in zip(upstream, factors, strict=True)]
        dx = torch.mm(d_lows[0], factors[0][0])
        for i, (dy, w) in enumerate(zip(upstream, ws, strict=True)):
            if i:
                dx.addmm_(d_lows[i], factors[i][0])
            found[f"d a{i}"] = torch.mm(d_lows[i].t(), x)
            found[f"d b{i}"] = torch.mm(dy.t(), lows[i]).mul_(SCALE)
            dx.addmm_(dy, w)
        return found | {"d x": dx}

    return Side(lambda: {f"y{i}": y for i, y in enumerate(run()[0])}, full)


def _augmented(leaves: dict[str, Tensor], ns: Sequence[int], upstream: Sequence[Tensor]) -> Side:
    """Adapters in further columns and rows of one product: [x | s]·[W | cB]ᵀ, [dy | ds]·[W ; A].

    Inputs and upstream gradients lie in the wide buffers already, where a norm or an activation
    would have written them; the factors were put beside the weights after the last update.
    """
    x = leaves["x"]
    (m, k), count = x.shape, len(ns)
    rank = len(leaves["a0"])
    total, extra = sum(ns), rank * count
    starts = [0, *itertools.accumulate(ns)]
    wide = x.new_zeros(m, k + extra)
    wide[:, :k] = x
    weight = x.new_zeros(total + extra, k + extra)
    wide_dy = x.new_zeros(m, total + extra)
    for i in range(count):
        out, low = slice(starts[i], starts[i + 1]), slice(i * rank, (i + 1) * rank)
        weight[out, :k] = leaves[f"w{i}"]
        weight[total:, :k][low] = leaves[f"a{i}"]
        weight[out, k:][:, low] = SCALE * leaves[f"b{i}"]
        wide_dy[:, out] = upstream[i]
    a, s, ds = weight[total:, :k], wide[:, k:], wide_dy[:, total:]

    def forward() -> Results:
        s.copy_(torch.mm(wide[:, :k], a.t()))
        y = torch.mm(wide, weight[:total].t())
        return {f"y{i}": y[:, starts[i] : starts[i + 1]] for i in range(count)}

    def full() -> Results:
        found = forward()
        ds.copy_(torch.mm(wide_dy[:, :total], weight[:total, k:]))
        found["d x"] = torch.mm(wide_dy, weight[:, :k])
        d_a = torch.mm(ds.t(), wide[:, :k])
        for i in range(count):
            out, low = slice(starts[i], starts[i + 1]), slice(i * rank, (i + 1) * rank)
            found[f"d a{i}"] = d_a[low]
            found[f"d b{i}"] = torch.mm(wide_dy[:, out].t(), s[:, low]).mul_(SCALE)
        return found

    return Side(forward, full)


# --- loss ----------------------------------------------------------------------------------------

TWO_PRODUCTS = "its two products alone"


def loss(room: Room, rows: int, hidden: int, vocabulary: int, masked: float) -> Case:
    """Cross-entropy of a frozen linear head: summed loss and gradient of the hidden states."""
    m, h, v = room.rows(rows), room.size(hidden), room.size(vocabulary)
    leaves = {"x": room.draw(m, h), "weight": room.draw(v, h, scale=h**-0.5)}
    targets = torch.randint(v, (m,), generator=room.generator, device=room.device)
    targets[torch.rand(m, generator=room.generator, device=room.device) < masked] = -100
    wanted = (targets != -100).nonzero().squeeze(1)
    upstream = [torch.ones((), device=room.device)]

    def ours(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight: run(x, weight, targets, rows=wanted)

    def logits_first(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    def torch_chunked(x: Tensor, weight: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options)

    def liger(x: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import (  # pyright: ignore
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(x, weight, targets, reduction="sum")

    def products(_: float) -> Side:
        x, weight = leaves["x"].index_select(0, wanted), leaves["weight"]
        chunk = 2048

        def run() -> Results:
            out = torch.empty_like(x)
            for start in range(0, len(x), chunk):
                logits = x[start : start + chunk] @ weight.t()
                torch.mm(logits, weight, out=out[start : start + chunk])
            return {"products": out}

        return Side(run, run)

    def side(run: Callable[..., Tensor]) -> Callable[[float], Side]:
        return lambda _: differentiated(run, leaves, ["x"], upstream)

    sides: dict[str, Callable[[float], Side]] = {TWO_PRODUCTS: products}
    for name in (TRITON, LATHE):
        sides[name] = side(ours(room.operations(name).linear_cross_entropy))
    sides["logits, F.cross_entropy in fp32"] = side(logits_first)
    sides[COMPILED] = lambda p: side(room.compile(logits_first))(p)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        sides["F.linear_cross_entropy"] = side(torch_chunked)
    if not room.dry:  # its kernels are CUDA's
        sides["Liger"] = side(liger)

    def exact(_: float) -> Results:
        run = ours(operations("reference").linear_cross_entropy)
        exact_side = differentiated(run, in_fp64(leaves), ["x"], upstream)
        assert exact_side.full is not None
        return exact_side.full()

    c, s = room.dtype.itemsize, len(wanted)
    moved = c * (2 * s * h + v * h + 3 * s * v) / 1e9
    return Case(
        part="loss",
        text=f"{m:,} rows, hidden {h:,}, vocabulary {v:,}, {masked:.0%} masked",
        sides=sides,
        exact=exact,
        gigabytes=(moved, moved),
        teraflops=(4 * s * h * v / 1e12, 4 * s * h * v / 1e12),
        floor=TWO_PRODUCTS,
        passes=("full",),  # the gradient is made in the forward pass
    )


# --- norms, rotary embeddings and activations ----------------------------------------------------


def _literal_rms(x: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + change
    exact = total.float() if total.dtype != torch.float64 else total
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    return total, weight * normed.to(x.dtype)


def _literal_layer_norm(
    x: Tensor, change: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + change
    return total, F.layer_norm(total, (x.shape[-1],), weight, bias, 1e-5)


def _literal_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    return rotated(q), rotated(k)


def _literal_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def _literal_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _pointwise(
    room: Room,
    part: str,
    text: str,
    leaves: dict[str, Tensor],
    needed: Sequence[str],
    literal: Callable[..., Any],
    ours: Callable[[Operations], Callable[..., Any]],
    shapes_of_outputs: Sequence[tuple[int, ...]],
    passes: tuple[float, float],
    liger: Callable[..., Any] | None = None,
) -> Case:
    """A case bound by memory: `passes` are the elements moved forward and in both passes."""
    upstream = [room.draw(*shape) for shape in shapes_of_outputs]

    def side(run: Callable[..., Any]) -> Callable[[float], Side]:
        return lambda _: differentiated(run, leaves, needed, upstream)

    sides: dict[str, Callable[[float], Side]] = {
        name: side(ours(room.operations(name))) for name in (TRITON, LATHE)
    }
    sides["eager"] = side(literal)
    sides[COMPILED] = lambda p: side(room.compile(literal))(p)
    if liger is not None and not room.dry:
        sides["Liger"] = side(on_copies(liger))

    def exact(_: float) -> Results:
        exact_side = differentiated(literal, in_fp64(leaves), needed, upstream)
        assert exact_side.full is not None
        return exact_side.full()

    c = room.dtype.itemsize / 1e9
    return Case(
        part=part,
        text=text,
        sides=sides,
        exact=exact,
        gigabytes=(c * passes[0], c * passes[1]),
    )


def norm(room: Room, rows: int, hidden: int, *, centred: bool) -> Case:
    """The residual addition and the norm behind it, frozen, as a layer of a LoRA run has it."""
    m, h = room.rows(rows), room.size(hidden)
    leaves = {"x": room.draw(m, h), "change": room.draw(m, h), "weight": 1 + room.draw(h) / 8}
    if centred:
        leaves["bias"] = room.draw(h)

    def ours(run: Operations) -> Callable[..., Any]:
        function = run.add_layer_norm if centred else run.add_rms_norm
        return lambda **tensors: function(**tensors, eps=1e-5)

    def liger(x: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import (  # pyright: ignore
            liger_fused_add_rms_norm,
        )

        out, total = liger_fused_add_rms_norm(x, change, weight, 1e-5, in_place=False)
        return total, out

    return _pointwise(
        room,
        "layer-norm" if centred else "rms-norm",
        f"{m:,} × {h:,}",
        leaves,
        ["x", "change"],
        _literal_layer_norm if centred else _literal_rms,
        ours,
        [(m, h)] * 2,
        (4 * m * h, 8 * m * h),
        None if centred else liger,
    )


def rotary(room: Room, rows: int, heads: int, kv: int, d: int) -> Case:
    """Queries and keys, rotated."""
    m = room.rows(rows)
    if room.dry:
        d = 10
    angles = torch.outer(
        torch.arange(m, device=room.device),
        10_000.0 ** -(torch.arange(0, d, 2, device=room.device) / d),
    ).repeat(1, 2)
    leaves = {
        "q": room.draw(m, heads, d),
        "k": room.draw(m, kv, d),
        "cos": angles.cos().to(room.dtype),
        "sin": angles.sin().to(room.dtype),
    }

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_rope  # pyright: ignore

        swapped = (x.transpose(0, 1)[None] for x in (q, k))
        return tuple(x[0].transpose(0, 1) for x in liger_rope(*swapped, cos[None], sin[None]))  # pyright: ignore

    moved = 2 * m * (heads + kv) * d
    return _pointwise(
        room,
        "rotary",
        f"{m:,} rows, {heads} + {kv} heads of {d}",
        leaves,
        ["q", "k"],
        _literal_rotary,
        lambda run: run.rotary,
        [(m, heads, d), (m, kv, d)],
        (moved, 2 * moved),
        liger,
    )


def swiglu(room: Room, rows: int, intermediate: int) -> Case:
    """silu(gate) · up."""
    m, i = room.rows(rows), room.size(intermediate)

    def liger(gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu  # pyright: ignore

        return liger_swiglu(gate, up)

    return _pointwise(
        room,
        "swiglu",
        f"{m:,} × {i:,}",
        {"gate": room.draw(m, i), "up": room.draw(m, i)},
        ["gate", "up"],
        _literal_swiglu,
        lambda run: run.swiglu,
        [(m, i)],
        (3 * m * i, 8 * m * i),
        liger,
    )


def gelu(room: Room, rows: int, intermediate: int) -> Case:
    """GELU in its tanh form of a layer's output and its bias, alone.

    The reference has no such step: its bias comes in with the product before (`linear_gelu`).
    """
    from kernels.triton.elementwise import gelu_tanh

    m, i = room.rows(rows), room.size(intermediate)
    case = _pointwise(
        room,
        "gelu",
        f"{m:,} × {i:,}",
        {"x": room.draw(m, i), "bias": room.draw(i)},
        ["x"],
        _literal_gelu,
        lambda run: gelu_tanh,
        [(m, i)],
        (2 * m * i, 5 * m * i),
    )
    sides = {name: side for name, side in case.sides.items() if name != LATHE}
    return replace(case, sides=sides, floor="eager")


def linear_gelu(room: Room, rows: int, hidden: int, intermediate: int) -> Case:
    """A frozen layer with its bias and GELU: with either backend the whole of it."""
    m, h, i = room.rows(rows), room.size(hidden), room.size(intermediate)
    leaves = {
        "x": room.draw(m, h),
        "weight": room.draw(i, h, scale=h**-0.5),
        "bias": room.draw(i),
    }

    def literal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def ours(run: Operations) -> Callable[..., Any]:
        return lambda x, weight, bias: run.linear_gelu(x, Operands(weight, bias))

    case = _pointwise(
        room,
        "linear-gelu",
        f"{m:,} rows, {h:,} → {i:,}",
        leaves,
        ["x"],
        literal,
        ours,
        [(m, i)],
        (m * h + i * h + 2 * m * i, 2 * (m * h + i * h) + 5 * m * i),
    )
    product = 2 * m * h * i / 1e12
    return replace(case, teraflops=(product, 2 * product))


# --- attention -----------------------------------------------------------------------------------

ONE_BY_ONE = "documents one by one"


@functools.cache
def _token_counts() -> list[int]:
    return [tokens for _, tokens in ragged_rows(300)]


def documents(rows: int, longest: int, shrink: int) -> list[int]:
    """Return the token counts of real functions, cut at `longest`, that fill `rows` exactly.

    Args:
        rows: Their sum.
        longest: What a document is cut at.
        shrink: What counts are divided by first.
    """
    lengths: list[int] = []
    for tokens in _token_counts():
        left = rows - sum(lengths)
        if left == 0:
            break
        lengths.append(min(-(-tokens // shrink), longest, left))
    return lengths


def attend(room: Room, rows: int, heads: int, kv: int, d: int) -> Case:
    """Causal attention inside ragged documents, unpadded but for the side that pads."""
    m = room.rows(rows)
    if room.dry:
        d = 8
    lengths = documents(m, 1024, 1) if not room.dry else documents(m, 9, 40)
    segments = Segments.build(lengths, device=room.device)
    scale = d**-0.5
    leaves = {"q": room.draw(m, heads, d), "k": room.draw(m, kv, d), "v": room.draw(m, kv, d)}
    upstream = [room.draw(m, heads * d)]
    longest, count = max(lengths), len(lengths)
    inside = torch.arange(longest, device=room.device) < torch.tensor(
        lengths, device=room.device
    ).unsqueeze(1)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=room.device).tril()
    document, place = inside.nonzero(as_tuple=True)
    # Pads see real keys too: what they compute is thrown away, and no row is without a key.
    mask = (causal & inside[:, None, :]).unsqueeze(1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [
            x.new_zeros(count, longest, *x.shape[1:])
            .index_put((document, place), x)
            .transpose(1, 2)
            for x in (q, k, v)
        ]
        q, k, v = wide
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)[document, place].flatten(1)

    def flexible(p: float) -> Side:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (document[i] == document[j]) & (i >= j)

        blocks = create_block_mask(visible, None, None, m, m, device=str(room.device))
        run: Callable[..., Any] = torch.compile(flex_attention)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            wide = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            out = run(*wide, block_mask=blocks, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        return differentiated(call, leaves, list(leaves), upstream)

    def lathe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, segments, scale=scale)

    alone = [Segments.build([length], device=room.device) for length in lengths]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat(
            [
                attention(*piece[:3], segments=one, scale=scale)
                for piece, one in zip(pieces, alone, strict=True)
            ]
        )

    def side(run: Callable[..., Tensor]) -> Callable[[float], Side]:
        return lambda _: differentiated(run, leaves, list(leaves), upstream)

    def exact(_: float) -> Results:
        def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, segments, scale=scale, implementation="eager")

        exact_side = differentiated(eager, in_fp64(leaves), list(leaves), upstream)
        assert exact_side.full is not None
        return exact_side.full()

    which = "varlen" if varlen.serves(leaves["q"], segments, room.dtype) else "one by one"
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    moved = room.dtype.itemsize * m * d * (2 * heads + 2 * kv) / 1e9
    return Case(
        part="attention",
        text=f"{m:,} rows, {count} documents, {heads} + {kv} heads of {d} (ours: {which})",
        sides={
            LATHE: side(lathe),
            ONE_BY_ONE: side(one_by_one),
            "padded, SDPA with a mask": side(padded),
            # Its backward pass is CUDA's.
            **({} if room.dry else {"flex_attention": flexible}),
        },
        exact=exact,
        gigabytes=(moved, 3 * moved),
        teraflops=(4 * heads * d * pairs / 1e12, 14 * heads * d * pairs / 1e12),
    )


# --- optimizers ----------------------------------------------------------------------------------


RATE, CHECKED_STEPS = 1e-2, 3


def optimizer(room: Room, name: str, shapes: Sequence[tuple[int, ...]], text: str) -> Case:
    """One update of fp32 masters; what is compared are all updates and our states."""
    from train.optim import build_optimizer

    shapes = [tuple(room.size(n) if n > 64 else n for n in shape) for shape in shapes]
    if room.dry:
        shapes = shapes[:6]
    # Small beside their updates, which are compared and must not drown in the weights' rounding.
    values = [room.draw(*shape, scale=0.01, dtype=torch.float32) for shape in shapes]
    gradients = [
        [room.draw(*shape, dtype=torch.float32) for shape in shapes] for _ in range(CHECKED_STEPS)
    ]
    options: dict[str, Any] = {"lr": RATE, "weight_decay": 0.1}

    def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(value.to(dtype, copy=True)) for value in values]

    def side_of(
        step: Callable[[float], None],
        weights: Sequence[Tensor],
        state: Callable[[], Results] = dict,
        *,
        scales_itself: bool = False,
    ) -> Side:
        """Do the steps that are compared, each with a gradient and a scale of its own."""
        for number, of_step in enumerate(gradients):
            scale = 1.0 - 0.25 * number
            for weight, gradient in zip(weights, of_step, strict=True):
                drawn = gradient.to(weight.dtype, copy=True)
                weight.grad = drawn if scales_itself else drawn.mul_(scale)
            step(scale)
        after = {
            f"update {i}": weight.detach() - values[i].to(weight.dtype)
            for i, weight in enumerate(weights)
        }
        after |= {key: value.clone() for key, value in state().items()}

        def forward() -> Results:
            step(1.0)
            return {}

        return Side(forward, lambda: after)

    def lathe(backend: str, dtype: torch.dtype = torch.float32) -> Side:
        weights = parameters(dtype)
        model = torch.nn.ParameterDict({f"p{i}": w for i, w in enumerate(weights)})
        ours = build_optimizer(
            name, model, weight_decay=0.1, operations=operations(backend, room.device)
        )
        return side_of(
            lambda scale: ours.step(RATE, scale), weights, ours.state_tensors, scales_itself=True
        )

    def theirs(make: Callable[..., Any], **more: Any) -> Side:
        weights = parameters()
        other = make(weights, **options, **more)
        return side_of(lambda _: other.step(), weights)

    sides: dict[str, Callable[[float], Side]] = {
        TRITON: lambda _: lathe("triton"),
        LATHE: lambda _: lathe("reference"),
    }
    if name == "adamw":
        sides["torch, foreach"] = lambda _: theirs(torch.optim.AdamW, foreach=True)
        sides["torch, fused"] = lambda _: theirs(torch.optim.AdamW, fused=True)
    else:

        def stack(_: float) -> Side:
            from transformers.optimization import Adafactor

            return theirs(Adafactor, scale_parameter=False, relative_step=False)

        sides["transformers"] = stack

    def exact(_: float) -> Results:
        side = lathe("reference", torch.float64)
        assert side.full is not None
        return side.full()

    elements = sum(math.prod(shape) for shape in shapes)
    moved = elements * (28 if name == "adamw" else 20) / 1e9
    return Case(
        part=name,
        text=f"{text}: {len(shapes)} tensors, {elements:,} parameters",
        sides=sides,
        exact=exact,
        gigabytes=(moved, moved),
        passes=("forward",),
        graph=False,  # torch's optimizers refuse to be captured
    )


def adapters_of(hidden: int, kv: int, intermediate: int, layers: int, rank: int) -> list[Any]:
    """Return the shapes of LoRA's factors on all linear layers of a StarCoder2 model."""
    linear = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, intermediate),
        (intermediate, hidden),
    ]
    return [shape for _ in range(layers) for k, n in linear for shape in ((rank, k), (n, rank))]


# --- the table of cases --------------------------------------------------------------------------

Make = Callable[[Room], Case]


def cases() -> Iterator[tuple[str, Make]]:
    """Yield (part, maker) of every case, in the order that they are measured in."""
    for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
        for p in (0.0, 0.1):
            yield "linear", lambda room, k=k, n=n, p=p: linears(room, 8192, k, [n], 16, p, "linear")
    for k, n in ((1536, 8960), (8960, 1536), (4096, 11008)):
        for p in (0.0, 0.05):
            yield "linear", lambda room, k=k, n=n, p=p: linears(room, 8192, k, [n], 32, p, "linear")
    for p in (0.0, 0.1):
        yield (
            "linear",
            lambda room, p=p: linears(room, 24576, 3072, [12288], 16, p, "linear"),
        )
        yield (
            "shared-input",
            lambda room, p=p: linears(room, 8192, 3072, [3072, 256, 256], 16, p, "shared-input"),
        )
        yield (
            "shared-input",
            lambda room, p=p: linears(room, 8192, 1536, [8960, 8960], 32, p, "shared-input"),
        )
    for h, v in ((3072, 49_152), (1536, 151_936), (4096, 32_000)):
        for masked in (0.0, 0.5):
            yield "loss", lambda room, h=h, v=v, s=masked: loss(room, 8192, h, v, s)
    for rows in (8192, 24576):
        yield "layer-norm", lambda room, m=rows: norm(room, m, 3072, centred=True)
        for h in (1536, 4096):
            yield "rms-norm", lambda room, m=rows, h=h: norm(room, m, h, centred=False)
        yield "gelu", lambda room, m=rows: gelu(room, m, 12_288)
        yield "linear-gelu", lambda room, m=rows: linear_gelu(room, m, 3072, 12_288)
        for i in (8960, 11_008):
            yield "swiglu", lambda room, m=rows, i=i: swiglu(room, m, i)
        for heads in ((24, 2), (12, 2), (32, 32)):
            yield "rotary", lambda room, m=rows, heads=heads: rotary(room, m, *heads, 128)
    for rows in (8192, 24576):
        yield "attention", lambda room, m=rows: attend(room, m, 24, 2, 128)
    adapters = adapters_of(3072, 256, 12_288, 30, 16)
    layers = [(3072, 3072), (12_288, 3072), (3072, 12_288), (3072,)] * 4
    for name in ("adamw", "adafactor"):
        yield name, lambda room, n=name: optimizer(room, n, adapters, "StarCoder2-3B's adapters")
        yield name, lambda room, n=name: optimizer(room, n, layers, "4 layers in full")


PARTS = tuple(dict.fromkeys(part for part, _ in cases()))
