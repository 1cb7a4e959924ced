"""Attention against a literal form of the formula, in fp64.

fp64 tolerances: 1e-12, some thousand roundings of 1.1e-16, on values of order one.
"""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import kernel
from kernels.cpu import attention as attention_module
from kernels.cpu.attention import attention
from kernels.dropout import attention_keep_mask, module_id
from kernels.segments import Segments

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
MODULE = module_id("model.layers.0.self_attn.attention_dropout")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def literal_attention(q, k, v, scale, window, start=0, keep=None):
    """Attend one document query by query and head by head; `keep` scales the weights."""
    heads, kv = q.shape[1], k.shape[1]
    out = torch.empty_like(q)
    for i in range(len(q)):
        position = start + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            shared = head // (heads // kv)
            keys = slice(first, position + 1)
            weights = torch.softmax(k[keys, shared] @ q[i, head] * scale, 0)
            if keep is not None:
                weights = weights * keep[head, i, keys]
            out[i, head] = weights @ v[keys, shared]
    return out.flatten(1)


LAYOUTS = {
    "one document": ([9], None),
    "equal lengths": ([6, 6, 6], None),
    "ragged": ([5, 1, 8, 3], None),
    "padded": ([5, 1, 7], 9),
}


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_stays_inside_documents_and_windows(layout, implementation, window, kv):
    lengths, padded = LAYOUTS[layout]
    segments = Segments.build(lengths, device="cpu", padded_length=padded)
    m = segments.num_rows
    q, k, v = random(m, 4, 6), random(m, kv, 6, seed=1), random(m, kv, 6, seed=2)
    options = {"scale": 0.3, "window": window, "implementation": implementation}
    out = attention(q, k, v, segments, **options)
    assert out.shape == (m, 24)
    start = 0
    for length, rows in zip(lengths, segments.rows, strict=True):
        real = slice(start, start + length)
        expected = literal_attention(q[real], k[real], v[real], 0.3, window)
        torch.testing.assert_close(out[real], expected, **EXACT)
        start += rows
    assert out.isfinite().all()  # pads too: a NaN there would spread in the backward pass


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 2])
def test_attention_gradient(implementation, window):
    segments = Segments.build([3, 2], device="cpu")
    inputs = [random(5, heads, 2, seed=i).requires_grad_() for i, heads in enumerate((2, 1, 1))]

    def attend(q, k, v):
        options = {"scale": 0.5, "window": window, "implementation": implementation}
        return attention(q, k, v, segments, **options)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("new", [1, 3])
def test_attention_behind_a_cache(new, window, implementation):
    q, k, v = random(new, 4, 6), random(7 + new, 2, 6), random(7 + new, 2, 6, seed=1)
    segments = Segments.build([new], device="cpu", offset=7)
    options = {"scale": 0.3, "window": window, "implementation": implementation}
    out = attention(q, k, v, segments, cache_length=7, **options)
    torch.testing.assert_close(out, literal_attention(q, k, v, 0.3, window, start=7), **EXACT)


