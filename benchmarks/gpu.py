"""The training step on a GPU: the rows E1 to E8 of `benchmarks.versus_peft`, and the gate.

Each row is a process of its own that builds its model on the card, with random weights that are a
function of their names, so that all rows train the same model and nothing is written to disk. Rows
of data are real functions of ragged length (`ragged`), or such functions end to end in rows of full
length (`full`). Five steps warm up and fifteen are timed. A dry run has small shapes, on a CPU.

The gate: on two layers of the real widths, in fp32, the gradients of all that is trained are those
of transformers and PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness, peer, product
from benchmarks.fixtures import DEMO, ragged_rows
from benchmarks.peer import PeftSide
from data.tokenizer import Tokenizer
from files.strict_json import read_json_object
from kernels.dispatch import operations
from lora import LoraConfig, inject
from models import build
from models.config import DecoderConfig, parse_config
from models.configs import shipped_config
from models.layers import CausalLM
from train.plan.decide import attention_kernels

WARM_UP, TIMED = 5, 15
EXAMPLES, LENGTH = 24, 1024
PEER_BATCH = 8  # of the peer's micro-batches: with logits in fp32, 24 would not fit everywhere
# ‖ours - PEFT's‖ / ‖PEFT's‖ of fp32 gradients: sums in another order, and rotary frequencies that a
# device's power function gives some units in the last place off (each moves a gradient by 6e-6).
GATE_BOUND = 1e-4
DRY_VOCABULARY, DRY_EXAMPLES, DRY_LENGTH = 256, 4, 12


@dataclass(frozen=True)
class Work:
    """What is trained: a model of models/configs, its own dropouts off."""

    model: str
    rank: int  # of the adapters on all linear layers; 0 trains every weight, with Adafactor
    dropout: float = 0.0  # on the adapters' input
    rows: str = "ragged"  # or `full`

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
    grouped = False  # rows stay in their order

    @property
    def text(self) -> str:
        """The settings in one line."""
        parts = [self.batching, f"kernels={self.kernels}"]
        parts.append(f"micro-batches of {self.micro_batch_tokens:,} tokens")
        return ", ".join(parts + ["gradient checkpointing"] * self.checkpointing)


@dataclass(frozen=True)
class Row:
    """One line of the table: what is trained, how and by whom.

    With `most` it is how many tokens fit into a micro-batch that is measured, not the speed.
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
OURS, TRITON = OurSide(), OurSide(kernels="triton")
SEEDS = PeftSide("max_length", checkpointing=True, **_FUSED)
FLAT = PeftSide("flattened", half_adapters=True, **_FUSED)
SIDES: dict[str, OurSide | PeftSide] = {
    "ours": OURS,
    "full rows": OURS,
    "triton": TRITON,
    "seeds": SEEDS,
    "flattened": FLAT,
    "grouped": PeftSide("longest", True, half_adapters=True, **_FUSED),
    "padded": PeftSide("max_length", **_FUSED),
    "ours padded": OurSide("max_length"),
    "compiled": dataclasses.replace(FLAT, compiled=True),
    "Liger": dataclasses.replace(FLAT, liger=True),
}
LADDER = (
    *(OurSide(batching, "reference", 8 * LENGTH) for batching in ("max_length", "longest")),
    OurSide("unpadded", "reference", 8 * LENGTH),
    *(OurSide("unpadded", kernels) for kernels in ("reference", "auto", "triton")),
    OurSide("unpadded", "triton", 4 * LENGTH),
    OurSide("unpadded", "triton", checkpointing=True),
)


