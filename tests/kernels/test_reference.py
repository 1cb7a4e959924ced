"""The reference operations against slow, literal forms of the same formulas, in fp64.

fp64 tolerances: 1e-12, some thousand roundings of 1.1e-16, on values of order one.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.dropout import attention_keep_mask, module_id
from kernels.segments import Segments

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
MODULE = module_id("model.layers.0.self_attn.attention_dropout")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


# --- norms, activations, rotary embeddings ---


def test_rms_norm():
    x, weight = random(4, 16), random(16)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.1), expected, **EXACT)


def test_rms_norm_rounds_before_the_weight_comes_in():
    x, weight = random(64, 16).bfloat16() * 3, random(16).bfloat16()
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    actual = reference.rms_norm(x, weight, 1e-6)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, normed.bfloat16() * weight)


def test_layer_norm():
    x, weight, bias = random(4, 16), random(16), random(16, seed=1)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 0.1), expected, **EXACT)
    mixed = reference.layer_norm(x.bfloat16(), weight.float(), bias.float(), 0.1)
    assert mixed.dtype == torch.bfloat16


def test_activations():
    gate, up = random(4, 16), random(4, 16, seed=1)
    swiglu = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(reference.swiglu(gate, up), swiglu, **EXACT)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + torch.tanh(inner))
    torch.testing.assert_close(reference.gelu_tanh(gate), gelu, **EXACT)


def rotary_tables(rows: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = random(rows, d // 2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def test_rotary_turns_the_two_halves_against_each_other():
    q, k, (cos, sin) = random(5, 4, 6), random(5, 2, 6), rotary_tables(5, 6)
    for x, turned in zip((q, k), reference.rotary(q, k, cos, sin), strict=True):
        as_complex = torch.complex(x[..., :3], x[..., 3:])
        expected = as_complex * torch.complex(cos[:, None, :3], sin[:, None, :3])
        expected = torch.cat((expected.real, expected.imag), -1)
        torch.testing.assert_close(turned, expected, **EXACT)


def test_rotary_gradient_and_types():
    q, k, (cos, sin) = random(3, 2, 4), random(3, 1, 4), rotary_tables(3, 4)
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: reference.rotary(q, k, cos, sin), (q, k))
    half = reference.rotary(q.bfloat16(), k.bfloat16(), cos.float(), sin.float())
    assert [x.dtype for x in half] == [torch.bfloat16] * 2


# --- attention ---


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
    out = reference.attention(q, k, v, segments, **options)
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
        return reference.attention(q, k, v, segments, **options)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("new", [1, 3])
def test_attention_behind_a_cache(new, window, implementation):
    q, k, v = random(new, 4, 6), random(7 + new, 2, 6), random(7 + new, 2, 6, seed=1)
    segments = Segments.build([new], device="cpu", offset=7)
    options = {"scale": 0.3, "window": window, "implementation": implementation}
    out = reference.attention(q, k, v, segments, cache_length=7, **options)
    torch.testing.assert_close(out, literal_attention(q, k, v, 0.3, window, start=7), **EXACT)


def test_a_cache_holds_one_document():
    x = random(4, 2, 4)
    segments = Segments.build([2, 2], device="cpu")
    with pytest.raises(ValueError, match="one document"):
        reference.attention(x, x, x, segments, scale=1.0, cache_length=2)


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
    out = reference.attention(q, k, v, segments, scale=0.3, **drawing)
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
    q, k, v = random(6, 4, 6), random(6, 2, 6), random(6, 2, 6, seed=1)
    segments = Segments.build([6], device="cpu")
    plain = reference.attention(q, k, v, segments, scale=0.3)
    same = reference.attention(q, k, v, segments, scale=0.3, dropout=0.5, module=MODULE)
    assert torch.equal(plain, same)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_in_bf16_keeps_its_type(implementation):
    q, k, v = (random(6, h, 8, seed=h).bfloat16() for h in (4, 2, 2))
    segments = Segments.build([4, 2], device="cpu")
    options = {"scale": 0.3, "implementation": implementation}
    out = reference.attention(q, k, v, segments, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), segments, **options)
    assert out.dtype == torch.bfloat16
    # Scores, weights and output are each rounded to 8 bits: a few 2^-8 of the largest value.
    assert (out - exact).abs().max() <= 4 * 2**-8 * v.abs().max()


@pytest.mark.gpu
def test_fused_dropout_on_a_gpu_repeats_itself_and_leaves_the_generator_alone():
    q, k, v = (random(64, h, 32, seed=h).bfloat16().cuda() for h in (4, 2, 2))

    def attend(step):
        segments = Segments.build([40, 24], device="cuda", examples=[1, 2], draw=(42, step))
        options = {"scale": 0.3, "dropout": 0.5, "module": MODULE}
        return reference.attention(q, k, v, segments, **options)

    before = torch.cuda.get_rng_state()
    first = attend(1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(attend(1), first)
    assert not torch.equal(attend(2), first)


def test_fused_and_written_out_attention_agree_on_a_long_document():
    q, k, v = random(300, 4, 16), random(300, 2, 16), random(300, 2, 16, seed=1)
    segments = Segments.build([300], device="cpu")
    options = {"scale": 0.25, "window": 77}
    fused = reference.attention(q, k, v, segments, **options)
    eager = reference.attention(q, k, v, segments, implementation="eager", **options)
    torch.testing.assert_close(fused, eager, **EXACT)
    assert F.cosine_similarity(fused, v.flatten(1).repeat(1, 2), dim=1).abs().max() < 1
