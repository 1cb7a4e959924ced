"""Triton kernels against fp64: interpreted on a CPU in fp32 and fp16, on a GPU in bf16 too.

Bounds. An operation that computes in fp32 and rounds its result once to a type of unit roundoff u
is within u of the exact value, relative to the largest term of its formula, and fp32's own error
over n terms is below n · 2⁻²⁴ of their sum of magnitudes: `bound` adds the two, with a factor of 4
for formulas of several steps. Outputs are filled with NaN before a kernel writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE
from torch import Tensor

from files.errors import UserError
from kernels import linears as plain
from kernels import reference
from kernels.dispatch import operations
from kernels.dropout import keep_mask, mix, module_id, signed
from kernels.loss import IGNORE, linear_cross_entropy
from kernels.operands import Operands
from kernels.segments import Segments
from train.optim import build_optimizer

pytest.importorskip("triton")

from kernels.triton import elementwise as triton_elementwise
from kernels.triton import launch as triton_launch
from kernels.triton import linears as triton_linears
from kernels.triton import loss as triton_loss
from kernels.triton import norms as triton_norms

ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [
    pytest.param(torch.float32, id="fp32", marks=ON_GPU),
    pytest.param(torch.float16, id="fp16", marks=ON_GPU),
    # The interpreter's bf16 products are wrong.
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]
SHAPES = [(1, 2), (3, 7), (16, 64), (37, 130), (5, 1025)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let torch.empty fill what it returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def bound(dtype: torch.dtype, terms: int) -> float:
    return 4 * (torch.finfo(dtype).eps / 2 + terms * 2**-24)


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    exact: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    terms: int,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compare outputs, and gradients of every input, relative to the largest value of each."""
    dtype = inputs[0].dtype
    sides = []
    for run, kind in ((ours, None), (exact, torch.float64)):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [
            draw(*out.shape, dtype=dtype, seed=99 + i).to(out.dtype)
            for i, out in enumerate(outputs)
        ]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        sides.append([*outputs, *gradients])
    for number, (one, other) in enumerate(zip(*sides, strict=True)):
        assert one.isfinite().all(), number
        difference = (one.double() - other).abs().max().item()
        largest = max(other.abs().max().item(), 1e-3)
        assert difference <= bound(dtype, terms) * largest, (number, difference / largest)


# --- norms ---------------------------------------------------------------------------------------


def exact_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(shape[1], dtype=dtype, seed=1)]
    compare(lambda x, w: triton_norms.rms_norm(x, w, 1e-5), exact_rms, inputs, sum(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rms_norm_rounds_before_the_weight_comes_in(dtype: torch.dtype) -> None:
    """As the reference does: but for a quotient that fp32 puts on the other side of a tie."""
    x, weight = draw(64, 130, dtype=dtype) * 3, draw(130, dtype=dtype, seed=1)
    ours = triton_norms.rms_norm(x, weight, 1e-6)
    assert (ours == reference.rms_norm(x, weight, 1e-6)).double().mean() > 0.99
    late = x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * weight.float()
    assert (ours == late.to(dtype)).double().mean() < 0.9  # the measure does see what it should


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype) + 3  # a mean away from 0
    inputs = [x, *(draw(shape[1], dtype=dtype, seed=i) for i in (1, 2))]
    compare(
        lambda x, w, b: triton_norms.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (shape[1],), w, b, 1e-5),
        inputs,
        4 * sum(shape),  # the mean, of size 3, is taken out in fp32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("centred", [False, True])
def test_norms_with_an_addition(shape: tuple[int, int], dtype: torch.dtype, centred: bool) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)]
    inputs += [draw(shape[1], dtype=dtype, seed=i) for i in ((2, 3) if centred else (2,))]

    def exact(x: Tensor, change: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        # The sum is part of the residual stream, in the stream's type: rounded here too.
        total = x + change + ((x + change).to(dtype).double() - (x + change)).detach()
        if centred:
            return total, F.layer_norm(total, (shape[1],), weight, *bias, 1e-5)
        return total, exact_rms(total, weight)

    ours = triton_norms.add_layer_norm if centred else triton_norms.add_rms_norm
    compare(lambda *tensors: ours(*tensors, 1e-5), exact, inputs, 4 * sum(shape))


def test_a_frozen_weight_s_gradient_is_not_made() -> None:
    x = draw(5, 8, dtype=torch.float32).requires_grad_()
    weight = draw(8, dtype=torch.float32, seed=1)
    triton_norms.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


# --- rotary and activations ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv", "d"), [(1, 1, 2), (6, 2, 8), (3, 3, 20), (12, 4, 64)])
def test_rotary(heads: int, kv: int, d: int, dtype: torch.dtype) -> None:
    angles = torch.arange(11)[:, None] * torch.rand(d // 2, generator=torch.manual_seed(3))
    angles = torch.cat((angles, angles), -1).to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rotary(q, k, cos.double(), sin.double())

    inputs = [draw(11, heads, d, dtype=dtype), draw(11, kv, d, dtype=dtype, seed=1)]
    compare(lambda q, k: triton_elementwise.rotary(q, k, cos, sin), exact, inputs, 2)


def test_rotary_takes_slices_of_wider_rows() -> None:
    wide = draw(7, 6 * 8, dtype=torch.float32)
    q = wide[:, : 4 * 8].unflatten(-1, (4, 8))
    k = wide[:, 4 * 8 :].unflatten(-1, (2, 8))
    cos, sin = draw(7, 4, dtype=torch.float32).repeat(1, 2), draw(7, 8, dtype=torch.float32)
    sin = sin[:, :4].repeat(1, 2)
    for one, other in zip(
        triton_elementwise.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2000)])
