"""A run on CUDA: exact resume, one gradient whatever the cut, and the memory that was planned."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import resume, signalled, train, trained_bits
from small import FAMILIES, RaggedExamples, adapted, small_model
from steps import cut, gradient_step, one_step
from test_resume import settings

from benchmarks.gpu import Work, gate, gate_fault, rows
from kernels.dispatch import operations
from kernels.pinned import CudaBoundary
from lora import LoraConfig, inject
from models import build
from models.config import parse_config
from models.recompute import POLICIES
from train.config.load import load_config
from train.inputs.streaming import stream_layers
from train.optim import build_optimizer
from train.optim.paged import PagedMoments
from train.plan.ledger import memory_ledger
from train.precision import Precision
from train.state import StepResult

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
EXAMPLES: Any = RaggedExamples([70, 31, 120, 18, 64, 9, 200, 14])
BACKENDS = ["reference", "triton"]
GATED = ["E1 ours", "E3 ours", "E4 ours", "E5 ours"]


@pytest.fixture(autouse=True)
def free_order() -> Iterator[None]:
    """A deterministic run asks it of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("work", [row.work for row in rows() if row.name in GATED], ids=GATED)
def test_the_benchmark_s_gate_is_green(work: Work) -> None:
    assert gate_fault(gate(work, dry=False)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": "bf16"},
        {"train.precision": "fp16"},
        {"train.precision": "bf16", "train.kernels": "triton"},
        {"train.precision": "bf16", "data.batching": "longest", "model.dropout": 0.0},
        {"train.precision": "bf16", "train.method": "full", "optimizer.name": "adafactor"},
    ],
    ids=["bf16", "fp16", "triton", "padded", "full"],
)
def test_stopped_and_resumed_ends_in_the_same_bits(
    changes: dict[str, Any],
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    changes = {"train.device": "cuda", "train.deterministic": True, **changes}
    whole = train(settings(model_folder, rows_file, tmp_path / "whole", **changes))
    run = tmp_path / "stopped"
    train(settings(model_folder, rows_file, run, **changes), signalled(3, signal.SIGTERM))
    resume(run)
    assert trained_bits(run) == trained_bits(whole.folder)


def step_on_cuda(
    family: str, backend: str, precision: str, size: int = 8, **given: Any
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model = adapted(0.1, family, torch.float32, rank=8, operations=operations(backend, CUDA))
    batch = cut(size, examples=EXAMPLES, **{"max_length": 200, **given})
    result, seen = gradient_step(model.to(CUDA), batch, precision=Precision(precision, CUDA))
    return result, {name: gradient.double() for name, gradient in seen.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_gives_one_loss_and_one_gradient(
    family: str, precision: str, bound: float, backend: str
) -> None:
    """The bounds are on norms: fp32 products in another order; bf16 ones rounded to 8 bits."""
    whole, gradients = step_on_cuda(family, backend, precision)
    for change in (
        {"size": 1},
        {"size": 3},
        {"micro_batch_tokens": 200},
        {"layout": "longest", "size": 2},
        {"layout": "max_length"},
    ):
        other, of_cut = step_on_cuda(family, backend, precision, **change)
        assert other.loss == pytest.approx(whole.loss, rel=bound)
        for name, gradient in gradients.items():
            assert (of_cut[name] - gradient).norm() <= bound * gradient.norm(), (change, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_host_memory_are_those_beside_the_parameters(
    dtype: torch.dtype, backend: str
) -> None:
    """Bit for bit, in buckets that wait for each other or would be read half written."""

    def trained(bucket: int | None) -> dict[str, torch.Tensor]:
        model = small_model("llama", dtype, vocab_size=4096, hidden_size=512)
        optimizer = build_optimizer(
            "paged_adamw",
            model.to(CUDA),
            weight_decay=0.1,
            operations=operations(backend, CUDA),
            rounding_seed=1 if dtype == torch.bfloat16 else None,
            moments=PagedMoments(CudaBoundary(CUDA, "a test", "none"), bucket) if bucket else None,
        )
        for step in range(1, 6):
            for index, parameter in enumerate(optimizer.parameters.values()):
                generator = torch.Generator().manual_seed(100 * step + index)
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(CUDA, dtype)
            optimizer.step(1e-2)
        tensors = {**optimizer.state_tensors(), **optimizer.parameters}
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    resident = trained(None)
    for bucket in (1 << 12, 1 << 18, 1 << 24):
        for name, tensor in trained(bucket).items():
            assert torch.equal(tensor, resident[name]), (bucket, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_streamed_layers_give_the_bits_of_resident_ones(policy: str, backend: str) -> None:
    """In less memory, in places that wait for each other or would be read half written."""

    def step(streams: bool) -> tuple[float, dict[str, torch.Tensor], int]:
        size: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096}
        kernels = operations(backend, CUDA)
        model = small_model(
            "llama", torch.bfloat16, num_hidden_layers=8, operations=kernels, **size
        )
        inject(model, LoraConfig(r=8, lora_dropout=0.1), seed=3)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        if streams:
            stream_layers(model, CUDA)
        else:
            model.to(CUDA)
        model.gradient_checkpointing = policy
        placed = torch.cuda.memory_allocated() - before
        batch = cut(4, examples=EXAMPLES, max_length=200)
        result, seen = gradient_step(model, batch, precision=Precision("bf16", CUDA))
        return result.loss, {name: gradient.cpu() for name, gradient in seen.items()}, placed

    torch.use_deterministic_algorithms(True)
    loss, gradients, whole = step(False)
    for _ in range(2):
        other, of_streamed, placed = step(True)
        assert other == loss
        assert all(torch.equal(of_streamed[name], gradients[name]) for name in gradients)
        assert placed < 0.4 * whole  # two of eight layers, and what is no layer's matrix


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_waits_for_the_device_only_at_its_end(backend: str) -> None:
    """What torch itself sees: up to the norm nothing may wait."""
    model = small_model("starcoder2", torch.bfloat16, operations=operations(backend, CUDA))
    inject(model, LoraConfig(r=8, lora_dropout=0.1))
    model.to(CUDA)
    optimizer = build_optimizer("adamw", model, operations=model.operations)
    batch = cut(3, examples=EXAMPLES, max_length=200)
    for number in (1, 2):  # the first may compile and load
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            one_step(
                model,
                optimizer,
                batch,
                precision=Precision("bf16", CUDA),
                draw=(42, number),
                meanwhile=lambda: torch.cuda.set_sync_debug_mode("default"),
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")


SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_ledger_is_near_what_a_step_takes(method: str, policy: str) -> None:
    """Between what its named parts come to and the whole, which allows for blocks not filled.

    The context of CUDA is outside torch's allocator and so outside of what is compared.
    """
    config = parse_config({**small_model("starcoder2").config.raw, **SIZES}, "test")
    lengths = [512] * 16
    keys = {"train.method": method, "data.max_length": 512, "lora.r": 16}
    keys |= {"train.per_device_train_batch_size": 16, "model.dropout": 0.0}
    ledger = memory_ledger(
        load_config(overrides=keys),
        config,
        precision="bf16",
        policy=policy,
        device="cuda",
        lengths=lengths,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = build(config, device="meta").to_empty(device=CUDA)
    model.to(torch.float32 if method == "full" else torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    if method == "lora":
        inject(model, LoraConfig(r=16, lora_dropout=0.05))
    model.gradient_checkpointing = policy
    optimizer = build_optimizer("adamw", model, operations=model.operations)
    examples: Any = RaggedExamples(lengths)
    for number in (1, 2):
        batch = cut(16, examples=examples, max_length=512)
        one_step(model, optimizer, batch, precision=Precision("bf16", CUDA), draw=(42, number))
    taken = torch.cuda.max_memory_allocated() - before
    named = ledger["total"] - ledger["overhead"]
    assert 0.85 * named <= taken <= ledger["total"], (taken, ledger)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_policy_changes_a_bit(method: str, kernels: str) -> None:
    """Above all `offload`, whose copies go on beside the kernels."""
    torch.use_deterministic_algorithms(True)
    on_cuda = operations(kernels, CUDA)
    if method == "lora":
        model = adapted(0.1, "llama", torch.float32, operations=on_cuda).to(CUDA)
    else:
        model = small_model("llama", operations=on_cuda).to(CUDA)
    precision = Precision("bf16", CUDA)
    batch = cut(4, examples=EXAMPLES, max_length=200)
    expected, gradients = gradient_step(model, batch, precision=precision)
    for policy in POLICIES[1:]:
        model.gradient_checkpointing = policy
        result, found = gradient_step(model, batch, precision=precision)
        assert result.loss == expected.loss
        assert all(torch.equal(found[name], gradients[name]) for name in gradients), policy