def test_a_cache_holds_one_document():
    x = random(4, 2, 4)
    segments = Segments.build([2, 2], device="cpu")
    with pytest.raises(ValueError, match="one document"):
        attention(x, x, x, segments, scale=1.0, cache_length=2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_dropout_is_drawn_per_head_query_and_key(layout, implementation):
    lengths, padded = LAYOUTS[layout]
    options = {"examples": range(len(lengths)), "draw": (42, 3)}
    segments = Segments.build(lengths, device="cpu", padded_length=padded, **options)
    m = segments.num_rows
    q, k, v = random(m, 4, 6), random(m, 2, 6), random(m, 2, 6, seed=1)
    drawing = {"dropout": 0.4, "module": MODULE, "implementation": implementation}
    before = torch.get_rng_state()
    out = attention(q, k, v, segments, scale=0.3, **drawing)
    assert torch.equal(torch.get_rng_state(), before)
    start = 0
    for i, (length, rows) in enumerate(zip(lengths, segments.rows, strict=True)):
        real = slice(start, start + length)
        alone = Segments.build([length], device="cpu", examples=[i], draw=(42, 3))
        keep = (
            attention_keep_mask(alone.dropout_rows[None], MODULE, 4, length, 0.4)[0].double() / 0.6
        )
        expected = literal_attention(q[real], k[real], v[real], 0.3, None, keep=keep)
        torch.testing.assert_close(out[real], expected, **EXACT)
        start += rows


def test_attention_dropout_needs_a_draw():
    rows = (
        attention_module.BLOCKS_MAX_LENGTH + 1
    )  # so that torch's fused kernel attends, which would drop
    q, k, v = random(rows, 4, 6), random(rows, 2, 6), random(rows, 2, 6, seed=1)
    segments = Segments.build([rows], device="cpu")
    plain = attention(q, k, v, segments, scale=0.3)
    same = attention(q, k, v, segments, scale=0.3, dropout=0.5, module=MODULE)
    assert torch.equal(plain, same)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_in_bf16_keeps_its_type(implementation):
    q, k, v = (random(6, h, 8, seed=h).bfloat16() for h in (4, 2, 2))
    segments = Segments.build([4, 2], device="cpu")
    options = {"scale": 0.3, "implementation": implementation}
    out = attention(q, k, v, segments, **options)
    exact = attention(q.double(), k.double(), v.double(), segments, **options)
    assert out.dtype == torch.bfloat16
    # Scores, weights and output are each rounded to 8 bits: a few 2^-8 of the largest value.
    assert (out - exact).abs().max() <= 4 * 2**-8 * v.abs().max()


@pytest.mark.parametrize("window", [None, 1, 50, 128, 129, 1000])
@pytest.mark.parametrize("kv", [1, 4])
def test_blocks_are_the_whole(window: int | None, kv: int) -> None:
    """Documents of less than a block, of exactly one, of two and a bit: value and gradient."""
    lengths = [300, 128, 1, 129]
    segments = Segments.build(lengths, device="cpu")
    d_out = random(sum(lengths), 4 * 6, seed=5)
    results = []
    for implementation in ("sdpa", "eager"):
        inputs = [
            random(sum(lengths), h, 6, seed=i).requires_grad_() for i, h in enumerate((4, kv, kv))
        ]
        out = attention(*inputs, segments, scale=0.3, window=window, implementation=implementation)
        out.backward(d_out)
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, literal in zip(*results, strict=True):
        torch.testing.assert_close(ours, literal, **EXACT)


def test_blocks_in_bf16_are_as_near_as_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean squared errors of output and gradients against fp64, both with the same roundings."""
    lengths = [200, 60]
    segments = Segments.build(lengths, device="cpu")
    d_out = random(260, 4 * 16, seed=5)

    def errors(dtype: torch.dtype, exact: list[torch.Tensor] | None) -> list[torch.Tensor]:
        inputs = [
            random(260, h, 16, seed=i).bfloat16().to(dtype).requires_grad_()
            for i, h in enumerate((4, 2, 2))
        ]
        out = attention(*inputs, segments, scale=0.25)
        out.backward(d_out.bfloat16().to(dtype))
        found = [out.detach(), *(x.grad for x in inputs)]
        if exact is None:
            return found
        return [(a.double() - b).square().mean().sqrt() for a, b in zip(found, exact, strict=True)]

    exact = errors(torch.float64, None)
    blocks = errors(torch.bfloat16, exact)
    monkeypatch.setattr(attention_module, "BLOCKS_MAX_LENGTH", 0)
    fused = errors(torch.bfloat16, exact)
    for ours, theirs in zip(blocks, fused, strict=True):
        assert ours <= 1.5 * theirs


def test_under_autocast_scores_stay_in_fp32() -> None:
    """Rounded to bf16, scores of 300 would be off by one, and weights by a factor of e."""
    segments = Segments.build([40], device="cpu")
    q, k, v = random(40, 2, 8).float(), random(40, 2, 8, seed=1).float(), random(40, 2, 8, seed=2)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    plain = attention(q, k, v, segments, scale=20.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = attention(q, k, v, segments, scale=20.0)
    assert torch.equal(plain, under)
    exact = attention(q.double(), k.double(), v.double(), segments, scale=20.0)
    assert (plain - exact).abs().max() <= 4 * 2**-8 * v.abs().max()


class Ran(TorchDispatchMode):
    """Notes the names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("window", [None, 3])
def test_records_name_the_kernel_that_runs(
    window: int | None, backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "BLOCKS_MAX_LENGTH", 0)
    segments = Segments.build([8, 8], device="cpu", examples=[0, 1], draw=(1, 1))
    q, k, v = (random(16, h, 8, seed=h).requires_grad_() for h in (4, 2, 2))
    with sdpa_kernel(backend), Ran() as ran:
        attention(q, k, v, segments, scale=0.3, window=window)
        named = kernel(q, k, segments, window)
    assert named == f"sdpa, {backend.name.lower()}"
    fused = "_scaled_dot_product_flash_attention_for_cpu" in ran.names
    assert fused == (backend == SDPBackend.FLASH_ATTENTION)
    assert kernel(q, k, segments, None, dropout=0.1) == "written out"
    assert kernel(q, k, segments, None, implementation="eager") == "written out"
