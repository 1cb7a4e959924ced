"""Linear layers with adapters as one function, against the plain formula and its autograd, in fp64.

fp64 tolerances: 1e-12, some hundred roundings of 1.1e-16, on values of order one.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linears as module
from kernels.dropout import keep_mask, module_id
from kernels.linears import linears
from kernels.operands import Operands, gradient_product
from kernels.segments import Segments

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
MODULE = module_id("model.layers.0.self_attn.q_proj")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def adapted(dtype: torch.dtype = torch.float64, **options) -> Operands:
    factors = {"lora_a": random(3, 8, dtype=dtype), "lora_b": random(5, 3, dtype=dtype)}
    return Operands(random(5, 8), random(5), **factors, scale=0.5, **options)


def test_linears_share_an_input():
    x, plain, lora = random(6, 8), Operands(random(4, 8)), adapted()
    first, second = linears(x, [plain, lora])
    torch.testing.assert_close(first, x @ plain.weight.T, **EXACT)
    expected = x @ lora.weight.T + lora.bias + 0.5 * (x @ lora.lora_a.T @ lora.lora_b.T)
    torch.testing.assert_close(second, expected, **EXACT)


def test_adapter_alone_sees_dropped_input():
    x, lora = random(6, 8), adapted(dropout=0.5, module=MODULE)
    segments = Segments.build([6], device="cpu", examples=[1], draw=(1, 1))
    mask = keep_mask(segments.dropout_rows, MODULE, 8, 0.5)
    (y,) = linears(x, [lora], segments)
    low_rank = (x * mask / 0.5) @ lora.lora_a.T @ lora.lora_b.T
    torch.testing.assert_close(y, x @ lora.weight.T + lora.bias + 0.5 * low_rank, **EXACT)


def test_fp32_adapter_and_bias_over_a_bf16_base():
    half = torch.bfloat16
    x = random(6, 8, dtype=half)
    layer = Operands(
        random(5, 8, dtype=half),
        random(5, dtype=torch.float32),
        random(3, 8, dtype=torch.float32).requires_grad_(),
        random(5, 3, dtype=torch.float32).requires_grad_(),
    )
    (y,) = linears(x, [layer])
    assert y.dtype == half
    y.sum().backward()
    assert layer.lora_a is not None and layer.lora_a.grad is not None
    assert layer.lora_a.grad.dtype == torch.float32


def test_linears_under_autocast_compute_in_bf16():
    x, lora = random(6, 8).float(), adapted()
    lora = Operands(*(t.float() for t in lora[:4]), scale=0.5)
    (exact,) = linears(x, [lora])
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = linears(x, [lora])
    assert y.dtype == torch.bfloat16
    # Five roundings to 8 bits (x, W, A, the product, the sum): 5 · 2^-8, of the largest term.
    assert (y - exact).abs().max() <= 5 * 2**-8 * exact.abs().max()


def test_under_autocast_an_input_is_lowered_and_kept_once() -> None:
    """The same bits as three layers of torch's, whose autocast lowers and keeps it three times."""
    layers = [Operands(random(n, 64).float().requires_grad_()) for n in (8, 5, 7)]
    grads, kept = [], []
    for together in (True, False):
        leaf = random(6, 64, seed=1).float().requires_grad_()
        x = leaf * 1  # autocast keeps copies of leaves
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if tensor.shape == (6, 64):
                saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            if together:
                out = linears(x, layers)
            else:
                out = [torch.nn.functional.linear(x, layer.weight) for layer in layers]
        kept.append(sum(saved.values()))
        upstream = [random(*y.shape, seed=i).bfloat16() for i, y in enumerate(out)]
        grads.append(
            torch.autograd.grad(out, [leaf, *(layer.weight for layer in layers)], upstream)
        )
    assert all(map(torch.equal, *grads))
    assert kept == [6 * 64 * 2, 3 * 6 * 64 * 2]


def plain_formula(x: torch.Tensor, layer: Operands, segments: Segments | None) -> torch.Tensor:
    """Return what one layer computes, in operations that autograd differentiates."""
    y = x @ layer.weight.T
    if layer.bias is not None:
        y = y + layer.bias
    if layer.lora_a is None or layer.lora_b is None:
        return y
    if segments is not None and layer.dropout:
        mask = keep_mask(segments.dropout_rows, layer.module, x.shape[1], layer.dropout)
        x = x * mask / (1 - layer.dropout)
    return y + layer.scale * (x @ layer.lora_a.T @ layer.lora_b.T)


