"""A linear layer with a low-rank adapter beside its frozen weight.

Legend: K input features · N output features · r rank of the adapter
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dora import weight_norms
from kernels.dropout import module_id
from kernels.operands import Operands
from kernels.streamed import StreamedWeight


class LoraLinear(nn.Module):
    """y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ, in the place of an `nn.Linear`.

    `weight` and `bias` are the very parameters of the layer that it replaces, under their old
    names; `lora_A` (r, K) and `lora_B` (N, r) are added. The factors are fp32 whatever the base is
    in, so that small updates are not rounded away (fp64 beside an fp64 base).

    With `use_dora` there is `lora_magnitude_vector` (N,) too, the lengths of the adapted weight's
    rows: y = x Wᵀ + b + (ρ-1) ⊙ x̃ Wᵀ + ρ ⊙ scale · x̃ Aᵀ Bᵀ, with ρ = m / ‖W + scale · B A‖ and x̃ =
    dropout(x); see `kernels.dora`.

    Attributes:
        scale: What the low-rank product is multiplied by.
        dropout: Probability of dropping an element of the adapter's input.
        module: Key of this layer's dropout masks, made from its name.
        start: A and B as they began, on the host, where what they began as was taken out of the
            weight (`lora.pissa`).
        plain: The layer it replaced, alone in a tuple so that it is no submodule: its weights would
            appear in the state twice.
        streamed: Stands for a weight that lies in host memory while it is not multiplied by.

    Source: Hu et al. 2021 (LoRA).
    """

    streamed: StreamedWeight | None = None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        name: str,
        r: int,
        scale: float,
        dropout: float,
        use_dora: bool = False,
    ):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, dtype=dtype, device=device))
        self.lora_magnitude_vector = None
        if use_dora:
            lengths = torch.zeros(linear.out_features, dtype=dtype, device=device)
            self.lora_magnitude_vector = nn.Parameter(lengths)
        self.scale = scale
        self.dropout = dropout
        self.module = module_id(name)
        self.start: tuple[Tensor, Tensor] | None = None
        self.plain = (linear,)

    def operands(self) -> Operands:
        """Return the layer's tensors for `Operations.linears`."""
        return Operands(
            self.streamed or self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scale,
            self.dropout,
            self.module,
            self.lora_magnitude_vector,
        )

    def factors(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter adds, by name."""
        found = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector
        return found

    def row_norms(self) -> Tensor:
        """Return the lengths of the rows of W + scale · B A, (N,), outside autograd."""
        with torch.no_grad():
            return weight_norms(self.weight, self.lora_A, self.lora_B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer in a network that is not ours: (…, K) → (…, N).

        Our decoders go through `operands()`. Here dropout is torch's own, in training mode, and the
        adapter computes in its own dtype; the sum has the base product's.
        """
        y = F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        change = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
        if self.lora_magnitude_vector is not None:
            ratio = self.lora_magnitude_vector / self.row_norms()
            straight = F.linear(dropped, self.weight.to(dropped.dtype))
            change = ratio * change + (ratio - 1) * straight
        return y + change.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        (outputs, inputs), r = self.weight.shape, self.lora_A.shape[0]
        return f"in_features={inputs}, out_features={outputs}, r={r}, scale={self.scale:g}"
