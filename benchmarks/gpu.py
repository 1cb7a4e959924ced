"""The training step on a GPU: Lathe beside Trainer + PEFT, rows E1 to E8.

    python -m benchmarks.versus_peft --device cuda [--rows E1 E3 …] [--minutes 7]
    python -m benchmarks.training --device cuda [--minutes 7]         the ladder E7 and E8
    python -m benchmarks.versus_peft --device cuda --dry-run          on a CPU, small, nothing timed

Each row is a process of its own that builds its model on the card, with random weights that are a
function of their names, so that all rows train the same model and nothing is written to disk. Rows
of data are real functions of ragged length (`ragged`), or such functions end to end in rows of full
length (`full`). Five steps warm up and fifteen are timed.

Before a row is timed the gate of its model must be green: on two layers of the real widths, in
fp32, the gradients of all that is trained are those of transformers and PEFT. Afterwards its steps
are compared with those of Lathe's first row of the same work: same tokens at every step, and at the
five first ones a loss within `bf16_bound` and a gradient's norm within `NORM_BOUND`; how far the
losses are apart at most over all twenty is recorded. What differs is recorded as wrong, and the
exit code is 1. Records are
appended row by row; after `--minutes` nothing new begins.

Tokens are real ones, padding left out. TFLOP/s count 4 N operations a token for a frozen weight
(6 N for a trained one), causal attention and the head, whatever a side computes beyond them; the
share is of this card's bf16 product rate, measured in the same command.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

if "--dry-run" in sys.argv:  # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import nn

from benchmarks import record
from benchmarks.fixtures import (
    DEMO,
    FP32_BOUND,
    ChildError,
    answer,
    child,
    operations_of_step,
    ragged_rows,
)
from benchmarks.peer import PeftSide, train_with_trainer
from data.batch import Batching, micro_batches
from data.examples import Example
from data.tokenizer import Tokenizer
from files.strict_json import read_json_object
from kernels.dispatch import operations
from lora import LoraConfig, inject
from models import build
from models.config import DecoderConfig, parse_config
from models.configs import shipped_config
from models.layers import CausalLM
from train.loss import loss_sum
from train.memory import within_memory
from train.optim import build_optimizer
from train.precision import Precision
from train.step import StepResult, train_step

WARM_UP, TIMED = 5, 15
EXAMPLES, LENGTH = 24, 1024
PEER_BATCH = 8  # of the peer's micro-batches: with logits in fp32, 24 would not fit everywhere
# ‖ours - PEFT's‖ / ‖PEFT's‖ of fp32 gradients: sums in another order, and rotary frequencies that a
# device's power function gives some units in the last place off (each moves a gradient by 6e-6).
GATE_BOUND = 1e-4
_RATES = ("copy_gb_s", "gemm_tflops", "device")
ROW_SECONDS = 150  # so that a command of 7 minutes ends within ten
DRY_VOCABULARY, DRY_EXAMPLES, DRY_LENGTH = 256, 4, 12
# Relative, of a gradient's norm in bf16: products rounded to 8 bits, some 12 in a layer, as
# independent ones over 32 layers √384 · 2⁻⁹; a norm is of millions of them, and far inside.
NORM_BOUND = 384**0.5 * 2**-9


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        model: Name on the hub; its architecture is one of models/configs.
        rank: Of the adapters on all linear layers; 0 trains every weight, with Adafactor.
        dropout: On the adapters' input; the model's own dropouts are off.
        rows: `ragged` or `full`.
    """

    model: str
    rank: int
    dropout: float = 0.0
    rows: str = "ragged"

    @property
    def text(self) -> str:
        """The work in words."""
        how = f"LoRA r = {self.rank}" if self.rank else "full, Adafactor"
        name, size = self.model.split("/")[1], f"{EXAMPLES} × {LENGTH} {self.rows}"
        return f"{name}, {how}, p = {self.dropout}, {size}"


