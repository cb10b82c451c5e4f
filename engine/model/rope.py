"""The table of rotary positions (Su et al., 2021), plain or stretched as in Llama 3.1."""

import math

import torch
from torch import Tensor

from engine.model.config import Rope


def rope_table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """Cosines and sines, fp32 [positions, 2, head_dim // 2]; computed as transformers does, to the bit."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "llama3":
        frequencies = _stretched(frequencies, rope)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def _stretched(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: waves as long as the first context are slowed by `factor`, short ones kept, others mixed."""
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / rope.factor
    share = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - share) * slowed + share * frequencies
    return torch.where(share > 1, frequencies, torch.where(share < 0, slowed, mixed))
