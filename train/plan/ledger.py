"""What a run costs, estimated before any weight is loaded: memory, disk, work.

Memory is a ledger of documented formulas by category, over what `train.plan.sizes` counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import UserError
from train.config.schema import RunConfig
from train.inputs.known import Unknown
from train.plan.activations import activations_of, makes_inputs_again, saved_by_norm
from train.plan.decide import decide_micro_batch_tokens
from train.plan.sharing import gathered_bytes
from train.plan.sizes import ModelSizes, model_sizes
from train.plan.steps import RunPlan, effective_batch_size, rank_shares

if TYPE_CHECKING:
    from models.config import DecoderConfig


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
    policy: str = "none",
    device: str | None = None,
    lengths: Sequence[int] | None = None,
    world_size: int = 1,
    sharding: str | None = None,
    paging: bool = False,
    streaming: bool = False,
) -> dict[str, int]:
    """Estimate the bytes that a step holds at its peak, by category.

    c is the width of `precision` in bytes, w that of stored base weights (`model.dtype`, else c;
    `train.masters` where every weight is trained), M the tokens of the largest micro-batch, rounded
    up where the step rounds them (`kernels.cpu.rounding`).

    - weights: base × w; where w ≠ c also c for each weight of a linear layer, because autocast
      keeps its lowered copy until the backward pass. Quantised ones have their packed bytes, and
      the largest of them is a tensor for a moment (`ModelSizes.quantised`). Of layers in host
      memory two are on the device, of which nobody keeps a copy (`ModelSizes.streamed`).
      An embedding or head that is trained beside adapters is 4 bytes a number, and the head has
      a lowered copy.
    - adapters, gradients: 4 bytes a parameter, 2 a gradient of bf16 masters; of PiSSA the start of
      the adapters too, which lies on the host.
    - optimizer: AdamW 8 bytes a trained parameter, in 8 bits about 2.03 but for embeddings and
      what is small; Adafactor 4 × (rows + columns) of a matrix. With paging two buffers, of a
      bucket's moments each, are on the device, and the 8 bytes a parameter are the host's.
    - Where ranks share the weights (`sharding="shard"`), those are a rank's: its rows, rounded up
      (adapters stay whole, Adafactor's statistics of columns too); gathered is what it holds of
      the others' at a time (`train.plan.sharing.gathered_bytes`).
    - activations: M × the bytes that one token leaves behind in each layer under the policy, and
      those of a layer or MLP that is computed again (`train.plan.activations`); the final norm
      (with adapters in the place of the first one); and c for each parameter of an adapter,
      lowered.
    - loss: a chunk's logits in fp32 and their gradient in c, the gradient of the hidden states,
      and where the head or the embedding is trained a gradient of that size in fp32.
    - overhead: gradients that a layer's backward pass holds at a time, two of M × hidden and three
      of its widest tensors, one of which is in passing (two where a kernel makes it: on CUDA and
      where no device is known). There also context and workspace, and 5 % of activations and loss
      for blocks that are not filled. Allowances: no GPU has checked those yet
      (`tests/train/test_on_cuda.py` does); a CPU's are checked by `tests/train/test_memory.py`.

    Args:
        config: What is asked.
        decoder: The architecture.
        sizes: `model_sizes` of the two, counted here where not given.
        precision: `bf16`, `fp16` or `fp32`.
        policy: What layers keep of activations, one of `models.recompute.POLICIES`.
        device: Type of the device, which decides how attention runs; None where it is not known.
        lengths: Tokens of the training examples; without them each is `data.max_length` long.
        world_size: Ranks that share a step.
        sharding: How they have the model: `replicate` or `shard`; None where there is one.
        paging: Whether AdamW's moments lie in host memory.
        streaming: Whether the matrices of the layers do.
    """
    from kernels.cpu.rounding import document_multiple, row_multiple
    from kernels.loss import chunk_rows_of
    from train.optim.paged import buffer_bytes
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
    held, on_device = 0, 0
    if config.model.quantization is not None:
        held, on_device = sizes.quantised(config.model.quantization, compute, device)
    elif streaming:
        held, on_device = sizes.streamed(decoder.num_hidden_layers, stored, compute)
    weights = (own.base - held) * stored + on_device
    if copied:
        weights += (sizes.matmul - held) * compute
    weights += (4 - stored) * sizes.whole
    if sizes.whole and sizes.trains_head and not copied and compute != 4:
        weights += compute * decoder.vocab_size * decoder.hidden_size
    adapters = 4 * (sizes.total - sizes.base)
    if device == "cpu" and _keeps_a_start(config):
        adapters *= 2
    state = buffer_bytes(own.trainable) if paging else optimizer_bytes(config, own)
    token = activations_of(config, decoder, sizes, (compute, stored), policy, device, longest)
    layers = decoder.num_hidden_layers
    lowered = 0 if compute == 4 else compute * (sizes.total - sizes.base)
    if policy in ("layers", "offload"):
        lowered /= layers
    saved = layers * token.kept + token.again + token.passing
    # The final norm is one more; over frozen embeddings the first one keeps nothing, unless the
    # linear layers behind it do, in the place of what it gives.
    if sizes.trains_embedding or policy != "none" or makes_inputs_again(config, device):
        saved += saved_by_norm(decoder, stored)
    if sizes.trains_embedding and not full and decoder.embedding_dropout:
        saved += decoder.hidden_size  # its mask; beside fp32 masters of everything it is little
    vocabulary = decoder.vocab_size * decoder.hidden_size
    all_rows = full or sizes.whole
    head_gradient = (
        4 * vocabulary if sizes.trains_head or (sizes.trains_embedding and all_rows) else 0
    )
    if sizes.trains_head and not all_rows:
        head_gradient += stored * vocabulary  # a copy with the trained rows in their places
    # A plan without a device may be one for a GPU.
    chunk_rows = chunk_rows_of(decoder.vocab_size, dtype, device or "cuda")
    logits = min(chunk_rows, tokens) * decoder.vocab_size * (4 + compute)
    ledger = {
        "weights": weights,
        "adapters": adapters,
        "gradients": _WIDTHS[config.train.masters] * own.trainable,
        "optimizer": state,
        "gathered": gathered_bytes(config, decoder, sizes, (compute, stored)) if shared else 0,
        "activations": round(tokens * saved + lowered),
        "loss": logits + head_gradient + tokens * decoder.hidden_size * compute,
    }
    wide = 2 if device in (None, "cuda") else 3
    working = tokens * (wide * decoder.intermediate_size + 2 * decoder.hidden_size) * compute
    ledger["overhead"] = working
    if device in (None, "cuda"):
        unfilled = round(_UNFILLED * (ledger["activations"] + ledger["loss"]))
        ledger["overhead"] += unfilled + _CUDA_CONTEXT + _CUBLAS_WORKSPACE
    return {**ledger, "total": sum(ledger.values())}


def optimizer_bytes(config: RunConfig, sizes: ModelSizes) -> int:
    """Return the bytes of an optimizer's state, wherever it lies."""
    of = {"adafactor": 4 * sizes.factored_state, "adamw_8bit": sizes.eight_bit_state}
    return of.get(config.optimizer.name, 4 * sizes.trained_state)


def ring_bytes(
    config: RunConfig,
    decoder: DecoderConfig,
    precision: str,
    policy: str | None,
    lengths: Sequence[int] | None = None,
    world_size: int = 1,
) -> int:
    """Return the host's bytes under `offload`: a buffer for each layer's input, (M, H)."""
    if policy != "offload":
        return 0
    compute, stored = widths(config, precision)
    tokens, _ = micro_batch_tokens(config, lengths, world_size)
    return decoder.num_hidden_layers * tokens * decoder.hidden_size * max(stored, compute)


def streamed_bytes(sizes: ModelSizes, decoder: DecoderConfig, stored: int) -> int:
    """Return the host's bytes of streamed layers, `stored` bytes a number."""
    return sizes.streamed(decoder.num_hidden_layers, stored, stored)[0] * stored


def widths(config: RunConfig, precision: str) -> tuple[int, int]:
    """Return the bytes of a number that is computed with, and of a stored base weight."""
    full = config.train.method == "full"
    stored = config.train.masters if full else config.model.dtype or precision
    return _WIDTHS[precision], _WIDTHS[stored]


def micro_batch_tokens(
    config: RunConfig, lengths: Sequence[int] | None, world_size: int = 1
) -> tuple[int, int]:
    """Return (rows of the largest micro-batch, rows of the longest example).

    Cut by tokens (`train.micro_batch_tokens`), it holds as many rows as that, or one longer
    example, and never more than a step does.
    """
    # An example has a target at least, so that a step of tokens has no more examples than tokens.
    most = config.train.effective_batch_tokens or effective_batch_size(config, world_size)
    share = rank_shares(most, world_size)[0]
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


def _keeps_a_start(config: RunConfig) -> bool:
    """Return whether adapters, and their files, hold what they began as (`lora.pissa`)."""
    return config.train.method == "lora" and config.lora.init_lora_weights == "pissa"


def disk_bytes(
    config: RunConfig,
    plan: RunPlan | None,
    sizes: ModelSizes | None,
    decoder: DecoderConfig | None,
) -> dict[str, Any]:
    """Return bytes of one checkpoint (trained masters, optimizer state), how many, and all.

    `best/` and `final/` hold fp32 adapters, or a model in its own dtype. Where nothing limits the
    checkpoints, `checkpoint.minutes` adds more than are counted: `one_more_each_minutes`.
    """
    if plan is None or sizes is None or decoder is None:
        names = ("checkpoint", "checkpoints_kept", "one_more_each_minutes", "best_and_final")
        return dict.fromkeys((*names, "total"))
    full = config.train.method == "full"
    checkpoint = _WIDTHS[config.train.masters] * sizes.trainable + optimizer_bytes(config, sizes)
    kept = len(plan.save_steps)
    if config.checkpoint.total_limit is not None:
        # The newest and the best are never deleted, whatever the limit.
        kept = min(kept, max(config.checkpoint.total_limit, 2 if plan.eval_steps else 1))
    width = _SAVED_WIDTHS.get(decoder.torch_dtype or "", 4)
    start = 4 * (sizes.total - sizes.base) if _keeps_a_start(config) else 0
    checkpoint += start
    result = sizes.base * width if full else 4 * sizes.trainable + start
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


def flops_per_token(config: RunConfig, sizes: ModelSizes, policy: str | None) -> int:
    """Return 4 (LoRA) or 6 (full) operations a weight, 2 more recomputing, and the adapters' 6.

    DoRA makes one more product with a weight, with dropout three (`kernels.dora`), and the first
    of these again where it recomputes.
    """
    per_weight = 6 if config.train.method == "full" else 4
    again = {"mlp": sizes.mlp_matmul, "layers": sizes.matmul, "offload": sizes.matmul}
    twice = 2 * again.get(policy or "none", 0)
    if config.train.method == "lora" and config.lora.use_dora:
        dropped = bool(config.lora.lora_dropout)
        per_weight += 6 if dropped else 2
        twice *= 2 if dropped else 1
    return per_weight * sizes.matmul + twice + 6 * (sizes.total - sizes.base)


def compute_estimate(
    config: RunConfig,
    plan: RunPlan | None,
    sizes: ModelSizes | None,
    lengths: Sequence[int] | None,
    policy: str | None,
) -> dict[str, Any]:
    """Estimate the work of a run, and how long one A100 would take."""
    if plan is None or sizes is None:
        return {"tokens": None, "tokens_are": None, "flops": None, "a100_hours": None}
    if lengths is not None and len(lengths):
        mean, tokens_are = sum(int(length) for length in lengths) / len(lengths), "counted"
    else:
        mean, tokens_are = float(config.data.max_length), "at most"
    tokens = round(mean * plan.epoch_of(plan.total_steps) * plan.num_examples)
    flops = tokens * flops_per_token(config, sizes, policy)
    return {
        "tokens": tokens,
        "tokens_are": tokens_are,
        "flops": flops,
        "a100_hours": flops / (SHARE_OF_PEAK * _A100_FLOPS) / 3600,
    }