def three_layers(*, dropout: float, train_base: bool) -> list[Operands]:
    """Return an adapted layer with a bias, a plain one, and an adapted one without bias."""

    def part(*shape: int, seed: int, trained: bool = True) -> torch.Tensor:
        return random(*shape, seed=seed).requires_grad_(trained)

    common = {"scale": 0.7, "dropout": dropout}
    return [
        Operands(
            part(5, 8, seed=1, trained=train_base),
            part(5, seed=2, trained=train_base),
            part(3, 8, seed=3),
            part(5, 3, seed=4),
            **common,
            module=MODULE,
        ),
        Operands(part(4, 8, seed=5, trained=train_base)),
        Operands(
            part(6, 8, seed=6, trained=train_base),
            None,
            part(2, 8, seed=7),
            part(6, 2, seed=8),
            **common,
            module=MODULE + 1,
        ),
    ]


@pytest.mark.parametrize("train_base", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("unused", [None, 0, 1, 2])
@pytest.mark.parametrize("input_trained", [True, False])
def test_every_gradient_is_that_of_the_formula(
    train_base: bool, dropout: float, unused: int | None, input_trained: bool
) -> None:
    segments = Segments.build([4, 3], device="cpu", examples=[1, 9], draw=(1, 1))
    gradients = []
    for function in (linears, lambda x, ls, s: [plain_formula(x, layer, s) for layer in ls]):
        x = random(7, 8).requires_grad_(input_trained)
        layers = three_layers(dropout=dropout, train_base=train_base)
        outputs = function(x, layers, segments)
        loss = sum(
            (random(*y.shape, seed=11 + i) * y).sum() for i, y in enumerate(outputs) if i != unused
        )
        loss.backward()
        leaves = [x, *(part for layer in layers for part in layer[:4] if part is not None)]
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_gradient_on_cuda_is_the_product_s_fp32_sum(half: torch.dtype) -> None:
    """FakeTensor says what a card's product returns, without the card."""
    with FakeTensorMode():
        left, right = (torch.empty(8, 8, dtype=half, device="cuda") for _ in range(2))
        assert gradient_product(left, right).dtype == torch.float32
        assert gradient_product(left.float(), right.float()).dtype == torch.float32
        assert gradient_product(left.double(), right.double()).dtype == torch.float64
    assert gradient_product(*(torch.ones(8, 8, dtype=half) for _ in range(2))).dtype == half


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_gradient_on_cuda_is_exact_to_fp32(half: torch.dtype) -> None:
    left, right = (random(3, 4096, dtype=half, seed=i).cuda() for i in range(2))
    exact = left.double() @ right.double().t()
    difference = (gradient_product(left, right.t()) - exact).abs().max()
    assert difference <= 4096 * 2**-24 * exact.abs().max()


def test_no_gradient_of_a_parameter_is_rounded_to_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On meta, which goes where CUDA goes: every product of a parameter's shape comes in fp32."""
    monkeypatch.setattr(module, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    seen: dict[tuple[int, ...], torch.dtype] = {}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is torch.ops.aten.mm:
                seen[tuple(out.shape)] = out.dtype
            return out

    def trained(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", requires_grad=True)

    x = torch.empty(6, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    (y,) = linears(x, [Operands(trained(5, 8), None, trained(3, 8), trained(5, 3))])
    with Products():
        y.backward(torch.empty_like(y))
    half, single = torch.bfloat16, torch.float32
    # dx, ds; dW, dA, dB turned.
    assert seen == {(6, 8): half, (6, 3): half, (5, 8): single, (3, 8): single, (3, 5): single}


def test_the_input_is_kept_once() -> None:
    """What is kept: x, M · r numbers an adapter, and on a CPU its mask, a byte an element.

    Weights and factors are there anyway.
    """
    m, k = 64, 32
    x = random(m, k, dtype=torch.float32).requires_grad_()
    segments = Segments.build([m], device="cpu", examples=[1], draw=(1, 1))
    layers = [
        Operands(
            random(k, k, dtype=torch.float32, seed=i),
            None,
            random(4, k, dtype=torch.float32, seed=i).requires_grad_(),
            random(k, 4, dtype=torch.float32, seed=i).requires_grad_(),
            dropout=0.1,
            module=i,
        )
        for i in range(3)
    ]
    own = {part.data_ptr() for layer in layers for part in layer[:4] if part is not None}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linears(x, layers, segments)
    row_keys = 4 * m
    masks = 3 * m * k
    assert sum(kept.values()) == 4 * m * k + 3 * 4 * m * 4 + row_keys + masks
