"""The operations of another backend against the reference, once, at one small ragged shape.

Legend: M token rows · H hidden size · N, I features out · R rank · V vocabulary · D head size

Interpreter and compile tests vouch for the kernels before there is a card. What they cannot see is
this card, its driver and this version of Triton. So where no record tells of the card a run begins
with this: outputs and gradients of each operation that is not the reference's, in the run's
precision, against the reference in fp64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files.errors import UserError
from files.strict_json import read_json_object
from kernels.dispatch import Operations, operations
from kernels.dropout import Draw
from kernels.loss import IGNORE
from kernels.operands import Made, Operands, value_of
from kernels.quantised import KINDS, QuantisedWeight, quantised
from kernels.segments import Segments
from kernels.triton import launch
from train.config.schema import RunConfig
from train.optim.adafactor import EPSILON, adafactor_update
from train.optim.adamw import adamw_update
from train.optim.buffers import in_step
from train.precision import COMPUTE_DTYPES
from train.saving.folder import code_commit, device_name, package_versions

# Three documents, of no tile's length; widths that no tile divides, though 16 does.
_LENGTHS = (19, 1, 50)
_M, _H, _N, _I, _R, _V, _D = sum(_LENGTHS), 208, 144, 272, 12, 307, 16
_RATES: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "gradient_factor": 0.5}


@dataclass(frozen=True)
class _Case:
    """One operation: the shapes of its inputs, and what it makes of them."""

    shapes: tuple[tuple[int, ...], ...]
    run: Callable[[Operations, Segments, list[Tensor]], Sequence[Tensor | Made]]


def _linears(ours: Operations, segments: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    layers = [
        Operands(t[1], t[2], t[3], t[4], 2.0, 0.1, module=7),
        Operands(t[5], None, t[6], t[7], 2.0, 0.1, module=9),
    ]
    return ours.linears(t[0], layers, segments)


def _linear_gelu(ours: Operations, segments: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    layer = Operands(t[1], t[2], t[3], t[4], 2.0, 0.1, module=7)
    return _read(ours, segments, ours.linear_gelu(t[0], layer, segments), t[5:])


def _read(ours: Operations, segments: Segments, x: Made, t: list[Tensor]) -> Sequence[Tensor]:
    """Return an activation and what a layer makes of it that keeps what it is made of."""
    layer = Operands(t[0].detach(), None, t[1], t[2], 2.0, 0.1, module=9)
    return [x.value, *ours.linears(x, [layer], segments)]


def _added(
    norm: Callable[..., tuple[Tensor, Made]], segments: Segments, t: list[Tensor]
) -> Sequence[Tensor | Made]:
    return [*norm(*t, 1e-5), *norm(*t, 1e-5, _draw(segments))]


def _draw(segments: Segments) -> Draw:
    assert segments.dropout_rows is not None
    return Draw(segments.dropout_rows, 5, 0.1)


def _rotary(ours: Operations, _: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    tables = (torch.cat((half, half), -1).detach() for half in t[2:])
    return ours.rotary(t[0], t[1], *tables)


def _loss(ours: Operations, _: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    targets = torch.arange(_M, device=t[0].device)
    targets[::5] = IGNORE
    rows = (targets != IGNORE).nonzero().squeeze(1)
    weights = torch.linspace(0.5, 2.0, len(rows), device=t[0].device)
    given = t[0], t[1], targets
    weighted = ours.linear_cross_entropy(*given, rows=rows, weights=weights)
    return [ours.linear_cross_entropy(*given, rows=rows), weighted]


def _dequantise(ours: Operations, _: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    made = []
    for kind in KINDS:
        parts = quantised(t[0].detach().float().cpu(), kind)
        placed = {name: part.to(t[0].device) for name, part in parts.items()}
        weight = QuantisedWeight(kind, tuple(t[0].shape), t[0].dtype, placed, ours.dequantise)
        made.append(weight.dense(t[0].dtype))
    return made


def _adamw(ours: Operations, _: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    weight, gradient, first, root = (x.detach().flatten().clone() for x in t)
    second = root.square()
    update = ours.adamw_ or adamw_update
    update(weight, gradient, first, second, step=3, betas=(0.9, 0.999), eps=1e-8, **_RATES)
    return [weight, first, second]


def _adafactor(ours: Operations, _: Segments, t: list[Tensor]) -> Sequence[Tensor]:
    weight, gradient, root = (x.detach().clone() for x in t)
    row, column = root.square().mean(-1), root.square().mean(-2)
    update = ours.adafactor_ or adafactor_update
    steps = update(weight, gradient, row, column, beta2=0.5, epsilon=EPSILON, **_RATES)
    in_step([steps], None)
    return [weight, row, column]


_X, _COLUMN, _ADAPTED = (_M, _H), (_H,), ((_N, _H), (_N,), (_R, _H), (_N, _R))
_READER = ((_N, _H), (_R, _H), (_N, _R))
_CASES = {
    "linears": _Case((_X, *_ADAPTED, (_I, _H), (_R, _H), (_I, _R)), _linears),
    "linear_gelu": _Case((_X, *_ADAPTED, (_H, _N), (_R, _N), (_H, _R)), _linear_gelu),
    "rms_norm": _Case(
        (_X, _COLUMN, *_READER),
        lambda ours, s, t: _read(ours, s, ours.rms_norm(*t[:2], 1e-5), t[2:]),
    ),
    "layer_norm": _Case(
        (_X, _COLUMN, _COLUMN, *_READER),
        lambda ours, s, t: _read(ours, s, ours.layer_norm(*t[:3], 1e-5), t[3:]),
    ),
    "add": _Case((_X, _X), lambda ours, s, t: [ours.add(*t, _draw(s))]),
    "add_rms_norm": _Case((_X, _X, _COLUMN), lambda ours, s, t: _added(ours.add_rms_norm, s, t)),
    "add_layer_norm": _Case(
        (_X, _X, _COLUMN, _COLUMN), lambda ours, s, t: _added(ours.add_layer_norm, s, t)
    ),
    "rotary": _Case(((_M, 3, _D), (_M, 1, _D), (_M, _D // 2), (_M, _D // 2)), _rotary),
    "swiglu": _Case(
        ((_M, _I), (_M, _I), (_N, _I), (_R, _I), (_N, _R)),
        lambda ours, s, t: _read(ours, s, ours.swiglu(*t[:2]), t[2:]),
    ),
    "linear_cross_entropy": _Case((_X, (_V, _H)), _loss),
    "dequantise": _Case(((_N, _H - 1),), _dequantise),
    "adamw_": _Case(((3, _M, _H),) * 4, _adamw),
    "adafactor_": _Case(((3, _M, _H),) * 3, _adafactor),
}


def replaced(ours: Operations, device: torch.device) -> list[str]:
    """Return the operations that are not the reference's, in the order of `Operations`."""
    plain = operations("reference", device)
    names = [field.name for field in dataclasses.fields(ours) if field.name != "name"]
    return [name for name in names if getattr(ours, name) is not getattr(plain, name)]


