"""AdamW, written out; which parameters decay; the optimizer of a model.

Parameters are fp32 masters and so is every state (fp64 parameters, as tests use them, get fp64
states). The learning rate is an argument of `step`: the schedule is the plan's, and no optimizer
holds a copy. An optimizer's state is plain tensors by name, so a checkpoint of it is a safetensors
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from files.errors import UserError, did_you_mean
from kernels.dispatch import Operations
from train.optim.adafactor import Adafactor
from train.optim.buffers import Optimizer, decays

OPTIMIZERS = ("adamw", "paged_adamw", "adafactor")

# Elements that are worked on at a time, and so the size of the update's working memory. On a CPU
# what a block touches stays in the shared cache, and shorter blocks (2^15 to 2^19 were tried) cost
# more in calls than they save; a GPU wants fewer launches.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 22


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


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; then, with m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ),
    θ ← θ(1 - lr·wd) - lr·m̂/(√v̂ + ε).

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
        kernel: Callable[..., None] | None = None,
    ) -> None:
        """Allocate the moments, as zeros beside the parameters.

        Args:
            named_parameters: What is trained, fp32 or fp64.
            betas: Decay rates of the two moments.
            eps: Added to the root of the second moment.
            weight_decay: Share of a weight that a learning rate of 1 would remove in a step.
            decayed: Names that weight decay applies to; None takes those for which `decays` holds.
            kernel: What updates fp32 parameters in the place of `_update`: a backend's `adamw_`.

        Raises:
            ValueError: As `Optimizer`.
        """
        super().__init__(named_parameters, weight_decay, decayed)
        self._kernel = kernel if self.weights.dtype == torch.float32 else None
        self.betas = betas
        self.eps = eps
        self._exp_avg = torch.zeros_like(self.weights)
        self._exp_avg_sq = torch.zeros_like(self.weights)
        self._lone_moments = {
            name: (_zeros(parameter), _zeros(parameter)) for name, parameter in self.lone.items()
        }
        on_cpu = self.weights.device.type == "cpu"
        self._block = _BLOCK_ELEMENTS_CPU if on_cpu else _BLOCK_ELEMENTS
        self._scratch = self.weights.new_empty(0 if self._kernel else self._block)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every parameter once with `gradient_scale` times its gradient."""
        self._gather_gradients()
        self.steps += 1
        flat = (self.weights, self.gradients, self._exp_avg, self._exp_avg_sq)
        split = max((group.end for group in self.groups if group.decayed), default=0)
        decay = 1.0 - learning_rate * self.weight_decay
        self._update([t[:split] for t in flat], learning_rate, gradient_scale, decay)
        self._update([t[split:] for t in flat], learning_rate, gradient_scale, 1.0)
        for name, parameter in self.lone.items():
            gradient = parameter.grad
            assert gradient is not None
            exp_avg, exp_avg_sq = self._lone_moments[name]
            self._update(
                [parameter.view(-1), gradient.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)],
                learning_rate,
                gradient_scale,
                decay if name in self.decayed else 1.0,
            )

    def _update(
        self, flat: list[Tensor], learning_rate: float, gradient_scale: float, decay: float
    ) -> None:
        """Update flat weights, with gradients and both moments, block by block.

        The bias corrections are scalars, and with numerator and denominator multiplied by √(1-β₂ᵗ)
        they need no pass over memory: m̂/(√v̂ + ε) is m/(√v + ε√(1-β₂ᵗ)) times √(1-β₂ᵗ)/(1-β₁ᵗ).
        """
        if self._kernel:
            self._kernel(
                *flat,
                learning_rate=learning_rate,
                betas=self.betas,
                eps=self.eps,
                steps=self.steps,
                gradient_scale=gradient_scale,
                decay=decay,
            )
            return
        beta1, beta2 = self.betas
        correction = math.sqrt(1.0 - beta2**self.steps)
        size = -learning_rate * correction / (1.0 - beta1**self.steps)
        for w, g, m, v in zip(*(tensor.split(self._block) for tensor in flat), strict=True):
            if gradient_scale != 1.0:
                g.mul_(gradient_scale)
            m.lerp_(g, 1.0 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            root = torch.sqrt(v, out=self._scratch[: v.numel()]).add_(self.eps * correction)
            if decay != 1.0:
                w.mul_(decay)
            w.addcdiv_(m, root, value=size)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state, live: `<name>.exp_avg` and `<name>.exp_avg_sq`; `steps`."""
        tensors = {"steps": torch.tensor(self.steps)}
        for kind, flat in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            tensors |= {f"{name}.{kind}": view for name, view in self._views(flat)}
        for name, (exp_avg, exp_avg_sq) in self._lone_moments.items():
            tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = exp_avg, exp_avg_sq
        return tensors


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    operations: Operations | None = None,
) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    `paged_adamw` is `adamw`: paging keeps the moments in host memory under pressure and changes no
    number, and the moments of an adapter (8 bytes a trained parameter) fit beside the model.
    Adafactor takes neither betas nor eps. The updates are those of `operations` where it has them.

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
    decay: dict[str, Any] = {"weight_decay": weight_decay, "decayed": decayed_parameters(model)}
    if name == "adafactor":
        return Adafactor(trainable, **decay, kernel=operations and operations.adafactor_)
    return AdamW(trainable, betas=betas, eps=eps, **decay, kernel=operations and operations.adamw_)


def _zeros(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