def test_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)
    # In the derivatives terms of the size of the input, up to 12 here, cancel.
    compare(triton_elementwise.swiglu, lambda g, u: F.silu(g) * u, [gate, up], 48)
    compare(triton_elementwise.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [gate], 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2000)])
def test_gelu_with_a_bias(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype, scale=3.0), draw(shape[1], dtype=dtype, seed=1)]
    spread = torch.stack([inputs[1], inputs[1]], 1)[:, 0]  # not contiguous
    assert triton_elementwise.gelu_tanh(inputs[0], spread).equal(
        triton_elementwise.gelu_tanh(*inputs)
    )
    compare(
        triton_elementwise.gelu_tanh,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        inputs,
        48 + shape[0],
    )


def test_gelu_takes_the_bias_of_the_layer_before_it() -> None:
    x, tensors, operands = layers_of(37, 24, [(40, 4, True)], 0.0, torch.float32)
    leaves = [x, *tensors]

    def plain_one(x: Tensor, *rest: Tensor) -> Tensor:
        return plain.linear_gelu(x, operands(rest)[0])

    def fused(x: Tensor, *rest: Tensor) -> Tensor:
        return triton_elementwise.linear_gelu(x, operands(rest)[0])

    compare(fused, plain_one, leaves, 400)


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 41, 1024, 9001])
def test_the_loss_of_a_chunk(vocabulary: int, dtype: torch.dtype) -> None:
    logits = draw(6, vocabulary, dtype=dtype, scale=4.0)
    targets = torch.tensor([0, vocabulary - 1, 1, 0, vocabulary // 2], device=DEVICE)
    exact = logits[:5].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().mul(0.25).backward()
    losses, gradient = triton_loss.cross_entropy_(logits, targets, 0.25)
    assert gradient.data_ptr() == logits.data_ptr()
    assert not gradient[5].any()
    assert exact.grad is not None
    terms = bound(torch.float32, vocabulary)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=terms, atol=16 * terms)
    assert (gradient[:5].double() - exact.grad).abs().max() <= 0.25 * bound(dtype, vocabulary)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_the_maximum_is_carried_from_block_to_block(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(triton_launch.DEFAULTS["cross_entropy"], "BLOCK", 16)
    logits = torch.stack([torch.arange(100.0), -torch.arange(100.0)]).to(dtype).to(DEVICE) / 4
    targets = torch.tensor([3, 99], device=DEVICE)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    losses, gradient = triton_loss.cross_entropy_(logits.clone(), targets, 1.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    exact = logits.double().softmax(-1) - F.one_hot(targets, 100)
    assert (gradient.double() - exact).abs().max() <= bound(dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_the_loss_through_its_head(dtype: torch.dtype) -> None:
    hidden = draw(23, 8, dtype=dtype)
    weight = draw(41, 8, dtype=dtype, seed=1)
    targets = torch.arange(23, device=DEVICE)
    targets[::5] = IGNORE
    compare(
        lambda h, w: linear_cross_entropy(
            h, w, targets, chunk_rows=7, cross_entropy=triton_loss.cross_entropy_
        ),
        lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum"),
        [hidden, weight],
        41,
    )


# --- linear layers -------------------------------------------------------------------------------


def layers_of(
    rows: int, width: int, outputs: list[tuple[int, int, bool]], p: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Callable[..., list[Operands]]]:
    """Return x, the layers' tensors in a flat list, and what puts such a list into operands."""
    x = draw(rows, width, dtype=dtype)
    tensors: list[Tensor] = []
    for i, (features, rank, bias) in enumerate(outputs):
        tensors.append(draw(features, width, dtype=dtype, seed=10 * i + 1, scale=width**-0.5))
        if bias:
            tensors.append(draw(features, dtype=dtype, seed=10 * i + 2))
        if rank:
            tensors.append(draw(rank, width, dtype=dtype, seed=10 * i + 3, scale=width**-0.5))
            tensors.append(draw(features, rank, dtype=dtype, seed=10 * i + 4, scale=rank**-0.5))

    def operands(flat: list[Tensor]) -> list[Operands]:
        flat = list(flat)
        made = []
        for i, (_, rank, bias) in enumerate(outputs):
            weight = flat.pop(0)
            bias_tensor = flat.pop(0) if bias else None
            a, b = (flat.pop(0), flat.pop(0)) if rank else (None, None)
            made.append(Operands(weight, bias_tensor, a, b, 2.0, p, module_id(f"layer {i}")))
        return made

    return x, tensors, operands


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param([(24, 4, False)], id="one"),
        pytest.param([(24, 4, True), (8, 4, True), (8, 4, True)], id="q, k and v"),
        pytest.param([(40, 16, False), (40, 16, False)], id="gate and up"),
        pytest.param([(24, 0, True), (8, 3, True), (8, 5, False)], id="ranks apart, q plain"),
        pytest.param([(24, 4, False), (8, 0, False), (8, 17, False)], id="k plain"),
    ],
)
@pytest.mark.parametrize(("rows", "width"), [(9, 20), (130, 96)])
def test_linears(
    rows: int, width: int, outputs: list[tuple[int, int, bool]], p: float, dtype: torch.dtype
) -> None:
    x, tensors, operands = layers_of(rows, width, outputs, p, dtype)
    lengths = [rows - rows // 3, rows // 3]
    segments = Segments.build(lengths, device=DEVICE, examples=[4, 9], draw=(42, 3))
    # Two products one after another, each of them rounded, and the sum over the layers.
    compare(
        lambda x, *flat: tuple(triton_linears.linears(x, operands(flat), segments)),
        lambda x, *flat: tuple(plain.linears(x, operands(flat), segments)),
        [x, *tensors],
        rows + width + (0 if dtype == torch.float32 else round(2**24 * torch.finfo(dtype).eps)),
    )


def test_an_adapter_without_dropout_keeps_every_word_beside_one_with() -> None:
    x, tensors, operands = layers_of(1, 2, [(2, 1, False), (2, 1, False)], 0.1, torch.float32)
    first, second = operands(tensors)
    first = first._replace(dropout=0.0)
    # The row key for which the first module's word of column 0 is the largest of all.
    word = 0x7FFFFFFF
    for multiplier, bits in ((0x846CA68B, 15), (0x7FEB352D, 16)):
        word = word * pow(multiplier, -1, 2**32) % 2**32
        word ^= word >> bits
        word ^= (word >> 2 * bits) if 2 * bits < 32 else 0
    row_key = word ^ mix(mix(first.module))
    segments = dataclasses.replace(
        Segments.build([1], device=DEVICE, examples=[0], draw=(1, 1)),
        dropout_rows=torch.tensor([signed(row_key)], dtype=torch.int32, device=DEVICE),
    )
    assert not keep_mask(segments.dropout_rows, first.module, 1, 2.0**-40).any()  # pyright: ignore
    for one, other in zip(
        triton_linears.linears(x, [first, second], segments),
        plain.linears(x, [first, second], segments),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_rows_that_several_programs_share(dtype: torch.dtype) -> None:
    rows = 1100  # two ranges of 550, which is no multiple of a tile
    x, tensors, operands = layers_of(rows, 8, [(8, 4, False)], 0.1, dtype)
    segments = Segments.build([rows], device=DEVICE, examples=[4], draw=(42, 3))
    compare(
        lambda x, *flat: tuple(triton_linears.linears(x, operands(flat), segments)),
        lambda x, *flat: tuple(plain.linears(x, operands(flat), segments)),
        [x, *tensors],
        rows,
    )


def test_frozen_tensors_get_no_gradient_and_dropout_needs_segments() -> None:
    x, tensors, operands = layers_of(9, 20, [(24, 4, True)], 0.5, torch.float32)
    weight, bias, a, b = tensors
    x.requires_grad_()
    a.requires_grad_()
    b.requires_grad_()
    (y,) = triton_linears.linears(x, operands(tensors))
    exact = x @ weight.T + bias + 2.0 * (x @ a.T) @ b.T
    torch.testing.assert_close(y, exact)
    y.sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_the_kernels_give_the_same_bits_again() -> None:
    x, tensors, operands = layers_of(130, 96, [(24, 4, True), (8, 4, True)], 0.1, torch.float32)
    segments = Segments.build([130], device=DEVICE, examples=[4], draw=(42, 3))
    runs = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *tensors)]
        outputs = triton_linears.linears(leaves[0], operands(leaves[1:]), segments)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
        runs.append([*outputs, *gradients])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))


