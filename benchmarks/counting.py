"""What a step launches: every operation of torch and every Triton kernel, with bytes and FLOPs.

Bytes are what a launch must read and write at least: each tensor that it reads, once, and each that
it writes, once; caches are taken to serve all repetition inside a launch. Of a table only the rows
that are taken count, and of an expanded tensor what is in memory. What a Triton kernel reads and
writes is found in its source: the arguments that its loads and stores start from.

`Counting` notes launches where `benchmarks.pretended` lets a step run without a card. Each is
given a kind: by the operation of `kernels.dispatch.Operations` that it belongs to, forward, and
backward by the node of autograd's graph that this operation left behind.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernel_source import uses_of

PRODUCTS = "large products"
ADAPTERS = "LoRA branch"
ATTENTION = "attention"
CASTS = "casts"
DEQUANTISATION = "dequantisation"
NORMS = "norms"
ACTIVATION = "GELU, SwiGLU"
ROTARY = "rotary"
ADDS = "residual adds"
LOSS = "loss"
OTHER = "embedding, dropout"
UPDATE = "gradients, optimizer"
KINDS = (
    PRODUCTS, ADAPTERS, DEQUANTISATION, ATTENTION, CASTS, NORMS, ACTIVATION, ROTARY, ADDS, LOSS,
    OTHER, UPDATE
)  # fmt: skip
_KIND_OF = {
    "linears": ADAPTERS,
    "linear_gelu": ADAPTERS,
    "dequantise": DEQUANTISATION,
    "rms_norm": NORMS,
    "layer_norm": NORMS,
    "add": ADDS,
    "add_rms_norm": NORMS,
    "add_layer_norm": NORMS,
    "rotary": ROTARY,
    "swiglu": ACTIVATION,
    "attention": ATTENTION,
    "linear_cross_entropy": LOSS,
}
# By the name of torch's operation.
_MADE_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_FILLED = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
_OVERWRITTEN = ("copy_", "zero_", "fill_")
_TAKES_ROWS = ("index_select", "embedding", "gather", "index", "take")
_PUTS_ROWS = ("index_copy_", "index_put_", "index_add_", "scatter_", "scatter_add_", "index_fill_")
_MULTIPLIES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique2", "_unique2")


@dataclass(frozen=True)
class Launch:
    """One kernel on a card: torch's own or Triton's.

    Attributes:
        name: Of the operation or kernel.
        kind: One of `KINDS`.
        phase: `forward`, `backward` or `update`.
        bytes: Read and written.
        flops: Of products; 0 where there are none.
    """

    name: str
    kind: str
    phase: str
    bytes: int
    flops: int


class Counting(TorchDispatchMode):
    """Notes what is launched, what a forward pass keeps, and where the host waits.

    Args:
        lengths: Rows of the documents of a micro-batch.
        window: That of attention, or None.
        most_rank: A product none of whose three sizes is this small is one with a base weight.

    Attributes:
        phase: What is being done; the caller sets it.
        launches: In order.
        waits: (phase, operation) where the host waits for the card.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, most_rank: int) -> None:
        super().__init__()
        self.lengths, self.window, self.most_rank = tuple(lengths), window, most_rank
        self.rows = sum(lengths)
        self.clear()

    def clear(self) -> None:
        """Forget what was noted so far."""
        self.phase = "forward"
        self.launches: list[Launch] = []
        self.waits: list[tuple[str, str]] = []
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._labels: list[str] = []
        self._nodes: dict[Any, str] = {}

    # --- what a launch belongs to ---

    def labelled(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return an operation whose launches, both ways, are noted under its name."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = {x.grad_fn for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            self._labels.append(name)
            try:
                out = function(*args, **kwargs)
            finally:
                self._labels.pop()
            found = [x.grad_fn for x in tree_leaves(out) if isinstance(x, Tensor)]
            while found:
                node = found.pop()
                if node is None or node in before or node in self._nodes:
                    continue
                if node.name() != "torch::autograd::AccumulateGrad":
                    self._nodes[node] = name
                    found += [following for following, _ in node.next_functions]
            return out

        return run

    def _label(self) -> str | None:
        if self._labels:
            return self._labels[-1]
        return self._nodes.get(torch._C._current_autograd_node())  # pyright: ignore

    def _kind(self, name: str, tensors: Sequence[Tensor], sizes: Sequence[int] | None) -> str:
        """Return the kind of a launch; `sizes` are the three of a product."""
        node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
        accumulates = node is not None and node.name() == "torch::autograd::AccumulateGrad"
        if self.phase == "update" or (accumulates and not self._labels):
            return UPDATE
        kind = _KIND_OF.get(self._label() or "", OTHER)
        if kind == LOSS:
            return LOSS
        if sizes is not None and kind != ATTENTION and min(sizes) > self.most_rank:
            return PRODUCTS
        if any(part in name for part in ("gelu", "swiglu", "activation")):
            return ACTIVATION
        by_row = any(x.dim() > 1 and len(x) == self.rows for x in tensors)
        if name == "add" and by_row:
            return ADDS
        if name in ("_to_copy", "copy_") and by_row and len({x.dtype for x in tensors}) > 1:
            return CASTS
        return kind

    # --- what is kept ---

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that the forward pass keeps for the backward pass; return it."""
        if self.phase == "forward" and tensor.is_meta:
            storage = tensor.untyped_storage()
            self._kept[storage._cdata] = storage
        return tensor

    def keeping(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which what autograd saves is noted."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x)

    def kept_bytes(self, apart_from: Iterator[Tensor]) -> int:
        """Return the bytes kept, each storage once, without those of `apart_from`: weights."""
        known = {x.untyped_storage()._cdata for x in apart_from}
        return sum(s.nbytes() for key, s in self._kept.items() if key not in known)

    # --- torch's operations ---

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x.is_meta for x in given]
        if any(there) and name in _WAITS:
            self.waits.append((self.phase, name))
            return 1.0  # a number that is finite, for whoever asks whether it is
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        if to_host and there[0]:
            self.waits.append((self.phase, "copy to the host"))
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        from_host = bool(there) and not any(there)
        if any(x.is_meta for x in made) and not from_host:
            self._note(func._schema, name, args, kwargs, given, made)
        return out

    def _note(
        self,
        schema: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        changed: list[Tensor] = []
        only_written: list[Tensor] = []
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                of = only_written if argument.is_out or name in _OVERWRITTEN else changed
                of += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        if name in ("addmm", "addmm_") and kwargs.get("beta", 1) == 0:
            only_written, changed = changed or only_written, []
            given = [x for x in given if x is not args[0]]
        if not changed and not only_written:
            storages = {x.untyped_storage()._cdata for x in given}
            if name in _MADE_EMPTY or all(x.untyped_storage()._cdata in storages for x in made):
                return  # a view, or memory without contents
        written = changed + only_written or made
        read = [x for x in given if not any(x is other for other in only_written)]
        if name in _FILLED:
            read = []
        elif name in _TAKES_ROWS:
            read = [*written, *read[1:]]
        elif name in _PUTS_ROWS:
            rows = [x for x in read[1:] if x.is_floating_point()] or read[1:2]
            written, read = rows, read[1:] + (rows if "add" in name else [])
        sizes, flops = None, 0
        if name in _MULTIPLIES:
            a, b = given[-2], given[-1]
            sizes = (a.shape[-2], a.shape[-1], b.shape[-1])
            flops = 2 * sizes[0] * sizes[1] * sizes[2] * (len(a) if a.dim() == 3 else 1)
        elif "attention" in name or "varlen_attn" in name:
            flops = self._attention_flops(name, given)
        kind = self._kind(name, [*given, *made], sizes)
        moved = _bytes_of(read) + _bytes_of(written)
        self.launches.append(Launch(name, kind, self.phase, moved, flops))

    def _attention_flops(self, name: str, given: list[Tensor]) -> int:
        """Return those of causal attention: two products forward, five backward, half of each."""
        backward = "backward" in name
        q = given[1] if backward else given[0]
        heads, d = (q.shape[1], q.shape[-1]) if q.dim() == 4 else q.shape[1:]
        lengths = [q.shape[2]] * len(q) if q.dim() == 4 else self.lengths
        pairs = 0.0
        for rows in lengths:
            unseen = max(0, rows - (self.window or rows))
            pairs += (rows**2 - unseen**2) / 2
        return round(pairs * heads * d * 2 * (5 if backward else 2))

    # --- Triton's kernels ---

    def launched(self, kernel: Any, *args: Any, **options: Any) -> None:
        """Note a launch of a Triton kernel: in the place of `JITFunction.run`."""
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        known = {
            name: x for name, x in arguments.items() if name.isupper() and not isinstance(x, Tensor)
        }
        uses = uses_of(kernel.fn, tuple(sorted(known.items())))
        reads = [x for name, x in tensors.items() if name in uses.reads]
        writes = [x for name, x in tensors.items() if name in uses.writes]
        flops = 0
        if uses.products:  # of a tile with the factors of adapters, over the largest tensor
            ranks = known.get("COUNT", 1) * known.get("RANK", 0)
            flops = 2 * uses.products * ranks * max(x.numel() for x in tensors.values())
        name = kernel.fn.__name__.strip("_")
        kind = self._kind(name, list(tensors.values()), None)
        moved = _bytes_of(reads) + _bytes_of(writes)
        self.launches.append(Launch(f"triton {name}", kind, self.phase, moved, flops))


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors in memory, each once, expanded dimensions as one."""
    unique = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors
    }
    total = 0
    for x in unique.values():
        count = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            count *= 1 if stride == 0 and size else size
        total += count * x.dtype.itemsize
    return total