@dataclass(frozen=True)
class OurSide:
    """How Lathe trains: as the configuration keys of these names say."""

    batching: str = "unpadded"
    kernels: str = "auto"
    micro_batch_tokens: int = EXAMPLES * LENGTH
    checkpointing: bool = False

    @property
    def text(self) -> str:
        """The settings in one line."""
        parts = [self.batching, f"kernels={self.kernels}"]
        parts.append(f"micro-batches of {self.micro_batch_tokens:,} tokens")
        return ", ".join(parts + ["gradient checkpointing"] * self.checkpointing)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: E1 to E8 and a letter.
        work: What is trained.
        side: How, and by whom.
        most: Measure how many tokens fit into a micro-batch, not the speed.
    """

    name: str
    work: Work
    side: OurSide | PeftSide
    most: bool = False

    @property
    def who(self) -> str:
        """Who trains."""
        return "lathe" if isinstance(self.side, OurSide) else "Trainer + PEFT"


_FUSED: dict[str, Any] = {"precision": "bf16 weights", "optimizer": "adamw_torch_fused"}
SEEDS = PeftSide("max_length", checkpointing=True, **_FUSED)
FLAT = PeftSide("flattened", half_adapters=True, **_FUSED)


def rows() -> list[Row]:
    """Return all rows in the order that they are measured in."""
    starcoder = Work("bigcode/starcoder2-3b", 16)
    dropped = Work("bigcode/starcoder2-3b", 16, 0.05)
    qwen = Work("Qwen/Qwen2.5-Coder-1.5B-Instruct", 32, 0.1)
    llama = Work("meta-llama/Llama-2-7b-hf", 16)
    full = Work("bigcode/starcoder2-3b", 0)
    whole = dataclasses.replace(starcoder, rows="full")
    ours, triton = OurSide(), OurSide(kernels="triton")
    trained = PeftSide("flattened", precision="bf16", optimizer="adafactor")
    found = [
        Row("E1 ours", starcoder, ours),
        Row("E1 seeds", starcoder, SEEDS),
        Row("E1 flattened", starcoder, FLAT),
        Row("E1 triton", starcoder, triton),
        Row("E1 grouped", starcoder, PeftSide("longest", True, half_adapters=True, **_FUSED)),
        Row("E1 padded", starcoder, PeftSide("max_length", **_FUSED)),
        Row("E1 ours padded", starcoder, OurSide("max_length")),
        Row("E1 compiled", starcoder, dataclasses.replace(FLAT, compiled=True)),
        Row("E1 full rows", whole, ours),
        Row("E1 full rows, triton", whole, triton),
        Row("E2 ours", dropped, ours),
        Row("E2 triton", dropped, triton),
        Row("E2 flattened", dropped, FLAT),
        Row("E3 ours", qwen, ours),
        Row("E3 triton", qwen, triton),
        Row("E3 seeds", qwen, SEEDS),
        Row("E3 flattened", qwen, FLAT),
        Row("E3 grouped", qwen, PeftSide("longest", True, half_adapters=True, **_FUSED)),
        Row("E3 Liger", qwen, dataclasses.replace(FLAT, liger=True)),
        Row("E3 full rows", dataclasses.replace(qwen, rows="full"), ours),
        Row("E3 full rows, triton", dataclasses.replace(qwen, rows="full"), triton),
        Row("E4 ours", llama, ours),
        Row("E4 triton", llama, triton),
        Row("E4 seeds", llama, SEEDS),
        Row("E4 flattened", llama, FLAT),
        Row("E4 grouped", llama, PeftSide("longest", True, half_adapters=True, **_FUSED)),
        Row("E4 full rows", dataclasses.replace(llama, rows="full"), ours),
        Row("E4 full rows, triton", dataclasses.replace(llama, rows="full"), triton),
        Row("E5 ours", full, ours),
        Row("E5 triton", full, triton),
        Row("E5 flattened", full, trained),
        Row("E5 full rows", dataclasses.replace(full, rows="full"), ours),
        Row("E5 full rows, triton", dataclasses.replace(full, rows="full"), triton),
        Row("E6 ours", starcoder, OurSide(checkpointing=True)),
        Row("E6 flattened", starcoder, dataclasses.replace(FLAT, checkpointing=True)),
    ]
    ladder = [
        OurSide("max_length", "reference", 8 * LENGTH),
        OurSide("longest", "reference", 8 * LENGTH),
        OurSide("unpadded", "reference", 8 * LENGTH),
        OurSide("unpadded", "reference"),
        OurSide("unpadded", "auto"),
        OurSide("unpadded", "triton"),
        OurSide("unpadded", "triton", 4 * LENGTH),
        OurSide("unpadded", "triton", checkpointing=True),
    ]
    found += [Row(f"E7 {i}", starcoder, side) for i, side in enumerate(ladder, start=1)]
    found += [
        Row("E8 ours", whole, ours, most=True),
        Row("E8 triton", whole, triton, most=True),
        Row("E8 flattened", whole, FLAT, most=True),
    ]
    return found


# --- what both sides are made of -----------------------------------------------------------------


def decoder_of(work: Work, dry: bool, layers: int | None = None) -> DecoderConfig:
    """Return a model's architecture without its own dropouts, for a dry run a small one."""
    file = shipped_config(work.model)
    assert file is not None
    raw = read_json_object(file)
    changed: dict[str, Any] = {name: 0.0 for name in raw if name.endswith("_dropout")}
    if layers is not None:
        changed["num_hidden_layers"] = layers
    if dry:
        changed |= {"hidden_size": 16, "intermediate_size": 24, "vocab_size": DRY_VOCABULARY}
        changed |= {"num_attention_heads": 4, "num_hidden_layers": 2}
        shared = raw.get("num_key_value_heads", 0) < raw["num_attention_heads"]
        changed["num_key_value_heads"] = 2 if shared else 4
    return parse_config({**raw, **changed}, work.model)


