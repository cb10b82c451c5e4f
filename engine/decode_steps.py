"""Steps of single tokens that all sample, recorded: the model's Python runs once for each number of rows.

What kernels cannot record (see `Kernels.record`) is computed like any other step (runner.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.protocol import Batch
from engine.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class _Step:
    """`run` reads these arrays, [rows] each, and returns logits [rows, vocabulary]."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    run: Callable[[], Tensor]


class DecodeSteps:
    def __init__(self, model: Decoder, pool: Tensor, tables: Tensor, max_context: int) -> None:
        self._model, self._pool, self._tables, self._max_context = model, pool, tables, max_context
        self._steps: dict[int, _Step | None] = {}

    def logits(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int32], slots: NDArray[np.int32]
    ) -> Tensor | None:
        """Writes the KV of a token a row; its logits, good until the next step. None: not recorded."""
        rows = len(tokens)
        if rows not in self._steps:
            self._steps[rows] = self._record(rows)
        if (step := self._steps[rows]) is None:
            return None
        step.tokens[:] = tokens
        step.positions[:] = positions
        step.slots[:] = slots
        return step.run()

    def _record(self, rows: int) -> _Step | None:
        tokens = np.zeros(rows, dtype=np.int64)
        positions, slots = np.zeros(rows, dtype=np.int32), np.zeros(rows, dtype=np.int32)
        batch = Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            row_starts=torch.arange(rows + 1, dtype=torch.int32),
            slots=torch.from_numpy(slots),
            tables=self._tables,
            longest_row=1,
            longest_context=self._max_context,
            scratch={},
        )
        model, pool = (
            self._model,
            self._pool,
        )  # not self: what is recorded is kept, and a dropped pool must be free at once
        run = model.kernels.record(lambda: model.forward(batch, pool))
        return None if run is None else _Step(tokens, positions, slots, run)
