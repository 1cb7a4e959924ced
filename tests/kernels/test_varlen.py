"""Flash attention over documents end to end: what torch's operation is asked for, and when.

The kernel is CUDA's. In its place stand both of torch's operations written out by their
documentation (queries see `window_size_left` keys before and `window_size_right` behind their own,
-1 is no bound; the logarithm of the sum is that without dropout; kept weights grow by 1/(1-p)), in
fp64 on a CPU, under torch's own derivative. fp64 tolerances: 1e-12, as in `test_attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_attention import EXACT, MODULE, literal_attention, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention as attention_module
from kernels import varlen
from kernels.attention import attention, way
from kernels.dropout import fold
from kernels.segments import Segments


def keep_mask(state: Tensor, p: float, heads: int, queries: int, document: int) -> Tensor:
    """Draw the weights of a document that are kept; the state alone decides."""
    generator = torch.Generator().manual_seed(int(state[0]) + 1000 * document)
    return torch.rand(heads, queries, queries, generator=generator) >= p


@dataclass
class Flash:
    """Both operations, and what they were asked."""

    seeds: list[int] = field(default_factory=list)  # of the generator, the last one holds
    kv: int = 2  # key heads that it is to be told of: as many as there are
    forwards: int = 0
    backwards: int = 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        begin: Tensor,
        begin_k: Tensor,
        most: int,
        most_k: int,
        p: float,
        causal: bool,
        debug: bool,
        **settings: Any,
    ) -> tuple[Tensor, ...]:
        assert begin.dtype == begin_k.dtype == torch.int32
        assert begin.tolist() == begin_k.tolist()
        assert most == most_k == max(b - a for a, b in pairwise(begin.tolist()))
        assert begin[-1] == len(q) == len(k) and k.shape[1] == v.shape[1] == self.kv and not debug
        self.forwards += 1
        state = torch.tensor([self.seeds[-1] if p else 0, 0], dtype=torch.uint64)
        parts = self._documents(q, k, begin, p, causal, state, **settings)
        out, sums = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for rows, heads, (weights, kept, total) in parts:
            out[rows, heads] = (weights * kept) @ v[rows, heads // (q.shape[1] // v.shape[1])]
            sums[heads, rows] = total
        return out, sums, state, torch.empty((), dtype=torch.uint64), q.new_empty(0)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        sums: Tensor,
        begin: Tensor,
        begin_k: Tensor,
        most: int,
        most_k: int,
        p: float,
        causal: bool,
        state: Tensor,
        unused: Tensor,
        **settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.backwards += 1
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
        parts = self._documents(q, k, begin, p, causal, state, **settings)
        for rows, head, (weights, kept, total) in parts:
            assert torch.equal(total, sums[head, rows])
            shared = head // (q.shape[1] // k.shape[1])
            d = d_out[rows, head]
            d_weights = d @ v[rows, shared].T * kept
            centre = (d * out[rows, head]).sum(-1, keepdim=True)
            d_scores = weights * (d_weights - centre) * settings["scale"]
            d_q[rows, head] = d_scores @ k[rows, shared]
            d_k[rows, shared] += d_scores.T @ q[rows, head]
            d_v[rows, shared] += (weights * kept).T @ d
        return d_q, d_k, d_v

    def _documents(
        self,
        q: Tensor,
        k: Tensor,
        begin: Tensor,
        p: float,
        causal: bool,
        state: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> Iterator[tuple[slice, int, tuple[Tensor, Tensor, Tensor]]]:
        """Yield (rows, head, (weights, what they are multiplied by, logarithms of the sums))."""
        ahead = 0 if causal else window_size_right
        for document, (first, last) in enumerate(pairwise(begin.tolist())):
            place = torch.arange(last - first)
            distance = place[:, None] - place
            visible = torch.ones_like(distance, dtype=torch.bool)
            if window_size_left >= 0:
                visible &= distance <= window_size_left
            if ahead >= 0:
                visible &= -distance <= ahead
            rows, count = slice(first, last), q.shape[1]
            kept = torch.ones(count, last - first, last - first, dtype=q.dtype)
            if p:
                kept = keep_mask(state, p, count, last - first, document).to(q.dtype) / (1 - p)
            for head in range(count):
                scores = q[rows, head] @ k[rows, head // (count // k.shape[1])].T * scale
                scores = scores.masked_fill(~visible, -torch.inf)
                total = scores.logsumexp(-1)
                weights = (scores - total[:, None]).exp()
                yield rows, head, (weights, kept[head], total)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flash]:
    """Put `Flash` in the place of CUDA's kernels, and let attention be as on CUDA."""
    stand_in = Flash()

    @contextlib.contextmanager
    def seeded(device: torch.device, seed: int) -> Iterator[None]:
        stand_in.seeds.append(seed)
        yield

    def on_cuda(*_: Any, implementation: str = "sdpa", **__: Any) -> str:
        return "eager" if implementation == "eager" else "varlen"

    monkeypatch.setattr(attention_module, "_seeded", seeded)
    monkeypatch.setattr(attention_module, "way", on_cuda)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", stand_in.forward, "CPU")
        library.impl("_flash_attention_backward", stand_in.backward, "CPU")
        yield stand_in


