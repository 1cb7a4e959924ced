"""AdamW and Adafactor, written out, and the clipping that comes before them.

Parameters are fp32 masters and so is every state (fp64 parameters, as tests use them, get fp64
states). The learning rate is an argument of `step`: the schedule is the plan's, and no optimizer
holds a copy. An optimizer's state is plain tensors by name, so a checkpoint of it is a safetensors
file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from files.errors import UserError, did_you_mean

OPTIMIZERS = ("adamw", "paged_adamw", "adafactor")

# Elements that one block of an AdamW update covers. Two buffers of this size serve all blocks, so
# the update's extra memory does not grow with the model. On a CPU longer blocks fall out of the
# caches (8 million elements took 9.3 ms a step at 2^20, 12.4 at 2^22); a GPU wants fewer launches.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 22

# torch's own multi-tensor operations: one call for a list of tensors, one launch for many on CUDA.
_foreach_add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
_foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(name: str) -> bool:
    """Return whether weight decay applies to a parameter of this name.

    It spares biases and norms; LoRA's A and B and the embeddings are decayed.

    Source: transformers 5.23 `Trainer.get_decay_parameter_names`.
    """
    return _NO_DECAY.search(name.lower()) is None


def decayed_parameters(model: nn.Module) -> set[str]:
    """Return the names of a model's trainable parameters that weight decay applies to.

    To the rule of `decays` this adds that nothing inside an `nn.LayerNorm` decays, whatever it is
    called.
    """
    layer_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and decays(name) and name not in layer_norms
    }


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Parameter], max_norm: float, *, loss_scale: float = 1.0
) -> float:
    """Bound the global L2 norm of the gradients, in place, and return the norm before that.

    The loss scale is divided out first, in the same pass. A norm that is not finite leaves every
    gradient as it was: the caller skips the step.

    Args:
        parameters: Their `.grad`s are scaled; a parameter without one is passed over.
        max_norm: Bound of the norm; 0 or less clips nothing.
        loss_scale: What the loss was multiplied by before the backward pass.

    Source: g · min(1, c / (n + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack(_foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms).item() / loss_scale
    if not math.isfinite(norm):
        return norm
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    if factor / loss_scale != 1.0:
        _foreach_mul_(gradients, factor / loss_scale)
    return norm


@dataclass(frozen=True)
class _Bucket:
    """Parameters that are updated together, their moments end to end in two flat tensors.

    Hundreds of small LoRA tensors become a handful of long ones this way: an update costs a few
    operations in all rather than a few for each tensor.

    Attributes:
        names: The parameters' names.
        parameters: The parameters; all that follows lies in their order.
        weight_decay: Their decay.
        exp_avg: First moments, (n,).
        exp_avg_sq: Second moments, (n,).
        gradient: Working memory that buckets share, (n,), or a block where a lone parameter is
            longer.
        update: The same, for the update's direction.
        gradient_views: `gradient` in the parameters' shapes, made once because a view costs as much
            host time as an operation; empty for a lone parameter.
        update_views: The same of `update`.
    """

    names: list[str]
    parameters: list[Tensor]
    weight_decay: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    update: Tensor
    gradient_views: list[Tensor]
    update_views: list[Tensor]


class AdamW:
    """Adam with decoupled weight decay.

    m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; then, with m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ),
    θ ← θ(1 - lr·wd) - lr·m̂/(√v̂ + ε).

    Attributes:
        parameters: What is trained, by name.
        steps: Updates made.

    Source: Loshchilov & Hutter 2019; `torch.optim.AdamW`, equal to rounding.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
    ) -> None:
        """Allocate the moments, as zeros beside the parameters.

        Args:
            named_parameters: What is trained, fp32 or fp64.
            betas: Decay rates of the two moments.
            eps: Added to the root of the second moment.
            weight_decay: Share of a weight that a learning rate of 1 would remove in a step.
            decayed: Names that weight decay applies to; None takes those for which `decays` holds.

        Raises:
            ValueError: A parameter is in half precision, which cannot hold small updates.
        """
        self.parameters = _masters(named_parameters)
        self.betas = betas
        self.eps = eps
        self.steps = 0
        if decayed is None:
            decayed = {name for name in self.parameters if decays(name)}
        self._buckets = _buckets(self.parameters, weight_decay, decayed)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter once with its gradient.

        Raises:
            ValueError: A parameter has no gradient; nothing has been changed then.
        """
        _require_gradients(self.parameters)
        self.steps += 1
        beta1, beta2 = self.betas
        size = -learning_rate * math.sqrt(1.0 - beta2**self.steps) / (1.0 - beta1**self.steps)
        for bucket in self._buckets:
            if bucket.weight_decay:
                _foreach_mul_(bucket.parameters, 1.0 - learning_rate * bucket.weight_decay)
            if len(bucket.parameters) == 1:
                self._step_one(bucket, size)
            else:
                self._step_many(bucket, size)

    def _step_many(self, bucket: _Bucket, size: float) -> None:
        """Update a bucket's parameters together, their gradients copied end to end first."""
        _foreach_copy_(bucket.gradient_views, _gradients(bucket.parameters))
        self._direction(bucket.exp_avg, bucket.exp_avg_sq, bucket.gradient, out=bucket.update)
        _foreach_add_(bucket.parameters, bucket.update_views, alpha=size)

    def _step_one(self, bucket: _Bucket, size: float) -> None:
        """Update a lone parameter block by block, without copying its gradient."""
        whole = (
            bucket.parameters[0].view(-1),
            _gradients(bucket.parameters)[0].reshape(-1),
            bucket.exp_avg,
            bucket.exp_avg_sq,
        )
        blocks = [tensor.split(bucket.update.numel()) for tensor in whole]
        for weight, gradient, exp_avg, exp_avg_sq in zip(*blocks, strict=True):
            out = bucket.update[: weight.numel()]
            self._direction(exp_avg, exp_avg_sq, gradient, out=out)
            weight.add_(out, alpha=size)

    def _direction(
        self, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, *, out: Tensor
    ) -> None:
        """Advance both moments and write m / (√v + ε√(1-β₂ᵗ)) into `out`.

        The bias corrections are scalars, and with numerator and denominator multiplied by √(1-β₂ᵗ)
        they need no pass over memory: m̂/(√v̂ + ε) is this direction times √(1-β₂ᵗ)/(1-β₁ᵗ).
        """
        beta1, beta2 = self.betas
        exp_avg.lerp_(gradient, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        torch.sqrt(exp_avg_sq, out=out).add_(self.eps * math.sqrt(1.0 - beta2**self.steps))
        torch.div(exp_avg, out, out=out)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg` and `<name>.exp_avg_sq`; `steps`."""
        tensors = {"steps": torch.tensor(self.steps)}
        for bucket in self._buckets:
            for kind, flat in (("exp_avg", bucket.exp_avg), ("exp_avg_sq", bucket.exp_avg_sq)):
                views = _unflatten(flat, bucket.parameters)
                for name, view in zip(bucket.names, views, strict=True):
                    tensors[f"{name}.{kind}"] = view
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_tensors` gave.

        Raises:
            UserError: Tensors are missing, unexpected, or of another shape; all of them are listed.
        """
        self.steps = _copy_state(self.state_tensors(), tensors)


class Adafactor:
    """Adafactor as the stack configures it: external learning rate, no first moment.

    A matrix (or a stack of them) keeps the means of its squared gradient by row and by column
    instead of the whole: rows + columns floats of state in place of rows x columns. t counts from
    1, so that β₂ is 0 at the first step:

    1. β₂ = 1 - t^-0.8; q = g² + 1e-30.
    2. R ← β₂R + (1-β₂)·mean(q, -1); C ← β₂C + (1-β₂)·mean(q, -2); v̂ = R⊗C / mean(R).
       A vector: v̂ ← β₂v̂ + (1-β₂)q.
    3. u = g/√v̂; u ← u / max(1, RMS(u)); θ ← θ - wd·lr·θ; θ ← θ - lr·u.

    `torch.optim.Adafactor` is another rule: it scales by the RMS of the parameter and decays first.

    Attributes:
        parameters: What is trained, by name.
        steps: Updates made.

    Source: Shazeer & Stern 2018; transformers 5.23 `optimization.Adafactor` with
        `scale_parameter=False, relative_step=False`, which `optim="adafactor"` selects.
    """

    epsilon = 1e-30
    decay_rate = -0.8

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        *,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
    ) -> None:
        """Allocate the second moments, as zeros beside the parameters; arguments as `AdamW`'s."""
        self.parameters = _masters(named_parameters)
        self.weight_decay = weight_decay
        self.steps = 0
        self._decayed = (
            {name for name in self.parameters if decays(name)} if decayed is None else set(decayed)
        )
        self._state = {
            name: _second_moments(parameter) for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter once with its gradient.

        Raises:
            ValueError: A parameter has no gradient; nothing has been changed then.
        """
        _require_gradients(self.parameters)
        self.steps += 1
        beta2 = 1.0 - self.steps**self.decay_rate
        for name, parameter in self.parameters.items():
            (gradient,) = _gradients([parameter])
            update = self._update(self._state[name], gradient, beta2)
            root_mean_square = torch.linalg.vector_norm(update) / math.sqrt(update.numel())
            update.mul_(learning_rate / root_mean_square.clamp_(min=1.0))
            if self.weight_decay and name in self._decayed:
                parameter.mul_(1.0 - self.weight_decay * learning_rate)
            parameter.sub_(update)

    def _update(self, state: dict[str, Tensor], gradient: Tensor, beta2: float) -> Tensor:
        """Advance the second moments and return g/√v̂, in memory of its own."""
        squared = torch.square(gradient).add_(self.epsilon)
        if "exp_avg_sq" in state:
            second_moment = state["exp_avg_sq"].lerp_(squared, 1.0 - beta2)
            return torch.rsqrt(second_moment, out=squared).mul_(gradient)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.lerp_(squared.mean(dim=-1), 1.0 - beta2)
        column.lerp_(squared.mean(dim=-2), 1.0 - beta2)
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        column_factor = column.rsqrt().unsqueeze(-2)
        return torch.mul(gradient, row_factor, out=squared).mul_(column_factor)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg_sq_row` and `_col`, or `.exp_avg_sq`; `steps`."""
        tensors = {
            f"{name}.{kind}": tensor
            for name, state in self._state.items()
            for kind, tensor in state.items()
        }
        return {"steps": torch.tensor(self.steps), **tensors}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_tensors` gave.

        Raises:
            UserError: Tensors are missing, unexpected, or of another shape; all of them are listed.
        """
        self.steps = _copy_state(self.state_tensors(), tensors)


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamW | Adafactor:
    """Return the optimizer of a model's trainable parameters.

    `paged_adamw` is `adamw`: paging keeps the moments in host memory under pressure and changes no
    number, and the moments of an adapter (8 bytes a trained parameter) fit beside the model.
    Adafactor takes neither betas nor eps.

    Raises:
        UserError: `name` is no optimizer, or nothing in the model is trainable.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer.name: '{name}' is not one of {', '.join(OPTIMIZERS)}"
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if not trainable:
        raise UserError(
            f"{type(model).__name__} has no trainable parameter: inject an adapter or unfreeze it"
        )
    decayed = decayed_parameters(model)
    if name == "adafactor":
        return Adafactor(trainable, weight_decay=weight_decay, decayed=decayed)
    return AdamW(trainable, betas=betas, eps=eps, weight_decay=weight_decay, decayed=decayed)


def _masters(named_parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return the parameters as our own dictionary, each checked to be fit for a master copy."""
    for name, parameter in named_parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}: trained parameters are kept in float32, because "
                "half precision cannot hold small updates"
            )
    return dict(named_parameters)


def _require_gradients(parameters: Mapping[str, Parameter]) -> None:
    """Refuse a step in which a trained parameter took no part: what it should do is undefined."""
    absent = [name for name, parameter in parameters.items() if parameter.grad is None]
    if absent:
        raise ValueError(
            f"no gradient reached {len(absent)} of {len(parameters)} trained parameters: "
            f"{', '.join(absent[:5])}"
        )


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _buckets(
    parameters: Mapping[str, Parameter], weight_decay: float, decayed: Collection[str]
) -> list[_Bucket]:
    """Gather the parameters, in order, into buckets of one decay, device and dtype each.

    A bucket holds at most a block's elements, or a single parameter.
    """
    runs: dict[tuple[bool, torch.device, torch.dtype], list[list[str]]] = {}
    for name, parameter in parameters.items():
        of_kind = runs.setdefault((name in decayed, parameter.device, parameter.dtype), [[]])
        elements = sum(parameters[other].numel() for other in of_kind[-1])
        if of_kind[-1] and elements + parameter.numel() > _block_elements(parameter.device):
            of_kind.append([])
        of_kind[-1].append(name)
    buckets = []
    for (decayed_run, device, dtype), of_kind in runs.items():
        members = [{name: parameters[name] for name in names} for names in of_kind]
        longest = max(sum(parameter.numel() for parameter in run.values()) for run in members)
        scratch = torch.empty(2, min(longest, _block_elements(device)), device=device, dtype=dtype)
        decay = weight_decay if decayed_run else 0.0
        buckets += [_bucket(run, decay, scratch) for run in members]
    return buckets


def _bucket(members: Mapping[str, Parameter], weight_decay: float, scratch: Tensor) -> _Bucket:
    parameters: list[Tensor] = list(members.values())
    count = sum(parameter.numel() for parameter in parameters)
    gradient, update = scratch[:, :count]
    alone = len(parameters) == 1
    return _Bucket(
        names=list(members),
        parameters=parameters,
        weight_decay=weight_decay,
        exp_avg=parameters[0].new_zeros(count),
        exp_avg_sq=parameters[0].new_zeros(count),
        gradient=gradient,
        update=update,
        gradient_views=[] if alone else _unflatten(gradient, parameters),
        update_views=[] if alone else _unflatten(update, parameters),
    )


def _block_elements(device: torch.device) -> int:
    return _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS


def _unflatten(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat tensor in the parameters' shapes."""
    pieces = flat.split([parameter.numel() for parameter in parameters])
    return [
        piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)
    ]


def _second_moments(parameter: Parameter) -> dict[str, Tensor]:
    """Return Adafactor's zero state: by row and column from two dimensions on, else in full."""
    if parameter.ndim < 2:
        return {"exp_avg_sq": torch.zeros_like(parameter, requires_grad=False)}
    shape = parameter.shape
    return {
        "exp_avg_sq_row": parameter.new_zeros(shape[:-1]),
        "exp_avg_sq_col": parameter.new_zeros(shape[:-2] + shape[-1:]),
    }


@torch.no_grad()
def _copy_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> int:
    """Copy a saved state into the live one and return its step count.

    Raises:
        UserError: Names or shapes differ; all are listed, and nothing has been copied.
    """
    faults = [f"{name} is missing" for name in own if name not in given]
    faults += [f"{name} is unexpected" for name in given if name not in own]
    faults += [
        f"{name} has shape {list(given[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if faults:
        raise UserError(f"optimizer state does not fit the trained parameters: {'; '.join(faults)}")
    for name, tensor in own.items():
        tensor.copy_(given[name])
    return int(given["steps"].item())
