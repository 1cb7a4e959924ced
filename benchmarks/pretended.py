"""CUDA without a card: a step's own code takes its CUDA branches, on tensors without storage.

Inside `pretended_cuda` a tensor of the meta device says that it is on `cuda`, so that whoever asks
`x.device.type` is told what a card would say; what is to be made on `cuda` is made on meta. Shapes
and autograd are torch's own. Three things torch does not do for meta, and they are done here:

- autocast: CUDA's lists of operations (`_LOWERED`, `_IN_FP32`, `_WIDEST`), with its cache of the
  lowered copies of weights; a test compares them with torch's own, on fake CUDA tensors;
- `scaled_dot_product_attention`: without a mask flash attention in half precision, and in fp32 the
  memory-efficient one where no key head is shared; else what torch falls back to;
- answers of `torch.cuda` about the card.

Nothing is computed, and nothing of this says how fast a card is. (torch's FakeTensor on `cuda`
knows the first by itself, but without a CUDA build its autograd has no device to record.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from train.plan.cards import Card

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_REAL_DEVICE: Any = torch._C.TensorBase.device  # pyright: ignore[reportAttributeAccessIssue]

# Of CUDA's lists what our models call, by the names of the functions in Python.
# Source: torch 2.13, aten/src/ATen/autocast_mode.h.
_LOWERED = {"addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "vecdot"}
_LOWERED |= {"scaled_dot_product_attention"}
_IN_FP32 = {"cumsum", "exp", "layer_norm", "log", "log_softmax", "logsumexp", "norm", "pow"}
_IN_FP32 |= {"prod", "reciprocal", "rsqrt", "softmax", "sum", "vector_norm"}
_WIDEST = {"addcdiv", "addcmul", "cat", "dot", "scatter_add", "stack"}
_AS = {"__matmul__": "matmul", "linalg_vecdot": "vecdot", "__pow__": "pow", "__rpow__": "pow"}
_AS |= {"linalg_vector_norm": "vector_norm"}


class _Pretence(TorchFunctionMode):
    """Puts what is meant for CUDA on meta, and casts as CUDA's autocast does."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered: dict[int, tuple[Tensor, Tensor]] = {}  # autocast's cache, with the originals

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if name == "pin_memory":
            return args[0]
        args, kwargs = tree_map(_on_meta, (args, kwargs or {}))
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._cast(_AS.get(name, name), args, kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in _LOWERED:
            dtype = torch.get_autocast_dtype("cuda")
        elif name in _IN_FP32:
            dtype = torch.float32
        elif name in _WIDEST:
            floats: list[torch.dtype] = []
            tree_map(lambda x: floats.append(x.dtype) if _floats(x) else None, (args, kwargs))
            dtype = torch.float32 if torch.float32 in floats else torch.get_autocast_dtype("cuda")
        else:
            return args, kwargs
        return tree_map(lambda x: self._as(x, dtype), (args, kwargs))

    def _as(self, x: Any, dtype: torch.dtype) -> Any:
        if not _floats(x) or x.dtype == dtype:
            return x
        lone = x.requires_grad and x.is_leaf and not x._is_view() and x.dtype == torch.float32
        if not lone:
            return x.to(dtype)
        if id(x) not in self.lowered:
            self.lowered[id(x)] = (x, x.to(dtype))
        return self.lowered[id(x)][1]


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta and x.is_floating_point() and x.dtype.itemsize < 8


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return _META
    return _META if isinstance(value, str) and value.startswith("cuda") else value


def _attention(
    func: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    if attn_mask is None and q.dtype.itemsize == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, return_debug_mask=False, scale=scale)[0]
    if attn_mask is None and not shared:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, True, dropout_p, is_causal, scale=scale)[0]
    return func(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


class _Truth(TorchDispatchMode):
    """Lets tensors say where they are to torch's own code, which makes more of them there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        pretended = torch.Tensor.__dict__.get("device")
        if pretended is None:  # called by such code
            return func(*args, **(kwargs or {}))
        del torch.Tensor.device
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.Tensor.device = pretended


@contextlib.contextmanager
def pretended_cuda(card: Card) -> Iterator[None]:
    """Let meta tensors be CUDA's, on that card, inside."""
    properties = SimpleNamespace(
        multi_processor_count=card.multiprocessors, total_memory=card.memory, name=card.name
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: card.capability,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: card.name,
        "manual_seed": lambda _: None,
    }

    def device(x: Tensor) -> torch.device:
        real = _REAL_DEVICE.__get__(x)
        return CUDA if real.type == "meta" else real

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        )
        stack.enter_context(
            mock.patch.object(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
        )
        pretence = stack.enter_context(_Pretence())
        clear = pretence.lowered.clear
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear))
        run_backward = torch.autograd._engine_run_backward  # pyright: ignore

        def walk_back(*args: Any, **options: Any) -> Any:
            with pretence:  # `backward` is a function of torch's, and inside those the mode is off
                return run_backward(*args, **options)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", walk_back))
        stack.enter_context(_Truth())
        torch.Tensor.device = property(device)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del torch.Tensor.device