def rows() -> list[Row]:
    """Return all rows in the order that they are measured in."""
    starcoder, full = (Work("bigcode/starcoder2-3b", rank) for rank in (16, 0))
    dropped = dataclasses.replace(starcoder, dropout=0.05)
    qwen = Work("Qwen/Qwen2.5-Coder-1.5B-Instruct", 32, 0.1)
    llama = Work("meta-llama/Llama-2-7b-hf", 16)
    full_rows = ("full rows", "full rows, triton")

    def of(name: str, work: Work, *sides: str, most: bool = False) -> Iterator[Row]:
        for side in sides:
            of_rows = "full" if most or side in full_rows else work.rows
            of_side = dataclasses.replace(work, rows=of_rows)
            yield Row(f"{name} {side}", of_side, SIDES[side.removeprefix("full rows, ")], most)

    padded = ("grouped", "padded", "ours padded", "compiled")
    return [
        *of("E1", starcoder, "ours", "seeds", "flattened", "triton", *padded, *full_rows),
        *of("E2", dropped, "ours", "triton", "flattened"),
        *of("E3", qwen, "ours", "triton", "seeds", "flattened", "grouped", "Liger", *full_rows),
        *of("E4", llama, "ours", "triton", "seeds", "flattened", "grouped", *full_rows),
        *of("E5", full, "ours", "triton"),
        Row("E5 flattened", full, PeftSide("flattened", precision="bf16", optimizer="adafactor")),
        *of("E5", full, *full_rows),
        Row("E6 ours", starcoder, OurSide(checkpointing=True)),
        Row("E6 flattened", starcoder, dataclasses.replace(FLAT, checkpointing=True)),
        *(Row(f"E7 {i}", starcoder, side) for i, side in enumerate(LADDER, start=1)),
        *of("E8", starcoder, "ours", "triton", "flattened", most=True),
    ]


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
    """Give every parameter a value that is a function of its plain name, as on the other side."""
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
    model = peer.untrained(config.raw, work.rank, work.dropout, side, device)
    fill(model.named_parameters())
    return model


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


