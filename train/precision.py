"""What a step computes in, and the loss scaler that fp16 needs.

Trained parameters are fp32 masters in every precision; autocast lowers the matrix products, and
what must stay in fp32 (softmax, norms, the loss) stays there. fp16 has 5 exponent bits, so small
gradients would vanish: its loss is multiplied by a scale that grows while nothing overflows. bf16
has the exponent of fp32 and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from files.errors import UserError

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """What a run computes in."""

    name: str  # `bf16`, `fp16` or `fp32` (resolved; `auto` is not a precision)
    device: torch.device  # where it computes

    def __post_init__(self) -> None:
        if self.name not in COMPUTE_DTYPES:
            raise ValueError(f"precision '{self.name}' is not one of {', '.join(COMPUTE_DTYPES)}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products, and of frozen weights where `model.dtype` is unset."""
        return COMPUTE_DTYPES[self.name]

    @property
    def needs_loss_scaler(self) -> bool:
        """Whether gradients can underflow in this precision."""
        return self.name == "fp16"

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass; in fp32 it changes nothing."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


class LossScaler:
    """The factor on the loss that keeps fp16 gradients above zero and below infinity.

    It doubles after 2000 updates in a row without overflow and halves at an overflow. Whether a
    step overflowed is the caller's finding from the gradients themselves, never a guess from what
    the optimizer did.

    Attributes:
        scale: The factor of the next loss.
        good_steps: Updates without overflow since the scale last changed.

    Source: torch 2.13 `torch.amp.GradScaler`, whose defaults these are.
    """

    initial_scale = 65536.0
    growth_factor = 2.0
    backoff_factor = 0.5
    growth_interval = 2000

    def __init__(self) -> None:
        self.scale = self.initial_scale
        self.good_steps = 0

    def update(self, found_inf: bool) -> None:
        """Take note of a backward pass: `found_inf` says that not all its gradients were finite."""
        if found_inf:
            self.scale *= self.backoff_factor
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            grown = self.scale * self.growth_factor
            # The scale multiplies an fp32 loss, so it has to stay finite there.
            self.scale = grown if grown <= torch.finfo(torch.float32).max else self.scale
            self.good_steps = 0

    def state(self) -> dict[str, float | int]:
        """Return what a resumed run needs, as JSON values."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: Mapping[str, float | int]) -> None:
        """Go on from a state.

        Raises:
            UserError: The state is not one that `state()` wrote.
        """
        scale, good_steps = state.get("scale"), state.get("good_steps")
        if (
            not isinstance(scale, int | float)
            or not (math.isfinite(scale) and scale > 0)
            or not isinstance(good_steps, int)
            or not 0 <= good_steps < self.growth_interval
        ):
            raise UserError(
                f"loss scaler state {dict(state)} needs a positive finite `scale` and a "
                f"`good_steps` from 0 to {self.growth_interval - 1}: resume from another checkpoint"
            )
        self.scale, self.good_steps = float(scale), good_steps