def plain_name(name: str) -> str:
    """Return our name of a parameter of a model that PEFT has wrapped."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.removesuffix(".default.weight")


def fill(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give every parameter a value that is a function of its name, the same on both sides.

    Names are those that `plain_name` gives.
    """
    for name, parameter in parameters:
        plain = plain_name(name)
        seed = int.from_bytes(hashlib.sha256(plain.encode()).digest()[:7], "little")
        generator = torch.Generator(parameter.device).manual_seed(seed)
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        centre = 1.0 if parameter.ndim == 1 and not plain.endswith(".bias") else 0.0
        parameter.data.copy_(drawn.mul_(0.02).add_(centre))


def our_model(work: Work, side: OurSide, device: torch.device, config: DecoderConfig) -> CausalLM:
    """Return Lathe's model, adapters injected and everything filled; fp32 where all is trained."""
    with torch.device(device):
        model = build(config, operations=operations(side.kernels, device), device="meta")
    model.to(torch.bfloat16 if work.rank and device.type == "cuda" else torch.float32)
    model.to_empty(device=device)
    if work.rank:
        inject(model, LoraConfig(r=work.rank, lora_alpha=2 * work.rank, lora_dropout=work.dropout))
    fill(model.named_parameters())
    model.gradient_checkpointing = side.checkpointing
    return model


