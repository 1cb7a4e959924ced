"""What tests of one training step share: eight ragged examples, a cut of them, and the step."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from small import RaggedExamples

from data.batch import Batching, MicroBatch, micro_batches
from models.layers import CausalLM
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer
from train.precision import Precision
from train.state import StepResult
from train.step import train_step

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
EXAMPLES: Any = RaggedExamples([3, 40, 7, 22, 15, 2, 31, 9])


class GradientsOnly(AdamW):
    """An optimizer that keeps the gradient it is given and touches no weight."""

    seen: ClassVar[dict[str, torch.Tensor]] = {}  # where no step was made

    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        self.seen = {
            name: p.grad * gradient_factor
            for name, p in self.parameters.items()
            if p.grad is not None
        }


def trained(model: CausalLM) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batching(size: int, layout: str = "unpadded", **given: Any) -> Batching:
    return Batching(
        **{"micro_batch_size": size, "layout": layout, "max_length": 48, "pad_id": 0, **given}
    )


def cut(
    size: int,
    layout: str = "unpadded",
    examples: Any = EXAMPLES,
    indices: Sequence[int] | None = None,
    **given: Any,
) -> list[MicroBatch]:
    """Cut a batch (of all examples) into micro-batches of `size`."""
    indices = range(len(examples)) if indices is None else indices
    return micro_batches(examples, indices, batching(size, layout, **given))


def one_step(
    model: CausalLM, optimizer: Optimizer, batch: Sequence[MicroBatch], **given: Any
) -> StepResult:
    """Do one step; `given` are other arguments of `train_step` than these."""
    usual = {
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "precision": FP32,
        "scaler": None,
        "draw": (0, 1),
    }
    return train_step(model, optimizer, batch, **{**usual, **given})  # type: ignore[arg-type]


def gradient_step(
    model: CausalLM, batch: Sequence[MicroBatch], **given: Any
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """Return what a step gives, and its gradients, which are not clipped unless asked for."""
    optimizer = GradientsOnly(trained(model))
    given = {"max_grad_norm": 0.0, "draw": (42, 7), **given}
    return one_step(model, optimizer, batch, **given), optimizer.seen
