"""What the sampler's table and its arithmetic (sampler_cpu.py, sampler_torch.py) exchange; the noise.

The noise is SplitMix64's finaliser (Steele, Lea and Flood, 2014), a 64-bit mixer that passes BigCrush
when fed a counter, applied to seed, choice, position and token id in turn. A change here changes every
seeded answer.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MASS_BITS = 40
"""A token's mass: its probability relative to the likeliest, exp(distance), as an integer multiple of 2**-40.

Integer sums do not depend on their order: so top-p and the softmax's denominator have the same bits alone and
in a batch. 2**22 tokens fit in an int64; a sum is off by at most 2**-41 a token.
"""

FLOOR = -MASS_BITS * math.log(2)
"""Distances (scaled logit less the largest one) below this have no mass and are never drawn."""

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Rows:
    """How each row of a step is drawn: arrays [S] on the host; a filter that is off has its neutral value."""

    keys: NDArray[np.uint64]  # the noise of token id i is mix(key + (i + 1) * GOLDEN)
    inverse_temperatures: NDArray[np.float64]  # 0: greedy
    floors: NDArray[np.float64]  # least distance kept: log(min_p), at least FLOOR
    top_k: NDArray[np.int64]  # neutral: the vocabulary's size
    top_p: NDArray[np.float64]  # neutral: 1


@dataclass(frozen=True, slots=True)
class Summary:
    """What log-probabilities need of A rows, on the sampler's device. Logits are raw, without masks."""

    peaks: Tensor  # fp32 [A]: the largest logit
    masses: Tensor  # int64 [A]: Σ round(exp(logit - peak) * 2**MASS_BITS)
    chosen: Tensor  # fp32 [A]: the drawn token's logit
    ids: Tensor  # int64 [A, K]: the likeliest tokens, equal ones by id
    values: Tensor  # fp32 [A, K]: their logits

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.peaks, self.masses, self.chosen, self.ids, self.values


def request_keys(seeds: NDArray[np.uint64], choices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What a choice's draws at all positions share: [n] each -> [n]."""
    return _mix(_mix(seeds + np.uint64(GOLDEN)) + _stride(choices))


def noise_keys(requests: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A row's share of the noise, from its request's key: [S] each -> [S]."""
    return _mix(requests + _stride(positions))


def _stride(counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (counts.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))
