"""The traffic ledger: what it counts of single operations, of kernels and of the presets' steps."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import pretended, traffic
from benchmarks.counting import Counting
from benchmarks.kernel_source import uses_of
from benchmarks.pretended import pretended_cuda
from kernels.dispatch import Operations
from kernels.loss import chunk_rows_of
from models.config import DecoderConfig
from train.config.layers import preset_names
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.known import Unknown
from train.plan.activations import activations_of
from train.plan.cards import CARDS
from train.plan.decide import Machine, decide
from train.plan.ledger import (
    find_decoder_config,
    memory_ledger,
    micro_batch_tokens,
    model_sizes,
    widths,
)
from train.precision import COMPUTE_DTYPES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
H200 = CARDS["h200"]

# --- the pretence --------------------------------------------------------------------------------

# By the names in `benchmarks.pretended`: what each is called with, x and y being (8, 8).
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addmm": lambda x, y: torch.addmm(x, x, y),
    "einsum": lambda x, y: torch.einsum("ij,jk->ik", x, y),
    "linear": lambda x, y: F.linear(x, y),
    "matmul": lambda x, y: x @ y,
    "mm": lambda x, y: torch.mm(x, y),
    "vecdot": lambda x, y: torch.linalg.vecdot(x, y),
    "cumsum": lambda x, y: torch.cumsum(x, 0),
    "exp": lambda x, y: x.exp(),
    "layer_norm": lambda x, y: F.layer_norm(x, (8,)),
    "log": lambda x, y: x.log(),
    "log_softmax": lambda x, y: torch.log_softmax(x, -1),
    "logsumexp": lambda x, y: torch.logsumexp(x, -1),
    "norm": lambda x, y: torch.norm(x),
    "pow": lambda x, y: x**2,
    "prod": lambda x, y: x.prod(0),
    "reciprocal": lambda x, y: x.reciprocal(),
    "rsqrt": lambda x, y: x.rsqrt(),
    "softmax": lambda x, y: torch.softmax(x, -1),
    "sum": lambda x, y: x.sum(0),
    "vector_norm": lambda x, y: torch.linalg.vector_norm(x),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
    "cat": lambda x, y: torch.cat((x, y)),
    "scatter_add": lambda x, y: x.scatter_add(0, torch.zeros_like(x, dtype=torch.int64), y),
    "stack": lambda x, y: torch.stack((x, y)),
    # What neither list has keeps torch's own rule.
    "gelu": lambda x, y: F.gelu(x),
    "silu": lambda x, y: F.silu(x),
    "add": lambda x, y: x + y,
    "mean": lambda x, y: x.mean(0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_is_that_of_cuda(name: str, dtype: torch.dtype, other: torch.dtype) -> None:
    def made() -> torch.dtype:
        x = torch.empty(8, 8, dtype=dtype, device="cuda")
        y = torch.empty(8, 8, dtype=other, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            return CALLS[name](x, y).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)

    with FakeTensorMode():
        expected = made()
    with pretended_cuda(H200):
        assert made() == expected


def test_each_name_of_autocast_s_lists_is_compared() -> None:
    ours = pretended._LOWERED | pretended._IN_FP32 | pretended._WIDEST
    # Those that a build without CUDA cannot fake.
    assert ours - {*CALLS} == {"baddbmm", "bmm", "dot", "scaled_dot_product_attention"}


def test_a_weight_is_lowered_once_a_forward_pass() -> None:
    with pretended_cuda(H200), Counting((8,), None, 0) as counting:
        weight = torch.nn.Parameter(torch.empty(8, 8, device="cuda"))
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                for _ in range(3):
                    F.linear(torch.empty(8, 8, dtype=torch.bfloat16, device="cuda"), weight)
    casts = [launch for launch in counting.launches if launch.name == "_to_copy"]
    assert [launch.bytes for launch in casts] == [64 * (4 + 2)] * 2


def test_tensors_are_on_cuda_inside_and_on_meta_again_outside() -> None:
    x = torch.empty(2, device="meta")
    with pretended_cuda(H200):
        assert x.device.type == x.new_zeros(2).device.type == "cuda"
        assert torch.arange(2).pin_memory().to("cuda", non_blocking=True).device.type == "cuda"
        assert torch.arange(2).device.type == "cpu"
        assert torch.cuda.get_device_capability(x.device) == (9, 0)
    assert x.device.type == "meta"
    assert not torch.cuda.is_available()


# --- what is counted -----------------------------------------------------------------------------


def launched(function: Callable[..., object], *shapes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (bytes, flops) of each launch that a function of bf16 tensors makes."""
    with pretended_cuda(H200), Counting((8,), None, 0) as counting:
        tensors = [torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        counting.clear()
        function(*tensors)
    return [(launch.bytes, launch.flops) for launch in counting.launches]


def test_bytes_and_flops_of_operations() -> None:
    product = 2 * 8 * 4 * 16
    abc = (8, 4), (4, 16), (8, 16)
    assert launched(torch.mm, *abc[:2]) == [(2 * (32 + 64 + 128), product)]
    # Added to what is there, it is read as well; with beta = 0 it is not.
    assert launched(lambda a, b, c: c.addmm_(a, b), *abc) == [(2 * (32 + 64 + 256), product)]
    assert launched(lambda a, b, c: c.addmm_(a, b, beta=0), *abc) == [
        (2 * (32 + 64 + 128), product)
    ]
    # A bias is read once, not once a row.
    assert launched(F.linear, (8, 4), (16, 4), (16,)) == [(2 * (32 + 64 + 128 + 16), product)]
    assert launched(lambda x: x.t()[1:].view(-1, 1, 8), (8, 4)) == []
    assert launched(lambda x: x.mul_(2), (8, 4)) == [(2 * 64, 0)]
    assert launched(lambda x: x + x, (8, 4)) == [(2 * 64, 0)]
    assert launched(lambda x, y: x.copy_(y), (8, 4), (8, 4)) == [(2 * 64, 0)]
    assert launched(lambda x, y: x + y.expand(8, 4), (8, 4), (1, 4)) == [(2 * (32 + 4 + 32), 0)]
    assert launched(lambda x: (x.new_empty(9), x.new_zeros(9)), (8, 4)) == [(2 * 9, 0)]
    rows = torch.tensor([3, 1])
    taken = launched(lambda x: x.index_select(0, rows.to("cuda")), (1000, 4))
    assert taken == [(2 * 8 + 2 * 8 + 2 * 8, 0)]  # two rows read and written, two indices


def test_flops_of_attention() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    ((moved, flops),) = launched(attend, (2, 4, 32, 8), (2, 1, 32, 8))
    assert flops == 2 * 4 * (2 * 2 * 32 * 32 * 8) // 2  # documents, heads, two products, causal
    q, k, row_sums = 2 * 4 * 32 * 8, 2 * 1 * 32 * 8, 2 * 4 * 32
    assert 0 <= moved - (2 * (2 * q + k) + 4 * row_sums) < 64  # and the generator's state


@triton.jit
def _inner(pointer, at, ADDS: tl.constexpr):
    if ADDS:
        return tl.load(pointer + at)
    return at


def _sample(x_ptr, y_ptr, bias_ptr, out_ptr, count, ADDS, LOOPS):
    at = tl.arange(0, 16)
    base = y_ptr + count * at
    for start in range(0, count, LOOPS):
        value = tl.load(base + start, mask=at < count)
        value = tl.dot(value, tl.trans(tl.load(x_ptr + at)))
        value += _inner(bias_ptr, at, ADDS).to(out_ptr.dtype.element_ty)
    if LOOPS > 2:
        tl.store(out_ptr + at, value)
    else:
        tl.atomic_add(x_ptr + at, value)


@pytest.mark.parametrize(
    ("known", "reads", "writes"),
    [
        ({"ADDS": True, "LOOPS": 4}, {"x_ptr", "y_ptr", "bias_ptr"}, {"out_ptr"}),
        ({"ADDS": False, "LOOPS": 1}, {"x_ptr", "y_ptr"}, {"x_ptr"}),
    ],
)
def test_what_a_kernel_reads_and_writes(
    known: dict[str, Any], reads: set[str], writes: set[str]
) -> None:
    uses = uses_of(_sample, tuple(known.items()))
    arguments = {"x_ptr", "y_ptr", "bias_ptr", "out_ptr"}
    assert uses.reads & arguments == reads
    assert uses.writes & arguments == writes
    assert uses.products == 1


def test_every_operation_of_a_backend_has_a_kind() -> None:
    from benchmarks.counting import _KIND_OF

    fields = {name for name in Operations.__dataclass_fields__ if not name.endswith("_")}
    assert fields - {"name"} == {*_KIND_OF}


# --- steps ---------------------------------------------------------------------------------------

# Per layer, at most: launches, GB, GiB kept. A change that gains lowers them.
CEILINGS = {
    "": (74, 17.9, 1.16),  # StarCoder2-3B, LoRA r = 16, 24 × 1,024, bf16
    "--preset qwen2.5-coder-1.5b per_device_train_batch_size=24 effective_batch_size=24 "
    "gradient_checkpointing=false": (81, 15.2, 1.14),  # r = 32, dropout 0.1
    "--preset llama2-7b lora.r=16 per_device_train_batch_size=16": (80, 20.3, 1.43),
}


def asked(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert traffic.main(["--json", "--layers", "3", *arguments.split()]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("arguments", CEILINGS, ids=["starcoder2-3b", "qwen2.5-1.5b", "llama2-7b"])
def test_a_layer_stays_below_its_ceilings(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = asked(f"--kernels triton {arguments}", capsys)
    layer = document["layer"]
    launches, gigabytes, kept = CEILINGS[arguments]
    assert layer["launches"] <= launches
    assert layer["bytes"] <= gigabytes * 1e9
    assert layer["saved_bytes"] <= kept * 2**30
    # The host waits for the gradient's norm and for the loss, and for nothing before them.
    assert document["waits"] == [["update", "copy to the host"]] * 2
    assert document["predicted"] is True
    assert document["launches"] > 3 * layer["launches"]
    assert document["flops"] > 3 * layer["flops"]


def test_products_of_a_layer_are_those_of_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = asked("--kernels reference", capsys)["by_operation"]
    rows, hidden, keys, inner, rank = 24 * 1024, 3072, 256, 12288, 16
    weights = 2 * hidden * hidden + 2 * hidden * keys + 2 * hidden * inner
    assert kinds["large products"]["layer"]["flops"] == 4 * rows * weights
    sides = 4 * hidden + 2 * (hidden + keys) + 2 * (hidden + inner)
    assert kinds["LoRA branch"]["layer"]["flops"] == 6 * rows * rank * sides
    pairs = 24 * 1024**2 // 2
    assert kinds["attention"]["layer"]["flops"] == 14 * pairs * hidden
    # GELU reads and writes M · I forward and again for A's gradient, and backward reads it twice
    # and writes it once.
    assert kinds["GELU, SwiGLU"]["layer"]["bytes"] == 7 * rows * inner * 2


def test_a_card_s_table_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--layers", "3", "--card", "a100", "--kernels", "triton"]) == 0
    said = capsys.readouterr().out
    assert "A100" in said
    assert "every time is PREDICTED" in said
    assert "\npredicted: " in said


def test_a_preset_whose_sizes_are_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--preset", "default"]) == 2
    assert "model.path is not set" in capsys.readouterr().err


# --- the plan's memory ---------------------------------------------------------------------------


def two_layers(preset: str, **settings: object) -> tuple[RunConfig, DecoderConfig] | None:
    config = load_config(preset, overrides={"train.kernels": "triton", **settings})
    decoder = find_decoder_config(config)
    if isinstance(decoder, Unknown):
        return None
    with pretended_cuda(H200):
        return decide(config, Machine("cuda", H200.memory)), traffic.with_layers(decoder, 2)


# Of each family each method; the other presets' sizes are slow.
QUICK = {
    "codellama-7b",
    "demo-base",
    "qwen2.5-coder-1.5b",
    "starcoder2-3b",
    "starcoder2-3b-lora",
}


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in preset_names()
        if name != "default"
    ],
)
def test_the_plan_s_activations_are_what_a_step_keeps(preset: str) -> None:
    found = two_layers(preset, **{"model.gradient_checkpointing": False})
    assert found is not None
    config, decoder = found
    sizes = model_sizes(decoder, config.train.method, config.lora)
    precision = config.train.precision
    memory = functools.partial(
        memory_ledger, config, decoder, sizes, precision=precision, device="cuda"
    )
    planned = memory()
    width = COMPUTE_DTYPES[precision].itemsize
    rows, _ = micro_batch_tokens(config, None)
    chunk = min(rows, chunk_rows_of(decoder.vocab_size, COMPUTE_DTYPES[precision], "cuda"))
    estimate = planned["activations"] + planned["loss"] - chunk * decoder.vocab_size * (4 + width)
    if planned["weights"] > width * sizes.base:  # lowered copies, but the head's, are kept too
        estimate += width * (sizes.matmul - decoder.vocab_size * decoder.hidden_size)
    kept = traffic.count(config, decoder, H200).saved_bytes
    assert estimate == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("policy", ["norms", "mlp", "layers"])
@pytest.mark.parametrize("preset", ["qwen2.5-coder-1.5b", "starcoder2-3b"])
def test_the_plan_s_activations_are_what_a_step_keeps_under_every_policy(
    preset: str, policy: str
) -> None:
    found = two_layers(preset, **{"model.gradient_checkpointing": policy})
    assert found is not None
    config, decoder = found
    sizes = model_sizes(decoder, config.train.method, config.lora)
    full, precision = config.train.method == "full", config.train.precision
    width = COMPUTE_DTYPES[precision].itemsize
    planned = memory_ledger(
        config, decoder, sizes, precision=precision, policy=policy, device="cuda"
    )
    rows, longest = micro_batch_tokens(config, None)
    token = activations_of(
        config, decoder, sizes, widths(config, precision), policy, "cuda", longest
    )
    chunk = min(rows, chunk_rows_of(decoder.vocab_size, COMPUTE_DTYPES[precision], "cuda"))
    estimate = planned["activations"] + planned["loss"] - chunk * decoder.vocab_size * (4 + width)
    estimate -= rows * token.again
    if policy == "layers":
        estimate -= width * (sizes.total - sizes.base) / 2  # a layer's adapters, lowered
    if full and policy != "layers":  # autocast's copies of the weights of what is kept
        head = decoder.vocab_size * decoder.hidden_size
        estimate += width * (sizes.matmul - head - (policy == "mlp") * sizes.mlp_matmul)
    kept = traffic.count(config, decoder, H200).saved_bytes
    assert estimate == pytest.approx(kept, rel=0.03)


def test_the_plan_s_activations_of_recomputed_layers() -> None:
    found = two_layers("qwen2.5-coder-1.5b", **{"model.gradient_checkpointing": True})
    assert found is not None
    config, decoder = found
    rows, _ = micro_batch_tokens(config, None)
    kept = traffic.count(config, decoder, H200).saved_bytes
    # Two layers' inputs, the final norm's, and the loss's gradient: M · H each, in bf16.
    assert kept == pytest.approx(4 * 2 * rows * decoder.hidden_size, rel=0.06)