def disagreement(
    ours: Operations, name: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return what is wrong with one operation on a device, as a predicate; None where it agrees.

    The bound is that of rounding: inputs are the same, and in `dtype` no result is rounded more
    than three times on its way; sums of some hundred terms are made in fp32.

    Args:
        ours: The backend.
        name: The operation.
        device: Where it runs.
        dtype: What the run computes in; updates are in fp32 always.
    """
    dtype = torch.float32 if name.endswith("_") else dtype
    try:
        # First: nothing right may lie in the memory that it is given.
        found = _results(name, ours, device, dtype, dtype)
        exact = _results(name, operations("reference", device), device, dtype, torch.float64)
        bound = 4 * (1.5 * torch.finfo(dtype).eps + 512 * 2**-24)
        for one, other in zip(found, exact, strict=True):
            away = ((one.double() - other).abs().max() / other.abs().max()).item()
            if not away <= bound:  # nor is it where it is no number
                return f"differs from the reference by {away:.2g} of its largest value"
    # What a compiler or a driver raises is anybody's: whatever it is, this kernel does not run.
    except Exception as error:
        return f"does not run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return None


def _results(
    name: str, ours: Operations, device: torch.device, dtype: torch.dtype, kind: torch.dtype
) -> list[Tensor]:
    """Return outputs and gradients of an operation in `kind`, of inputs rounded to `dtype`."""
    segments = Segments.build(_LENGTHS, device=device, examples=(4, 9, 2), draw=(42, 3))
    generator = torch.Generator().manual_seed(1)
    leaves = []
    for shape in _CASES[name].shapes:
        size = 1.0 if shape[0] in (_M, 3) else shape[-1] ** -0.5  # products stay of size 1
        drawn = torch.randn(shape, generator=generator) * size
        leaves.append(drawn.to(dtype).to(device, kind).requires_grad_())
    outputs = [value_of(y) for y in _CASES[name].run(ours, segments, leaves)]
    if not outputs[0].requires_grad:
        return outputs
    upstream = []
    for y in outputs:
        drawn = torch.randn(y.shape, generator=generator)
        upstream.append(drawn.to(dtype).to(device, y.dtype))
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def vouch(config: RunConfig, device: torch.device, folder: Path | None) -> dict[str, Any] | None:
    """Check the kernels of a run, unless records or the run's own folder tell of them already.

    Args:
        config: The run's, every `auto` decided.
        device: Where it computes.
        folder: Of a resumed run.

    Returns:
        What was checked and where, for environment.json; None where nothing needs to be.

    Raises:
        UserError: A kernel disagrees with the reference, or does not run.
    """
    if device.type != "cuda" or launch.decided(device):
        return None
    return checked(config, operations(config.train.kernels, device), device, folder)


def checked(
    config: RunConfig, ours: Operations, device: torch.device, folder: Path | None
) -> dict[str, Any] | None:
    """Check what of `ours` is not the reference's; arguments and result as of `vouch`."""
    if not (names := replaced(ours, device)):
        return None
    precision, card = config.train.precision, device_name(device)
    found = {
        "operations": names,
        "precision": precision,
        "device": card,
        "versions": package_versions(("torch", "triton")),
        "commit": code_commit(),
    }
    if folder is not None and _told_by(folder) == found:
        return found
    for name in names:
        if fault := disagreement(ours, name, device, COMPUTE_DTYPES[precision]):
            raise UserError(
                f"train.kernels={config.train.kernels}: Triton's {name} {fault} in {precision} on "
                f"{card}, so nothing is trained with it; use train.kernels=reference"
            )
    return found


def _told_by(folder: Path) -> Any:
    """Return what a run's environment.json says was checked; None where it says nothing."""
    try:
        return read_json_object(folder / "environment.json").get("kernels_checked")
    except UserError:
        return None
