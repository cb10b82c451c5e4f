"""Each slot's sampling parameters in the form the arithmetic takes: one array a parameter, picked from by slot.

Filled when a sequence takes its slot, so that a step looks nothing up in Python. What the parameters mean is in
sampler.py.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.plan import Sampling
from engine.sampler_rows import FLOOR, Rows, noise_keys, request_keys

_HIGHEST_INVERSE_TEMPERATURE = 1e30  # distances stay finite; a colder request draws as one at 1e-30 does


class Table:
    """Arrays [max_sequences] on the host; a filter that is off has its neutral value. They never move."""

    def __init__(self, max_sequences: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.keys = np.zeros(max_sequences, np.uint64)  # of seed and choice
        self.inverse_temperatures = np.zeros(max_sequences, np.float64)
        self.floors = np.zeros(max_sequences, np.float64)
        self.top_k = np.zeros(max_sequences, np.int64)
        self.top_p = np.zeros(max_sequences, np.float64)
        self.logprobs = np.full(max_sequences, -1, np.int64)
        self._suppressed = np.full(
            (max_sequences, 0), -1, np.int64
        )  # ids, filled up with -1; widened when needed
        self._suppressed_until = np.zeros(max_sequences, np.int64)
        self.addresses = {
            name: getattr(self, name).ctypes.data
            for name in ("keys", "inverse_temperatures", "floors", "top_k", "top_p")
        }
        self.suppresses = False  # whether any slot may: most steps need not look
        self.wants_logprobs = False  # the same

    def place(self, slot: int, sampling: Sampling) -> None:
        """From now on the slot has these parameters."""
        assert 0 <= sampling.seed < 1 << 64
        assert sampling.temperature >= 0
        cold = sampling.temperature == 0
        seed, choice = np.array([sampling.seed], np.uint64), np.array([sampling.choice], np.int64)
        self.keys[slot] = request_keys(seed, choice)[0]
        self.inverse_temperatures[slot] = (
            0 if cold else min(1 / sampling.temperature, _HIGHEST_INVERSE_TEMPERATURE)
        )
        self.floors[slot] = max(math.log(sampling.min_p), FLOOR) if sampling.min_p > 0 else FLOOR
        self.top_k[slot] = min(sampling.top_k, self._vocab_size) if sampling.top_k > 0 else self._vocab_size
        self.top_p[slot] = sampling.top_p
        self.logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._suppressed_until[slot] = sampling.suppressed_until if sampling.suppressed else 0
        self._suppress(slot, sorted(set(sampling.suppressed)))
        self.suppresses = bool(self._suppressed_until.any())
        self.wants_logprobs = bool((self.logprobs >= 0).any())

    def rows(self, slots: NDArray[Any], positions: NDArray[np.int64]) -> Rows:
        """How the rows of a step are drawn, gathered."""
        return Rows(
            noise_keys(self.keys[slots], positions),
            self.inverse_temperatures[slots],
            self.floors[slots],
            self.top_k[slots],
            self.top_p[slots],
        )

    def suppressed(
        self, slots: NDArray[Any], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, ids), pair by pair: what is masked at these positions."""
        rows = np.flatnonzero(positions < self._suppressed_until[slots])
        ids = self._suppressed[slots[rows]]
        which, column = np.nonzero(ids >= 0)
        return rows[which], ids[which, column]

    def _suppress(self, slot: int, ids: list[int]) -> None:
        assert len(ids) < self._vocab_size
        assert all(0 <= token < self._vocab_size for token in ids)
        missing = len(ids) - self._suppressed.shape[1]
        if missing > 0:
            self._suppressed = np.pad(self._suppressed, ((0, 0), (0, missing)), constant_values=-1)
        self._suppressed[slot] = -1
        self._suppressed[slot, : len(ids)] = ids
