"""The step's batch is the unit of meaning: any cut of it gives one loss and one gradient.

Everything is in fp64: two orders of summation of n terms differ by about n·2⁻⁵³ relative, which is
below 1e-12 for the few thousand terms here.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import DROPOUTS, FAMILIES, adapted, small_model
from steps import CPU, EXAMPLES, FP32, batching, cut, gradient_step, one_step, trained
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.cpu.rounding
import kernels.dropout
import kernels.linears
from kernels.cpu.attention import attention
from kernels.dropout import module_id
from kernels.segments import Segments
from lora import LoraConfig, inject
from lora.linear import LoraLinear
from models.layers import CausalLM, Dropout
from train.evaluate import evaluate
from train.loss import exact_sum
from train.optim.adamw import AdamW
from train.precision import LossScaler, Precision
from train.state import StepResult

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
LAYOUTS = ["unpadded", "longest", "max_length"]


def all_dropped(attention: str = "eager") -> CausalLM:
    """Return a StarCoder2 that drops 0.1 everywhere: adapters, attention, residuals, embeddings."""
    model = adapted(0.1, **DROPOUTS)
    for layer in model.model.layers:
        layer.self_attn.implementation = attention
    return model


def assert_same(one: tuple, other: tuple, tolerance: float = 1e-12) -> None:
    (result, gradients), (other_result, other_gradients) = one, other
    assert result.loss == pytest.approx(other_result.loss, rel=tolerance)
    assert result.grad_norm == pytest.approx(other_result.grad_norm, rel=tolerance)
    assert result.targets == other_result.targets
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - other_gradients[name]).norm() / gradient.norm()
        assert difference <= tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "windows"), CUTS)
def test_every_cut_and_every_padding_gives_one_loss_and_one_gradient(
    size: int, windows: int, layout: str
) -> None:
    model = adapted()
    batch = cut(size, layout)
    assert len(batch) == windows
    assert_same(gradient_step(model, cut(8)), gradient_step(model, batch))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "rope"), [*((family, None) for family in FAMILIES), ("llama", "dynamic")]
)
def test_rows_and_lengths_that_are_rounded_up_change_nothing(
    family: str, layout: str, attention: str, rope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {} if rope is None else {"rope_scaling": {"rope_type": rope, "factor": 2.0}}
    model = adapted(0.1, family, max_position_embeddings=16, **changes)
    for layer in model.model.layers:
        layer.self_attn.implementation = attention
    expected = gradient_step(model, cut(3, layout))
    monkeypatch.setattr(kernels.cpu.rounding, "rounds", lambda device, dtype: True)
    assert_same(expected, gradient_step(model, cut(3, layout)))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_rounded_blocks_is_that_without(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 200, 64, 65, 130, 200]
    upstream = torch.randn(sum(lengths), 6 * 4, dtype=torch.float64, generator=generator)

    def attend(multiple: int) -> list[torch.Tensor]:
        segments = Segments.build(lengths, device="cpu", multiple=multiple)
        inputs = []
        for seed, heads in enumerate((6, 2, 2)):
            seeded = torch.Generator().manual_seed(seed)
            x = torch.randn(segments.num_rows, heads, 4, dtype=torch.float64, generator=seeded)
            inputs.append(x.requires_grad_())
        out = attention(*inputs, segments, scale=0.5, window=window)
        real = out[: sum(lengths)]
        gradients = torch.autograd.grad(real, inputs, upstream)
        assert all(not gradient[sum(lengths) :].any() for gradient in gradients)
        return [real, *(gradient[: sum(lengths)] for gradient in gradients)]

    expected = attend(1)
    monkeypatch.setattr(kernels.cpu.rounding, "rounds", lambda device, dtype: True)
    for one, other in zip(expected, attend(128), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def dropped_step() -> tuple[StepResult, dict[str, torch.Tensor]]:
    """What one unpadded micro-batch of all examples gives with dropout everywhere."""
    return gradient_step(all_dropped(), cut(8))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "windows"), CUTS)
def test_no_draw_depends_on_the_cut_the_padding_or_recomputation(
    size: int, windows: int, layout: str, checkpointing: bool, dropped_step: tuple
) -> None:
    model = all_dropped()
    model.gradient_checkpointing = checkpointing
    batch = cut(size, layout)
    assert len(batch) == windows
    assert_same(dropped_step, gradient_step(model, batch))


@pytest.mark.parametrize(
    ("layout", "tokens", "windows"),
    [("unpadded", 50, 3), ("longest", 90, 3), ("max_length", 150, 3)],
)
def test_no_draw_depends_on_a_cut_by_tokens(
    layout: str, tokens: int, windows: int, dropped_step: tuple
) -> None:
    batch = cut(8, layout, micro_batch_tokens=tokens)
    assert len(batch) == windows
    assert_same(dropped_step, gradient_step(all_dropped(), batch))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_adapters_of_other_families_draw_by_the_same_rule(family: str) -> None:
    """Their q, k and v read one input, and so do gate and up: each draws a mask of its own."""
    model = adapted(0.1, family)
    whole = gradient_step(model, cut(8))
    model.gradient_checkpointing = True
    for size, layout in ((4, "longest"), (1, "unpadded"), (8, "max_length")):
        assert_same(whole, gradient_step(model, cut(size, layout)))


def test_no_draw_depends_on_the_order_of_the_examples(dropped_step: tuple) -> None:
    shuffled = gradient_step(all_dropped(), cut(3, indices=[5, 2, 7, 0, 6, 1, 3, 4]))
    assert_same(dropped_step, shuffled)


def test_attention_dropout_on_a_cpu_follows_the_rule_under_sdpa_too(dropped_step: tuple) -> None:
    assert_same(dropped_step, gradient_step(all_dropped("sdpa"), cut(2, "longest")))


def test_draws_belong_to_seed_and_step_and_to_nothing_that_ran_before(dropped_step: tuple) -> None:
    model = all_dropped()
    losses = {
        gradient_step(model, cut(8), draw=draw)[0].loss for draw in ((42, 8), (43, 7), (7, 42))
    }
    assert len(losses | {dropped_step[0].loss}) == 4
    again, gradients = gradient_step(model, cut(8))
    assert again.loss == dropped_step[0].loss
    assert all(torch.equal(gradients[name], dropped_step[1][name]) for name in gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_place_draws_masks_of_its_own(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a forward pass; what a layer draws, once more where it is computed again."""
    model = all_dropped() if family == "starcoder2" else adapted(0.1, family)
    model.gradient_checkpointing = checkpointing
    expected: Counter[int] = Counter()
    for name, module in model.named_modules():
        times = 2 if checkpointing and ".layers." in name else 1
        if isinstance(module, LoraLinear):
            expected[module_id(name)] += times
        elif isinstance(module, Dropout) and module.p:
            expected[module.id] += times
    layers = len(model.model.layers)
    assert len(expected) == layers * (9 if family == "starcoder2" else 7) + (family == "starcoder2")
    drawn: Counter[int] = Counter()
    keep_mask = kernels.dropout.keep_mask

    def counted(rows: torch.Tensor, module: int, width: int, p: float) -> torch.Tensor:
        drawn[module] += 1
        return keep_mask(rows, module, width, p)

    monkeypatch.setattr(kernels.dropout, "keep_mask", counted)
    monkeypatch.setattr(kernels.linears, "keep_mask", counted)
    gradient_step(model, cut(8, "longest"))
    assert drawn == expected


