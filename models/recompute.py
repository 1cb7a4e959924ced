"""What a layer keeps between its passes, and the computing again of what it does not keep.

| policy    | a layer keeps for its backward pass                      | computed again         |
|-----------|----------------------------------------------------------|------------------------|
| `none`    | inputs of both norms; q, k, v and what attention gives;  | nothing (adapters on a |
|           | gate and up, or the input of the GELU; masks, low-rank   | GPU: as `norms`)       |
|           | products; outputs of norms and activation                |                        |
| `norms`   | the same without the outputs of norms and activation     | norms and activation   |
| `mlp`     | inputs of both norms; q, k, v and what attention gives   | norms and the MLP      |
| `layers`  | the layer's input                                        | the layer              |
| `offload` | nothing: its input is in host memory                     | the layer              |

From one to the next less is kept and more is computed. Draws have no state, so that what is
computed again draws the same masks, and every policy gives the same loss and gradients, bit for
bit. Triton's kernels are run again under `layers` and `offload`; the inputs that `norms` and `mlp`
make again are made by torch's formulas there, which may round a last bit otherwise.

What is computed again is one autograd function around a layer or an MLP (`recomputed`): its forward
pass keeps nothing but how to get its input, its backward pass computes it with its graph and asks
that for the gradients. torch's own checkpoint does it by hooks on every saved tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from files.errors import UserError
from kernels.operands import Made, same_autocast
from kernels.pinned import pin

POLICIES = ("none", "norms", "mlp", "layers", "offload")  # from the one that keeps the most


def recomputed(
    run: Callable[[Made], Tensor],
    x: Made,
    parameters: Iterable[nn.Parameter],
    kept: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return `run(x)`, keeping the sources of `x` alone, and compute it again for gradients.

    Args:
        run: makes a tensor of it; it may use `parameters` and what needs no gradient.
        x: its input, and how that is made again.
        parameters: all that `run` uses; those that are trained get their gradients.
        kept: gives the input back where something else keeps it; its sources are then not kept.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _Recomputed.apply(run, x, kept, x.value, *trained)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Made], Tensor],
        made: Made,
        kept: Callable[[], Tensor] | None,
        x: Tensor,
        *trained: nn.Parameter,
    ) -> Tensor:
        ctx.run, ctx.again, ctx.kept, ctx.trained = run, made.again, kept, trained
        ctx.autocast = same_autocast(x)
        if kept is None:
            ctx.save_for_backward(*made.sources)
        return run(made._replace(made=x))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as the decorator has it
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        needs_x = ctx.needs_input_grad[3]
        with torch.enable_grad(), ctx.autocast():
            with torch.no_grad():
                x = ctx.kept() if ctx.kept else ctx.again(*ctx.saved_tensors)
            x = x.detach().requires_grad_(needs_x)
            y = ctx.run(Made(x, ctx.again, ctx.saved_tensors or (x,)))
        wanted = [x, *ctx.trained] if needs_x else ctx.trained
        found = torch.autograd.grad(y, wanted, grads)
        return (None, None, None, *(found if needs_x else (None, *found)))


def itself(x: Tensor) -> Tensor:
    """Return x: how an input is made again that is kept as it is."""
    return x


def host_buffer(x: Tensor) -> Tensor:
    """Return room on the host for the elements of a tensor, pinned where CUDA is to copy by itself.

    Raises:
        UserError: The system does not let go of so much memory.
    """
    buffer = torch.empty(x.numel(), dtype=x.dtype)
    if x.device.type == "cuda" and (error := pin(buffer)):
        raise UserError(
            f"model.gradient_checkpointing=offload: {buffer.nbytes / 2**20:,.0f} MiB of host "
            f"memory for a layer's input cannot be pinned (CUDA error {error}); free memory, raise "
            "the container's limit, or use model.gradient_checkpointing=layers"
        )
    return buffer


class HostRing:
    """The inputs of layers on the host, from a micro-batch's forward pass to its backward pass.

    Each layer has a buffer, used again micro-batch after micro-batch; one grows where a micro-batch
    is larger than all before, which the longest, tried out before the run, is not.

    On CUDA copies have a stream of their own, so that they go on beside the kernels: a layer's
    input leaves while the layer computes, and comes back while the layer above it is computed
    again. What is copied waits for the kernels that made it, and who reads a copy waits for it;
    copies are in order among themselves, so that no buffer is written before it was read.

    Args:
        place: makes a flat buffer for the elements of a tensor.
        beside: whether copies go on beside the kernels of a device type.
    """

    def __init__(
        self,
        place: Callable[[Tensor], Tensor] = host_buffer,
        beside: Callable[[str], bool] = lambda device: device == "cuda",
    ):
        self._place, self._beside = place, beside
        self._buffers: dict[int, Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._stream: torch.cuda.Stream | None = None

    def send(self, layer: int, x: Tensor) -> Callable[[], Tensor]:
        """Copy the input of a layer, (M, H), to the host; return what brings it back."""
        x = x.detach()
        buffer = self._buffers.get(layer)
        if buffer is None or buffer.numel() < x.numel() or buffer.dtype != x.dtype:
            if buffer is not None and self._stream is not None:
                self._stream.synchronize()  # the old one may be read still
            buffer = self._buffers[layer] = self._place(x)
        self._shapes[layer] = x.shape
        self._coming.pop(layer, None)  # of a micro-batch that was given up
        self._copy(buffer[: x.numel()].view(x.shape), x, on_device=x)
        device = x.device
        return lambda: self._bring_back(layer, device)

    def _bring_back(self, layer: int, device: torch.device) -> Tensor:
        if layer not in self._coming:
            self._fetch(layer, device)
        x, there = self._coming.pop(layer)
        if there is not None:
            torch.cuda.current_stream(device).wait_event(there)
        if layer - 1 in self._shapes:
            self._fetch(layer - 1, device)  # while this layer is computed
        del self._shapes[layer]
        return x

    def _fetch(self, layer: int, device: torch.device) -> None:
        shape = self._shapes[layer]
        buffer = self._buffers[layer][: shape.numel()].view(shape)
        x = torch.empty(shape, dtype=buffer.dtype, device=device)
        self._coming[layer] = x, self._copy(x, buffer, on_device=x)

    def _copy(self, to: Tensor, of: Tensor, on_device: Tensor) -> torch.cuda.Event | None:
        """Copy, on CUDA beside the kernels and behind those enqueued by now; return when."""
        if not self._beside(on_device.device.type):
            to.copy_(of)
            return None
        self._stream = self._stream or torch.cuda.Stream(on_device.device)
        self._stream.wait_stream(torch.cuda.current_stream(on_device.device))
        with torch.cuda.stream(self._stream):
            to.copy_(of, non_blocking=True)
        on_device.record_stream(self._stream)
        there = torch.cuda.Event()
        there.record(self._stream)
        return there
