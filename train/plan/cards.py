"""What a card can do at most: the figures that a prediction divides by.

What is attained of a card's peak was measured on one H200 alone: 790 TFLOP/s in a large bf16
product, 4.3 TB/s in a copy. The others are given the same share of theirs: an assumption.

Source: NVIDIA's data sheets of the H200 SXM, H100 SXM, A100 SXM, L40S, RTX A6000, A10 and L4; the
Ada and Ampere GA102 whitepapers for the GeForce cards (dense, bf16 with sums in fp32); CUDA C++
Programming Guide, "Technical Specifications per Compute Capability", for shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

_PRODUCT_SHARE = 790 / 989
_COPY_SHARE = 4.3 / 4.8


@dataclass(frozen=True)
class Card:
    """A card, by its data sheet.

    Attributes:
        name: As it is sold.
        capability: Its compute capability.
        multiprocessors: How many it has.
        memory: Bytes.
        peak_flops: Operations a second of dense bf16 products.
        peak_bytes: Bytes a second to and from its memory.
        shared_bytes: Shared memory that one program may have.
        host_bytes: Bytes a second to the host's memory, and from it, of its PCIe generation.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    peak_flops: float
    peak_bytes: float
    shared_bytes: int
    host_bytes: float

    @property
    def architecture(self) -> str:
        """Its compute capability as compilers write it: `sm_90`."""
        return "sm_{}{}".format(*self.capability)

    @property
    def flops(self) -> float:
        """Operations a second that a large product attains at best."""
        return self.peak_flops * _PRODUCT_SHARE

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a copy attains at best."""
        return self.peak_bytes * _COPY_SHARE


CARDS = {
    "h200": Card("H200 SXM", (9, 0), 132, 141 * 10**9, 989e12, 4.8e12, 227 * 1024, 64e9),
    "h100": Card("H100 SXM", (9, 0), 132, 80 * 10**9, 989e12, 3.35e12, 227 * 1024, 64e9),
    "a100": Card("A100 80GB SXM", (8, 0), 108, 80 * 10**9, 312e12, 2.039e12, 163 * 1024, 32e9),
    "a100-40gb": Card("A100 40GB SXM", (8, 0), 108, 40 * 10**9, 312e12, 1.555e12, 163 * 1024, 32e9),
    "l40s": Card("L40S", (8, 9), 142, 48 * 10**9, 362e12, 864e9, 99 * 1024, 32e9),
    "a6000": Card("RTX A6000", (8, 6), 84, 48 * 10**9, 154.8e12, 768e9, 99 * 1024, 32e9),
    "4090": Card("GeForce RTX 4090", (8, 9), 128, 24 * 10**9, 165.2e12, 1.008e12, 99 * 1024, 32e9),
    "3090": Card("GeForce RTX 3090", (8, 6), 82, 24 * 10**9, 71e12, 936e9, 99 * 1024, 32e9),
    "a10": Card("A10", (8, 6), 72, 24 * 10**9, 125e12, 600e9, 99 * 1024, 32e9),
    "l4": Card("L4", (8, 9), 58, 24 * 10**9, 121e12, 300e9, 99 * 1024, 32e9),
}