def test_loss_and_gradient_are_those_of_the_token_mean_of_the_whole_step() -> None:
    """Against autograd over one dense computation; not the mean of micro-batch means."""
    model = adapted()
    result, gradients = gradient_step(model, cut(2))
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for example in EXAMPLES.examples:
        ids, labels = (torch.from_numpy(a).long() for a in (example.input_ids, example.labels))
        logits = model(ids[None])[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        targets += int((labels[1:] != -100).sum())
    assert result.targets == targets
    assert result.loss == pytest.approx(total.item() / targets, rel=1e-12)
    expected = torch.autograd.grad(total / targets, list(trained(model).values()))
    for (name, gradient), exact in zip(gradients.items(), expected, strict=True):
        assert (gradient - exact).norm() <= 1e-12 * exact.norm(), name
    # Which overweights short examples.
    means = [gradient_step(model, cut(1, indices=[i]))[0].loss for i in range(8)]
    assert abs(sum(means) / 8 - result.loss) > 1e-3


def test_losses_are_added_up_in_fp64() -> None:
    """2^24 + 1 is the first whole number that fp32 does not have."""
    assert exact_sum([torch.tensor(2.0**24), torch.tensor(1.0)]) == 2.0**24 + 1


def test_clipping_sees_the_whole_gradient_once_and_after_unscaling() -> None:
    model = adapted()
    free, gradients = gradient_step(model, cut(2))
    bound = free.grad_norm / 3
    scaler = LossScaler()
    scaler.scale = 1024.0
    for loss_scaler in (None, scaler):
        clipped, small = gradient_step(model, cut(2), max_grad_norm=bound, scaler=loss_scaler)
        assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-12)
        for name, gradient in gradients.items():
            # min(1, c / (n + 1e-6)), the stack's rule
            expected = gradient * (bound / (free.grad_norm + 1e-6))
            assert (small[name] - expected).norm() <= 1e-12 * expected.norm()


