"""Every `auto` becomes a value here, for `--plan` and the run alike.

Each rule is static: a function of the configuration, the machine and the plan, never a timing. What
was decided is written to the run's folder, and a resumed run decides nothing anew. What is not
known is None: of a plan made where the run is not to be, `UNKNOWN` is the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from files.errors import UserError, did_you_mean
from train.config.schema import RunConfig
from train.plan.cards import CARDS
from train.plan.profiled import profiled_steps
from train.plan.refusals import (
    refuse_moments,
    refuse_to_complete,
    refuse_with_holes,
    refuse_with_quantization,
    refuse_with_steps_of_tokens,
    refuse_with_weights,
    wants_whole_weights,
    why_not_streamed,
)
from train.process.room import available_memory
from train.process.world import ALONE, World
from train.text import size_text

if TYPE_CHECKING:
    from models.config import DecoderConfig

PRECISIONS = ("bf16", "fp16", "fp32")
AMPERE = (8, 0)  # the first compute capability with bf16 products, and Triton's kernels
# Instruction sets that multiply bf16 natively, as `torch.cpu.get_capabilities` names them on x86-64
# and ARM64.
_NATIVE_BF16_CPU = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True)
class Machine:
    """Where a run computes.

    Attributes:
        device: `cpu`, `cuda` or `mps`; None where it is not known.
        memory: Bytes that a run may use there; None where that is not known.
        capability: Compute capability of a CUDA card that is planned for and need not be here.
        card: Its name in `train.plan.cards`, where that was given.
    """

    device: str | None
    memory: int | None
    capability: tuple[int, int] | None = None
    card: str | None = None


UNKNOWN = Machine(None, None)


def this_machine(config: RunConfig, world: World = ALONE) -> Machine:
    """Return the machine that a run would compute on, started here and now: one rank's share of it.

    Raises:
        UserError: `train.device` is not to be had here.
    """
    return _share(decide_device(config.train.device), world.local_size)


def machine_to_plan_for(config: RunConfig, ranks: int = 1) -> Machine:
    """Return the machine that a plan counts with: this one, or an unknown one.

    It is unknown where `train.device=auto` finds no more than a CPU: so a laptop plans the run of a
    GPU. `train.device=cpu` plans for the CPU, whose memory all ranks then share.

    Raises:
        UserError: `train.device` is not to be had here.
    """
    device = decide_device(config.train.device)
    if config.train.device == "auto" and device == "cpu":
        return UNKNOWN
    return _share(device, ranks)


def machine_elsewhere(config: RunConfig, gpu: str | None, memory: int | None) -> Machine:
    """Return the CUDA machine of `--gpu` and `--memory`, wherever it stands.

    Of a card that only its memory is known of, Ampere or later is assumed.

    Raises:
        UserError: No such card is known, or `train.device` names something else.
    """
    if config.train.device not in ("auto", "cuda"):
        option = "--gpu" if gpu else "--memory"
        raise UserError(
            f"{option} plans for a CUDA card, and train.device={config.train.device} is none; "
            "leave one of them out"
        )
    if gpu is None:
        return Machine("cuda", memory, AMPERE)
    name = gpu.lower().replace(" ", "-")
    card = CARDS.get(name)
    if card is None:
        raise UserError(
            f"--gpu {gpu}: is not one of {', '.join(CARDS)}{did_you_mean(gpu, CARDS)}; give the "
            "memory of any other with --memory"
        )
    return Machine("cuda", memory or card.memory, card.capability, name)


def _share(device: str, ranks: int) -> Machine:
    """Return what one of the ranks of this machine has of it: of the CPU's memory its part."""
    memory = available_memory(device)
    if memory is not None and device != "cuda":
        memory //= ranks
    return Machine(device, memory)


def decide(config: RunConfig, machine: Machine) -> RunConfig:
    """Return the configuration with every `auto` decided that needs no look at the model.

    On an unknown machine `train.precision=auto` stays. Deciding twice changes nothing.
    Recomputing is decided by the plan's ledger: `decide_recomputing`.

    Raises:
        UserError: The base would be stored in a half precision other than the one that is computed
            in, or quantised and trained, shared or compiled; or the kernels cannot run there, or
            they or what is asked of activations not with `train.compile`; or its layers cannot be
            streamed; or the steps to trace are none; or shares are not those of a list's entries.
    """
    refuse_with_holes(config)
    refuse_to_complete(config)
    refuse_with_steps_of_tokens(config)
    refuse_with_quantization(config)
    refuse_with_weights(config)
    profiled_steps(config.train.profile_steps, config.train.max_steps)  # before rows are read
    streams = config.model.stream_layers == "true"
    if streams and (because := why_not_streamed(config, machine.device)):
        raise UserError(f"model.stream_layers=true {because}")
    precision = decide_precision(config.train.precision, machine.device, machine.capability)
    stored, agreeing = config.model.dtype, (None, "fp32", precision)
    if config.train.method == "lora" and precision != "auto" and stored not in agreeing:
        # Layers compute in their weights' type where autocast leaves them alone.
        raise UserError(
            f"model.dtype={stored} with train.precision={precision}: the base would compute partly "
            f"in {stored}; use model.dtype=none (stored in {precision}), model.dtype=fp32, or "
            f"train.precision={stored}"
        )
    kernels = decide_kernels(config.train.kernels, machine.device, machine.capability)
    if config.train.compile and kernels is not None and "triton" in kernels:
        raise UserError(
            f"train.compile=true with train.kernels={config.train.kernels}, which takes Triton's "
            "kernels here: that has never been tried together; use train.compile=false or "
            "train.kernels=reference"
        )
    refuse_moments(config, precision)
    policy = config.model.gradient_checkpointing
    if config.train.compile and policy not in ("auto", *possible_policies(config, None)):
        raise UserError(
            f"train.compile=true with model.gradient_checkpointing={policy}: compiled layers are "
            "kept or computed again whole; use none or layers, or train.compile=false"
        )
    settings = dataclasses.replace(
        config.train, precision=precision, micro_batch_tokens=decide_micro_batch_tokens(config)
    )
    return dataclasses.replace(config, train=settings)