# --- optimizers ----------------------------------------------------------------------------------

# A buffer of several blocks, cut inside one; equal and lone matrices; a vector.
PARAMETERS = {"a": (3, 700), "b": (3, 700), "m": (37, 130), "big": (1030, 1030), "v_bias": (9,)}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("scale", [pytest.param(scale, marks=ON_GPU) for scale in (1.0, 0.3)])
def test_updates(name: str, scale: float) -> None:
    """Three steps with masters in fp32 and in fp64."""
    sides = []
    for kind, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        model = torch.nn.ParameterDict(
            {
                key: torch.nn.Parameter(draw(*shape, dtype=torch.float32, seed=i).to(kind))
                for i, (key, shape) in enumerate(PARAMETERS.items())
            }
        )
        optimizer = build_optimizer(
            name, model, weight_decay=0.1, operations=operations(backend, DEVICE)
        )
        assert (optimizer._kernel is not None) == (backend == "triton")  # type: ignore
        assert "big" in optimizer.lone
        for step in range(3):
            for i, parameter in enumerate(model.values()):
                gradient = draw(*parameter.shape, dtype=torch.float32, seed=100 * step + i)
                gradient[..., 0] = 0  # a column whose mean square is epsilon alone, and a row
                gradient[0] = 0
                parameter.grad = gradient.to(kind)
            optimizer.step(0.1, scale)
            optimizer.clear_gradients()
        sides.append({**dict(model.items()), **optimizer.state_tensors()})
    ours, exact = sides
    assert ours.keys() == exact.keys()
    # Every number comes of three steps of some ten operations, and of a mean over 1,030 or a norm
    # over a million, whose parts torch adds pairwise.
    for key, value in ours.items():
        largest = exact[key].abs().max().item()
        difference = (value.double() - exact[key]).abs().max().item()
        assert difference <= bound(torch.float32, 64) * largest, (key, difference / largest)


