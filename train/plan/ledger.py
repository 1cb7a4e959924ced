"""What a run costs, estimated before any weight is loaded: parameters, memory, disk, work.

Parameters are counted, exactly, on a model that has no storage: the very modules that the run would
build from config.json. Memory is a ledger of documented formulas by category. torch is imported
inside the one function that counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError
from train.config.schema import LoraSettings, RunConfig
from train.inputs.adapters import lora_config
from train.inputs.known import Unknown
from train.plan.decide import decide_attention, decide_micro_batch_tokens
from train.plan.sharing import gathered_bytes
from train.plan.steps import RunPlan, effective_batch_size, rank_shares

if TYPE_CHECKING:
    from models.config import DecoderConfig


@dataclass(frozen=True)
class ModelSizes:
    """What an architecture and its adapters measure, in numbers of parameters or of floats a token.

    Attributes:
        base: Parameters of the base model.
        total: Base and adapters.
        trainable: Those that are trained.
        trained_state: Floats of AdamW's two moments.
        factored_state: Floats of Adafactor's row and column statistics.
        matmul: Weights of all linear layers and of the head (tied or not), that each token meets.
        saved_linears: Sum of the input widths of the linear layers that keep their input for a
            gradient of their own (adapted, or trained).
        adapter_ranks: Sum of the adapters' ranks.
        layer: Base parameters of a decoder layer, the largest.
        outside_layers: Base parameters outside them: embedding, norm, head.
        base_shapes: Shapes of all base parameters.
    """

    base: int
    total: int
    trainable: int
    trained_state: int
    factored_state: int
    matmul: int
    saved_linears: int
    adapter_ranks: int
    layer: int
    outside_layers: int
    base_shapes: tuple[tuple[int, ...], ...]

    def share(self, ranks: int) -> ModelSizes:
        """Return what a rank has where `ranks` share the base: rows, rounded up; whole adapters."""
        rows = [(-(-shape[0] // ranks), *shape[1:]) for shape in self.base_shapes]
        base = sum(map(math.prod, rows))
        if self.total > self.base:
            return dataclasses.replace(self, base=base, total=base + self.total - self.base)
        return dataclasses.replace(
            self,
            base=base,
            total=base,
            trainable=base,
            trained_state=2 * base,
            factored_state=sum(map(_factored, rows)),
        )

    @property
    def trainable_percent(self) -> float:
        """Trainable share of base and adapters together, in percent: what PEFT prints."""
        return 100 * self.trainable / self.total

    @property
    def trainable_percent_of_base(self) -> float:
        """Trainable share of the base model, in percent."""
        return 100 * self.trainable / self.base


@functools.lru_cache(maxsize=32)
def model_sizes(decoder: DecoderConfig, method: str, lora: LoraSettings) -> ModelSizes:
    """Count parameters on a model without storage: the very modules that a run would build.

    Args:
        decoder: The architecture.
        method: `lora` or `full`.
        lora: The adapters, where the method is `lora`.

    Raises:
        UserError: `lora.target_modules` matches nothing.
    """
    from torch import nn

    from lora import count_parameters, inject, lora_layers
    from models import build

    model = build(decoder, device="meta")
    base_shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    if method == "lora":
        inject(model, lora_config(lora))
    adapters = list(lora_layers(model).values())
    # The head is counted by its weight: where it is tied, no linear layer holds it.
    head = model.head_weight()
    linears = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not head
    ]
    adapted = [layer.weight for layer in adapters]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = count_parameters(model)
    return ModelSizes(
        base=count.base,
        total=count.total,
        trainable=count.trainable,
        trained_state=2 * count.trainable,
        factored_state=sum(_factored(tuple(parameter.shape)) for parameter in trainable),
        matmul=sum(weight.numel() for weight in (*linears, *adapted, head)),
        saved_linears=sum(weight.shape[1] for weight in (adapted if method == "lora" else linears)),
        adapter_ranks=sum(layer.lora_A.shape[0] for layer in adapters),
        layer=max(layers),
        outside_layers=count.base - sum(layers),
        base_shapes=base_shapes,
    )


def _factored(shape: tuple[int, ...]) -> int:
    """Return Adafactor's floats for a parameter: rows and columns, or one each for a vector."""
    if len(shape) < 2:
        return math.prod(shape)
    leading = math.prod(shape[:-2])
    return leading * (shape[-2] + shape[-1])


