"""What an architecture measures, counted on a model that has no storage.

The very modules are built that the run would build from config.json. torch is imported inside the
one function that counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config.schema import LoraSettings
from train.inputs.adapters import lora_config, refuse_unmatched

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
        eight_bit_state: Bytes of AdamW's two moments in 8 bits.
        matmul: Weights of all linear layers and of the head (tied or not), that each token meets.
        saved_linears: Sum of the input widths of the linear layers that keep their input for a
            gradient of their own (adapted, or trained).
        adapter_ranks: Sum of the adapters' ranks.
        mlp_matmul: Of `matmul`, those of the MLPs; so `mlp_saved_linears` and `mlp_ranks`.
        layer: Base parameters of a decoder layer, the largest.
        outside_layers: Base parameters outside them: embedding, norm, head.
        base_shapes: Shapes of all base parameters.
        linear_shapes: Shapes of the weights of all linear layers but the head: what is quantised.
        whole: Base parameters of the embedding and the head that are trained beside adapters.
        trains_embedding: Whether the embedding is trained, or rows of it.
        trains_head: Whether the head is, or rows of it.
    """

    base: int
    total: int
    trainable: int
    trained_state: int
    factored_state: int
    eight_bit_state: int
    matmul: int
    saved_linears: int
    adapter_ranks: int
    mlp_matmul: int
    mlp_saved_linears: int
    mlp_ranks: int
    layer: int
    outside_layers: int
    base_shapes: tuple[tuple[int, ...], ...]
    linear_shapes: tuple[tuple[int, ...], ...]
    whole: int
    trains_embedding: bool
    trains_head: bool

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

    def quantised(self, kind: str, compute: int, device: str | None) -> tuple[int, int]:
        """Return how many numbers are quantised, and the bytes that they take.

        The largest is a tensor too while it is multiplied by, in `compute` bytes a number, and on a
        CPU a piece of it in fp32, with its codes.
        """
        from kernels.quantised import PIECE_ON_A_CPU, quantised_shapes

        parts = [
            math.prod(size) * dtype.itemsize
            for shape in self.linear_shapes
            for size, dtype in quantised_shapes(shape, kind).values()
        ]
        largest = max(map(math.prod, self.linear_shapes), default=0)
        piece = 6 * min(largest, PIECE_ON_A_CPU) if device == "cpu" else 0
        return sum(map(math.prod, self.linear_shapes)), sum(parts) + largest * compute + piece

    def streamed(self, layers: int, stored: int, compute: int) -> tuple[int, int]:
        """Return how many numbers lie in host memory, and the bytes of them on the device.

        Those are two of the `layers`, and the largest matrix once more where it is lowered from
        `stored` bytes a number to `compute`.
        """
        numbers = sum(map(math.prod, self.linear_shapes))
        largest = max(map(math.prod, self.linear_shapes), default=0)
        lowered = largest * compute if stored != compute else 0
        return numbers, 2 * -(-numbers // layers) * stored + lowered

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
        UserError: `lora.target_modules`, or a pattern of ranks or alphas, matches nothing.
    """
    from torch import nn

    from lora import count_parameters, inject, lora_layers
    from lora.linear import LoraLinear
    from lora.saved_modules import whole_weights
    from models import build

    model = build(decoder, device="meta")
    base_shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    whole: dict[str, nn.Parameter] = {}
    if method == "lora":
        asked = lora_config(lora)
        whole = whole_weights(model, asked.modules_to_save)
        names = inject(model, asked)
        if lora.init_from is None:
            refuse_unmatched(asked, names)
    named = lora_layers(model)
    adapters = list(named.values())
    in_mlps = [layer for name, layer in named.items() if ".mlp." in name]
    # The head is counted by its weight: where it is tied, no linear layer holds it.
    head = model.head_weight()
    linears = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not head
    ]
    adapted = [layer.weight for layer in adapters]
    of_mlps = [
        module.weight
        for name, module in model.named_modules()
        if ".mlp." in name and isinstance(module, nn.Linear | LoraLinear)
    ]
    keeping = [layer.weight for layer in in_mlps] if method == "lora" else of_mlps
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = count_parameters(model)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return ModelSizes(
        base=count.base,
        total=count.total,
        trainable=count.trainable,
        trained_state=2 * count.trainable,
        factored_state=sum(_factored(tuple(parameter.shape)) for parameter in trainable),
        eight_bit_state=sum(_eight_bit(p.numel(), p in tables) for p in trainable),
        matmul=sum(weight.numel() for weight in (*linears, *adapted, head)),
        saved_linears=sum(weight.shape[1] for weight in (adapted if method == "lora" else linears)),
        adapter_ranks=sum(layer.lora_A.shape[0] for layer in adapters),
        mlp_matmul=sum(weight.numel() for weight in of_mlps),
        mlp_saved_linears=sum(weight.shape[1] for weight in keeping),
        mlp_ranks=sum(layer.lora_A.shape[0] for layer in in_mlps),
        layer=max(layers),
        outside_layers=count.base - sum(layers),
        base_shapes=base_shapes,
        linear_shapes=tuple(tuple(weight.shape) for weight in (*linears, *adapted)),
        whole=sum({id(x): x.numel() for x in whole.values()}.values()),
        trains_embedding=any(p.requires_grad for p in model.model.embed_tokens.parameters()),
        trains_head=head.requires_grad,
    )


def _factored(shape: tuple[int, ...]) -> int:
    """Return Adafactor's floats for a parameter: rows and columns, or one each for a vector."""
    if len(shape) < 2:
        return math.prod(shape)
    leading = math.prod(shape[:-2])
    return leading * (shape[-2] + shape[-1])


def _eight_bit(elements: int, is_embedding: bool) -> int:
    """Return the bytes of a parameter's two moments (train/optim/eight_bit.py)."""
    from kernels.blockwise import blocks_of
    from train.optim.eight_bit import SMALLEST

    if elements < SMALLEST or is_embedding:
        return 2 * 4 * elements
    return 2 * (elements + 4 * blocks_of(elements))