def decide_device(name: str) -> str:
    """Return the type of the device that `train.device` means: with `auto` the best that is here.

    Raises:
        UserError: A device that this machine does not have.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device, there in available.items() if there)
        raise UserError(
            f"train.device={name}: torch {torch.__version__} sees no such device here "
            f"(it sees {there}); use train.device=auto"
        )
    return name


def decide_precision(
    name: str, device: str | None, capability: tuple[int, int] | None = None
) -> str:
    """Return `bf16`, `fp16` or `fp32`: `name` itself, or the rule behind `auto`.

    It is bf16 where the device multiplies it natively (CUDA from Ampere on, a CPU with AVX512-BF16,
    AMX or an ARM equivalent), else fp32. `auto` stays where no device is known.

    Raises:
        UserError: `name` is no precision.
    """
    if name in PRECISIONS:
        return name
    if name != "auto":
        names = ["auto", *PRECISIONS]
        raise UserError(
            f"train.precision: '{name}' is not one of {', '.join(names)}{did_you_mean(name, names)}"
        )
    if device is None:
        return name
    native = capability >= AMPERE if capability else _computes_bf16_natively(device)
    return "bf16" if native else "fp32"


def _computes_bf16_natively(device: str) -> bool:
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _NATIVE_BF16_CPU)
    return False


def decide_micro_batch_tokens(config: RunConfig) -> int | None:
    """Return the rows of a micro-batch, None where `per_device_train_batch_size` cuts a step.

    `auto` is as many as the padded micro-batch of that many examples would hold.
    """
    tokens = config.train.micro_batch_tokens
    if isinstance(tokens, str):
        return config.train.per_device_train_batch_size * config.data.max_length
    return tokens


def decide_kernels(
    name: str, device: str | None, capability: tuple[int, int] | None = None
) -> str | None:
    """Return the name of the operations that `train.kernels` means, None where it is not known.

    Raises:
        UserError: `triton`, which cannot run on the device.
    """
    from kernels.dispatch import operations

    if device is None:
        return None if name == "auto" else name
    if capability is not None:
        return "triton" if name != "reference" and capability >= AMPERE else "reference"
    return operations(name, device).name


def decide_attention(
    config: RunConfig, decoder: DecoderConfig, device: str | None, longest: int
) -> str:
    """Return how attention runs: `fused`, `blocks` or `written out` (kernels/attention.py).

    Args:
        config: What is asked.
        decoder: The architecture.
        device: Type of the device; one that is not known may be a GPU.
        longest: Rows of the longest document.
    """
    from kernels.cpu.attention import BLOCKS_MAX_LENGTH

    dropout = decoder.attention_dropout if config.model.dropout is None else config.model.dropout
    if config.model.attention == "eager" or (dropout > 0 and device not in (None, "cuda")):
        return "written out"
    return "blocks" if device == "cpu" and longest <= BLOCKS_MAX_LENGTH else "fused"


def attention_kernels(
    decoder: DecoderConfig, device: str, precision: str, longest: int, dropout: float, name: str
) -> str:
    """Return the kernels that torch has for attention on a device that is here, for records.

    `longest` is the rows of the longest document, `dropout` attention's, `name` `model.attention`.
    """
    import torch

    from kernels.attention import kernel
    from kernels.segments import Segments
    from train.precision import COMPUTE_DTYPES

    windows = {decoder.window(layer) for layer in range(decoder.num_hidden_layers)}
    window = 1 if any(size is not None and size < longest for size in windows) else None
    made: dict[str, Any] = {"dtype": COMPUTE_DTYPES[precision], "requires_grad": True}
    heads = (decoder.num_attention_heads, decoder.num_key_value_heads)
    q, k = (torch.empty(64, n, decoder.head_dim, device=device, **made) for n in heads)
    rest: dict[str, Any] = {"implementation": "eager" if name == "eager" else "sdpa"}
    ragged, equal = (
        kernel(q, k, segments, window, dropout=dropout, **rest)
        for segments in (
            Segments.build(lengths, device=device, examples=(0, 1), draw=(0, 0))
            for lengths in ((33, 31), (32, 32))
        )
    )
    return ragged if ragged == equal else f"{ragged}; documents of one length: {equal}"


def possible_policies(config: RunConfig, device: str | None) -> tuple[str, ...]:
    """Return the values of `model.gradient_checkpointing` that a run can have, cheapest first.

    Host memory is other memory than the device's on CUDA alone; one that is not known may be one.
    """
    if config.train.compile:
        return ("none", "layers")
    everywhere = ("none", "norms", "mlp", "layers")
    return (*everywhere, "offload") if device in (None, "cuda") else everywhere


def decide_recomputing(
    config: RunConfig, needed: Mapping[str, int] | None, machine: Machine
) -> tuple[str | None, str]:
    """Return `model.gradient_checkpointing` and, in words, why; None where it is not known.

    `auto` is the cheapest that fits; where none does, the one that needs the least.

    Args:
        config: What is asked.
        needed: Bytes of a step under each of `possible_policies`, cheapest first; None where the
            model is not known.
        machine: Where it runs.
    """
    setting = config.model.gradient_checkpointing
    if setting != "auto":
        return setting, "as set"
    if needed is None:
        return None, "auto: the model is not known yet"
    if machine.device is None:
        return None, "auto: no device is known yet"
    if machine.memory is None:
        return "none", "auto: this system does not tell its memory"
    least = min(needed, key=needed.__getitem__)
    chosen = next((policy for policy, total in needed.items() if total <= machine.memory), least)
    there = f"{size_text(needed['none'])} needed with none, {size_text(machine.memory)} there"
    return chosen, f"auto: {there}"


def decide_paging(
    config: RunConfig, needed: int | None, saves: int, machine: Machine
) -> tuple[bool | None, str]:
    """Return whether `paged_adamw` keeps its moments in host memory and, in words, why.

    None where it is not known: it does on a CUDA card whose memory does not suffice otherwise.

    Args:
        config: What is asked.
        needed: Bytes of a step with moments beside the parameters; None where that is not known.
        saves: Bytes fewer with moments in host memory.
        machine: Where it runs.
    """
    if config.optimizer.name != "paged_adamw":
        return False, "not asked for"
    if needed is None:
        return None, "the model is not known yet"
    if machine.device is None:
        return None, "no device is known yet"
    if machine.device != "cuda" or machine.memory is None:
        return False, f"{machine.device} has no memory of its own"
    there = f"{size_text(needed)} needed without it, {size_text(machine.memory)} there"
    return saves > 0 and needed > machine.memory, there


def decide_streaming(
    config: RunConfig, needed: int | None, saves: int, machine: Machine, sharding: str | None
) -> tuple[bool | None, str]:
    """Return whether frozen layers stay in host memory and, in words, why; None if not known.

    `auto` does on a CUDA card whose memory does not suffice under the policy that needs the least,
    unless the ranks share the weights, which sends less.

    Args:
        config: What is asked.
        needed: The least bytes of a step whose layers stay on the device; None where not known.
        saves: Bytes fewer with layers in host memory.
        machine: Where it runs.
        sharding: What `decide_sharding` gave.
    """
    setting = config.model.stream_layers
    if setting != "auto":
        return setting == "true", "as set"
    if because := why_not_streamed(config, machine.device):
        return False, f"auto: not {because.partition(';')[0]}"
    if sharding == "shard":
        return False, "auto: the ranks share the weights"
    if needed is None:
        return None, "auto: the model is not known yet"
    if machine.device is None:
        return None, "auto: no device is known yet"
    if machine.memory is None:
        return False, "auto: this system does not tell its memory"
    there = f"at least {size_text(needed)} needed without it, {size_text(machine.memory)} there"
    return saves > 0 and needed > machine.memory, f"auto: {there}"


def decide_sharding(
    config: RunConfig, needed: int | None, machine: Machine, world_size: int
) -> str | None:
    """Return how ranks have the model, `replicate` or `shard`; None where there is one rank.

    Args:
        config: What is asked.
        needed: Bytes of a step on a rank that has the whole model; None where that is not known.
        machine: A rank's.
        world_size: How many ranks there are.

    Raises:
        UserError: Ranks are to share weights that the adapters want whole.
    """
    if world_size == 1:
        return None
    if whole := wants_whole_weights(config):
        if config.train.sharding == "shard":
            raise UserError(
                f"train.sharding=shard with {whole}: it reads weights whole that ranks have rows "
                "of; use train.sharding=replicate, or plain adapters"
            )
        return "replicate"
    if config.train.sharding != "auto":
        return config.train.sharding
    if config.model.quantization is not None or config.model.stream_layers == "true":
        return "replicate"
    too_large = needed is not None and machine.memory is not None and needed > machine.memory
    # Blocks of 256 moments would be cut where the ranks' rows are.
    full = config.train.method == "full" and config.optimizer.name != "adamw_8bit"
    return "shard" if full or (too_large and config.train.method == "lora") else "replicate"