def their_model(work: Work, side: PeftSide, device: torch.device, config: DecoderConfig) -> Any:
    """Return the same model of transformers, wrapped by PEFT."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {key: value for key, value in config.raw.items() if key != "torch_dtype"}
    theirs = AutoConfig.for_model(**source)
    theirs.use_cache = False
    half = side.precision == "bf16 weights" and device.type == "cuda"
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            theirs, dtype=torch.bfloat16 if half else torch.float32, attn_implementation="sdpa"
        )
    if work.rank:
        lora = peft.LoraConfig(
            r=work.rank,
            lora_alpha=2 * work.rank,
            lora_dropout=work.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        adapters_in_fp32 = not (side.half_adapters and device.type == "cuda")
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=adapters_in_fp32)
        if side.checkpointing:
            model.enable_input_require_grads()
    fill(model.named_parameters())
    return model


class Documents:
    """Token ids as a set of examples: every token but the first is a target."""

    def __init__(self, ids: Sequence[Sequence[int]]):
        import numpy as np

        self.ids = [np.asarray(row, dtype=np.int32) for row in ids]
        self.lengths = np.asarray([len(row) for row in ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return Example(index=index, input_ids=self.ids[index], labels=self.ids[index])


def token_rows(work: Work, steps: int, dry: bool) -> list[list[int]]:
    """Return the token ids of every example of a run, cut at `LENGTH`."""
    length, examples = (DRY_LENGTH, DRY_EXAMPLES) if dry else (LENGTH, EXAMPLES)
    count = steps * examples
    documents = [list(row) for row in _functions(40 if dry else 480)]
    if dry:
        documents = [[token % DRY_VOCABULARY for token in row] for row in documents]
    if work.rows == "full":
        flat = [token for document in documents for token in document]
        flat *= -(-count * length // len(flat))
        return [flat[i * length : (i + 1) * length] for i in range(count)]
    documents = [row[: length - i % 7] if dry else row[:length] for i, row in enumerate(documents)]
    return (documents * -(-count // len(documents)))[:count]


@functools.cache
def _functions(count: int) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.load(DEMO / "base")
    return [tuple(map(int, tokenizer.encode(text))) for text, _ in ragged_rows(count)]


# --- one row in its process ----------------------------------------------------------------------


class Ours:
    """Lathe's model, optimizer and step."""

    def __init__(self, row: Row, dry: bool):
        assert isinstance(row.side, OurSide)
        self.side, self.device = row.side, torch.device("cpu" if dry else "cuda")
        self.precision = Precision("fp32" if dry else "bf16", self.device)
        self.max_length = DRY_LENGTH if dry else LENGTH
        self.model = our_model(row.work, row.side, self.device, decoder_of(row.work, dry))
        name = "adamw" if row.work.rank else "adafactor"
        self.optimizer = build_optimizer(name, self.model, operations=self.model.operations)

    def step(self, number: int, ids: list[list[int]], tokens: int) -> StepResult:
        """Do one step on some documents, in micro-batches of at most `tokens` tokens."""
        examples: Any = Documents(ids)
        batch = micro_batches(
            examples,
            range(len(ids)),
            Batching(
                micro_batch_size=len(ids),
                micro_batch_tokens=tokens,
                layout=self.side.batching,
                max_length=self.max_length,
                pad_id=0,
            ),
        )
        return train_step(
            self.model,
            self.optimizer,
            batch,
            learning_rate=2e-4,
            max_grad_norm=1.0,
            precision=self.precision,
            scaler=None,
            draw=(42, number),
        )


def run_ours(row: Row, ids: list[list[int]], steps: int, dry: bool) -> dict[str, Any]:
    """Train with Lathe's step; return loss, seconds and tokens of each step."""
    ours = Ours(row, dry)
    tokens = ours.side.micro_batch_tokens
    each = len(ids) // steps
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, list[Any]] = {"loss": [], "norm": [], "seconds": [], "tokens": []}
    for step in range(1, steps + 1):
        started = time.perf_counter()
        documents = ids[(step - 1) * each : step * each]
        result = ours.step(step, documents, tokens)
        while result.skipped == "out of memory" and tokens > ours.max_length:
            tokens //= 2  # as the loop of a run does (train.loop.step_that_fits)
            result = ours.step(step, documents, tokens)
        if result.skipped is not None:
            raise ChildError(f"step {step} was skipped: {result.skipped}")
        if not dry:
            torch.cuda.synchronize()  # the update, which the step itself does not wait for
        found["seconds"].append(time.perf_counter() - started)
        found["loss"].append(result.loss)
        found["norm"].append(result.grad_norm)
        found["tokens"].append(result.tokens)
    return {**found, "micro_batch_tokens": tokens}