def is_hub_id(path: str) -> bool:
    """Return whether `model.path` reads as a hub id (owner/name), with no such folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def find_decoder_config(config: RunConfig) -> DecoderConfig | Unknown:
    """Return the architecture of `model.path`, or why it is not known.

    The seeds' models are known without a network; otherwise config.json is read from the folder or
    fetched from the hub.

    Raises:
        UserError: A folder that is missing, or a config.json that is not understood.
    """
    from files.hub import resolve_config
    from files.strict_json import read_json_object
    from models.config import parse_config, read_config
    from models.configs import shipped_config

    path = config.model.path
    if path is None:
        return Unknown("model.path is not set")
    on_hub = is_hub_id(path)
    shipped = shipped_config(path) if on_hub and config.model.revision is None else None
    if shipped is not None:
        return parse_config(read_json_object(shipped), str(shipped))
    try:
        folder = resolve_config(path, config.model.revision)
    except UserError as error:
        if on_hub:
            return Unknown(str(error))
        raise
    return read_config(folder)


MEMORY_CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "gathered",
    "activations",
    "loss",
    "overhead",
)
# Allowances on CUDA: what its context takes, what cuBLAS works in (torch's default on Hopper; less
# elsewhere), and the share of a step's tensors that the allocator cannot fill its blocks with.
_CUDA_CONTEXT = 600 * 2**20
_CUBLAS_WORKSPACE = 32 * 2**20
_UNFILLED = 0.05
_WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
_SAVED_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def memory_ledger(
    config: RunConfig,
    decoder: DecoderConfig,
    sizes: ModelSizes | None = None,
    *,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    device: str | None = None,
    lengths: Sequence[int] | None = None,
    world_size: int = 1,
    sharding: str | None = None,
) -> dict[str, int]:
    """Estimate the bytes that a step holds at its peak, by category.

    c is the width of `precision` in bytes, w that of stored base weights (`model.dtype`, else c;
    4 where every weight is trained), M the tokens of the largest micro-batch, rounded up where the
    step rounds them (`kernels.cpu.rounding`).

    - weights: base × w; where w ≠ c also c for each weight of a linear layer, because autocast
      keeps its lowered copy until the backward pass.
    - adapters, gradients: 4 bytes a parameter (fp32 masters, fp32 gradients).
    - optimizer: AdamW 8 bytes a trained parameter; Adafactor 4 × (rows + columns) of a matrix.
    - Where ranks share the weights (`sharding="shard"`), those are a rank's: its rows, rounded up
      (adapters stay whole, Adafactor's statistics of columns too); gathered is what it holds of
      the others' at a time (`train.plan.sharing.gathered_bytes`).
    - activations: M × the bytes that one token leaves behind in each layer (`_saved_per_token`);
      with checkpointing M × the input of each layer and one layer in full; the final norm (with
      adapters in the place of the first one); and c for each parameter of an adapter, lowered.
    - loss: a chunk's logits in fp32 and their gradient in c, the gradient of the hidden states,
      and where the head is trained its gradient in fp32.
    - overhead, on CUDA and where no device is known: gradients that a layer's backward pass holds
      at a time (two of its widest tensors and two of M × hidden), context and workspace, and 5 % of
      activations and loss for blocks that are not filled. Allowances: no GPU has checked them yet
      (`tests/train/test_on_cuda.py` does).

    Args:
        config: What is asked.
        decoder: The architecture.
        sizes: `model_sizes` of the two, counted here where not given.
        precision: `bf16`, `fp16` or `fp32`.
        gradient_checkpointing: Whether each layer is recomputed.
        device: Type of the device, which decides how attention runs; None where it is not known.
        lengths: Tokens of the training examples; without them each is `data.max_length` long.
        world_size: Ranks that share a step.
        sharding: How they have the model: `replicate` or `shard`; None where there is one.
    """
    from kernels.cpu.rounding import document_multiple, row_multiple
    from kernels.loss import chunk_rows_of
    from train.precision import COMPUTE_DTYPES

    sizes = sizes or model_sizes(decoder, config.train.method, config.lora)
    full = config.train.method == "full"
    compute, stored = widths(config, precision)
    shared = sharding == "shard"
    own = sizes.share(world_size) if shared else sizes
    tokens, longest = micro_batch_tokens(config, lengths, world_size)
    dtype = COMPUTE_DTYPES[precision]
    if device is not None:
        tokens += -tokens % row_multiple(tokens, device, dtype)
        longest += -longest % document_multiple(device, dtype)
    # Layers that are shared and trained are gathered in what they compute with.
    copied = stored != compute and not (shared and full)
    weights = own.base * stored + (sizes.matmul * compute if copied else 0)
    adapters = 4 * (sizes.total - sizes.base)
    state = own.factored_state if config.optimizer.name == "adafactor" else own.trained_state
    layer = _saved_per_token(config, decoder, sizes, compute, stored, device, longest)
    layers = decoder.num_hidden_layers
    lowered = 0 if compute == 4 else compute * (sizes.total - sizes.base)
    if gradient_checkpointing:
        saved = layers * decoder.hidden_size * max(stored, compute) + layer
        lowered /= layers
    else:
        saved = layers * layer
    # The final norm is one more; over frozen embeddings the first one keeps nothing, unless the
    # linear layers behind it do, in the place of what it gives.
    if full or gradient_checkpointing or _makes_inputs_again(config, device):
        saved += _saved_by_norm(decoder, stored)
    head_gradient = 4 * decoder.vocab_size * decoder.hidden_size if full else 0
    # A plan without a device may be one for a GPU.
    chunk_rows = chunk_rows_of(decoder.vocab_size, dtype, device or "cuda")
    logits = min(chunk_rows, tokens) * decoder.vocab_size * (4 + compute)
    ledger = {
        "weights": weights,
        "adapters": adapters,
        "gradients": 4 * own.trainable,
        "optimizer": 4 * state,
        "gathered": gathered_bytes(config, decoder, sizes, (compute, stored)) if shared else 0,
        "activations": round(tokens * saved + lowered),
        "loss": logits + head_gradient + tokens * decoder.hidden_size * compute,
        "overhead": 0,
    }
    if device in (None, "cuda"):
        working = 2 * tokens * (decoder.intermediate_size + decoder.hidden_size) * compute
        unfilled = round(_UNFILLED * (ledger["activations"] + ledger["loss"]))
        ledger["overhead"] = working + unfilled + _CUDA_CONTEXT + _CUBLAS_WORKSPACE
    return {**ledger, "total": sum(ledger.values())}


def widths(config: RunConfig, precision: str) -> tuple[int, int]:
    """Return the bytes of a number that is computed with, and of a stored base weight."""
    full = config.train.method == "full"
    return _WIDTHS[precision], 4 if full else _WIDTHS[config.model.dtype or precision]


def micro_batch_tokens(
    config: RunConfig, lengths: Sequence[int] | None, world_size: int = 1
) -> tuple[int, int]:
    """Return (rows of the largest micro-batch, rows of the longest example).

    Cut by tokens (`train.micro_batch_tokens`), it holds as many rows as that, or one longer
    example, and never more than a step does.
    """
    share = rank_shares(effective_batch_size(config, world_size), world_size)[0]
    budget = decide_micro_batch_tokens(config)
    count = share if budget is not None else min(config.train.per_device_train_batch_size, share)
    longest = config.data.max_length
    tokens = count * longest
    if lengths is not None and len(lengths) and config.data.batching != "max_length":
        largest = sorted((int(length) for length in lengths), reverse=True)[:count]
        longest = largest[0]
        tokens = sum(largest) if config.data.batching == "unpadded" else len(largest) * longest
    if budget is not None:
        tokens = max(min(tokens, budget), longest)
    return tokens, longest


def _saved_per_token(
    config: RunConfig,
    decoder: DecoderConfig,
    sizes: ModelSizes,
    compute: int,
    stored: int,
    device: str | None,
    longest: int,
) -> float:
    """Return the bytes that one token leaves in one layer for the backward pass.

    - two norms (`_saved_by_norm`);
    - attention: rotated q, k, v (what it gives is the input of a linear layer); in blocks the
      weights of the keys that a query's block can see; written out, those of all keys of the
      longest document, in fp32 and in c, and under dropout a mask and the dropped copy;
    - what the family's own layers keep (`Family.saved_values`), such as an activation's inputs;
    - inputs of linear layers that need them for a gradient of their own, each of the four once;
      with adapters on a GPU attention's output alone: the others are made again;
    - one byte an element for the masks of residual dropout, where Triton does not draw them again,
      and, on a CPU, of the adapters' inputs; and the adapters' low-rank outputs.
    """
    from models.families import FAMILIES

    family = FAMILIES[decoder.model_type]
    layers = decoder.num_hidden_layers
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    query = decoder.num_attention_heads * decoder.head_dim
    key = decoder.num_key_value_heads * decoder.head_dim
    model_dropout = config.model.dropout
    residual = decoder.residual_dropout if model_dropout is None else model_dropout
    dropped = decoder.attention_dropout if model_dropout is None else model_dropout

    norms = 2 * _saved_by_norm(decoder, stored)
    attend = (query + 2 * key) * compute
    heads = decoder.num_attention_heads
    attention = decide_attention(config, decoder, device, longest)
    if attention == "blocks":
        from kernels.cpu.attention import BLOCK

        attend += heads * min(longest, (longest + BLOCK) / 2) * compute
    elif attention == "written out":
        weight = 4 + (compute if compute != 4 else 0) + (1 + compute if dropped else 0)
        attend += heads * longest * weight
    own = family.saved_values(decoder) * compute
    inputs = (2 * hidden + query + intermediate) * compute
    if _makes_inputs_again(config, device):
        inputs = query * compute
    drawn_again = device == "cuda" and config.train.kernels != "reference"
    masks = family.residual_dropouts * hidden if residual and not drawn_again else 0
    if device == "cpu" and config.train.method == "lora" and config.lora.lora_dropout:
        masks += sizes.saved_linears / layers
    ranks = sizes.adapter_ranks / layers * compute
    return norms + attend + own + inputs + masks + ranks


def _makes_inputs_again(config: RunConfig, device: str | None) -> bool:
    """Return whether linear layers keep what their input is made of (`kernels.operands.Made`)."""
    return config.train.method == "lora" and device not in (None, "cpu")


def _saved_by_norm(decoder: DecoderConfig, stored: int) -> int:
    """Return the bytes that one token leaves in a norm: those of its input."""
    return decoder.hidden_size * stored


def disk_bytes(
    config: RunConfig,
    plan: RunPlan | None,
    sizes: ModelSizes | None,
    decoder: DecoderConfig | None,
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """Return bytes of one checkpoint (trained weights in fp32, optimizer state), how many, and all.

    `best/` and `final/` hold fp32 adapters, or a model in its own dtype. Where nothing limits the
    checkpoints, `checkpoint.minutes` adds more than are counted: `one_more_each_minutes`.
    """
    if plan is None or sizes is None or decoder is None:
        names = ("checkpoint", "checkpoints_kept", "one_more_each_minutes", "best_and_final")
        return dict.fromkeys((*names, "total"))
    full = config.train.method == "full"
    checkpoint = 4 * sizes.trainable + memory["optimizer"]
    kept = len(plan.save_steps)
    if config.checkpoint.total_limit is not None:
        # The newest and the best are never deleted, whatever the limit.
        kept = min(kept, max(config.checkpoint.total_limit, 2 if plan.eval_steps else 1))
    width = _SAVED_WIDTHS.get(decoder.torch_dtype or "", 4)
    result = sizes.base * width if full else 4 * sizes.trainable
    both = result * (2 if plan.eval_steps else 1)
    unlimited = config.checkpoint.total_limit is None
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": kept,
        "one_more_each_minutes": config.checkpoint.minutes if unlimited else None,
        "best_and_final": both,
        "total": checkpoint * kept + both,
    }


_A100_FLOPS = 312e12  # dense bf16 peak of NVIDIA's A100, from its data sheet
SHARE_OF_PEAK = 0.4


def compute_estimate(
    config: RunConfig,
    plan: RunPlan | None,
    sizes: ModelSizes | None,
    lengths: Sequence[int] | None,
    checkpointing: bool,
) -> dict[str, Any]:
    """Estimate the work: 4 (LoRA) or 6 (full) operations a weight and token, 2 more recomputing."""
    if plan is None or sizes is None:
        return {"tokens": None, "tokens_are": None, "flops": None, "a100_hours": None}
    if lengths is not None and len(lengths):
        mean, tokens_are = sum(int(length) for length in lengths) / len(lengths), "counted"
    else:
        mean, tokens_are = float(config.data.max_length), "at most"
    tokens = round(mean * plan.epoch_of(plan.total_steps) * plan.num_examples)
    per_weight = (6 if config.train.method == "full" else 4) + (2 if checkpointing else 0)
    adapters = 6 * (sizes.total - sizes.base)
    flops = tokens * (per_weight * sizes.matmul + adapters)
    return {
        "tokens": tokens,
        "tokens_are": tokens_are,
        "flops": flops,
        "a100_hours": flops / (SHARE_OF_PEAK * _A100_FLOPS) / 3600,
    }