class Ours:
    """Lathe's model, optimizer and step."""

    def __init__(self, row: Row, dry: bool):
        assert isinstance(row.side, OurSide)
        self.side, self.device = row.side, torch.device("cpu" if dry else "cuda")
        self.precision = product.Precision("fp32" if dry else "bf16", self.device)
        self.max_length = DRY_LENGTH if dry else LENGTH
        self.model = our_model(row.work, row.side, self.device, decoder_of(row.work, dry))
        name = "adamw" if row.work.rank else "adafactor"
        of_backend = self.model.operations
        self.optimizer = product.build_optimizer(name, self.model, operations=of_backend)

    def step(self, number: int, ids: list[list[int]], tokens: int) -> product.StepResult:
        """Do one step on some documents, in micro-batches of at most `tokens` tokens."""
        batch = product.cut(ids, self.side.batching, tokens, self.max_length)
        return product.train_step(
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
            tokens //= 2  # as the loop of a run does
            result = ours.step(step, documents, tokens)
        if result.skipped is not None:
            raise harness.Fault(f"step {step} was skipped: {result.skipped}")
        if not dry:
            torch.cuda.synchronize()  # the update, which the step itself does not wait for
        of_step = (result.loss, result.grad_norm, time.perf_counter() - started, result.tokens)
        for name, value in zip(found, of_step, strict=True):
            found[name].append(value)
    named = (str(ours.device), ours.precision.name, LENGTH, 0.0, "sdpa")
    attention = attention_kernels(ours.model.config, *named)
    return {**found, "micro_batch_tokens": tokens, "attention": attention}


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
    max_length = DRY_LENGTH if dry else LENGTH
    return peer.train_with_trainer(model, ids, side, steps, batch, max_length, **more)


def most_tokens(row: Row, dry: bool) -> dict[str, Any]:
    """Return how many tokens fit into one micro-batch, in documents of full length."""
    document = token_rows(row.work, 1, dry)[0]
    device = torch.device("cpu" if dry else "cuda")
    ours = theirs = None
    if isinstance(row.side, OurSide):
        ours = Ours(row, dry)
    else:
        theirs = their_model(row.work, row.side, device, decoder_of(row.work, dry)).train()

    def fits(count: int) -> bool:
        if ours is not None:
            return ours.step(count, [document] * count, count * LENGTH).skipped is None
        attempt = functools.partial(_backward, theirs, document, count)
        return bool(product.within_memory(attempt, device))

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
    our side; PEFT's has them one by one.
    """
    device = torch.device("cpu" if dry else "cuda")
    config = decoder_of(work, dry, layers=2)
    work = dataclasses.replace(work, dropout=0.0)
    ids = [row[: DRY_LENGTH if dry else 256] for row in token_rows(work, 1, dry)[:4]]
    ids = [row[: len(row) - i] for i, row in enumerate(ids)]
    targets = sum(len(row) - 1 for row in ids)

    # Rounded as ours are, then exact again: both sides hold the same numbers.
    precision = "bf16 weights" if work.rank else "fp32"
    theirs: Any = their_model(work, PeftSide("longest", precision=precision), device, config)
    theirs.float()
    for row in ids:
        one = torch.tensor([row], device=device)
        logits = theirs(input_ids=one).logits[0, :-1].float()
        (nn.functional.cross_entropy(logits, one[0, 1:], reduction="sum") / targets).backward()
    expected = {
        plain_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None
    }
    worst: dict[str, float] = {}
    for backend in ["reference", "triton"] if device.type == "cuda" else ["reference"]:
        ours = our_model(work, OurSide(kernels=backend), device, config).float()
        (batch,) = product.cut(ids, "unpadded", None, LENGTH)
        (product.loss_sum(ours, batch, device, (42, 1)) / targets).backward()
        found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        if found.keys() != expected.keys():
            raise harness.Fault(f"other parameters are trained: {found.keys() ^ expected.keys()}")
        worst[backend] = max(
            ((gradient - expected[name]).norm() / expected[name].norm()).item()  # type: ignore
            for name, gradient in found.items()
        )
    return {"gate": worst}


def be(_: Path | None, task: str, number: int, dry: bool = False) -> dict[str, Any]:
    """Be the process of one row, of a gate, or of the card's rates."""
    if task == "rates":
        rates = harness.ceilings(harness.flusher())
        return {**rates, "device": torch.cuda.get_device_name()}
    row = rows()[number]
    if task == "gate":
        return gate(row.work, dry)
    return work_on(row, 2 if dry else WARM_UP + TIMED, dry)


def work_on(row: Row, steps: int, dry: bool) -> dict[str, Any]:
    """Train, and return what was measured."""
    if not dry:
        torch.backends.cuda.matmul.allow_tf32 = False
    if row.most:
        return most_tokens(row, dry)
    run = run_ours if isinstance(row.side, OurSide) else run_theirs
    whole, figures = harness.timed(lambda: run(row, token_rows(row.work, steps, dry), steps, dry))
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {**figures, "peak_allocated": peak, "start_up": whole - sum(figures["seconds"])}


def gate_fault(answered: dict[str, Any]) -> str | None:
    """Return what is wrong with an answer of `gate`, or None."""
    for backend, apart in answered["gate"].items():
        if not apart <= GATE_BOUND:
            return f"kernels={backend}: gradients {apart:.1e} from PEFT's, {GATE_BOUND} is allowed"
    return None


def arithmetic(work: Work, ids: list[list[int]], dry: bool) -> float:
    """Return the operations of a step of the real tokens in `ids`: additions and multiplications.

    Of N weights in the layers forward is 2 N a token; a backward pass takes 2 N for the input and,
    where they are trained, 2 N for them. Causal attention over T tokens, W query heads × head size
    wide, is 2 T² W forward (two products, half of each) and twice that backward.
    """
    model = build(decoder_of(work, dry), device="meta")
    config, frozen_or_trained = model.config, 4.0 if work.rank else 6.0
    if work.rank:
        inject(model, LoraConfig(r=work.rank, lora_alpha=2 * work.rank))
    lengths = [len(row) for row in ids]
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    total = frozen_or_trained * config.hidden_size * config.vocab_size * (tokens - len(lengths))
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() == 2:
            total += (6.0 if "lora_" in name else frozen_or_trained) * weight.numel() * tokens
    width = config.num_attention_heads * config.head_dim
    return total + 6.0 * pairs * width * config.num_hidden_layers