def inputs_of(rows: int, heads: int, kv: int) -> list[Tensor]:
    sizes = (heads, kv, kv)
    return [random(rows, h, 8, seed=i).requires_grad_() for i, h in enumerate(sizes)]


LAYOUTS = {
    "ragged": ([5, 1, 8, 3], None),
    "equal": ([6, 6, 6], None),
    "padded": ([5, 1, 7], 9),
}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_call_is_told_documents_window_heads_and_dropout(
    layout: str, window: int | None, kv: int, p: float, flash: Flash
) -> None:
    """Output and gradients, against fp64 autograd through query after query and head after head."""
    lengths, padded = LAYOUTS[layout]
    drawing: dict[str, Any] = {"examples": range(len(lengths)), "draw": (42, 3)}
    segments = Segments.build(lengths, device="cpu", padded_length=padded, multiple=4, **drawing)
    flash.kv = kv
    rows = segments.num_rows
    ours, theirs = inputs_of(rows, 4, kv), inputs_of(rows, 4, kv)
    settings: dict[str, Any] = {"window": window, "dropout": p, "module": MODULE}
    out = attention(*ours, segments, scale=0.3, **settings)
    assert out.shape == (rows, 32) and out.isfinite().all()

    state = torch.tensor([fold(segments.dropout_seed, MODULE), 0], dtype=torch.uint64)
    pieces, start = [], 0
    for document, count in enumerate(segments.rows):
        piece = slice(start, start + count)
        keep = keep_mask(state, p, 4, count, document).double() / (1 - p) if p else None
        pieces.append(literal_attention(*(x[piece] for x in theirs), 0.3, window, keep=keep))
        start += count
    exact = torch.cat(pieces)
    upstream = random(*exact.shape, seed=9)
    found = torch.autograd.grad(out[:start], ours, upstream)
    expected = torch.autograd.grad(exact, theirs, upstream)
    for one, other in zip((out[:start], *found), (exact, *expected), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert (flash.forwards, flash.backwards) == (1, 1)
    assert not any(gradient[start:].any() for gradient in found)  # of rows that nobody reads


def test_dropout_is_drawn_anew_by_seed_step_micro_batch_and_layer_alone(flash: Flash) -> None:
    """What the generator is seeded with: the same again for a resume and for a recomputed layer."""
    lengths = [5, 3]
    options: dict[str, Any] = {"scale": 0.3, "dropout": 0.5}

    def seed_of(
        seed: int = 42, step: int = 3, examples: tuple[int, ...] = (7, 9), module: int = MODULE
    ) -> int:
        segments = Segments.build(lengths, device="cpu", examples=examples, draw=(seed, step))
        attention(*inputs_of(8, 4, 2), segments, module=module, **options)
        return flash.seeds[-1]

    assert seed_of() == seed_of()
    others = [seed_of(seed=43), seed_of(step=4), seed_of(examples=(9, 7)), seed_of(module=1)]
    assert len({seed_of(), *others}) == 5
    drawn = len(flash.seeds)
    undrawn = Segments.build(lengths, device="cpu")
    attention(*inputs_of(8, 4, 2), undrawn, module=MODULE, **options)
    assert len(flash.seeds) == drawn


def test_what_is_asked_of_torch_is_there() -> None:
    assert varlen.offered()


HALF, WHOLE = torch.bfloat16, torch.float32
RAGGED, EQUAL, ONE = (40, 24), (32, 32), (64,)


@pytest.mark.parametrize(
    ("lengths", "window", "p", "dtype", "capability", "expected"),
    [
        (RAGGED, None, 0.0, HALF, (8, 0), "varlen"),
        (RAGGED, None, 0.1, HALF, (9, 0), "varlen"),
        (RAGGED, 8, 0.1, HALF, (9, 0), "varlen"),
        (EQUAL, 8, 0.0, HALF, (9, 0), "varlen"),  # sdpa would want a mask of T × T
        (ONE, 8, 0.0, HALF, (9, 0), "varlen"),
        (EQUAL, None, 0.1, HALF, (9, 0), "varlen"),
        (EQUAL, None, 0.0, HALF, (9, 0), "sdpa"),
        (EQUAL, 32, 0.0, HALF, (9, 0), "sdpa"),  # the window hides nothing
        (RAGGED, None, 0.0, WHOLE, (9, 0), "sdpa"),
        (RAGGED, None, 0.0, HALF, (7, 5), "sdpa"),
    ],
)
def test_which_way_is_a_rule_of_the_device_and_the_sizes(
    lengths: tuple[int, ...],
    window: int | None,
    p: float,
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    segments = Segments.build(lengths, device="cpu", examples=range(len(lengths)), draw=(1, 1))
    with FakeTensorMode():
        on_cuda = torch.empty(64, 4, 16, dtype=dtype, device="cuda")
        on_cpu = torch.empty(64, 4, 16, dtype=dtype)
    settings: dict[str, Any] = {"window": window, "dropout": p}
    assert way(on_cuda, segments, **settings) == expected
    assert way(on_cuda, segments, **settings, implementation="eager") == "eager"
    assert way(on_cuda, segments, window=window, cache_length=5) == "sdpa"
    assert way(on_cpu, segments, **settings) == ("eager" if p else "sdpa")
    if expected == "sdpa" and dtype == HALF and capability >= (8, 0):
        behind = Segments.build(lengths, device="cpu", multiple=100)
        assert way(on_cuda, behind) == "varlen"  # no row is cut off, nor put back
    undrawn = Segments.build(lengths, device="cpu")
    assert way(on_cpu, undrawn, **settings) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("kv", [1, 4])
def test_varlen_attention_on_a_gpu_against_fp64(
    kv: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [130, 1, 64, 257]
    segments = Segments.build(lengths, device="cuda")
    rows = sum(lengths)
    sides = []
    for kind in (dtype, torch.float64):
        inputs = [
            random(rows, h, 64, seed=h + i).to(dtype).to(kind).cuda().requires_grad_()
            for i, h in enumerate((4, kv, kv))
        ]
        assert varlen.serves(inputs[0], segments, kind) == (kind == dtype)
        out = attention(*inputs, segments, scale=0.125, window=window)
        upstream = random(*out.shape, seed=9).to(dtype).to(kind).cuda()
        sides.append([out, *torch.autograd.grad(out, inputs, upstream)])
    # Weights are rounded once, the output and each gradient once; sums are in fp32: a few units of
    # the type, and a gradient by keys sums them over all queries and shared heads.
    for ours, exact in zip(*sides, strict=True):
        difference = (ours.double() - exact).abs().max()
        assert difference <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.gpu
def test_fused_dropout_on_a_gpu_repeats_itself_and_leaves_the_generator_alone():
    q, k, v = (random(64, h, 32, seed=h).bfloat16().cuda() for h in (4, 2, 2))

    def attend(step):
        segments = Segments.build([40, 24], device="cuda", examples=[1, 2], draw=(42, step))
        options = {"scale": 0.3, "dropout": 0.5, "module": MODULE}
        return attention(q, k, v, segments, **options)

    before = torch.cuda.get_rng_state()
    first = attend(1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(attend(1), first)
    assert not torch.equal(attend(2), first)