def test_a_batch_without_targets_is_skipped() -> None:
    model = adapted()
    batch = cut(8)
    for micro_batch in batch:
        micro_batch.targets.fill_(-100)
        object.__setattr__(micro_batch, "target_rows", torch.empty(0, dtype=torch.int64))
    parameters = trained(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    assert one_step(model, AdamW(parameters), batch).skipped == "no targets"
    assert all(torch.equal(before[name], parameters[name]) for name in before)


class NoDoubles(TorchDispatchMode):
    """A device without fp64, as MPS: nothing but a conversion, made on the host, may give it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            given = [x.dtype for x in args if isinstance(x, torch.Tensor)]
            assert torch.float64 in given or "_to_copy" in str(func), func
        return out


def test_the_device_needs_no_fp64() -> None:
    model = small_model("starcoder2")
    inject(model, LoraConfig(r=4, lora_dropout=0.1))
    with NoDoubles():
        result, _ = adamw_step(model)
        evaluated = evaluate(model, EXAMPLES, batching(3), FP32)
    assert result.targets == evaluated.targets


class Waits(TorchDispatchMode):
    """Writes down what a host would have to wait for a device for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_the_device_when_its_gradient_is_there_and_for_nothing_else(
    family: str, checkpointing: bool
) -> None:
    model = small_model(family)
    inject(model, LoraConfig(r=4, lora_dropout=0.1))
    model.gradient_checkpointing = checkpointing
    at: list[int] = []
    gradient_step(model, cut(2))  # what a CPU's attention lays out for these lengths is kept
    with Waits() as waits:
        look = lambda: at.append(len(waits.seen))  # noqa: E731
        result = one_step(model, AdamW(trained(model)), cut(2), meanwhile=look)
    assert len(cut(2)) == 4
    assert result.skipped is None
    assert waits.seen == ["_local_scalar_dense"] * 2  # the norm, then the loss
    assert at == [0]


def adamw_step(model: CausalLM, scaler: LossScaler | None = None) -> tuple[StepResult, AdamW]:
    optimizer = AdamW(trained(model))
    return one_step(model, optimizer, cut(4), scaler=scaler), optimizer


def test_an_overflow_halves_the_scale_and_redoes_the_step() -> None:
    """At first the norm's square overflows fp64; the step is done all the same, its draws too."""
    plain, scaled = adapted(0.1), adapted(0.1)
    expected, _ = adamw_step(plain)
    scaler = LossScaler()
    scaler.scale = 2.0**530
    result, optimizer = adamw_step(scaled, scaler)
    assert result.skipped is None
    assert optimizer.steps == 1
    assert scaler.scale < 2.0**530
    assert scaler.good_steps == 1
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(scaled: bool) -> None:
    model = adapted()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    scaler = LossScaler() if scaled else None
    result, optimizer = adamw_step(model, scaler)
    assert result.skipped == "non-finite"
    # Of no use to the scale either: at 0.5 the next 2000 fp16 steps would underflow.
    assert scaler is None or scaler.state() == LossScaler().state()
    assert optimizer.steps == 0
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_the_head_s_own_gradient_is_under_the_scaler_too() -> None:
    """Full fine-tuning in fp16: the head's gradient overflows at a scale of 65536, fits at less."""
    model = small_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(12_000.0)
        model.lm_head.weight.div_(12_000.0)
    exact = small_model("llama")
    exact.load_state_dict(model.state_dict())
    gradients = {}
    for name, decoder in (("fp16", model), ("fp32", exact)):
        scaler = LossScaler() if name == "fp16" else None
        precision = Precision(name, CPU)
        result, seen = gradient_step(decoder, cut(8), precision=precision, scaler=scaler)
        assert result.skipped is None, name
        assert scaler is None or scaler.scale < LossScaler.initial_scale
        gradients[name] = seen["lm_head.weight"]
    difference = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert difference < 0.01  # fp16 rounds each of a few products to 11 bits