@pytest.mark.parametrize("name", [pytest.param("adafactor", marks=ON_GPU)])
def test_a_turned_matrix_is_updated_as_one_that_lies_straight(name: str) -> None:
    sides = []
    for turned in (False, True):
        weight = draw(1030, 1031, dtype=torch.float32)
        if turned:
            weight = weight.t().contiguous().t()
        model = torch.nn.ParameterDict({"w": torch.nn.Parameter(weight)})
        optimizer = build_optimizer(name, model, operations=operations("triton", DEVICE))
        model["w"].grad = draw(1030, 1031, dtype=torch.float32, seed=7)
        optimizer.step(0.1)
        sides.append(model["w"].detach())
    torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-6)


def test_launch_parameters_of_a_device_come_before_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device(DEVICE)
    before = triton_launch.launch("low_rank", device)
    assert before == triton_launch.DEFAULTS["low_rank"] or DEVICE == "cuda"
    found = {triton_launch.capability(device): {"launch": {"low_rank": {"BLOCK_ROWS": 32}}}}
    monkeypatch.setattr(triton_launch, "entries", lambda: found)
    assert triton_launch.launch("low_rank", device) == {
        **triton_launch.DEFAULTS["low_rank"],
        "BLOCK_ROWS": 32,
    }
    assert triton_launch.launch("adamw", device) == triton_launch.DEFAULTS["adamw"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "launch.json"),
        ("[]", "launch.json"),
        ('{"sm_90": []}', "must be an object with `launch` and `gains`"),
        ('{"sm_90": {"gain": []}}', "must be an object with `launch` and `gains`"),
        ('{"sm_90": {"gains": "linears"}}', "gains 'linears' must be a list of operations"),
        ('{"sm_90": {"launch": {"adam": {}}}}', "kernels among adamw, adafactor"),
        ('{"sm_90": {"launch": {"adamw": {"BLOCK": 512}}}}', "adamw must have BLOCK, num_warps"),
        (
            '{"sm_90": {"launch": {"adamw": {"BLOCK": 33, "num_warps": 4}}}}',
            "adamw.BLOCK is 33, but must be a power of two",
        ),
    ],
)
def test_a_damaged_file_of_what_was_measured_is_refused(
    content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "launch.json"
    path.write_text(content)
    monkeypatch.setattr(triton_launch, "TUNED", path)
    with pytest.raises(UserError) as caught:
        triton_launch.entries.__wrapped__()
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_was_measured_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"sm_90": {"gains": ["swiglu"], "launch": dict(triton_launch.DEFAULTS)}}
    monkeypatch.setattr(triton_launch, "TUNED", tmp_path / "launch.json")
    assert triton_launch.entries.__wrapped__() == {}
    monkeypatch.setattr(triton_launch, "entries", lambda: found)
    triton_launch.write_entries()
    monkeypatch.undo()
    monkeypatch.setattr(triton_launch, "TUNED", tmp_path / "launch.json")
    assert triton_launch.entries.__wrapped__() == found