def run_theirs(row: Row, ids: list[list[int]], steps: int, dry: bool) -> dict[str, Any]:
    """Train with Trainer + PEFT; return loss, seconds and tokens of each step."""
    assert isinstance(row.side, PeftSide)
    side, device = row.side, torch.device("cpu" if dry else "cuda")
    model = their_model(row.work, side, device, decoder_of(row.work, dry))
    # Flattened rows hold no pads: all of a step's examples are fewer tokens than 8 padded ones.
    each = len(ids) // steps
    batch = 2 if dry else EXAMPLES if side.batching == "flattened" else PEER_BATCH
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    more: dict[str, Any] = {}
    if dry:
        side = dataclasses.replace(side, precision="fp32", liger=False)
        more = {"torch_compile_backend": "eager"} if side.compiled else {}
    if side.grouped:  # the steps that warm up keep their order: their losses can be compared
        first = (1 if dry else WARM_UP) * each
        ids = ids[:first] + sorted(ids[first:], key=len, reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        return train_with_trainer(
            model,
            ids,
            side,
            steps=steps,
            batch=batch,
            accumulation=each // batch,
            max_length=DRY_LENGTH if dry else LENGTH,
            folder=Path(folder),
            use_cpu=dry,
            **more,
        )


def most_tokens(row: Row, dry: bool) -> dict[str, Any]:
    """Return how many tokens fit into one micro-batch, in documents of full length."""
    document = token_rows(row.work, 1, dry)[0]
    if isinstance(row.side, OurSide):
        ours = Ours(row, dry)

        def fits(count: int) -> bool:
            return ours.step(count, [document] * count, count * LENGTH).skipped is None
    else:
        device = torch.device("cpu" if dry else "cuda")
        theirs = their_model(row.work, row.side, device, decoder_of(row.work, dry)).train()

        def fits(count: int) -> bool:
            return bool(
                within_memory(functools.partial(_backward, theirs, document, count), device)
            )

    most = 0
    for count in (1, 2) if dry else (8, 12, 16, 24, 32, 48, 64, 96, 128, 192):
        if not fits(count):
            break
        most = count * len(document)
    return {"most_tokens": most}


def _backward(model: Any, document: list[int], count: int) -> bool:
    """Do a peer's forward and backward pass over `count` copies of a document in one row."""
    one = torch.tensor(document, device=model.device)
    positions = torch.arange(len(document), device=model.device)
    ids = one.repeat(count)[None]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        loss = model(input_ids=ids, labels=ids, position_ids=positions.repeat(count)[None]).loss
    loss.backward()
    model.zero_grad()
    return True


def gate(work: Work, dry: bool) -> dict[str, Any]:
    """Return how far fp32 gradients are from PEFT's on two layers of the real widths.

    Dropout is off: the two draw theirs differently. Documents of unequal length lie end to end on
    our side and are padded on PEFT's.
    """
    device = torch.device("cpu" if dry else "cuda")
    config = decoder_of(work, dry, layers=2)
    work = dataclasses.replace(work, dropout=0.0)
    ids = [row[: DRY_LENGTH if dry else 256] for row in token_rows(work, 1, dry)[:4]]
    ids = [row[: len(row) - i] for i, row in enumerate(ids)]
    targets = sum(len(row) - 1 for row in ids)
    width = max(map(len, ids))

    # Rounded as ours are, then exact again: both sides hold the same numbers.
    precision = "bf16 weights" if work.rank else "fp32"
    theirs: Any = their_model(work, PeftSide("longest", precision=precision), device, config)
    theirs.float()
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    logits = theirs(input_ids=padded, attention_mask=mask).logits[:, :-1].float()
    labels = padded[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    (total / targets).backward()
    expected = {
        plain_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None
    }
    worst: dict[str, float] = {}
    backends = ["reference", "triton"] if device.type == "cuda" else ["reference"]
    for backend in backends:
        ours = our_model(work, OurSide(kernels=backend), device, config).float()
        examples: Any = Documents(ids)
        (batch,) = micro_batches(
            examples,
            range(len(ids)),
            Batching(micro_batch_size=len(ids), layout="unpadded", max_length=LENGTH, pad_id=0),
        )
        (loss_sum(ours, batch, device, (42, 1)) / targets).backward()
        found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        if found.keys() != expected.keys():
            raise ChildError(f"other parameters are trained: {found.keys() ^ expected.keys()}")
        worst[backend] = max(
            ((gradient - expected[name]).norm() / expected[name].norm()).item()  # type: ignore
            for name, gradient in found.items()
        )
    return {"gate": worst}


def work_on(row: Row, steps: int, dry: bool) -> dict[str, Any]:
    """Be one row: train, and return what was measured."""
    if not dry:
        torch.backends.cuda.matmul.allow_tf32 = False
    if row.most:
        return most_tokens(row, dry)
    started = time.perf_counter()
    ids = token_rows(row.work, steps, dry)
    run = run_ours if isinstance(row.side, OurSide) else run_theirs
    figures = run(row, ids, steps, dry)
    whole = time.perf_counter() - started
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {**figures, "peak_allocated": peak, "start_up": whole - sum(figures["seconds"])}


# --- the comparison ------------------------------------------------------------------------------


def arithmetic(work: Work, ids: list[list[int]], dry: bool) -> float:
    """Return the operations of a step of the real tokens in `ids`."""
    model = build(decoder_of(work, dry), device="meta")
    if work.rank:
        inject(model, LoraConfig(r=work.rank, lora_alpha=2 * work.rank))
    lengths = [len(row) for row in ids]
    targets = sum(lengths) - len(lengths)
    return sum(operations_of_step(model, lengths, targets, full=not work.rank).values())


def bf16_bound(config: DecoderConfig) -> float:
    """Return how far a step's loss may be from another side's in bf16; see `Fixture.bf16_bound`."""
    roundings = 12 * config.num_hidden_layers
    return 2 * 0.02 * config.hidden_size**0.5 * roundings**0.5 * 2**-9


def wrong(row: Row, figures: dict[str, Any], reference: dict[str, Any], dry: bool) -> str | None:
    """Return in words how a row computed something else than the reference row of its work."""
    grouped = isinstance(row.side, PeftSide) and row.side.grouped
    # Later the two drift apart as two runs of one side do: rounding decides what Adam divides by.
    compared = slice(0, 1 if dry and grouped else WARM_UP)
    of_row, of_reference = figures["tokens"], reference["tokens"]
    if of_row[compared] != of_reference[compared] or sum(of_row) != sum(of_reference):
        return f"tokens {of_row}, not {of_reference}"
    if not grouped and of_row != of_reference:
        return f"tokens {of_row}, not {of_reference}"
    other_masks = row.work.dropout > 0 and isinstance(row.side, PeftSide)
    bound = FP32_BOUND if dry else bf16_bound(decoder_of(row.work, dry))
    bounds = {"loss": (bound, 0.0), "norm": (0.0, FP32_BOUND if dry else NORM_BOUND)}
    for name, (absolute, relative) in bounds.items():
        if other_masks and name == "norm":
            continue  # it scatters with them; the gate has compared gradients without
        for step, (one, other) in enumerate(
            zip(figures[name][compared], reference[name][compared], strict=True), start=1
        ):
            allowed = (absolute + relative * other) * (4 if other_masks else 1)
            if not abs(one - other) <= allowed:
                return f"{name} {one:.4f} at step {step}, not {other:.4f} within {allowed:.1e}"
    return None


def figures_of(
    row: Row, figures: dict[str, Any], reference: dict[str, Any], operations: float
) -> dict[str, Any]:
    """Return what a timed row is recorded with."""
    seconds = figures["seconds"][WARM_UP:]
    tokens = figures["tokens"][WARM_UP:]
    fifths = quantiles(seconds, n=5)
    grouped = isinstance(row.side, PeftSide) and row.side.grouped
    compared = WARM_UP if grouped else None  # the others are in another order
    return {
        "seconds_per_step": median(seconds),
        "p20": fifths[0],
        "p80": fifths[-1],
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tflops": operations * len(seconds) / sum(seconds) / 1e12,
        "peak_bytes": figures["peak_allocated"],
        "first_step_seconds": figures["seconds"][0],
        "start_up_seconds": figures["start_up"],
        "loss_difference": max(
            abs(a - b)
            for a, b in zip(figures["loss"][:compared], reference["loss"][:compared], strict=True)
        ),
        "micro_batch_tokens": figures.get("micro_batch_tokens"),  # where memory halved it
        "steps": len(seconds),
        "warm_up": WARM_UP,
    }


class OutOfTime(Exception):
    """A row was not measured for want of time: nothing is recorded of it."""


def run(names: Sequence[str], minutes: float, module: str) -> int:
    """Measure the rows whose names begin with one of `names`; return the exit code."""
    if not torch.cuda.is_available():
        print("--device cuda needs a CUDA device; --dry-run checks every row without one")
        return 2
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # else Trainer spreads over all cards
    deadline = time.monotonic() + 60 * minutes
    answers: dict[tuple[str, str], dict[str, Any]] = {}

    def ask(task: str, number: str) -> dict[str, Any]:
        """Ask a process once; what went wrong is its answer, under `error`.

        Raises:
            OutOfTime: The command's minutes, not the process's, were too few.
        """
        if (task, number) in answers:
            return answers[task, number]
        limit = min(ROW_SECONDS, deadline - time.monotonic() + ROW_SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = ["--device", "cuda", "--worker", task, number]
                found = child(module, arguments, Path(folder), limit)
        except subprocess.TimeoutExpired:
            if limit < ROW_SECONDS:
                raise OutOfTime from None
            found = {"error": f"{task}: more than {ROW_SECONDS} s"}
        except (ChildError, ValueError, IndexError, KeyError) as error:
            text = (str(error).strip().splitlines() or ["no answer"])[-1]
            found = {"error": text[:300].replace("|", "/")}
        answers[task, number] = found
        return found

    rates = {name: value for name, value in ask("rates", "").items() if name in _RATES}
    if not rates:
        print(f"the card's rates could not be measured: {answers['rates', '']['error']}")
        return 1
    every = rows()
    faults = left = 0
    for number, row in enumerate(every):
        if row.name.split()[0] not in names:
            continue
        try:
            if time.monotonic() > deadline:
                raise OutOfTime
            found = measured(row, every, number, ask)
        except OutOfTime:
            left += 1
            continue
        faults += "error" in found
        about = {"row": row.name, "work": row.work.text, "who": row.who, "side": row.side.text}
        record.append("gpu", {**about, **rates, **found})
        print(line(row, found, rates), flush=True)
    if left:
        print(f"{left} rows left out after {minutes:g} minutes; --rows measures those missing")
    return 1 if faults else 0


def measured(
    row: Row, every: Sequence[Row], number: int, ask: Callable[[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """Return what a row is recorded with: its figures, or under `error` what is wrong."""
    gated = dataclasses.replace(row.work, dropout=0.0, rows="ragged")
    of_gate = next(i for i, other in enumerate(every) if _same_gate(other.work, gated))
    gate_answer = ask("gate", str(of_gate))
    fault = gate_answer.get("error") or _gate_fault(gate_answer)
    if fault is not None:
        return {"error": f"gate: {fault}"}
    figures = ask("row", str(number))
    if "error" in figures:
        return figures
    if row.most:
        return {"most_tokens": figures["most_tokens"]}
    first = next(
        i
        for i, other in enumerate(every)
        if other.work == row.work and isinstance(other.side, OurSide) and not other.most
    )
    reference = ask("row", str(first))
    if "error" in reference:
        return {"error": f"nothing to compare with: {every[first].name}: {reference['error']}"}
    fault = wrong(row, figures, reference, dry=False)
    if fault is not None:
        return {"error": fault}
    timed = token_rows(row.work, WARM_UP + TIMED, False)[WARM_UP * EXAMPLES :]
    return figures_of(row, figures, reference, arithmetic(row.work, timed, False) / TIMED)


def _same_gate(one: Work, other: Work) -> bool:
    return (one.model, one.rank) == (other.model, other.rank)


def _gate_fault(answered: dict[str, Any]) -> str | None:
    for backend, apart in answered["gate"].items():
        if not apart <= GATE_BOUND:
            return f"kernels={backend}: gradients {apart:.1e} from PEFT's, {GATE_BOUND} is allowed"
    return None


def line(row: Row, found: dict[str, Any], rates: dict[str, Any]) -> str:
    """Return one printed line."""
    start = f"{row.name:<24}"
    if "error" in found:
        return f"{start} {found['error']}  ({row.who}: {row.side.text})"
    if row.most:
        return f"{start} {found['most_tokens']:,} tokens fit  ({row.who}: {row.side.text})"
    share = found["tflops"] / rates["gemm_tflops"]
    return (
        f"{start} {found['tokens_per_second']:9,.0f} tok/s  {found['tflops']:6,.0f} TFLOP/s "
        f"({share:.0%})  {found['peak_bytes'] / 2**30:6.1f} GiB  first step "
        f"{found['first_step_seconds']:.1f} s  ({row.who}: {row.side.text})"
    )


def dry_run(names: Sequence[str]) -> int:
    """Compare every row's losses and every gate at small shapes; return the exit code."""
    references: dict[Work, dict[str, Any]] = {}
    gates: dict[tuple[str, int], str | None] = {}
    faults = 0
    for row in rows():
        if not any(row.name.split()[0] == name for name in names):
            continue
        try:
            if row.most:
                figures = work_on(row, 2, True)
                fault = None if figures["most_tokens"] else "no token fits"
            else:
                model = row.work.model, row.work.rank
                if model not in gates:
                    gates[model] = _gate_fault(gate(row.work, True))
                if row.work not in references:
                    reference = Row("reference", row.work, OurSide(kernels="reference"))
                    references[row.work] = work_on(reference, 2, True)
                figures = work_on(row, 2, True)
                fault = gates.get(model) or wrong(row, figures, references[row.work], dry=True)
        except Exception as error:  # whatever another library raises is the row's result
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        faults += fault is not None
        print(f"{row.name:<24} {fault or 'agrees'}  ({row.who}: {row.side.text})", flush=True)
    return 1 if faults else 0


def work(task: str, number: str) -> None:
    """Be the process of one row, of a gate, or of the card's rates."""
    if task == "rates":
        from benchmarks.kernels import FLUSHED, ceilings

        flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
        answer({**ceilings(flush), "device": torch.cuda.get_device_name()})
        return
    row = rows()[int(number)]
    answer(gate(row.work, False) if task == "gate" else work_on(row, WARM_UP + TIMED, False))


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the newest record of each row as lines of README."""
    if not records:
        return ["Nothing has been measured yet: `make bench-gpu`, on a machine with a GPU."]
    lines: list[str] = []
    device = None
    for row in sorted(records, key=lambda row: row["device"]):
        if row["device"] != device:
            device = row["device"]
            lines += [
                "",
                f"{device}: bf16 products {row['gemm_tflops']:,.0f} TFLOP/s; shares are of it.",
                "",
                "| row | work | side | real tokens/s | TFLOP/s | peak memory | first step |",
                "|---|---|---|---:|---:|---:|---:|",
            ]
        cells = [row["row"], row["work"], f"{row['who']}: {row['side']}"]
        if "error" in row:
            cells += [row["error"], "", "", ""]
        elif "most_tokens" in row:
            cells += [f"{row['most_tokens']:,} tokens fit", "", "", ""]
        else:
            share = row["tflops"] / row["gemm_tflops"]
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:,.0f} ({share:.0%})"]
            cells += [f"{row['peak_bytes'] / 2**30:.1f} GiB", f"{row['first_step_seconds']:.1f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def main(names: Sequence[str], options: Any, module: str) -> None:
    """Answer the command line of `module` behind `--device cuda`.

    Args:
        names: Rows that the command is for.
        options: `worker`, `dry_run`, `rows` and `minutes`.
        module: The module that is run, for the rows' own processes.
    """
    if options.worker:
        work(*options.worker)
        return
    chosen = [name for name in names if not options.rows or name in options.rows]
    sys.exit(dry_run(chosen) if options.dry_run else run(chosen, options.minutes, module))
