"""Rotary tables: the cosines and sines that turn queries and keys by their positions.

Legend: M token rows · d head size · f frequencies, d/2 of them (radians a position).

Frequencies are a pure function of the configuration and, for the `dynamic` type alone, of the
length of the document; they are made in fp32 on the host and kept there. No buffer hangs on the
model, whose state is the checkpoint's and nothing else.

Source: Su et al. 2021 (default), Chen et al. 2023 (linear), bloc97 and emozilla 2023 (dynamic),
Peng et al. 2023 (yarn), Meta's Llama 3.1 release (llama3); conventions of transformers 5.23.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kernels.segments import Segments, uploaded
from models.keys import DecoderConfig, RopeConfig


def rotary_tables(
    config: DecoderConfig, segments: Segments, offset: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every row's position.

    Angles are products of fp32 numbers, which autocast leaves alone; only the tables are cast.

    Args:
        config: gives the frequencies.
        segments: give positions and, for `dynamic`, the real length of each document.
        offset: tokens of the document that a key-value cache already holds.
        dtype: type of the tables, that of the hidden states.

    Returns:
        Two (M, d) tables, each of two equal halves.
    """
    limit = config.max_position_embeddings
    lengths = [max(limit, offset + length) for length in segments.lengths]
    device = segments.positions.device
    if config.rope.rope_type != "dynamic" or max(lengths) == limit:
        frequencies, size = rotary_frequencies(config, limit)
        frequencies = uploaded(frequencies, device)
    else:
        each = torch.stack([rotary_frequencies(config, length)[0] for length in lengths])
        rows = torch.tensor(segments.rows)
        rows[-1] += segments.tail
        frequencies = uploaded(each.repeat_interleave(rows, 0), device)
        size = 1.0
    angles = segments.positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos(), angles.sin()
    if size != 1:
        cos, sin = cos * size, sin * size
    return cos.to(dtype), sin.to(dtype)


@lru_cache(maxsize=1024)
def rotary_frequencies(config: DecoderConfig, length: int) -> tuple[Tensor, float]:
    """Return the d/2 frequencies, fp32, and the factor on cos and sin, for documents of `length`.

    Source: SEMANTICS §10. A `dynamic` length below `max_position_embeddings` counts as that.
    """
    rope, dim, theta = config.rope, config.head_dim, config.rope_theta
    if rope.rope_type == "dynamic":
        limit = config.max_position_embeddings
        stretch = rope.factor * max(length, limit) / limit - (rope.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(plain, rope, config.max_position_embeddings), 1.0
    if rope.rope_type == "yarn":
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        return _yarn(plain, rope, dim, theta, original), _yarn_size(rope)
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig, positions: int) -> Tensor:
    """Keep short wavelengths, stretch long ones by the factor, and blend in between."""
    original = rope.original_max_position_embeddings or positions
    turns = original * plain / (2 * math.pi)  # how often a frequency turns in the first context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(plain, rope.factor, keep.clamp(0, 1))


def _yarn(plain: Tensor, rope: RopeConfig, dim: int, theta: float, original: int) -> Tensor:
    """Keep fast dimensions, stretch slow ones by the factor, with a linear ramp in between."""

    def dimension(rotations: float) -> float:
        """Return the (fractional) index of the frequency that turns so often in the context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    return _blend(plain, rope.factor, 1 - ramp.clamp(0, 1))


def _blend(plain: Tensor, factor: float, keep: Tensor) -> Tensor:
    """Mix frequencies as they are (`keep` = 1) with those stretched by `factor` (`keep` = 0)."""
    return plain * keep + plain / factor * (1 - keep)


def _yarn_size(rope: RopeConfig) -> float:
    """Return the factor on cos and sin by which yarn sharpens attention in a longer context."""

    def size(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return size(rope.mscale) / size(rope.mscale_all_dim)
    return size(1.0)