def test_an_unknown_operation_among_the_gains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    for name in ("swiglue", "name"):
        found = {triton_launch.capability(device): {"gains": [name]}}
        monkeypatch.setattr(triton_launch, "entries", lambda found=found: found)
        with pytest.raises(UserError, match=f"gains name {name}, which is no operation"):
            operations("auto", device)


@pytest.mark.parametrize("gains", [["linears"], ["linear_gelu"], ["linear_gelu", "linears"]])
def test_a_layer_before_gelu_goes_through_the_linears_that_were_chosen(
    gains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {triton_launch.capability(torch.device(DEVICE)): {"gains": gains}}
    monkeypatch.setattr(triton_launch, "entries", lambda: found)
    calls = []
    product = triton_linears.low_rank_product
    monkeypatch.setattr(
        triton_linears, "low_rank_product", lambda *given: calls.append(1) or product(*given)
    )
    x, tensors, operands = layers_of(9, 24, [(40, 4, True)], 0.0, torch.float32)
    operations("auto", DEVICE).linear_gelu(x, operands(tensors)[0])
    assert bool(calls) == ("linears" in gains)


def test_ranks_that_no_tile_holds_go_through_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(triton_linears, "low_rank_product")
    x, tensors, operands = layers_of(9, 24, [(40, 129, False)], 0.0, torch.float32)
    exact = plain.linears(x.double(), operands([t.double() for t in tensors]))[0]
    ours = triton_linears.linears(x, operands(tensors))[0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_auto_takes_what_gains_on_a_class_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    found = {triton_launch.capability(device): {"gains": ["swiglu", "adamw_"]}}
    monkeypatch.setattr(triton_launch, "entries", lambda: found)
    chosen = operations("auto", device)
    assert chosen.name == "reference, triton's swiglu, adamw_"
    assert chosen.swiglu is triton_elementwise.swiglu
    assert chosen.adamw_ is not None
    assert chosen.rotary is reference.rotary
    monkeypatch.setattr(triton_launch, "entries", dict)
    assert operations("auto", device).name == "reference"
